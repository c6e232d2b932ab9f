// nvcuda::wmma with 16x16 accumulators: every lane holds 1/32 of a tile, in row-major order.
#pragma once
#define CPU_INLINE inline __attribute__((always_inline))   // so that reports name the kernel's line
namespace nvcuda::wmma {
struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
namespace precision { struct tf32; }
enum layout_t { mem_row_major, mem_col_major };
template <class T> struct storage { using type = T; };
template <> struct storage<precision::tf32> { using type = float; };
template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment {
    static constexpr int rows = std::is_same_v<Use, matrix_b> ? K : M, cols = std::is_same_v<Use, matrix_a> ? K : N;
    static constexpr int num_elements = rows * cols / 32;
    using element_type = typename storage<T>::type;
    element_type x[num_elements];
};
inline float __float_to_tf32(float f)   // cvt.rna.tf32: 10 mantissa bits, round to nearest, ties away
{ return cpu_bits<float>((cpu_bits<uint32_t>(f) + 0x1000u) & ~0x1fffu); }
template <class T> float multiplicand(T v)   // a tensor core reads TF32 inputs truncated
{
    if constexpr (std::is_same_v<T, float>) return cpu_bits<float>(cpu_bits<uint32_t>(v) & ~0x1fffu);
    else return float(v);
}
template <class F, class T> void fill_fragment(F& f, T v) { for (auto& e : f.x) e = v; }
template <class F> CPU_INLINE size_t offset(int i, unsigned ld, bool columns)   // of this lane's element i in memory
{
    const int e = cpu::lane() * F::num_elements + i, r = e / F::cols, c = e % F::cols;
    return columns ? size_t(c) * ld + r : size_t(r) * ld + c;
}
template <class F, class P> CPU_INLINE void load(F& f, const P* p, unsigned ld, bool columns, int line)
{
    cpu::warp_exchange(~0u, nullptr, 0, nullptr, cpu::JOIN, line);
    for (int i = 0; i < F::num_elements; ++i) f.x[i] = p[offset<F>(i, ld, columns)];
}
template <class U, int M, int N, int K, class T, class L, class P>
CPU_INLINE void load_matrix_sync(fragment<U, M, N, K, T, L>& f, const P* p, unsigned ld, int line = __builtin_LINE())
{ load(f, p, ld, std::is_same_v<L, col_major>, line); }
template <int M, int N, int K, class T, class P>
CPU_INLINE void load_matrix_sync(fragment<accumulator, M, N, K, T>& f, const P* p, unsigned ld, layout_t layout,
                                 int line = __builtin_LINE())
{ load(f, p, ld, layout == mem_col_major, line); }
template <int M, int N, int K, class T, class P>
CPU_INLINE void store_matrix_sync(P* p, fragment<accumulator, M, N, K, T>& f, unsigned ld, layout_t layout,
                                  int line = __builtin_LINE())
{
    using F = fragment<accumulator, M, N, K, T>;
    cpu::warp_exchange(~0u, nullptr, 0, nullptr, cpu::JOIN, line);
    for (int i = 0; i < F::num_elements; ++i) p[offset<F>(i, ld, layout == mem_col_major)] = f.x[i];
}
template <class D, class A, class B, class C>
NOHOOK void mma_sync(D& d, const A& a, const B& b, const C& c, int line = __builtin_LINE())
{
    struct Operands { const A* a; const B* b; } mine{&a, &b}, all[32];   // fibers share one address space
    cpu::warp_exchange(~0u, &mine, sizeof mine, all, cpu::GATHER, line);
    float out[D::num_elements];
    for (int i = 0; i < D::num_elements; ++i) {
        const int e = cpu::lane() * D::num_elements + i, row = e / D::cols, col = e % D::cols;
        float sum = float(c.x[i]);
        for (int k = 0; k < A::cols; ++k) {
            const int ea = row * A::cols + k, eb = k * B::cols + col;
            sum += multiplicand(all[ea / A::num_elements].a->x[ea % A::num_elements])
                 * multiplicand(all[eb / B::num_elements].b->x[eb % B::num_elements]);
        }
        out[i] = sum;
    }
    cpu::warp_exchange(~0u, nullptr, 0, nullptr, cpu::JOIN, line);       // nobody may overwrite a, b before all have read
    for (int i = 0; i < D::num_elements; ++i) d.x[i] = out[i];
}
}
