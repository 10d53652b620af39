// SPDX-License-Identifier: Apache-2.0
//
// Dense blocks of a sampled product on bfloat16 products: AVX-512's VDPBF16PS adds two products of bfloat16 numbers to
// a float32 sum in the time of one float32 multiply-add. A word is two tokens of a feature.
#include <immintrin.h>

#include "sampled_blocks.h"
#include "simd.h"

namespace frodkernels::cpu::FRODKERNELS_ISA {
namespace {

struct Pairs {
  using acc = float;
  using word = uint32_t;
  static constexpr int64_t kTokens = 2;
  static constexpr int kVecs = 3;
  static constexpr int64_t kRows = 8, kWidth = kVecs * kLanes;

  // Words of tokens t and t + 1 of 32 features, which lie side by side.
  static void interleave(const uint16_t* one, const uint16_t* two, uint32_t* to) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i a = _mm512_loadu_si512(one), b = _mm512_loadu_si512(two);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
    _mm512_storeu_si512(to + kLanes, _mm512_permutex2var_epi16(a, high, b));
  }

  static void pack(const Features& x, int64_t f0, int64_t features, int64_t width, int64_t t0, int64_t tokens,
                   word* to) {
    const auto* from = static_cast<const uint16_t*>(x.data) + f0 * x.row + t0 * x.token;
    const int64_t pairs = tokens / 2, words = (tokens + 1) / 2;
    int64_t done = 0;  // features that are packed, of the whole pairs
    if (x.row == 1) {
      done = features / (2 * kLanes) * (2 * kLanes);
      for (int64_t k = 0; k < pairs; ++k) {
        const uint16_t* row = from + 2 * k * x.token;
        for (int64_t f = 0; f < done; f += 2 * kLanes) interleave(row + f, row + x.token + f, to + k * kStride + f);
      }
    } else if (x.token == 1) {
      for (; done + kLanes <= features; done += kLanes) {
        const uint16_t* block = from + done * x.row;
        int64_t k = 0;
        for (; k + kLanes <= pairs; k += kLanes) {
          vu r[kLanes];
#pragma GCC unroll 16
          for (int l = 0; l < kLanes; ++l) r[l] = load<vu>(block + l * x.row + 2 * k);
          transpose_words(r);
#pragma GCC unroll 16
          for (int l = 0; l < kLanes; ++l) store(to + (k + l) * kStride + done, r[l]);
        }
        for (; k < pairs; ++k) {
          for (int l = 0; l < kLanes; ++l) {
            const uint16_t* at = block + l * x.row + 2 * k;
            to[k * kStride + done + l] = uint32_t(at[0]) | uint32_t(at[1]) << 16;
          }
        }
      }
    }
    for (int64_t k = 0; k < words; ++k) {
      const bool pair = k < pairs;
      for (int64_t f = pair ? done : 0; f < features; ++f) {
        const uint16_t* at = from + f * x.row + 2 * k * x.token;
        to[k * kStride + f] = uint32_t(at[0]) | (pair ? uint32_t(at[x.token]) << 16 : 0);
      }
      for (int64_t f = features; f < width; ++f) to[k * kStride + f] = 0;
    }
  }

  static void multiply(const word* b, const word* a, int64_t words, acc* c) {
    __m512 sum[kRows][kVecs];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v) sum[i][v] = _mm512_setzero_ps();
    }
    for (int64_t t = 0; t < words; ++t) {
      __m512bh x[kVecs];
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v) x[v] = (__m512bh)_mm512_loadu_si512(a + v * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const __m512bh y = (__m512bh)_mm512_set1_epi32(int(b[i]));
#pragma GCC unroll 3
        for (int v = 0; v < kVecs; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], y, x[v]);
      }
      a += kStride;
      b += kStride;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v) {
        float* to = c + i * kStride + v * kLanes;
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[i][v]));
      }
    }
  }
};

void run(const Sampled& s, int64_t begin, int64_t end) { run_blocks<Pairs>(s, begin, end); }

}  // namespace

const SampledKernels kSampledKernels = {&run};

}  // namespace frodkernels::cpu::FRODKERNELS_ISA
