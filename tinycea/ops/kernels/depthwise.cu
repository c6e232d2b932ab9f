// A 3 x 3 cross-correlation of each channel with its own kernel, zero padding 1; the simple gate after it; the backward of both:
//   f[k] = bias[k] + sum over i,j of x[h+i-1, w+j-1, k] weight[k,i,j],  gated: y[c] = f[c] f[C+c]
//
//   x (B,H,W,channels), weight (channels,9), bias (channels). Grid (blocks, channels / 32), blocks (32,8): a lane keeps its
//   channel and goes through pixels; the nine neighbors come from the cache.
//   depthwise                  reads and writes all channels once; 18 FLOPs a number
//   gated_depthwise            reads 2 C channels, writes C; 19 FLOPs a number read
//   gated_depthwise_backward   reads 3 C channels, writes 2 C; 38 FLOPs a number of x

// v[3 i + j] = x[h+i-1, w+j-1, c], 0 outside the image.
template <typename T>
__device__ inline void window(T (&v)[9], const T* __restrict__ x, int pixel, int c, int H, int W, int channels)
{
    const int w = pixel % W, h = pixel / W % H;
    #pragma unroll
    for (int k = 0; k < 9; ++k) {
        const int i = k / 3 - 1, j = k % 3 - 1;
        const bool inside = h + i >= 0 && h + i < H && w + j >= 0 && w + j < W;
        v[k] = inside ? x[(size_t)(pixel + i * W + j) * channels + c] : T(0);
    }
}

template <typename T> __device__ inline T dot9(const T (&v)[9], const T (&weight)[9])
{
    T sum = 0;
    #pragma unroll
    for (int k = 0; k < 9; ++k) sum += v[k] * weight[k];
    return sum;
}

template <typename T>
__global__ void __launch_bounds__(256, 2) depthwise(T* __restrict__ y, const T* __restrict__ x, const T* __restrict__ weight,
        int pixels, int H, int W, int channels)
{
    const int c = blockIdx.y * 32 + threadIdx.x;
    if (c >= channels) return;
    T taps[9], v[9];
    for (int k = 0; k < 9; ++k) taps[k] = weight[c * 9 + k];
    for (int pixel = blockIdx.x * 8 + threadIdx.y; pixel < pixels; pixel += gridDim.x * 8) {
        window(v, x, pixel, c, H, W, channels);
        y[(size_t)pixel * channels + c] = dot9(v, taps);
    }
}

template <typename T>
__global__ void __launch_bounds__(256, 2) gated_depthwise(T* __restrict__ y, const T* __restrict__ x,
        const T* __restrict__ weight, const T* __restrict__ bias, int pixels, int H, int W, int C)
{
    const int c = blockIdx.y * 32 + threadIdx.x;
    if (c >= C) return;
    T taps[2][9], v[9];
    for (int k = 0; k < 18; ++k) taps[k / 9][k % 9] = weight[(k / 9 * C + c) * 9 + k % 9];
    for (int pixel = blockIdx.x * 8 + threadIdx.y; pixel < pixels; pixel += gridDim.x * 8) {
        window(v, x, pixel, c, H, W, 2 * C);
        const T a = bias[c] + dot9(v, taps[0]);
        window(v, x, pixel, C + c, H, W, 2 * C);
        y[(size_t)pixel * C + c] = a * (bias[C + c] + dot9(v, taps[1]));
    }
}

// df (B,H,W,2C) = (dy b, dy a), with the halves a and b computed again; dx is then `depthwise` of df, the kernels turned around.
// part (gridDim.x, 2, 10, C): each block's share of dweight (9) and of dbias, for either half.
template <typename T>
__global__ void __launch_bounds__(256) gated_depthwise_backward(T* __restrict__ df, T* __restrict__ part,
        const T* __restrict__ dy, const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
        int pixels, int H, int W, int C)
{
    __shared__ T share[8][33];
    const int c = blockIdx.y * 32 + threadIdx.x;
    T taps[2][9], v[2][9], sums[2][10] = {};
    if (c < C) {
        for (int k = 0; k < 18; ++k) taps[k / 9][k % 9] = weight[(k / 9 * C + c) * 9 + k % 9];
        for (int pixel = blockIdx.x * 8 + threadIdx.y; pixel < pixels; pixel += gridDim.x * 8) {
            window(v[0], x, pixel, c, H, W, 2 * C);
            window(v[1], x, pixel, C + c, H, W, 2 * C);
            const T d = dy[(size_t)pixel * C + c];
            const T df_half[2] = {d * (bias[C + c] + dot9(v[1], taps[1])), d * (bias[c] + dot9(v[0], taps[0]))};
            #pragma unroll
            for (int half = 0; half < 2; ++half) {
                df[(size_t)pixel * 2 * C + half * C + c] = df_half[half];
                #pragma unroll
                for (int k = 0; k < 9; ++k) sums[half][k] += df_half[half] * v[half][k];
                sums[half][9] += df_half[half];
            }
        }
    }
    #pragma unroll
    for (int k = 0; k < 20; ++k) {                        // the eight rows of threads, one number of each channel at a time
        share[threadIdx.y][threadIdx.x] = sums[k / 10][k % 10];
        __syncthreads();
        if (threadIdx.y == 0 && c < C) {
            T total = 0;
            for (int i = 0; i < 8; ++i) total += share[i][threadIdx.x];
            part[((size_t)blockIdx.x * 20 + k) * C + c] = total;
        }
        __syncthreads();
    }
}
