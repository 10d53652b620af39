// SPDX-License-Identifier: Apache-2.0
//
// CUDA's device functions for g++: bit tricks, conversions, arithmetic that the CUDA headers offer only to nvcc, cached
// loads and atomics. Fast-math variants compute the exact function: their error is the GPU's own.
#pragma once
#include <cmath>
#include <cstring>

#include "simt/language.h"

// --- bits
// --------------------------------------------------------------------------------------------------------------
SIMT_INLINE int __popc(unsigned v) { return __builtin_popcount(v); }
SIMT_INLINE int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
SIMT_INLINE int __ffs(int v) { return __builtin_ffs(v); }
SIMT_INLINE int __ffsll(long long v) { return __builtin_ffsll(v); }
SIMT_INLINE int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
SIMT_INLINE int __clzll(long long v) { return v ? __builtin_clzll(static_cast<unsigned long long>(v)) : 64; }
SIMT_INLINE unsigned __brev(unsigned v) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (v >> i & 1u) << (31 - i);
  return r;
}
SIMT_INLINE unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> (4 * i) & 0xf;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (pick & 7))) & 0xff;
    if (pick & 8) byte = byte & 0x80 ? 0xff : 0;  // PTX prmt: the fourth bit repeats the sign
    r |= byte << (8 * i);
  }
  return r;
}
SIMT_INLINE unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (by & 31) >> 32);
}
SIMT_INLINE unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (by & 31));
}
SIMT_INLINE int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
SIMT_INLINE unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}

namespace simt {
template <class To, class From>
SIMT_INLINE To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}
}  // namespace simt
SIMT_INLINE unsigned __float_as_uint(float v) { return simt::bits<unsigned>(v); }
SIMT_INLINE int __float_as_int(float v) { return simt::bits<int>(v); }
SIMT_INLINE float __uint_as_float(unsigned v) { return simt::bits<float>(v); }
SIMT_INLINE float __int_as_float(int v) { return simt::bits<float>(v); }
SIMT_INLINE long long __double_as_longlong(double v) { return simt::bits<long long>(v); }
SIMT_INLINE double __longlong_as_double(long long v) { return simt::bits<double>(v); }

// --- arithmetic
// --------------------------------------------------------------------------------------------------------
SIMT_INLINE float __fadd_rn(float a, float b) { return a + b; }
SIMT_INLINE float __fmul_rn(float a, float b) { return a * b; }
SIMT_INLINE double __dadd_rn(double a, double b) { return a + b; }
SIMT_INLINE double __dmul_rn(double a, double b) { return a * b; }
SIMT_INLINE float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
SIMT_INLINE float __fdiv_rn(float a, float b) { return a / b; }
SIMT_INLINE float __fdividef(float a, float b) { return a / b; }
SIMT_INLINE float __frcp_rn(float v) { return 1.0f / v; }
SIMT_INLINE float __fsqrt_rn(float v) { return std::sqrt(v); }
SIMT_INLINE float __expf(float v) { return std::exp(v); }
SIMT_INLINE float __logf(float v) { return std::log(v); }
SIMT_INLINE float __saturatef(float v) { return v > 0.0f ? (v < 1.0f ? v : 1.0f) : 0.0f; }
SIMT_INLINE float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
SIMT_INLINE int __float2int_rn(float v) { return static_cast<int>(std::nearbyint(v)); }
SIMT_INLINE int __float2int_rz(float v) { return static_cast<int>(v); }
SIMT_INLINE int __float2int_rd(float v) { return static_cast<int>(std::floor(v)); }
SIMT_INLINE int __float2int_ru(float v) { return static_cast<int>(std::ceil(v)); }
SIMT_INLINE float __int2float_rn(int v) { return static_cast<float>(v); }
SIMT_INLINE float __uint2float_rn(unsigned v) { return static_cast<float>(v); }
using std::fma;
using std::fmaf;

// CUDA's min and max take mixed arithmetic types.
template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
SIMT_INLINE constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
SIMT_INLINE constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

// Fused multiply-add of the 16-bit types: the product and the sum are exact in double, then one rounding.
SIMT_INLINE __half __hfma(__half a, __half b, __half c) {
  return __double2half(static_cast<double>(__half2float(a)) * __half2float(b) + __half2float(c));
}
SIMT_INLINE __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return __double2bfloat16(static_cast<double>(__bfloat162float(a)) * __bfloat162float(b) + __bfloat162float(c));
}
SIMT_INLINE __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return __halves2half2(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y));
}
SIMT_INLINE __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return __halves2bfloat162(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y));
}

[[noreturn]] SIMT_INLINE void __trap() { simt::fail("__trap"); }

// --- memory
// ------------------------------------------------------------------------------------------------------------
namespace gpu {

// One access of sizeof(V) bytes; g++ would split a plain copy of a vector type in two.
template <class V>
SIMT_INLINE V load(const void* from) {
#if defined(SIMT_CHECK)
  V value;
  simt::load(&value, from, sizeof(V));
  return value;
#else
  return *static_cast<const V*>(from);
#endif
}

template <class V>
SIMT_INLINE void store(void* to, V value) {
#if defined(SIMT_CHECK)
  simt::store(to, &value, sizeof(V));
#else
  *static_cast<V*>(to) = value;
#endif
}

}  // namespace gpu

#define SIMT_CACHED_LOAD(name)     \
  template <class T>               \
  SIMT_INLINE T name(const T* p) { \
    return gpu::load<T>(p);        \
  }
#define SIMT_CACHED_STORE(name)          \
  template <class T>                     \
  SIMT_INLINE void name(T* p, T value) { \
    gpu::store<T>(p, value);             \
  }
SIMT_CACHED_LOAD(__ldg)
SIMT_CACHED_LOAD(__ldca)
SIMT_CACHED_LOAD(__ldcg)
SIMT_CACHED_LOAD(__ldcs)
SIMT_CACHED_LOAD(__ldcv)
SIMT_CACHED_LOAD(__ldlu)
SIMT_CACHED_STORE(__stcg)
SIMT_CACHED_STORE(__stcs)
SIMT_CACHED_STORE(__stwb)
SIMT_CACHED_STORE(__stwt)
#undef SIMT_CACHED_LOAD
#undef SIMT_CACHED_STORE

// --- atomics: right for one OS thread or many
// --------------------------------------------------------------------------
namespace simt {
template <class T, class Change>
SIMT_INLINE T atomic(T* p, Change change) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "atomics work on 2, 4 or 8 bytes");
  atomic_begin(p, sizeof(T));
  T before;
  atomic_read(p, sizeof(T), &before);
  for (;;) {
    const T after = change(before);
    if (atomic_swap(p, sizeof(T), &before, &after)) return before;
  }
}
}  // namespace simt

template <class T>
SIMT_INLINE T atomicAdd(T* p, T v) {
  return simt::atomic(p, [v](T old) { return static_cast<T>(old + v); });
}
SIMT_INLINE __half2 atomicAdd(__half2* p, __half2 v) {
  return simt::atomic(p, [v](__half2 old) { return __hadd2(old, v); });
}
SIMT_INLINE __nv_bfloat162 atomicAdd(__nv_bfloat162* p, __nv_bfloat162 v) {
  return simt::atomic(p, [v](__nv_bfloat162 old) { return __hadd2(old, v); });
}
template <class T>
SIMT_INLINE T atomicSub(T* p, T v) {
  return simt::atomic(p, [v](T old) { return static_cast<T>(old - v); });
}
template <class T>
SIMT_INLINE T atomicMax(T* p, T v) {
  return simt::atomic(p, [v](T old) { return old > v ? old : v; });
}
template <class T>
SIMT_INLINE T atomicMin(T* p, T v) {
  return simt::atomic(p, [v](T old) { return old < v ? old : v; });
}
template <class T>
SIMT_INLINE T atomicExch(T* p, T v) {
  return simt::atomic(p, [v](T) { return v; });
}
template <class T>
SIMT_INLINE T atomicAnd(T* p, T v) {
  return simt::atomic(p, [v](T old) { return static_cast<T>(old & v); });
}
template <class T>
SIMT_INLINE T atomicOr(T* p, T v) {
  return simt::atomic(p, [v](T old) { return static_cast<T>(old | v); });
}
template <class T>
SIMT_INLINE T atomicXor(T* p, T v) {
  return simt::atomic(p, [v](T old) { return static_cast<T>(old ^ v); });
}
template <class T>
SIMT_INLINE T atomicCAS(T* p, T expected, T v) {
  return simt::atomic(p, [expected, v](T old) { return old == expected ? v : old; });
}
