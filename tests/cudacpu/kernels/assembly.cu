// y[n,:] += sum_k <x[n,:], a[k,:]> b[k,:]      x,y: (n_tokens, C)   a,b: (r, C)
// One warp per token; A and B live in shared memory (2*r*C floats, dynamic).
template <typename T, int C>
__global__ void __launch_bounds__(256) assemble(T* __restrict__ y, const T* __restrict__ x,
        const float* __restrict__ a, const float* __restrict__ b, int n_tokens, int r)
{
    extern __shared__ float smem[];
    float* As = smem;
    float* Bs = smem + r * C;
    for (int i = threadIdx.x; i < r * C; i += blockDim.x) { As[i] = a[i]; Bs[i] = b[i]; }
    __syncthreads();

    constexpr int V = C / 32;
    const int lane = threadIdx.x & 31, warps = blockDim.x >> 5;
    for (int n = blockIdx.x * warps + (threadIdx.x >> 5); n < n_tokens; n += gridDim.x * warps) {
        const size_t row = (size_t)n * C;
        float xv[V], acc[V];
        #pragma unroll
        for (int j = 0; j < V; ++j) { xv[j] = (float)x[row + j * 32 + lane]; acc[j] = 0.f; }
        for (int k = 0; k < r; ++k) {
            float t = 0.f;
            #pragma unroll
            for (int j = 0; j < V; ++j) t = fmaf(xv[j], As[k * C + j * 32 + lane], t);
            #pragma unroll
            for (int o = 16; o > 0; o >>= 1) t += __shfl_xor_sync(0xffffffffu, t, o);
            #pragma unroll
            for (int j = 0; j < V; ++j) acc[j] = fmaf(t, Bs[k * C + j * 32 + lane], acc[j]);
        }
        #pragma unroll
        for (int j = 0; j < V; ++j) y[row + j * 32 + lane] = (T)((float)y[row + j * 32 + lane] + acc[j]);
    }
}

// Register-tiled version without shuffles: a block owns 64 tokens; phase 1 computes the 64 x r
// coefficient tile T = X A^T in shared memory, phase 2 adds T B.  A,B streamed through shared memory.
template <int C, int R>
__global__ void __launch_bounds__(256) assemble_tiled(float* __restrict__ y, const float* __restrict__ x,
        const float* __restrict__ a, const float* __restrict__ b, int n_tokens)
{
    constexpr int TOK = 64, KC = 32;
    __shared__ float xs[KC][TOK + 4];
    __shared__ float as[KC][R + 4];
    __shared__ float ts[R][TOK + 4];
    const int t = threadIdx.x, n0 = blockIdx.x * TOK;
    // phase 1: each thread owns 4 tokens x R/16 coefficients
    constexpr int RR = R / 16;
    const int tok = (t & 15) * 4, rr = (t >> 4) * RR;
    float acc[4][RR];
    for (int i = 0; i < 4; ++i) for (int k = 0; k < RR; ++k) acc[i][k] = 0.f;
    for (int c0 = 0; c0 < C; c0 += KC) {
        for (int i = t; i < TOK * KC; i += 256) {
            int n = i / KC, c = i % KC;
            xs[c][n] = (n0 + n < n_tokens) ? x[(size_t)(n0 + n) * C + c0 + c] : 0.f;
        }
        for (int i = t; i < R * KC; i += 256) as[i % KC][i / KC] = a[(i / KC) * C + c0 + i % KC];
        __syncthreads();
        #pragma unroll 8
        for (int c = 0; c < KC; ++c) {
            const float4 xv = *reinterpret_cast<const float4*>(&xs[c][tok]);
            #pragma unroll
            for (int k = 0; k < RR; ++k) {
                const float av = as[c][rr + k];
                acc[0][k] = fmaf(xv.x, av, acc[0][k]); acc[1][k] = fmaf(xv.y, av, acc[1][k]);
                acc[2][k] = fmaf(xv.z, av, acc[2][k]); acc[3][k] = fmaf(xv.w, av, acc[3][k]);
            }
        }
        __syncthreads();
    }
    for (int i = 0; i < 4; ++i) for (int k = 0; k < RR; ++k) ts[rr + k][tok + i] = acc[i][k];
    __syncthreads();
    // phase 2: y tile (TOK x C) += T^T B ; thread owns float4 of channels x 4 tokens at a time
    for (int i = t; i < (TOK / 4) * (C / 4); i += 256) {
        const int c = (i % (C / 4)) * 4, n = (i / (C / 4)) * 4;
        float4 o[4] = {};
        #pragma unroll 4
        for (int k = 0; k < R; ++k) {
            const float4 bv = *reinterpret_cast<const float4*>(b + k * C + c);
            const float4 tv = *reinterpret_cast<const float4*>(&ts[k][n]);
            const float tt[4] = {tv.x, tv.y, tv.z, tv.w};
            #pragma unroll
            for (int m = 0; m < 4; ++m) {
                o[m].x = fmaf(tt[m], bv.x, o[m].x); o[m].y = fmaf(tt[m], bv.y, o[m].y);
                o[m].z = fmaf(tt[m], bv.z, o[m].z); o[m].w = fmaf(tt[m], bv.w, o[m].w);
            }
        }
        for (int m = 0; m < 4; ++m) if (n0 + n + m < n_tokens) {
            float4* p = reinterpret_cast<float4*>(y + (size_t)(n0 + n + m) * C + c);
            float4 v = *p; v.x += o[m].x; v.y += o[m].y; v.z += o[m].z; v.w += o[m].w; *p = v;
        }
    }
}
