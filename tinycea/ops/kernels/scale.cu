// y = x s, one factor per image and channel (the product of NAFNet's SCA); its backward in one pass: dx = dy s, ds = sum of dy x.
//
//   x, y, dy, dx (B,n,C), s (B,C). Grid (blocks, C / 32, B), blocks (32,8): a lane keeps its channel and goes through the tokens.
//   scale            reads n C numbers, writes n C; n C FLOPs
//   scale_backward   reads 2 n C, writes n C; 3 n C FLOPs; part (B, gridDim.x, C): each block's share of ds

template <typename T>
__global__ void __launch_bounds__(256, 2) scale(T* __restrict__ y, const T* __restrict__ x, const T* __restrict__ s, int n, int C)
{
    const int c = blockIdx.y * 32 + threadIdx.x;
    if (c >= C) return;
    const size_t image = (size_t)blockIdx.z * n * C;
    const T factor = s[(size_t)blockIdx.z * C + c];
    for (int token = blockIdx.x * 8 + threadIdx.y; token < n; token += gridDim.x * 8)
        y[image + (size_t)token * C + c] = x[image + (size_t)token * C + c] * factor;
}

template <typename T>
__global__ void __launch_bounds__(256, 2) scale_backward(T* __restrict__ dx, T* __restrict__ part, const T* __restrict__ dy,
        const T* __restrict__ x, const T* __restrict__ s, int n, int C)
{
    __shared__ T share[8][33];
    const int c = blockIdx.y * 32 + threadIdx.x;
    const size_t image = (size_t)blockIdx.z * n * C;
    T sum = 0;
    if (c < C) {
        const T factor = s[(size_t)blockIdx.z * C + c];
        for (int token = blockIdx.x * 8 + threadIdx.y; token < n; token += gridDim.x * 8) {
            const size_t i = image + (size_t)token * C + c;
            dx[i] = dy[i] * factor;
            sum += dy[i] * x[i];
        }
    }
    share[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < C) {
        for (int i = 1; i < 8; ++i) sum += share[i][threadIdx.x];
        part[((size_t)blockIdx.z * gridDim.x + blockIdx.x) * C + c] = sum;
    }
}
