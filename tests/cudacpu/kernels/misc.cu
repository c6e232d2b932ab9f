// Legitimate patterns that no check may report.
extern "C" __global__ void saxpy(float* y, const float* x, float a, int n)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = fmaf(a, x[i], y[i]);
}
// "last block done" reduction with __threadfence and an atomic ticket
extern "C" __global__ void last_block_sum(float* out, float* part, unsigned* ticket, const float* x, int n)
{
    __shared__ float red[8];
    __shared__ bool last;
    float v = 0.f;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += x[i];
    for (int o = 16; o > 0; o >>= 1) v += __shfl_down_sync(0xffffffffu, v, o);
    if ((threadIdx.x & 31) == 0) red[threadIdx.x >> 5] = v;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < 8; ++i) v += red[i];
        part[blockIdx.x] = v;
        __threadfence();
        last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (last && threadIdx.x == 0) { float t = 0.f; for (unsigned i = 0; i < gridDim.x; ++i) t += part[i]; *out = t; *ticket = 0; }
}
// warp-level programming: __syncwarp-ordered shared memory, ballots, partial masks, early exit of whole warps
extern "C" __global__ void warp_tricks(int* out, const int* x, int n)
{
    __shared__ int buf[8][32];
    const int lane = threadIdx.x & 31, w = threadIdx.x >> 5, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (blockIdx.x * blockDim.x + w * 32 >= (unsigned)n) return;
    const int v = i < n ? x[i] : 0;
    buf[w][lane] = v;
    __syncwarp();
    const int rev = buf[w][31 - lane];
    __syncwarp();
    buf[w][lane] = rev;
    __syncwarp();
    const unsigned pos = __ballot_sync(0xffffffffu, v > 0);
    int s = 0;
    if (lane < 16) { s = v; for (int o = 8; o > 0; o >>= 1) s += __shfl_xor_sync(0x0000ffffu, s, o); }
    else           { s = v; for (int o = 8; o > 0; o >>= 1) s += __shfl_xor_sync(0xffff0000u, s, o, 16); }
    if (i < n) out[i] = buf[w][31 - lane] * 1000 + __popc(pos) + 100 * s;
}
extern "C" __global__ void histogram(int* out, const unsigned char* x, int n)
{
    __shared__ int h[256];
    h[threadIdx.x] = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(&h[x[i]], 1);
    __syncthreads();
    if (h[threadIdx.x]) atomicAdd(&out[threadIdx.x], h[threadIdx.x]);
}
