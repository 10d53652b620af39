// SPDX-License-Identifier: Apache-2.0
//
// The kernels of householder.h on bfloat16 products: AVX-512's VDPBF16PS adds two products of bfloat16 numbers to a
// float32 sum in the time of one float32 multiply-add. Storage is bf16, the factors and the coefficients are rounded to
// bf16 where they enter a product; sums, coefficients and partial sums stay float32. For callers whose factors were
// bfloat16 in the first place.
//
// Numbers travel in pairs, a 32-bit word each:
//   left   [n / 2][whole vectors of r]   of features 2 k, 2 k + 1
//   right  [n / 32][r / 2][32]           of ranks 2 k, 2 k + 1
// What fills up a pair or a vector is zero, and only ever meets zeros or lanes that are not stored.
#include <immintrin.h>

#include "householder.h"
#include "householder_layout.h"
#include "scratch.h"

namespace frodkernels::cpu::FRODKERNELS_ISA {
namespace {

constexpr int kVec = 16;                       // float32 sums in a vector
constexpr int kPair = 32;                      // features that two vectors of sums cover
constexpr int64_t kSpan = 64;                  // features of the update and the sums at a time
constexpr int64_t kPanel = 256;                // features of the input at a time: with their part of `left` in L1
constexpr int64_t kPanelStride = kPanel + 32;  // rows a power of two apart would share cache sets

int64_t half_up(int64_t a) { return (a + 1) / 2; }

__m512 add_pairs(__m512 sum, uint32_t pair, __m512i row) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(int(pair)), (__m512bh)row);
}

// The mask of the first `count` of `lanes` lanes.
template <typename Mask>
Mask first_lanes(int64_t count, int lanes) {
  return count >= lanes ? Mask(~Mask(0)) : Mask((uint64_t(1) << count) - 1);
}

// 32 consecutive floats, as many as there are, rounded: pairs of neighbours.
__m512i rounded_pairs(const float* from, int64_t count) {
  const __m512 low = _mm512_maskz_loadu_ps(first_lanes<__mmask16>(count, 16), from);
  const __m512 high = _mm512_maskz_loadu_ps(first_lanes<__mmask16>(count > 16 ? count - 16 : 0, 16), from + 16);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

__m512i load_words(const void* from) { return _mm512_loadu_si512(from); }

// 16 features of storage.
__m512 widened(const uint16_t* from, __mmask16 mask) {
  const __m512i words = _mm512_maskz_cvtepu16_epi32(mask, _mm256_maskz_loadu_epi16(mask, from));
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(mask, words, 16));
}

// Pairs of two rows of 32: of their columns 0 to 15, and 16 to 31.
void interleave(__m512i one, __m512i two, uint32_t* to) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(one, low, two));
  _mm512_storeu_si512(to + kVec, _mm512_permutex2var_epi16(one, high, two));
}

// sum[i][v] += pairs[i * kRow + k * step] · b[k * b_step + v]
template <int64_t kRow, int M, int N>
__attribute__((always_inline)) inline void multiply_pairs(const uint32_t* pairs, int64_t step, const uint32_t* b,
                                                          int64_t b_step, int64_t count, __m512 (&sum)[M][N]) {
  for (int64_t k = 0; k < count; ++k) {
    __m512i row[N];
#pragma GCC unroll 2
    for (int v = 0; v < N; ++v) row[v] = load_words(b + v * kVec);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < N; ++v) sum[i][v] = add_pairs(sum[i][v], pairs[i * kRow], row[v]);
    }
    pairs += step;
    b += b_step;
  }
}

// Rows far apart defeat the prefetchers of the hardware: the next part of `count` rows, from t0 and feature f, is asked
// for while the one before it is worked on.
template <bool kWrite>
void fetch(const Rows& rows, int64_t t0, int64_t count, int64_t f, int64_t features) {
  constexpr int64_t kLine = 32;  // features
  for (int64_t t = t0; t < t0 + count; ++t) {
    const auto* row = static_cast<const uint16_t*>(rows.data) + t * rows.stride + f;
    for (int64_t i = 0; i < features; i += kLine) __builtin_prefetch(row + i, kWrite ? 1 : 0, 2);
  }
}

// Scratch of a tile.
struct Workspace {
  uint16_t* panel;        // [kGroup][kPanelStride] input
  float* sums;            // [tile][whole vectors of r] coefficients
  uint32_t* packed;       // [groups of tokens][r / 2][tokens of the group] coefficients, negated
  uint32_t* factors[2];   // [tile / 2][whole pairs of vectors of r]: pairs of tokens of coefficients, saved
  uint32_t* features[2];  // [tile / 2][kSpan]: pairs of tokens of x, input

  Workspace(int64_t tile, int64_t r) {
    const int64_t pairs = half_up(tile), wide = rounded_up(r, kPair);
    const int64_t sizes[] = {kGroup * kPanelStride / 2,
                             tile * wide,
                             tile * half_up(r),
                             pairs * wide,
                             pairs * wide,
                             pairs * kSpan,
                             pairs * kSpan};
    int64_t total = 0;
    for (int64_t size : sizes) total += rounded_up(size, kVec);
    auto* at = reinterpret_cast<uint32_t*>(scratch(0, size_t(total) * 4));
    void* parts[7];
    for (int i = 0; i < 7; ++i) {
      parts[i] = at;
      at += rounded_up(sizes[i], kVec);
    }
    panel = static_cast<uint16_t*>(parts[0]);
    sums = static_cast<float*>(parts[1]);
    packed = static_cast<uint32_t*>(parts[2]);
    for (int k = 0; k < 2; ++k) {
      factors[k] = static_cast<uint32_t*>(parts[3 + k]);
      features[k] = static_cast<uint32_t*>(parts[5 + k]);
    }
  }
};

// Coefficients of `count` tokens from t0: vectors run along the ranks.
void project(const Householder& a, const Workspace& work, int64_t t0, int64_t count) {
  const int64_t stride = rounded_up(a.r, kVec);
  const auto* in = static_cast<const uint16_t*>(a.in.data) + t0 * a.in.stride;
  const auto* left = static_cast<const uint32_t*>(a.left);
  std::memset(work.sums, 0, size_t(count * stride) * sizeof(float));
  for (int64_t f = 0; f < a.n_in; f += kPanel) {
    const int64_t features = smaller(kPanel, a.n_in - f), pairs = half_up(features);
    in_groups<kGroup>(count, [&](auto rows, int64_t t) {
      constexpr int kRows = rows.value;
      if (t + kRows < count) {
        fetch<false>(a.in, t0 + t + kRows, smaller(kGroup, count - t - kRows), f, features);
      } else {
        fetch<false>(a.in, t0, smaller(kGroup, count), f + kPanel, smaller(kPanel, a.n_in - f - kPanel));
      }
      for (int i = 0; i < kRows; ++i) {
        const uint16_t* from = in + (t + i) * a.in.stride + f;
        uint16_t* to = work.panel + i * kPanelStride;
        for (int64_t c = 0; c < features; c += kPair)
          _mm512_storeu_si512(to + c, _mm512_maskz_loadu_epi16(first_lanes<__mmask32>(features - c, kPair), from + c));
      }
      const auto* panel = reinterpret_cast<const uint32_t*>(work.panel);
      auto add = [&](auto vectors, int64_t j) {
        __m512 sum[kRows][vectors.value];
        float* to = work.sums + t * stride + j;
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
          for (int v = 0; v < vectors.value; ++v) sum[i][v] = _mm512_loadu_ps(to + i * stride + v * kVec);
        }
        multiply_pairs<kPanelStride / 2>(panel, 1, left + f / 2 * stride + j, stride, pairs, sum);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
          for (int v = 0; v < vectors.value; ++v) _mm512_storeu_ps(to + i * stride + v * kVec, sum[i][v]);
        }
      };
      int64_t j = 0;
      for (; j + kPair <= stride; j += kPair) add(std::integral_constant<int, 2>{}, j);
      if (j < stride) add(std::integral_constant<int, 1>{}, j);
    });
  }
  float* coefficients = static_cast<float*>(a.coefficients) + t0 * a.r;
  for (int64_t t = 0; t < count; ++t)
    std::memcpy(coefficients + t * a.r, work.sums + t * stride, size_t(a.r) * sizeof(float));
}

// What the update broadcasts: coefficients of a group of tokens side by side, rank pair after rank pair.
void pack_coefficients(const Householder& a, const Workspace& work, int64_t t0, int64_t count) {
  const float* from = static_cast<const float*>(a.coefficients) + t0 * a.r;
  const int64_t pairs = half_up(a.r);
  const __m512i sign = _mm512_set1_epi32(int(0x80008000u));
  in_groups<kGroup>(count, [&](auto rows, int64_t t) {
    for (int i = 0; i < rows.value; ++i) {
      for (int64_t j = 0; j < a.r; j += kPair) {
        uint32_t words[kVec];
        _mm512_storeu_si512(words, _mm512_xor_si512(rounded_pairs(from + (t + i) * a.r + j, a.r - j), sign));
        const int64_t here = smaller(kVec, pairs - j / 2);
        uint32_t* to = work.packed + t * pairs + j / 2 * rows.value + i;
        for (int64_t k = 0; k < here; ++k) to[k * rows.value] = words[k];
      }
    }
  });
}

// Features [f, f + width) of out = base − coefficients · rightᵀ
void update(const Householder& a, const Workspace& work, int64_t t0, int64_t count, int64_t f, int64_t width) {
  const int64_t pairs = half_up(a.r), base_stride = a.base.stride, out_stride = a.out.stride;
  const auto* base = static_cast<const uint16_t*>(a.base.data) + t0 * base_stride;
  auto* out = static_cast<uint16_t*>(a.out.data) + t0 * out_stride;
  const auto* right = static_cast<const uint32_t*>(a.right);
  in_groups<kGroup>(count, [&](auto rows, int64_t t) {
    constexpr int kRows = rows.value;
    for (int64_t c = f; c < f + width; c += kPair) {
      const auto mask = first_lanes<__mmask32>(f + width - c, kPair);
      const uint16_t* from = base + t * base_stride + c;
      uint16_t* to = out + t * out_stride + c;
      __m512 sum[kRows][2];
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        sum[i][0] = widened(from + i * base_stride, __mmask16(mask));
        sum[i][1] = widened(from + i * base_stride + kVec, __mmask16(mask >> kVec));
      }
      multiply_pairs<1>(work.packed + t * pairs, kRows, right + c * pairs, kPair, pairs, sum);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i)
        _mm512_mask_storeu_epi16(to + i * out_stride, mask, (__m512i)_mm512_cvtne2ps_pbh(sum[i][1], sum[i][0]));
    }
  });
}

// Pairs of tokens of coefficients [count, r], rounded.
void pair_tokens(const float* from, int64_t count, int64_t r, uint32_t* to) {
  const int64_t stride = rounded_up(r, kPair);
  for (int64_t t = 0; t < count; t += 2, to += stride) {
    for (int64_t j = 0; j < r; j += kPair) {
      const __m512i one = rounded_pairs(from + t * r + j, r - j);
      const __m512i two = t + 1 < count ? rounded_pairs(from + (t + 1) * r + j, r - j) : _mm512_setzero_si512();
      interleave(one, two, to + j);
    }
  }
}

// Pairs of tokens of features [f, f + width).
void pair_features(const Rows& rows, int64_t t0, int64_t count, int64_t f, int64_t width, uint32_t* to) {
  for (int64_t t = 0; t < count; t += 2) {
    const auto* one = static_cast<const uint16_t*>(rows.data) + (t0 + t) * rows.stride + f;
    for (int64_t c = 0; c < width; c += kPair, to += kPair) {
      const auto mask = first_lanes<__mmask32>(width - c, kPair);
      const auto both = t + 1 < count ? mask : __mmask32(0);
      interleave(_mm512_maskz_loadu_epi16(mask, one + c), _mm512_maskz_loadu_epi16(both, one + rows.stride + c), to);
    }
    to += kSpan - rounded_up(width, kPair);
  }
}

// partial [r][stride], `width` features from where it points: (+)= the sum of `terms` products over a tile's tokens.
void add_sums(const Workspace& work, int first, int terms, int64_t count, int64_t r, int64_t width, float* partial,
              int64_t stride, bool fresh) {
  const int64_t pairs = half_up(count), factor_stride = rounded_up(r, kPair);
  in_groups<kRanks>(r, [&](auto ranks, int64_t j) {
    constexpr int kHere = ranks.value;
    for (int64_t c = 0; c < width; c += kPair) {
      __m512 sum[kHere][2];
      float* to = partial + j * stride + c;
#pragma GCC unroll 16
      for (int i = 0; i < kHere; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v)
          sum[i][v] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(to + i * stride + v * kVec);
      }
      for (int k = first; k < first + terms; ++k)
        multiply_pairs<1>(work.factors[k] + j, factor_stride, work.features[k] + c, kSpan, pairs, sum);
#pragma GCC unroll 16
      for (int i = 0; i < kHere; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) _mm512_storeu_ps(to + i * stride + v * kVec, sum[i][v]);
      }
    }
  });
}

void run_tile(const Householder& a, const Workspace& work, int64_t split, int64_t t0, int64_t count, bool fresh) {
  if (a.project) project(a, work, t0, count);
  if (a.out.data != nullptr) pack_coefficients(a, work, t0, count);
  const bool sums_out = a.partial_out != nullptr, sums_in = a.partial_in != nullptr;
  const float* coefficients = static_cast<const float*>(a.coefficients) + t0 * a.r;
  const float* saved = static_cast<const float*>(a.saved) + t0 * a.r;
  if (sums_out) pair_tokens(coefficients, count, a.r, work.factors[0]);
  if (a.saved != nullptr) pair_tokens(saved, count, a.r, work.factors[1]);
  const int64_t out_stride = partial_stride(a.n_out), in_stride = partial_stride(a.n_in);
  for (int64_t f = 0; f < a.n_out && (sums_out || a.out.data != nullptr); f += kSpan) {
    const int64_t width = smaller(kSpan, a.n_out - f), next = smaller(kSpan, a.n_out - f - width);
    if (a.out.data != nullptr) fetch<true>(a.out, t0, count, f + width, next);
    if (a.out.data != nullptr && a.base.data != a.in.data) fetch<false>(a.base, t0, count, f + width, next);
    if (sums_out) {
      fetch<false>(a.x, t0, count, f + width, next);
      pair_features(a.x, t0, count, f, width, work.features[0]);
      if (a.joint) pair_features(a.in, t0, count, f, width, work.features[1]);
      float* partial = static_cast<float*>(a.partial_out) + split * a.r * out_stride + f;
      add_sums(work, 0, a.joint ? 2 : 1, count, a.r, width, partial, out_stride, fresh);
    }
    if (a.out.data != nullptr) update(a, work, t0, count, f, width);
  }
  for (int64_t f = 0; f < a.n_in && sums_in; f += kSpan) {
    const int64_t width = smaller(kSpan, a.n_in - f);
    pair_features(a.in, t0, count, f, width, work.features[1]);
    float* partial = static_cast<float*>(a.partial_in) + split * a.r * in_stride + f;
    add_sums(work, 1, 1, count, a.r, width, partial, in_stride, fresh);
  }
}

void run(const Householder& a, int64_t begin, int64_t end) {
  const Workspace work(a.tile, a.r);
  for (int64_t split = begin; split < end; ++split) {
    const int64_t first = a.first_tile(split), last = a.first_tile(split + 1);
    for (int64_t which = first; which < last; ++which) {
      const int64_t t0 = which * a.tile;
      run_tile(a, work, split, t0, smaller(a.tile, a.T - t0), which == first);
    }
  }
}

int64_t left_size(Scalar, int64_t n, int64_t r) { return half_up(n) * rounded_up(r, kVec); }
int64_t right_size(Scalar, int64_t n, int64_t r) { return rounded_up(n, kUnit) * half_up(r); }

void pack_left(Scalar, const void* source, void* target, int64_t n, int64_t r, int64_t begin, int64_t end) {
  const float* from = static_cast<const float*>(source);
  const int64_t stride = rounded_up(r, kVec);
  for (int64_t i = begin; i < end; i += 2) {
    uint32_t* to = static_cast<uint32_t*>(target) + i / 2 * stride;
    for (int64_t j = 0; j < r; j += kPair) {
      const __m512i one = rounded_pairs(from + i * r + j, r - j);
      const __m512i two = i + 1 < n ? rounded_pairs(from + (i + 1) * r + j, r - j) : _mm512_setzero_si512();
      uint32_t words[kPair];
      interleave(one, two, words);
      std::memcpy(to + j, words, size_t(smaller(kPair, stride - j)) * 4);
    }
  }
}

void pack_right(Scalar, const void* source, void* target, int64_t n, int64_t r, int64_t begin, int64_t end) {
  const float* from = static_cast<const float*>(source);
  const int64_t pairs = half_up(r);
  for (int64_t i = begin; i < rounded_up(end, kPair); i += kVec) {
    uint32_t* panel = static_cast<uint32_t*>(target) + i / kPair * kPair * pairs + i % kPair;
    for (int64_t k = 0; k < pairs; k += kVec) {
      vu words[kVec];
#pragma GCC unroll 16
      for (int l = 0; l < kVec; ++l)
        words[l] = i + l < n ? bits<vu>(rounded_pairs(from + (i + l) * r + 2 * k, r - 2 * k)) : vu{};
      transpose_words(words);
      for (int64_t l = 0; l < smaller(kVec, pairs - k); ++l) store(panel + (k + l) * kPair, words[l]);
    }
  }
}

void reduce(Scalar, const void* partial, void* sum, int64_t splits, int64_t n, int64_t r, int64_t begin, int64_t end) {
  reduce_as<F32>(partial, sum, splits, n, r, begin, end);
}

}  // namespace

extern const HouseholderKernels kHouseholderKernels;
const HouseholderKernels kHouseholderKernels = {left_size, right_size, pack_left, pack_right, run, reduce};

}  // namespace frodkernels::cpu::FRODKERNELS_ISA
