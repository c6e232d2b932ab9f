// One AdamW update of the flat parameters, in place (Loshchilov and Hutter 2019, algorithm 2):
//   m <- b1 m + (1-b1) g,  v <- b2 v + (1-b2) g^2,  w <- w - lr (m / c1 / (sqrt(v / c2) + eps) + decay w),  ci = 1-bi^t
//
//   w, g, m, v, lr, decay (n). Any grid, blocks of 256. Reads 6 n numbers, writes 3 n; 16 n FLOPs

template <typename T>
__global__ void __launch_bounds__(256, 2) adamw(T* __restrict__ w, T* __restrict__ m, T* __restrict__ v, const T* __restrict__ g,
        const T* __restrict__ lr, const T* __restrict__ decay, int n, T b1, T b2, T c1, T c2, T eps)
{
    for (int i = blockIdx.x * 256 + threadIdx.x; i < n; i += gridDim.x * 256) {
        const T gi = g[i], mi = m[i] + (1 - b1) * (gi - m[i]), vi = v[i] + (1 - b2) * (gi * gi - v[i]);
        m[i] = mi;
        v[i] = vi;
        w[i] -= lr[i] * (mi / c1 / (root(vi / c2) + eps) + decay[i] * w[i]);
    }
}
