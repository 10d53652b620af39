// SPDX-License-Identifier: Apache-2.0
//
// The walk over dense blocks that sampled.h describes, for a way to multiply:
//
//   Way::acc         what is summed in
//   Way::word        an element of packed features: one token of a feature, or several
//   Way::kTokens     tokens in a word
//   Way::kRows, kWidth            the block of sums that registers hold: groups by columns
//   Way::pack(x, f0, features, width, t0, tokens, to)   features [f0, f0 + features) of tokens [t0, t0 + tokens) to
//                                 to[word][feature], kStride words from row to row; zeros up to `width` features
//   Way::multiply(b, a, words, c)       c[kRows][kWidth] += the sums of that many rows of words
#pragma once
#include <cstring>

#include "sampled.h"
#include "scratch.h"

namespace frodkernels::cpu::FRODKERNELS_ISA {

constexpr int64_t kWords = 64;    // rows of packed words: a chain of sums in registers
constexpr int64_t kInChain = 16;  // such chains that are added up one by one, before they join the others in f64
constexpr int64_t kStride =
    Sampled::kBlock + 16;  // not a multiple of many cache lines: rows spread over the sets of L1

static inline int64_t less(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t whole(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// The first slot in [begin, end) whose index is at least `least`.
template <typename Index>
static int32_t first_slot(const Index* indices, int32_t begin, int32_t end, int64_t least) {
  while (begin < end) {
    const int32_t middle = begin + (end - begin) / 2;
    if (int64_t(indices[middle]) < least) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

template <typename Acc>
static void write_sum(const Sampled& s, int64_t k, Acc sum) {
  switch (s.out_type) {
    case Scalar::kF32:
      static_cast<float*>(s.out)[k] = float(sum);
      return;
    case Scalar::kF64:
      static_cast<double*>(s.out)[k] = double(sum);
      return;
    case Scalar::kBF16:
      static_cast<uint16_t*>(s.out)[k] = float_to_bf16(float(sum));
      return;
    case Scalar::kF16:
      static_cast<uint16_t*>(s.out)[k] = float_to_half(float(sum));
      return;
  }
}

// The slots of each group whose columns are in the block.
struct Range {
  int32_t begin, end;
};

template <typename Way, typename Index>
static void run_block(const Sampled& s, int64_t g0, int64_t g1, int64_t c0, int64_t c1) {
  using word = typename Way::word;
  using acc = typename Way::acc;
  const Index* indices = static_cast<const Index*>(s.indices);
  Range slots[Sampled::kBlock];
  bool any = false;
  for (int64_t g = g0; g < g1; ++g) {
    const int32_t end = s.indptr[g + 1], begin = first_slot(indices, s.indptr[g], end, c0);
    slots[g - g0] = {begin, first_slot(indices, begin, end, c1)};
    any |= slots[g - g0].begin < slots[g - g0].end;
  }
  if (!any) return;

  const int64_t rows = whole(g1 - g0, Way::kRows), width = whole(c1 - c0, Way::kWidth);
  constexpr int64_t kAtOnce = kWords * Way::kTokens, kLong = kAtOnce * kInChain;
  const size_t packed = size_t(kWords * kStride) * sizeof(word);
  char* const memory = scratch(0, 2 * packed + size_t(Sampled::kBlock * kStride) * sizeof(acc));
  word* const a = reinterpret_cast<word*>(memory);
  word* const b = reinterpret_cast<word*>(memory + packed);
  acc* const c = reinterpret_cast<acc*>(memory + 2 * packed);
  double* total = nullptr;  // of what c held before, where the sums are long
  std::memset(c, 0, size_t(rows * kStride) * sizeof(acc));
  for (int64_t t0 = 0; t0 < s.T; t0 += kAtOnce) {
    if (t0 > 0 && t0 % kLong == 0) {
      const bool first = total == nullptr;
      total = reinterpret_cast<double*>(scratch(1, size_t(Sampled::kBlock * kStride) * sizeof(double)));
      for (int64_t i = 0; i < rows * kStride; ++i) {
        total[i] = (first ? 0 : total[i]) + double(c[i]);
        c[i] = 0;
      }
    }
    const int64_t tokens = less(kAtOnce, s.T - t0), words = whole(tokens, Way::kTokens) / Way::kTokens;
    Way::pack(s.a, c0, c1 - c0, width, t0, tokens, a);
    Way::pack(s.b, g0, g1 - g0, rows, t0, tokens, b);
    for (int64_t j = 0; j < width; j += Way::kWidth) {
      for (int64_t i = 0; i < rows; i += Way::kRows) Way::multiply(b + i, a + j, words, c + i * kStride + j);
    }
  }
  for (int64_t g = g0; g < g1; ++g) {
    const int64_t row = (g - g0) * kStride - c0;
    for (int32_t p = slots[g - g0].begin; p < slots[g - g0].end; ++p) {
      const int64_t at = row + indices[p];
      if (total == nullptr) {
        write_sum(s, s.perm[p], c[at]);
      } else {
        write_sum(s, s.perm[p], total[at] + double(c[at]));
      }
    }
  }
}

template <typename Way>
static void run_blocks(const Sampled& s, int64_t begin, int64_t end) {
  const int64_t rows = s.row_blocks(), columns = s.column_blocks();
  for (int64_t block = begin; block < end; ++block) {
    const int64_t i = block / columns, j = block % columns;
    // nearly equal blocks, rather than a last one of a few features
    const int64_t g0 = s.groups * i / rows, g1 = s.groups * (i + 1) / rows;
    const int64_t c0 = s.columns * j / columns, c1 = s.columns * (j + 1) / columns;
    if (s.narrow) {
      run_block<Way, uint16_t>(s, g0, g1, c0, c1);
    } else {
      run_block<Way, int32_t>(s, g0, g1, c0, c1);
    }
  }
}

}  // namespace frodkernels::cpu::FRODKERNELS_ISA
