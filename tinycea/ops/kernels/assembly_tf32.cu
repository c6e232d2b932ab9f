// Y = X + S U, S = scale Xhat A^T with scale = 1/sqrt(C R), and its backward, on tensor cores, for float32 and R of 32 or more;
// S is never written to memory.
//
//   x, xhat, y, dy, dxhat (B,n,C), A, U (B,R,C), C and R multiples of 16, n any. Grid (blocks, B), blocks of THREADS: the blocks
//   of an image take its tiles of TOK tokens in turn.
//   assembly_tf32            reads 2 n C numbers, writes n C; 4 n R C FLOPs, three times that on the tensor cores
//   assembly_tf32_backward   reads 2 n C, writes n C; 10 n R C FLOPs (S is computed again), likewise three times that
//
// 3xTF32: a number is big + small, two of TF32, to 2^-22 of it; a b = small big + big small + big big, without the smallest part.
// A, U and part are read and written by wmma where they lie: they begin at a multiple of 32 bytes, as CuPy's own arrays do.
#include <mma.h>
using namespace nvcuda;

using Sum = wmma::fragment<wmma::accumulator, 16, 16, 8, float>;
template <typename Layout> using Left = wmma::fragment<wmma::matrix_a, 16, 16, 8, wmma::precision::tf32, Layout>;        // 16 x 8
template <typename Layout> using Right = wmma::fragment<wmma::matrix_b, 16, 16, 8, wmma::precision::tf32, Layout>;       // 8 x 16
template <bool TURNED> struct Order { using Layout = wmma::row_major; };
template <> struct Order<true> { using Layout = wmma::col_major; };

// A fragment of float32 numbers as two of TF32.
template <typename F> struct Split {
    F big, small;
    __device__ void load(const float* p, unsigned ld)
    {
        wmma::load_matrix_sync(big, p, ld);
        #pragma unroll
        for (int i = 0; i < F::num_elements; ++i) {
            const float v = big.x[i];
            big.x[i] = wmma::__float_to_tf32(v);
            small.x[i] = wmma::__float_to_tf32(v - big.x[i]);
        }
    }
};

template <typename L, typename M> __device__ inline void add_product(Sum& sum, const Split<L>& a, const Split<M>& b)
{
    wmma::mma_sync(sum, a.small, b.big, sum);
    wmma::mma_sync(sum, a.big, b.small, sum);
    wmma::mma_sync(sum, a.big, b.big, sum);
}

// sums[i][j] = left times right, K long, by a warp: 16 rows i of left, and columns first + j STEP of right's COLUMNS, of 16 each.
// left is (16 I, K) and right (K, 16 COLUMNS), or the other way round where it is TURNED; LL and LR are their rows' strides.
template <bool LEFT_TURNED, bool RIGHT_TURNED, int K, int COLUMNS, int STEP, int LL, int LR, int I, int J>
__device__ inline void product(Sum (&sums)[I][J], const float* left, const float* right, int first)
{
    #pragma unroll
    for (int i = 0; i < I; ++i)
        #pragma unroll
        for (int j = 0; j < J; ++j) wmma::fill_fragment(sums[i][j], 0.f);
    #pragma unroll 1
    for (int k = 0; k < K; k += 8) {
        Split<Left<typename Order<LEFT_TURNED>::Layout>> a[I];
        #pragma unroll
        for (int i = 0; i < I; ++i) a[i].load(left + (LEFT_TURNED ? k * LL + i * 16 : i * 16 * LL + k), LL);
        #pragma unroll
        for (int j = 0; j < J; ++j) {
            const int c = (first + j * STEP) * 16;
            if (c >= COLUMNS * 16) continue;
            Split<Right<typename Order<RIGHT_TURNED>::Layout>> b;
            b.load(right + (RIGHT_TURNED ? c * LR + k : k * LR + c), LR);
            #pragma unroll
            for (int i = 0; i < I; ++i) add_product(sums[i][j], a[i], b);
        }
    }
}

// tile = scale sums, at the rows and columns that they had above.
template <int COLUMNS, int STEP, int LD, int I, int J>
__device__ inline void put(float* tile, Sum (&sums)[I][J], int first, float scale)
{
    #pragma unroll
    for (int i = 0; i < I; ++i)
        #pragma unroll
        for (int j = 0; j < J; ++j) {
            if (first + j * STEP >= COLUMNS) continue;
            #pragma unroll
            for (int e = 0; e < Sum::num_elements; ++e) sums[i][j].x[e] *= scale;
            wmma::store_matrix_sync(tile + i * 16 * LD + (first + j * STEP) * 16, sums[i][j], LD, wmma::mem_row_major);
        }
}

// Each warp works alone, on ROWS of a tile's tokens: its rows of `tiles` hold Xhat, then S, then S U. TOK is a multiple of 64.
template <typename T, int C, int R, int TOK>              // T is float
__global__ void __launch_bounds__(THREADS, 2) assembly_tf32(float* __restrict__ y, const float* __restrict__ x,
        const float* __restrict__ xhat, const float* __restrict__ A, const float* __restrict__ U, int n, float scale)
{
    constexpr int ROWS = TOK / (THREADS / 32), LD = (C > R ? C : R) + 4;                 // + 4: eight rows in eight bank groups
    static_assert(C % 16 == 0 && R % 16 == 0 && ROWS % 16 == 0, "wmma's tiles are 16 by 16");
    __shared__ __align__(32) float tiles[TOK][LD];
    const int lane = threadIdx.x % 32, mine = (int)(threadIdx.x / 32) * ROWS;
    const size_t image = (size_t)blockIdx.y * n * C, factor = (size_t)blockIdx.y * R * C;
    float (*tile)[LD] = tiles + mine;
    for (int n0 = blockIdx.x * TOK + mine; n0 < n; n0 += gridDim.x * TOK) {
        const size_t start = image + (size_t)n0 * C;
        #pragma unroll 8
        for (int i = lane; i < ROWS * C; i += 32)
            tile[i / C][i % C] = n0 + i / C < n ? xhat[start + i] : 0.f;
        __syncwarp();
        Sum s[ROWS / 16][R / 16];
        product<false, true, C, R / 16, 1, LD, C>(s, *tile, A + factor, 0);
        __syncwarp();
        put<R / 16, 1, LD>(*tile, s, 0, scale);
        __syncwarp();
        Sum d[ROWS / 16][C / 16];
        product<false, false, R, C / 16, 1, LD, C>(d, *tile, U + factor, 0);
        __syncwarp();
        put<C / 16, 1, LD>(*tile, d, 0, 1.f);
        __syncwarp();
        #pragma unroll 8
        for (int i = lane; i < ROWS * C; i += 32)
            if (n0 + i / C < n) y[start + i] = x[start + i] + tile[i / C][i % C];
        __syncwarp();
    }
}

// dS = scale dY U^T, dXhat = dS A, dA = dS^T Xhat, dU = S^T dY; dX is dY.
// part (B, gridDim.x, 2, R, C): a block's share of dA and dU; a kernel of its own sums the second axis, in a fixed order.
// Four warps: `side` 0 has S and dU, 1 has dS and dA, each `half` of it; of dXhat 16 tokens and every second column. TOK is 32.
template <typename T, int C, int R, int TOK>              // T is float
__global__ void __launch_bounds__(THREADS, 2) assembly_tf32_backward(float* __restrict__ dxhat, float* __restrict__ part,
        const float* __restrict__ dy, const float* __restrict__ xhat, const float* __restrict__ A, const float* __restrict__ U,
        int n, float scale)
{
    constexpr int LC = C + 4, LR = R + 4, I = (R / 16 + 1) / 2, J = C / 16;
    static_assert(C % 16 == 0 && R % 16 == 0 && TOK == 32 && THREADS == 128, "two 16 by 16 tiles of tokens, two warps each");
    __shared__ __align__(32) float rows[2][TOK][LC];                                    // Xhat and dY; then dXhat for Xhat
    __shared__ __align__(32) float s[2][TOK][LR];                                       // S and dS
    const int warp = threadIdx.x / 32, side = warp / 2, half = warp % 2;
    const size_t image = (size_t)blockIdx.y * n * C, factor = (size_t)blockIdx.y * R * C;
    Sum total[I][J];                                                                    // of dU or dA: rows half + 2 i, columns j
    #pragma unroll
    for (int i = 0; i < I; ++i)
        #pragma unroll
        for (int j = 0; j < J; ++j) wmma::fill_fragment(total[i][j], 0.f);
    for (int n0 = blockIdx.x * TOK; n0 < n; n0 += gridDim.x * TOK) {
        const size_t start = image + (size_t)n0 * C;
        #pragma unroll 4
        for (int i = threadIdx.x; i < TOK * C; i += THREADS) {                          // a thread fills what it read: no barrier
            rows[0][i / C][i % C] = n0 + i / C < n ? xhat[start + i] : 0.f;
            rows[1][i / C][i % C] = n0 + i / C < n ? dy[start + i] : 0.f;
        }
        __syncthreads();
        {
            Sum sums[1][R / 16];
            product<false, true, C, R / 16, 1, LC, C>(sums, rows[side][half * 16], (side ? U : A) + factor, 0);
            put<R / 16, 1, LR>(s[side][half * 16], sums, 0, scale);
        }
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < I; ++i) {
            const int r = (half + 2 * i) * 16;
            if (r >= R) continue;
            Sum sums[1][J];                                         // of a tile: tensor cores truncate, longer sums are float32's
            product<true, false, TOK, J, 1, LR, LC>(sums, &s[side][0][r], rows[1 - side][0], 0);
            #pragma unroll
            for (int j = 0; j < J; ++j)
                #pragma unroll
                for (int e = 0; e < Sum::num_elements; ++e) total[i][j].x[e] += sums[0][j].x[e];
        }
        Sum sums[1][(J + 1) / 2];
        product<false, false, R, J, 2, LR, C>(sums, s[1][half * 16], A + factor, side);
        __syncthreads();
        put<J, 2, LC>(rows[0][half * 16], sums, side, 1.f);
        __syncthreads();
        #pragma unroll 4
        for (int i = threadIdx.x; i < TOK * C; i += THREADS)
            if (n0 + i / C < n) dxhat[start + i] = rows[0][i / C][i % C];
    }
    part += ((size_t)(blockIdx.y * gridDim.x + blockIdx.x) * 2 + 1 - side) * R * C;
    #pragma unroll
    for (int i = 0; i < I; ++i) {
        const int r = (half + 2 * i) * 16;
        if (r >= R) continue;
        #pragma unroll
        for (int j = 0; j < J; ++j) wmma::store_matrix_sync(part + r * C + j * 16, total[i][j], C, wmma::mem_row_major);
    }
}
