// y = weight (x - mean)/sqrt(var + eps) + bias over the C channels of each of n tokens, and its backward.
//
//   x, y, dy, dx (n,C), weight, bias (C), mean, rstd (n). Any grid, blocks of 256: a warp takes a token, then each (8 blocks)-th.
//   layernorm            reads n C numbers, writes n C; 8 n C FLOPs
//   layernorm_backward   reads 2 n C, writes n C; 14 n C FLOPs

template <typename T, int C>
__global__ void __launch_bounds__(256, 2) layernorm(T* __restrict__ y, T* __restrict__ mean, T* __restrict__ rstd,
        const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias, int n, T eps)
{
    constexpr int V = (C + 31) / 32;                      // channels of a lane: lane, lane + 32, ...
    const int lane = threadIdx.x % 32;
    for (int token = blockIdx.x * 8 + threadIdx.x / 32; token < n; token += gridDim.x * 8) {
        const size_t row = (size_t)token * C;
        T v[V], sum = 0, squares = 0;
        #pragma unroll
        for (int j = 0; j < V; ++j) sum += v[j] = lane + 32 * j < C ? x[row + lane + 32 * j] : T(0);
        const T m = warp_sum(sum) / C;
        #pragma unroll
        for (int j = 0; j < V; ++j)
            if (lane + 32 * j < C) squares += (v[j] - m) * (v[j] - m);
        const T r = reciprocal_root(warp_sum(squares) / C + eps);
        #pragma unroll
        for (int j = 0; j < V; ++j) {
            const int c = lane + 32 * j;
            if (c < C) y[row + c] = (v[j] - m) * r * weight[c] + bias[c];
        }
        if (lane == 0) { mean[token] = m; rstd[token] = r; }
    }
}

// With g = dy weight: dx = (g - mean(g) - xhat mean(g xhat)) rstd.
// part (gridDim.x, 2, C): each block's share of dweight = sum dy xhat and of dbias = sum dy.
template <typename T, int C>
__global__ void __launch_bounds__(256, 2) layernorm_backward(T* __restrict__ dx, T* __restrict__ part, const T* __restrict__ dy,
        const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ mean, const T* __restrict__ rstd, int n)
{
    constexpr int V = (C + 31) / 32;
    __shared__ T share[8][C];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    T dweight[V] = {}, dbias[V] = {};
    for (int token = blockIdx.x * 8 + warp; token < n; token += gridDim.x * 8) {
        const size_t row = (size_t)token * C;
        const T m = mean[token], r = rstd[token];
        T xhat[V], g[V], sum = 0, product = 0;
        #pragma unroll
        for (int j = 0; j < V; ++j) {
            const int c = lane + 32 * j;
            const T d = c < C ? dy[row + c] : T(0);
            xhat[j] = c < C ? (x[row + c] - m) * r : T(0);
            g[j] = c < C ? d * weight[c] : T(0);
            sum += g[j];
            product += g[j] * xhat[j];
            dweight[j] += d * xhat[j];
            dbias[j] += d;
        }
        sum = warp_sum(sum) / C;
        product = warp_sum(product) / C;
        #pragma unroll
        for (int j = 0; j < V; ++j)
            if (lane + 32 * j < C) dx[row + lane + 32 * j] = (g[j] - sum - xhat[j] * product) * r;
    }
    for (int which = 0; which < 2; ++which) {             // dweight, then dbias, through the same shared memory
        #pragma unroll
        for (int j = 0; j < V; ++j)
            if (lane + 32 * j < C) share[warp][lane + 32 * j] = which ? dbias[j] : dweight[j];
        __syncthreads();
        for (int c = threadIdx.x; c < C; c += 256) {
            T total = 0;
            for (int w = 0; w < 8; ++w) total += share[w][c];
            part[((size_t)blockIdx.x * 2 + which) * C + c] = total;
        }
        __syncthreads();
    }
}
