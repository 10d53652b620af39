// SPDX-License-Identifier: Apache-2.0
//
// Vectors of one ISA level, and how each storage type enters and leaves them.
//
// Compiled once per level with -DFRODKERNELS_ISA=portable|avx2|avx512; everything lives in a namespace of that name, so
// that no symbol is shared between objects built with different instruction sets (the linker would keep one copy, and
// portable code could jump into AVX-512).
//
// A "chunk" is one vector register of tile bytes. A storage type says what a tile holds, how a chunk of it becomes
// kVecs vectors of accumulators, and back:
//   F32   tile float     kVecs 1
//   F16   tile float     kVecs 1   (converted when the tile is packed)
//   BF16  tile bf16      kVecs 2   even tokens in one vector, odd tokens in the other: two ALU ops a chunk, no shuffle
//   F64   tile double    kVecs 1
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "scalars.h"

#ifndef FRODKERNELS_ISA
#error "compile with -DFRODKERNELS_ISA=portable, avx2 or avx512"
#endif

namespace frodkernels::cpu::FRODKERNELS_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;  // SSE2, NEON
#endif
constexpr int kLanes = kBytes / 4;

using vf = float __attribute__((vector_size(kBytes)));
using vd = double __attribute__((vector_size(kBytes)));
using vu = uint32_t __attribute__((vector_size(kBytes)));
using vi = int32_t __attribute__((vector_size(kBytes)));
using vl = int64_t __attribute__((vector_size(kBytes)));
using vs = uint16_t __attribute__((vector_size(kBytes)));
using vm = int16_t __attribute__((vector_size(kBytes)));

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }  // std::min would be a symbol shared by levels

template <typename V, typename T>
inline V load(const T* p) {  // any alignment
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <typename V, typename T>
inline void store(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}
template <typename To, typename From>
inline To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &v, sizeof(To));
  return to;
}

// Lane patterns as compile-time vectors: mask(lane) for lane = 0, 1, ...
template <typename Mask, typename F>
inline Mask lanes(F f) {
  Mask m;
  for (int i = 0; i < int(sizeof(Mask) / sizeof(m[0])); ++i) m[i] = f(i);
  return m;
}

// Sums of a set of vectors, pair by pair, first within 16 bytes and then of those. kWithin: [a0 + a2, b0 + b2, a1 + a3,
// b1 + b3] of each 16 bytes, or of pairs of 8 bytes [a0 + a1, b0 + b1]; else of neighbouring 16 bytes of a, then of b.
// Shuffles within 16 bytes, and of whole ones, are the cheapest there are.
template <typename V, typename Mask, int kEach, bool kWithin>
[[gnu::always_inline]] inline V pair_sums(V a, V b) {
  constexpr int kCount = int(sizeof(V) / sizeof(a[0])), kBlock = 16 / int(sizeof(a[0]));
  const auto place = [](int l, int second) {
    if (kWithin) {  // kEach neighbours at a time, from a and b in turn
      const int k = l % kBlock, half = kBlock / 2;
      return l / kBlock * kBlock + k / (2 * kEach) * kEach + k % kEach + k / kEach % 2 * kCount + second * half;
    }
    const int from = 2 * (l / kBlock) + second;  // of the blocks of a and b in a row
    return from * kBlock + l % kBlock;
  };
  const Mask first = lanes<Mask>([&](int l) { return place(l, 0); });
  const Mask second = lanes<Mask>([&](int l) { return place(l, 1); });
  return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, second);
}

// rows[k] -> lane k of the result is the sum of rows[k]; the tree is the same for every k.
template <typename V, typename Mask, int kCount>
[[gnu::always_inline]] inline V sum_each(V (&rows)[kCount]) {
  constexpr int kBlock = 16 / int(sizeof(rows[0][0]));
#pragma GCC unroll 8
  for (int width = kCount; width > 1; width /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < width / 2; ++i) {
      V& to = rows[i];
      if (width == kCount) {
        to = pair_sums<V, Mask, 1, true>(rows[2 * i], rows[2 * i + 1]);
      } else if (kBlock == 4 && 2 * width == kCount) {
        to = pair_sums<V, Mask, 2, true>(rows[2 * i], rows[2 * i + 1]);
      } else {
        to = pair_sums<V, Mask, 1, false>(rows[2 * i], rows[2 * i + 1]);
      }
    }
  }
  return rows[0];
}

// Transpose a kLanes x kLanes block of 32-bit words held in registers: first every 4 x 4 block, by shuffles within
// 16 bytes (of words, then of pairs of them), then of whole blocks.
inline void transpose_words(vu (&r)[kLanes]) {
  constexpr int kBlocks = kLanes / 4;
  const vi word_low = lanes<vi>([](int l) { return l / 4 * 4 + l % 4 / 2 + l % 2 * kLanes; });
  const vi word_high = lanes<vi>([](int l) { return l / 4 * 4 + l % 4 / 2 + l % 2 * kLanes + 2; });
  const vl pair_low = lanes<vl>([](int l) { return l / 2 * 2 + l % 2 * (kLanes / 2); });
  const vl pair_high = lanes<vl>([](int l) { return l / 2 * 2 + l % 2 * (kLanes / 2) + 1; });
  auto pairs = [](vu a, vu b, vl mask) { return bits<vu>(__builtin_shuffle(bits<vl>(a), bits<vl>(b), mask)); };
#pragma GCC unroll 4
  for (int q = 0; q < kLanes; q += 4) {
    const vu a = __builtin_shuffle(r[q], r[q + 1], word_low), b = __builtin_shuffle(r[q], r[q + 1], word_high);
    const vu c = __builtin_shuffle(r[q + 2], r[q + 3], word_low), d = __builtin_shuffle(r[q + 2], r[q + 3], word_high);
    r[q] = pairs(a, c, pair_low);
    r[q + 1] = pairs(a, c, pair_high);
    r[q + 2] = pairs(b, d, pair_low);
    r[q + 3] = pairs(b, d, pair_high);
  }
  // Word k of block m in row 4 q + k is now one of column 4 m + k; block m goes to block q of row 4 m + k.
  const vi half_low = lanes<vi>([](int l) { return l % (kLanes / 2) + l / (kLanes / 2) * kLanes; });
  const vi half_high = lanes<vi>([](int l) { return l % (kLanes / 2) + l / (kLanes / 2) * kLanes + kLanes / 2; });
  if constexpr (kBlocks == 2) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const vu a = r[k], b = r[4 + k];
      r[k] = __builtin_shuffle(a, b, half_low);
      r[4 + k] = __builtin_shuffle(a, b, half_high);
    }
  } else if constexpr (kBlocks == 4) {
    const vi even = lanes<vi>([](int l) { return l % 4 + l / 4 * 8; });
    const vi odd = lanes<vi>([](int l) { return l % 4 + l / 4 * 8 + 4; });
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const vu a = __builtin_shuffle(r[k], r[4 + k], half_low), b = __builtin_shuffle(r[k], r[4 + k], half_high);
      const vu c = __builtin_shuffle(r[8 + k], r[12 + k], half_low),
               d = __builtin_shuffle(r[8 + k], r[12 + k], half_high);
      r[k] = __builtin_shuffle(a, c, even);
      r[4 + k] = __builtin_shuffle(a, c, odd);
      r[8 + k] = __builtin_shuffle(b, d, even);
      r[12 + k] = __builtin_shuffle(b, d, odd);
    }
  }
}

// Transpose a block of 2 kLanes x 2 kLanes 16-bit numbers: put(k, column k of what row(0), row(1), ... give), by words
// that pair two rows. Every row is read once and every column put once, as a whole.
template <typename Row, typename Put>
inline void transpose_pairs(Row row, Put put) {
  const vm first = lanes<vm>([](int l) { return l / 8 * 8 + l % 8 / 2 + l % 2 * 2 * kLanes; });
  const vm second = lanes<vm>([](int l) { return l / 8 * 8 + l % 8 / 2 + l % 2 * 2 * kLanes + 4; });
  vu low[kLanes], high[kLanes];
#pragma GCC unroll 16
  for (int l = 0; l < kLanes; ++l) {
    const vs a = row(2 * l), b = row(2 * l + 1);
    low[l] = bits<vu>(__builtin_shuffle(a, b, first));
    high[l] = bits<vu>(__builtin_shuffle(a, b, second));
  }
  transpose_words(low);
  transpose_words(high);
#pragma GCC unroll 16
  for (int l = 0; l < kLanes; ++l) {
    put(l / 4 * 8 + l % 4, bits<vs>(low[l]));
    put(l / 4 * 8 + l % 4 + 4, bits<vs>(high[l]));
  }
}

// float32 -> bfloat16 in the high half of each word, to nearest even; NaN stays NaN.
inline vu round_bf16(vf x) {
  const vu w = bits<vu>(x);
  const vu rounded = w + 0x7fffu + ((w >> 16) & 1u);
  return (x != x ? w | 0x00400000u : rounded) & 0xffff0000u;
}

inline vf halves_to_floats(const uint16_t* p) {
#if defined(__AVX512F__)
  return bits<vf>(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__) && defined(__F16C__)
  return bits<vf>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(p[i]);
  return v;
#endif
}

inline void floats_to_halves(vf v, uint16_t* p) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(v[i]);
#endif
}

struct F32 {
  using scalar = float;  // in tensors
  using tile = float;    // in packed tiles
  using acc = float;
  using Vec = vf;
  using Mask = vi;
  static constexpr int kVecs = 1;
  static constexpr int kTokens = kLanes;  // a chunk's
  static constexpr int kVecLanes = kLanes;
  static void unpack(const tile* p, Vec* out) { out[0] = load<vf>(p); }
  static void pack(const scalar* from, tile* to) { store(to, load<vf>(from)); }
  static void write(const Vec* v, scalar* to) { store(to, v[0]); }
  static vu words(const scalar* token) { return load<vu>(token); }
};

struct F16 {
  using scalar = uint16_t;
  using tile = float;
  using acc = float;
  using Vec = vf;
  using Mask = vi;
  static constexpr int kVecs = 1;
  static constexpr int kTokens = kLanes;
  static constexpr int kVecLanes = kLanes;
  static void unpack(const tile* p, Vec* out) { out[0] = load<vf>(p); }
  static void pack(const scalar* from, tile* to) { store(to, halves_to_floats(from)); }
  static void write(const Vec* v, scalar* to) { floats_to_halves(v[0], to); }
  static vu words(const scalar* token) { return bits<vu>(halves_to_floats(token)); }
};

struct BF16 {
  using scalar = uint16_t;
  using tile = uint16_t;
  using acc = float;
  using Vec = vf;
  using Mask = vi;
  static constexpr int kVecs = 2;
  static constexpr int kTokens = 2 * kLanes;
  static constexpr int kVecLanes = kLanes;
  static void unpack(const tile* p, Vec* out) {
    const vu w = load<vu>(p);
    out[0] = bits<vf>(w << 16);
    out[1] = bits<vf>(w & 0xffff0000u);
  }
  static void pack(const scalar* from, tile* to) { store(to, load<vu>(from)); }
  static void write(const Vec* v, scalar* to) { store(to, (round_bf16(v[0]) >> 16) | round_bf16(v[1])); }
};

struct F64 {
  using scalar = double;
  using tile = double;
  using acc = double;
  using Vec = vd;
  using Mask = vl;
  static constexpr int kVecs = 1;
  static constexpr int kTokens = kLanes / 2;
  static constexpr int kVecLanes = kLanes / 2;
  static void unpack(const tile* p, Vec* out) { out[0] = load<vd>(p); }
  static void pack(const scalar* from, tile* to) { store(to, load<vd>(from)); }
  static void write(const Vec* v, scalar* to) { store(to, v[0]); }
};

// f(tag of the storage type)
template <typename F>
inline void by_storage(Scalar type, F f) {
  switch (type) {
    case Scalar::kF32:
      return f(F32{});
    case Scalar::kF64:
      return f(F64{});
    case Scalar::kBF16:
      return f(BF16{});
    case Scalar::kF16:
      return f(F16{});
  }
}

}  // namespace frodkernels::cpu::FRODKERNELS_ISA
