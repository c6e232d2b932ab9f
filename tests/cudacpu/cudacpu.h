// CUDA's device language in terms of the emulator: g++ includes this file before a kernel's own source, which stays as it is.
// One OS thread runs all CUDA threads as fibers; they switch only inside barriers and warp operations and at their end
// (cudacpu.cpp).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <math.h>               // with <cmath> alone, abs(float) would be C's abs(int) and exp(float) be exp(double)
#include <stdlib.h>
#include <type_traits>
#include <utility>
#include <vector_functions.h>   // NVIDIA's own, fit for host compilers: float4, make_float4, dim3
#include <vector_types.h>
#undef __launch_bounds__
#undef __forceinline__
#undef __noinline__
#undef __shared__
#undef __device__
#undef __global__
#undef __constant__
#undef __host__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __noinline__
#define __device__
#define __host__
#define __global__
#define __constant__ static
#define __shared__ thread_local // static storage of a block: the library's TLS segment, poisoned before each block

struct __half;                  // complete in kernels that include cuda_fp16.h

#pragma GCC visibility push(default)
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cpu {
#define NOHOOK __attribute__((noinline, no_sanitize("thread")))   // accesses that the race check does not see as plain ones
void block_sync(int line, int site);
// The live lanes of `mask` meet; the last one to arrive hands every lane its result.
// source >= 0: that lane's `in`; GATHER: everybody's, out[32]; JOIN: nothing; SYNC: nothing, and it orders memory.
enum { GATHER = -1, SYNC = -2, JOIN = -3 };
void warp_exchange(unsigned mask, const void* in, unsigned size, void* out, int source, int line);
void* dynamic_shared();
int lane();
void fence();
void atomic_access(void* p, size_t size, void* pc);
struct Copy { void* to; const void* from; size_t bytes, zeros; int group; };
extern bool eager_copies;
void push_copy(Copy);
void commit_copies();
bool pop_copy(size_t prior, Copy&);
}
#pragma GCC visibility pop

namespace cpu {
template <class T> T shuffle(unsigned mask, T value, int source, int line)
{
    static_assert(std::is_trivially_copyable_v<T>);
    T out;
    warp_exchange(mask, &value, sizeof value, &out, source, line);
    return out;
}
template <class T> NOHOOK T exchange(T* p, T (*f)(T, T), T value)
{
    atomic_access(p, sizeof *p, __builtin_return_address(0));
    const T old = *p;
    *p = f(old, value);
    return old;
}
template <class T> NOHOOK T compare_exchange(T* p, T expected, T value)
{
    atomic_access(p, sizeof *p, __builtin_return_address(0));
    const T old = *p;
    if (old == expected) *p = value;
    return old;
}

// A kernel called through CUDA's void** arguments, and its signature in NumPy's type characters for the checks in Python.
template <class T> constexpr char type_char()
{
    using U = std::remove_cv_t<T>;
    if constexpr (std::is_pointer_v<U>) return 'P';
    else if constexpr (std::is_same_v<U, float>) return 'f';
    else if constexpr (std::is_same_v<U, double>) return 'd';
    else if constexpr (std::is_same_v<U, __half>) return 'e';
    else if constexpr (std::is_same_v<U, bool>) return '?';
    else if constexpr (std::is_integral_v<U>) return "?bh?i???q"[sizeof(U)] - (std::is_unsigned_v<U> ? 32 : 0);
    else return 'V';
}
template <class... A> struct Call {
    template <void (*K)(A...), size_t... I> static void go(void** a, std::index_sequence<I...>)
    { K(*static_cast<std::remove_cv_t<A>*>(a[I])...); }
    static const char* signature()     // parameters / what they point at / m(utable) or c(onst): "Pi/fi/mm" is (float*, int)
    {
        static const char text[] = {type_char<A>()..., '/', type_char<std::remove_pointer_t<A>>()..., '/',
                                    (std::is_const_v<std::remove_pointer_t<A>> ? 'c' : 'm')..., 0};
        return text;
    }
};
template <class... A> Call<A...> call_of(void (*)(A...)) { return {}; }
template <auto K> struct Entry {
    template <class... A> static void go(void (*)(A...), void** a)
    { Call<A...>::template go<K>(a, std::index_sequence_for<A...>{}); }
    static void run(void** a) { go(K, a); }
};
inline thread_local volatile char touch;   // writing it makes this library's TLS, and so its __shared__ variables, exist
}
#define CPU_EXPORT extern "C" __attribute__((visibility("default")))
#define CPU_ENTRY(n, ...) \
    CPU_EXPORT void cpu_run_##n(void** a) { if (a) cpu::Entry<&__VA_ARGS__>::run(a); else cpu::touch = 0; } \
    CPU_EXPORT const char* cpu_signature_##n() { return decltype(cpu::call_of(&__VA_ARGS__))::signature(); }

// ---- barriers and warp operations ----
#define __syncthreads() cpu::block_sync(__LINE__, __COUNTER__)
#define CPU_LINE int line = __builtin_LINE()
inline void __syncwarp(unsigned mask = ~0u, CPU_LINE) { cpu::warp_exchange(mask, nullptr, 0, nullptr, cpu::SYNC, line); }
template <class T> inline T __shfl_sync(unsigned mask, T v, int source, int width = 32, CPU_LINE)
{ return cpu::shuffle(mask, v, (cpu::lane() & ~(width - 1)) | (source & (width - 1)), line); }
template <class T> inline T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, CPU_LINE)
{
    const int lane = cpu::lane(), source = lane ^ bits;
    return cpu::shuffle(mask, v, (source & ~(width - 1)) <= (lane & ~(width - 1)) ? source : lane, line);
}
template <class T> inline T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, CPU_LINE)
{
    const int lane = cpu::lane(), source = lane + int(delta);
    return cpu::shuffle(mask, v, (lane & (width - 1)) + int(delta) < width ? source : lane, line);
}
template <class T> inline T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, CPU_LINE)
{
    const int lane = cpu::lane();
    return cpu::shuffle(mask, v, (lane & (width - 1)) >= int(delta) ? lane - int(delta) : lane, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CPU_LINE)
{
    bool mine = predicate != 0, all[32];
    cpu::warp_exchange(mask, &mine, 1, all, cpu::GATHER, line);
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i) votes |= unsigned(all[i]) << i;
    return votes;
}
inline int __any_sync(unsigned mask, int predicate, CPU_LINE) { return __ballot_sync(mask, predicate, line) != 0; }
inline int __all_sync(unsigned mask, int predicate, CPU_LINE) { return __ballot_sync(mask, !predicate, line) == 0; }
inline void __threadfence() { cpu::fence(); }
inline void __threadfence_block() {}

// ---- atomics: fibers do not preempt each other, so a plain read and write is one ----
#define CPU_ATOMIC(name, value) \
    template <class T> inline T name(T* p, std::type_identity_t<T> v) \
    { return cpu::exchange<T>(p, [](T a, T b) -> T { return value; }, v); }
CPU_ATOMIC(atomicAdd, a + b)
CPU_ATOMIC(atomicMax, a > b ? a : b)
CPU_ATOMIC(atomicMin, a < b ? a : b)
CPU_ATOMIC(atomicExch, (void(a), b))
template <class T> inline T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v)
{ return cpu::compare_exchange<T>(p, expected, v); }

// ---- arithmetic that <math.h> lacks ----
using std::max;
using std::min;
#define CPU_MIXED(R, A, B) \
    inline R min(A a, B b) { return std::min<R>(a, b); } \
    inline R max(A a, B b) { return std::max<R>(a, b); }
CPU_MIXED(unsigned, unsigned, int)
CPU_MIXED(unsigned, int, unsigned)
CPU_MIXED(double, double, float)
CPU_MIXED(double, float, double)
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float rsqrt(float x) { return 1.f / std::sqrt(x); }
inline double rsqrt(double x) { return 1. / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __saturatef(float x) { return std::min(std::max(x, 0.f), 1.f); }
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline void __stcs(T* p, std::type_identity_t<T> v) { *p = v; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class To, class From> inline To cpu_bits(From x)
{
    static_assert(sizeof(To) == sizeof(From));
    To out;
    std::memcpy(&out, &x, sizeof out);
    return out;
}
inline float __int_as_float(int x) { return cpu_bits<float>(x); }
inline int __float_as_int(float x) { return cpu_bits<int>(x); }
inline double __longlong_as_double(long long x) { return cpu_bits<double>(x); }
inline long long __double_as_longlong(double x) { return cpu_bits<long long>(x); }

// ---- cp.async (cuda_pipeline.h): even seeds copy as late as allowed, at the wait; odd seeds at once ----
inline void cpu_copy(const cpu::Copy& c)
{
    for (size_t i = 0; i < c.bytes; i += 4)
        static_cast<int*>(c.to)[i / 4] = i < c.bytes - c.zeros ? static_cast<const int*>(c.from)[i / 4] : 0;
}
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0)
{
    if (cpu::eager_copies) cpu_copy({to, from, bytes, zeros, 0});
    else cpu::push_copy({to, from, bytes, zeros, 0});
}
inline void __pipeline_commit() { cpu::commit_copies(); }
inline void __pipeline_wait_prior(size_t prior)
{
    for (cpu::Copy c; cpu::pop_copy(prior, c);) cpu_copy(c);
}
