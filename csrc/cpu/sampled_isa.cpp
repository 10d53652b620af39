// SPDX-License-Identifier: Apache-2.0
//
// Dense blocks of a sampled product for one ISA level, by fused multiply-adds; sampled.h is the contract.
#include <type_traits>

#include "sampled_blocks.h"
#include "simd.h"

namespace frodkernels::cpu::FRODKERNELS_ISA {

// One token of a feature as an accumulator.
template <typename S>
static typename S::acc widened(typename S::scalar x) {
  if constexpr (std::is_same_v<S, BF16>) {
    return bf16_to_float(x);
  } else if constexpr (std::is_same_v<S, F16>) {
    return half_to_float(x);
  } else {
    return x;
  }
}

// kVecLanes neighbouring numbers of storage.
template <typename S>
static typename S::Vec widened_row(const typename S::scalar* from) {
  if constexpr (std::is_same_v<S, BF16>) {
    uint32_t w[kLanes];
    for (int l = 0; l < kLanes; ++l) w[l] = uint32_t(from[l]) << 16;
    return bits<vf>(load<vu>(w));
  } else if constexpr (std::is_same_v<S, F16>) {
    return halves_to_floats(from);
  } else {
    return load<typename S::Vec>(from);
  }
}

template <typename S>
struct Fma {
  using acc = typename S::acc;
  using word = acc;
  using Vec = typename S::Vec;
  static constexpr int64_t kTokens = 1;
  // Sums in registers: 24 vectors of 32 with AVX-512, 12 of 16 below.
  static constexpr int kVecs = kBytes == 64 ? 3 : 2;
  static constexpr int64_t kRows = kBytes == 64 ? 8 : 6;
  static constexpr int64_t kWidth = kVecs * S::kVecLanes;
  static_assert(Sampled::kBlock % kRows == 0 && Sampled::kBlock % kWidth == 0, "a block must be cut in whole pieces");

  static void pack(const Features& x, int64_t f0, int64_t features, int64_t width, int64_t t0, int64_t tokens,
                   word* to) {
    const auto* from = static_cast<const typename S::scalar*>(x.data) + f0 * x.row + t0 * x.token;
    constexpr int kStep = S::kVecLanes;
    if (x.row == 1) {
      for (int64_t t = 0; t < tokens; ++t) {
        const auto* row = from + t * x.token;
        word* line = to + t * kStride;
        int64_t f = 0;
        for (; f + kStep <= features; f += kStep) store(line + f, widened_row<S>(row + f));
        for (; f < features; ++f) line[f] = widened<S>(row[f]);
        for (; f < width; ++f) line[f] = 0;
      }
      return;
    }
    int64_t f = 0;
    if constexpr (sizeof(acc) == 4) {
      if (x.token == 1) {
        for (; f + kLanes <= features; f += kLanes) {
          const auto* block = from + f * x.row;
          int64_t t = 0;
          for (; t + kLanes <= tokens; t += kLanes) {
            vu r[kLanes];
#pragma GCC unroll 16
            for (int l = 0; l < kLanes; ++l) r[l] = bits<vu>(widened_row<S>(block + l * x.row + t));
            transpose_words(r);
#pragma GCC unroll 16
            for (int l = 0; l < kLanes; ++l) store(to + (t + l) * kStride + f, r[l]);
          }
          for (; t < tokens; ++t) {
            for (int l = 0; l < kLanes; ++l) to[t * kStride + f + l] = widened<S>(block[l * x.row + t]);
          }
        }
      }
    }
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t k = f; k < features; ++k) to[t * kStride + k] = widened<S>(from[k * x.row + t * x.token]);
      for (int64_t k = features; k < width; ++k) to[t * kStride + k] = 0;
    }
  }

  static void multiply(const word* b, const word* a, int64_t words, acc* c) {
    Vec sum[kRows][kVecs] = {};
    for (int64_t t = 0; t < words; ++t) {
      Vec x[kVecs];
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v) x[v] = load<Vec>(a + v * S::kVecLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
        for (int v = 0; v < kVecs; ++v) sum[i][v] += b[i] * x[v];
      }
      a += kStride;
      b += kStride;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v) {
        acc* to = c + i * kStride + v * S::kVecLanes;
        store(to, load<Vec>(to) + sum[i][v]);
      }
    }
  }
};

static void run(const Sampled& s, int64_t begin, int64_t end) {
  by_storage(s.type, [&](auto storage) { run_blocks<Fma<decltype(storage)>>(s, begin, end); });
}

const SampledKernels kSampledKernels = {&run};

}  // namespace frodkernels::cpu::FRODKERNELS_ISA
