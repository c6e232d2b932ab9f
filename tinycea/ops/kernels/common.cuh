// What the kernels share; put in front of each of them. Letters are the project's: n tokens, C channels, R rank components.
constexpr int THREADS = 128;                              // of a block, in the kernels that work on tiles of tokens

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }
__device__ inline float root(float x) { return sqrtf(x); }
__device__ inline double root(double x) { return sqrt(x); }
__device__ inline float reciprocal_root(float x) { return rsqrtf(x); }
__device__ inline double reciprocal_root(double x) { return 1 / sqrt(x); }

// The sum over the 32 lanes of a warp, in every lane.
template <typename T> __device__ inline T warp_sum(T v)
{
    for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}

// How a block's warps share C channels and a tile's tokens: ACROSS warps stand side by side on 32 channels each and take CHUNKS
// turns; SHARES such rows take every SHARES-th token. A thread keeps its channels, so sums over tokens stay in registers.
template <int C> struct Warps {
    static constexpr int ALL = THREADS / 32, NEEDED = (C + 31) / 32;
    static constexpr int ACROSS = NEEDED < ALL ? NEEDED : ALL, SHARES = ALL / ACROSS, CHUNKS = (NEEDED + ACROSS - 1) / ACROSS;
    __device__ static int channel(int j) { return (int(threadIdx.x / 32) % ACROSS + j * ACROSS) * 32 + int(threadIdx.x % 32); }
    __device__ static int share() { return int(threadIdx.x / 32) / ACROSS; }            // SHARES or more: this warp has no tokens
};

// A thread's channels of the R rows of a factor (R,C), into registers.
template <typename T, int C, int R> __device__ inline void columns(T (*out)[R], const T* __restrict__ factor)
{
    #pragma unroll
    for (int j = 0; j < Warps<C>::CHUNKS; ++j)
        #pragma unroll
        for (int r = 0; r < R; ++r) out[j][r] = Warps<C>::channel(j) < C ? factor[r * C + Warps<C>::channel(j)] : T(0);
}

// out[t][r] = scale sum over c of rows[n0+t][c] factors[r][c] for the TOK tokens of a tile (0 past the n-th), by the whole block.
// Ends with a barrier, and begins with one: whoever still reads `out` of the last tile is waited for.
template <typename T, int C, int R, int TOK, typename H>
__device__ inline void dots(T (*out)[R], const H* __restrict__ rows, const T* __restrict__ factors, int n0, int n, T scale)
{
    constexpr int K = 32, GROUPS = THREADS / TOK, EACH = (R + GROUPS - 1) / GROUPS;      // a thread: one token, EACH of R sums
    __shared__ T xs[TOK][K + 1];
    __shared__ __align__(16) T fs[K][R];
    const int t = threadIdx.x % TOK, r0 = threadIdx.x / TOK * EACH;
    T s[EACH] = {};
    for (int c0 = 0; c0 < C; c0 += K) {
        __syncthreads();
        for (int i = threadIdx.x; i < TOK * K; i += THREADS) {
            const int token = n0 + i / K, c = c0 + i % K;
            xs[i / K][i % K] = token < n && c < C ? T(rows[(size_t)token * C + c]) : T(0);
        }
        for (int i = threadIdx.x; i < R * K; i += THREADS) {
            const int c = c0 + i % K;
            fs[i % K][i / K] = c < C ? factors[(size_t)(i / K) * C + c] : T(0);
        }
        __syncthreads();
        #pragma unroll 8
        for (int c = 0; c < K; ++c) {
            const T x = xs[t][c];
            #pragma unroll
            for (int k = 0; k < EACH; ++k)
                if (r0 + k < R) s[k] += x * fs[c][r0 + k];
        }
    }
    #pragma unroll
    for (int k = 0; k < EACH; ++k)
        if (r0 + k < R) out[t][r0 + k] = scale * s[k];
    __syncthreads();
}
