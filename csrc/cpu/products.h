// SPDX-License-Identifier: Apache-2.0
//
// Register-blocked products over rows with unit stride, for one ISA level: a block of accumulators takes rank-one
// updates, a few broadcast numbers times a few vectors. The dense kernels are made of `multiply`.
#pragma once
#include <type_traits>

#include "simd.h"

namespace frodkernels::cpu::FRODKERNELS_ISA {

// Rows x vectors of accumulators that fit the registers beside their operands: 32 vectors with AVX-512, 16 below.
constexpr int kGroup = kBytes == 64 ? 12 : 6;  // tokens, two vectors each
constexpr int kRanks = kBytes == 64 ? 8 : 4;   // ranks, two vectors each

// Storage of the accumulation type of S.
template <typename S>
struct WideOf {
  using type = F32;
};
template <>
struct WideOf<F64> {
  using type = F64;
};
template <typename S>
using Wide = typename WideOf<S>::type;

using vh = uint16_t __attribute__((vector_size(kBytes / 2)));

// One vector of accumulators from consecutive elements, and back.
template <typename S>
inline typename S::Vec widen(const typename S::scalar* p) {
  typename S::Vec v;
  S::unpack(p, &v);
  return v;
}
template <>
inline vf widen<BF16>(const uint16_t* p) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const vu words =
      bits<vu>(_mm256_cvtepu16_epi32(load<__m128i>(p)));  // one instruction, of which the compiler makes four
#else
  const vu words = __builtin_convertvector(load<vh>(p), vu);
#endif
  return bits<vf>(words << 16);
}
template <>
inline vf widen<F16>(const uint16_t* p) {
  return halves_to_floats(p);
}

template <typename S>
inline void narrow(typename S::Vec v, typename S::scalar* p) {
  S::write(&v, p);
}
template <>
inline void narrow<BF16>(vf v, uint16_t* p) {
  const vu words = round_bf16(v) >> 16;
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i w = bits<__m256i>(words);  // the compiler's own way takes three times as many instructions
  store(p, _mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
#else
  store(p, __builtin_convertvector(words, vh));
#endif
}

// The first `count` of them: what lies past a row is neither read nor written. Lanes past it are zero.
template <typename S>
inline typename S::Vec widen_some(const typename S::scalar* p, int64_t count) {
  typename S::scalar all[S::kVecLanes] = {};
  std::memcpy(all, p, size_t(count) * sizeof(all[0]));
  return widen<S>(all);
}
template <typename S>
inline void narrow_some(typename S::Vec v, typename S::scalar* p, int64_t count) {
  typename S::scalar all[S::kVecLanes];
  narrow<S>(v, all);
  std::memcpy(p, all, size_t(count) * sizeof(all[0]));
}

// `count` elements of a row as accumulators, of which whole vectors are written; and back, exactly `count`.
template <typename S>
inline void widen_row(const typename S::scalar* from, typename Wide<S>::scalar* to, int64_t count) {
  int64_t i = 0;
  for (; i + S::kVecLanes <= count; i += S::kVecLanes) store(to + i, widen<S>(from + i));
  if (i < count) store(to + i, widen_some<S>(from + i, count - i));
}
template <typename S>
inline void narrow_row(const typename Wide<S>::scalar* from, typename S::scalar* to, int64_t count) {
  using Vec = typename S::Vec;
  int64_t i = 0;
  for (; i + S::kVecLanes <= count; i += S::kVecLanes) narrow<S>(load<Vec>(from + i), to + i);
  if (i == count) return;
  typename Wide<S>::scalar rest[S::kVecLanes] = {};
  std::memcpy(rest, from + i, size_t(count - i) * sizeof(rest[0]));
  narrow_some<S>(load<Vec>(rest), to + i, count - i);
}

// sum[i][v] += sum_k a[i * kRow + k * a_step] * b[k * b_step + lanes of v],   k < count; b is of storage type B
template <typename B, int kRow, int M, int N, typename Vec, typename Acc>
__attribute__((always_inline)) inline void multiply(const Acc* a, int64_t a_step, const typename B::scalar* b,
                                                    int64_t b_step, int64_t count, Vec (&sum)[M][N]) {
  for (int64_t k = 0; k < count; ++k) {
    Vec row[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) row[v] = widen<B>(b + v * B::kVecLanes);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const Acc factor = a[i * kRow];
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) sum[i][v] += factor * row[v];
    }
    a += a_step;
    b += b_step;
  }
}

// f(rows, first row): `count` rows in groups of kMost, then of 4, then one by one.
template <int kMost, typename F>
__attribute__((always_inline)) inline void in_groups(int64_t count, F f) {
  int64_t i = 0;
  for (; i + kMost <= count; i += kMost) f(std::integral_constant<int, kMost>{}, i);
  if constexpr (kMost > 4) {
    for (; i + 4 <= count; i += 4) f(std::integral_constant<int, 4>{}, i);
  }
  for (; i < count; ++i) f(std::integral_constant<int, 1>{}, i);
}

}  // namespace frodkernels::cpu::FRODKERNELS_ISA
