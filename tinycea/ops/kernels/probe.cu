// means[m] = sum over n of P[m,n] xhat[n], P = softmax over n of <queries[m], xhat[n]>: M queries, the n tokens of each image.
// An online softmax: the logits live in shared memory for one tile of TOK tokens, no (n,M) matrix is ever written.
//
//   xhat, dxhat (B,n,C), queries (M,C), means, dmeans (B,M,C), lse (B,M): the logarithm of the softmax's denominator.
//   probe            grid (blocks, B); reads n C numbers; 4 n M C FLOPs and n M exponentials
//   probe_combine    grid (M, B); joins what the blocks of an image found
//   probe_backward   grid (blocks, B); reads n C numbers (twice more from the cache), writes n C; 10 n M C FLOPs (P from lse)

#define INFINITE __int_as_float(0x7f800000)               // NVRTC does not know INFINITY

// top, total (B,blocks,M): the largest logit of a block's tokens, and the sum of the exponentials relative to it;
// part (B, blocks SHARES, M, C): the same sum, weighted with the tokens.
template <typename T, int C, int M, int TOK>
__global__ void __launch_bounds__(THREADS, 2) probe(T* __restrict__ top, T* __restrict__ total, T* __restrict__ part,
        const T* __restrict__ queries, const T* __restrict__ xhat, int n)
{
    using W = Warps<C>;
    constexpr int ALL = W::ALL, OWN = (M + 31) / 32;      // queries of a lane in the softmax: lane, lane + 32, ...
    __shared__ __align__(16) T s[TOK][M];
    __shared__ T highest[ALL][M], sums[ALL][M], shrink[M];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const size_t image = (size_t)blockIdx.y * n * C;
    T peak[OWN], mass[OWN], means[W::CHUNKS][M] = {};
    for (int k = 0; k < OWN; ++k) { peak[k] = -INFINITE; mass[k] = 0; }
    for (int n0 = blockIdx.x * TOK; n0 < n; n0 += gridDim.x * TOK) {
        const int tokens = min(TOK, n - n0);
        dots<T, C, M, TOK>(s, xhat + image, queries, n0, n, T(1));
        #pragma unroll
        for (int k = 0; k < OWN; ++k) {
            const int m = lane + 32 * k;
            T most = -INFINITE;
            if (m < M)
                for (int t = warp; t < tokens; t += ALL) most = s[t][m] > most ? s[t][m] : most;
            if (m < M) highest[warp][m] = most;
        }
        __syncthreads();
        #pragma unroll
        for (int k = 0; k < OWN; ++k) {
            const int m = lane + 32 * k;
            if (m >= M) continue;
            T now = peak[k], sum = 0;
            for (int w = 0; w < ALL; ++w) now = highest[w][m] > now ? highest[w][m] : now;
            for (int t = warp; t < tokens; t += ALL) sum += s[t][m] = exponential(s[t][m] - now);
            sums[warp][m] = sum;
            mass[k] *= exponential(peak[k] - now);
            if (warp == 0) shrink[m] = exponential(peak[k] - now);
            peak[k] = now;
        }
        __syncthreads();
        #pragma unroll
        for (int k = 0; k < OWN; ++k)
            if (lane + 32 * k < M)
                for (int w = 0; w < ALL; ++w) mass[k] += sums[w][lane + 32 * k];
        if (W::share() >= W::SHARES) continue;
        #pragma unroll
        for (int j = 0; j < W::CHUNKS; ++j) {
            const int c = W::channel(j);
            if (c >= C) continue;
            #pragma unroll
            for (int m = 0; m < M; ++m) means[j][m] *= shrink[m];
            for (int t = W::share(); t < tokens; t += W::SHARES) {
                const T x = xhat[image + (size_t)(n0 + t) * C + c];
                #pragma unroll
                for (int m = 0; m < M; ++m) means[j][m] += s[t][m] * x;
            }
        }
    }
    const size_t block = (size_t)blockIdx.y * gridDim.x + blockIdx.x;
    for (int k = 0; k < OWN; ++k)
        if (warp == 0 && lane + 32 * k < M) {
            top[block * M + lane + 32 * k] = peak[k];
            total[block * M + lane + 32 * k] = mass[k];
        }
    if (W::share() >= W::SHARES) return;
    part += (block * W::SHARES + W::share()) * M * C;
    #pragma unroll
    for (int j = 0; j < W::CHUNKS; ++j)
        #pragma unroll
        for (int m = 0; m < M; ++m)
            if (W::channel(j) < C) part[m * C + W::channel(j)] = means[j][m];
}

template <typename T, int C>
__global__ void __launch_bounds__(THREADS, 2) probe_combine(T* __restrict__ means, T* __restrict__ lse, const T* __restrict__ top,
        const T* __restrict__ total, const T* __restrict__ part, int blocks)
{
    const int m = blockIdx.x, M = gridDim.x;
    const size_t first = (size_t)blockIdx.y * blocks;
    T peak = -INFINITE, mass = 0;
    for (int k = 0; k < blocks; ++k) peak = top[(first + k) * M + m] > peak ? top[(first + k) * M + m] : peak;
    for (int k = 0; k < blocks; ++k) mass += exponential(top[(first + k) * M + m] - peak) * total[(first + k) * M + m];
    for (int c = threadIdx.x; c < C; c += THREADS) {
        T sum = 0;
        for (int k = 0; k < blocks; ++k) {
            T own = 0;
            for (int share = 0; share < Warps<C>::SHARES; ++share)
                own += part[(((first + k) * Warps<C>::SHARES + share) * M + m) * C + c];
            sum += exponential(top[(first + k) * M + m] - peak) * own;
        }
        means[((size_t)blockIdx.y * M + m) * C + c] = sum / mass;
    }
    if (threadIdx.x == 0) lse[(size_t)blockIdx.y * M + m] = peak + logarithm(mass);
}

// P = exp(logit - lse), dP = <dmeans, xhat>, dlogit = P (dP - center) with center (B,M) = rowsum(dmeans means);
// dxhat = sum over m of P dmeans + dlogit queries, dqueries = sum over n of dlogit xhat, in part (B, gridDim.x SHARES, M, C).
template <typename T, int C, int M, int TOK>
__global__ void __launch_bounds__(THREADS, 2) probe_backward(T* __restrict__ dxhat, T* __restrict__ part,
        const T* __restrict__ dmeans, const T* __restrict__ center, const T* __restrict__ queries, const T* __restrict__ xhat,
        const T* __restrict__ lse, int n)
{
    using W = Warps<C>;
    __shared__ __align__(16) T p[TOK][M];
    __shared__ __align__(16) T dl[TOK][M];
    const size_t image = (size_t)blockIdx.y * n * C, query = (size_t)blockIdx.y * M;
    T dqueries[W::CHUNKS][M] = {};
    for (int n0 = blockIdx.x * TOK; n0 < n; n0 += gridDim.x * TOK) {
        const int tokens = min(TOK, n - n0);
        dots<T, C, M, TOK>(p, xhat + image, queries, n0, n, T(1));
        dots<T, C, M, TOK>(dl, xhat + image, dmeans + query * C, n0, n, T(1));
        for (int i = threadIdx.x; i < tokens * M; i += THREADS) {
            const int t = i / M, m = i % M;
            p[t][m] = exponential(p[t][m] - lse[query + m]);
            dl[t][m] = p[t][m] * (dl[t][m] - center[query + m]);
        }
        __syncthreads();
        if (W::share() >= W::SHARES) continue;
        #pragma unroll
        for (int j = 0; j < W::CHUNKS; ++j) {
            const int c = W::channel(j);
            if (c >= C) continue;
            T d[M], l[M];
            #pragma unroll
            for (int m = 0; m < M; ++m) {
                d[m] = dmeans[(query + m) * C + c];
                l[m] = queries[m * C + c];
            }
            for (int t = W::share(); t < tokens; t += W::SHARES) {
                const size_t i = image + (size_t)(n0 + t) * C + c;
                const T x = xhat[i];
                T v = 0;
                #pragma unroll
                for (int m = 0; m < M; ++m) {
                    v += p[t][m] * d[m] + dl[t][m] * l[m];
                    dqueries[j][m] += dl[t][m] * x;
                }
                dxhat[i] = v;
            }
        }
    }
    if (W::share() >= W::SHARES) return;
    part += ((size_t)(blockIdx.y * gridDim.x + blockIdx.x) * W::SHARES + W::share()) * M * C;
    #pragma unroll
    for (int j = 0; j < W::CHUNKS; ++j)
        #pragma unroll
        for (int m = 0; m < M; ++m)
            if (W::channel(j) < C) part[m * C + W::channel(j)] = dqueries[j][m];
}
