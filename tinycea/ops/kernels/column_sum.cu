// out[b,c] = sum over i of part[b,i,c]: the second stage of every sum over tokens, in an order that never changes.
//
//   part (B,rows,columns), out (B,columns). Grid (columns / 32, B), blocks (32,8). Reads B rows columns numbers, as many FLOPs.

template <typename T>
__global__ void __launch_bounds__(256, 2) column_sum(T* __restrict__ out, const T* __restrict__ part, int rows, int columns)
{
    __shared__ T share[8][33];
    const int c = blockIdx.x * 32 + threadIdx.x;
    T total = 0;
    if (c < columns)
        for (int i = threadIdx.y; i < rows; i += 8) total += part[((size_t)blockIdx.y * rows + i) * columns + c];
    share[threadIdx.y][threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.y == 0 && c < columns) {
        for (int i = 1; i < 8; ++i) total += share[i][threadIdx.x];
        out[(size_t)blockIdx.y * columns + c] = total;
    }
}
