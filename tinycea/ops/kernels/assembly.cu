// Y = X + S U, S = scale Xhat A^T with scale = 1/sqrt(C R), and its backward; S is never written to memory.
//
//   x, xhat, y, dy, dxhat (B,n,C), A, U (B,R,C). Grid (blocks, B): the blocks of an image take its tiles of TOK tokens in turn.
//   assembly            reads 2 n C numbers, writes n C; 4 n R C FLOPs
//   assembly_backward   reads 2 n C (a second time from the cache), writes n C; 10 n R C FLOPs (S is computed again)
//
// H is what tokens are stored in, T or __half; T is what is computed in. A number is 8 bytes, 4 or, in half, 2.

template <typename T, int C, int R, int TOK, typename H = T>
__global__ void __launch_bounds__(THREADS, 2) assembly(H* __restrict__ y, const H* __restrict__ x, const H* __restrict__ xhat,
        const T* __restrict__ A, const T* __restrict__ U, int n, T scale)
{
    using W = Warps<C>;
    __shared__ __align__(16) T s[TOK][R];
    const size_t image = (size_t)blockIdx.y * n * C, factor = (size_t)blockIdx.y * R * C;
    T u[W::CHUNKS][R];
    columns<T, C, R>(u, U + factor);
    for (int n0 = blockIdx.x * TOK; n0 < n; n0 += gridDim.x * TOK) {
        dots<T, C, R, TOK>(s, xhat + image, A + factor, n0, n, scale);
        if (W::share() >= W::SHARES) continue;
        for (int t = W::share(); t < TOK && n0 + t < n; t += W::SHARES) {
            #pragma unroll
            for (int j = 0; j < W::CHUNKS; ++j) {
                const int c = W::channel(j);
                if (c >= C) continue;
                const size_t i = image + (size_t)(n0 + t) * C + c;
                T v = T(x[i]);
                #pragma unroll
                for (int r = 0; r < R; ++r) v += s[t][r] * u[j][r];
                y[i] = H(v);
            }
        }
    }
}

// dS = scale dY U^T, dXhat = dS A, dA = dS^T Xhat, dU = S^T dY; dX is dY.
// part (B, gridDim.x SHARES, 2, R, C): the shares of dA and dU; a kernel of its own sums the second axis, in a fixed order.
template <typename T, int C, int R, int TOK, typename H = T>
__global__ void __launch_bounds__(THREADS, 2) assembly_backward(H* __restrict__ dxhat, T* __restrict__ part,
        const H* __restrict__ dy, const H* __restrict__ xhat, const T* __restrict__ A, const T* __restrict__ U, int n, T scale)
{
    using W = Warps<C>;
    __shared__ __align__(16) T s[TOK][R];
    __shared__ __align__(16) T ds[TOK][R];
    const size_t image = (size_t)blockIdx.y * n * C, factor = (size_t)blockIdx.y * R * C;
    T a[W::CHUNKS][R], da[W::CHUNKS][R] = {}, du[W::CHUNKS][R] = {};
    columns<T, C, R>(a, A + factor);
    for (int n0 = blockIdx.x * TOK; n0 < n; n0 += gridDim.x * TOK) {
        dots<T, C, R, TOK>(s, xhat + image, A + factor, n0, n, scale);
        dots<T, C, R, TOK>(ds, dy + image, U + factor, n0, n, scale);
        if (W::share() >= W::SHARES) continue;
        for (int t = W::share(); t < TOK && n0 + t < n; t += W::SHARES) {
            #pragma unroll
            for (int j = 0; j < W::CHUNKS; ++j) {
                const int c = W::channel(j);
                if (c >= C) continue;
                const size_t i = image + (size_t)(n0 + t) * C + c;
                const T xi = T(xhat[i]), dyi = T(dy[i]);
                T v = 0;
                #pragma unroll
                for (int r = 0; r < R; ++r) {
                    v += ds[t][r] * a[j][r];
                    da[j][r] += ds[t][r] * xi;
                    du[j][r] += s[t][r] * dyi;
                }
                dxhat[i] = H(v);
            }
        }
    }
    if (W::share() >= W::SHARES) return;
    part += ((size_t)(blockIdx.y * gridDim.x + blockIdx.x) * W::SHARES + W::share()) * 2 * R * C;
    #pragma unroll
    for (int j = 0; j < W::CHUNKS; ++j)
        #pragma unroll
        for (int r = 0; r < R; ++r) {
            const int c = W::channel(j);
            if (c >= C) continue;
            part[r * C + c] = da[j][r];
            part[(R + r) * C + c] = du[j][r];
        }
}
