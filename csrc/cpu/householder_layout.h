// SPDX-License-Identifier: Apache-2.0
//
// The layouts of householder.h for one ISA level: the packed factors, and partial sums back into a tensor. W is the
// accumulation type's storage.
//
//   left   rank above half a vector: [n][whole vectors of r]. Vectors run along the ranks; a tensor whose rank fills
//          its vectors is taken as it is. Else [half a vector][whole vectors of n]: vectors run along the features.
//   right  [n / kColumns][r][kColumns]: vectors run along the features.
#pragma once
#include "householder.h"
#include "products.h"

namespace frodkernels::cpu::FRODKERNELS_ISA {
namespace {

int64_t rounded_up(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }

template <typename W>
constexpr int kColumns = 2 * W::kVecLanes;
static_assert(kUnit % kColumns<F32> == 0 && kUnit % kColumns<F64> == 0);

template <typename W>
bool low_rank(int64_t r) {
  return r <= W::kVecLanes / 2;
}
template <typename W>
int64_t left_stride(int64_t n, int64_t r) {
  return rounded_up(low_rank<W>(r) ? n : r, W::kVecLanes);
}
template <typename W>
int64_t left_size_as(int64_t n, int64_t r) {
  if (low_rank<W>(r)) return W::kVecLanes / 2 * left_stride<W>(n, r);
  return r % W::kVecLanes == 0 ? 0 : n * left_stride<W>(n, r);
}

// to[j][i] = from[i][j] for one vector of rows i, of which there are `rows` (zeros beyond), and `columns` columns.
// `end`: of the memory behind `from`, which full vectors must not pass (what lies there may be another thread's).
template <typename W>
inline void transpose(const typename W::scalar* from, int64_t from_stride, const typename W::scalar* end, int64_t rows,
                      int64_t columns, typename W::scalar* to, int64_t to_stride) {
  if constexpr (sizeof(*to) == 4) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      vu words[kLanes];
      const float* at = from + j;
      if (rows >= kLanes && end - (at + (kLanes - 1) * from_stride) >= kLanes) {
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; ++l) words[l] = load<vu>(at + l * from_stride);
      } else {
        const int64_t count = smaller(columns - j, kLanes);
        for (int l = 0; l < kLanes; ++l)
          words[l] = l < rows ? bits<vu>(widen_some<F32>(at + l * from_stride, count)) : vu{};
      }
      transpose_words(words);
      float* out = to + j * to_stride;
      if (columns - j >= kLanes) {
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; ++l) store(out + l * to_stride, words[l]);
      } else {
        for (int64_t l = 0; l < columns - j; ++l) store(out + l * to_stride, words[l]);
      }
    }
  } else {
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t i = 0; i < W::kVecLanes; ++i) to[j * to_stride + i] = i < rows ? from[i * from_stride + j] : 0;
    }
  }
}

// Rows [begin, end); begin is a multiple of kUnit.
template <typename W>
void pack_left_as(const void* source, void* target, int64_t n, int64_t r, int64_t begin, int64_t end) {
  using acc = typename W::scalar;
  const acc* from = static_cast<const acc*>(source);
  acc* to = static_cast<acc*>(target);
  const int64_t stride = left_stride<W>(n, r);
  if (low_rank<W>(r)) {
    for (int64_t i = begin; i < end; i += W::kVecLanes) {
      transpose<W>(from + i * r, r, from + end * r, smaller(W::kVecLanes, n - i), r, to + i, stride);
      for (int64_t j = r; j < W::kVecLanes / 2; ++j) store(to + j * stride + i, typename W::Vec{});
    }
    return;
  }
  for (int64_t i = begin; i < end; ++i) {
    std::memcpy(to + i * stride, from + i * r, size_t(r) * sizeof(acc));
    for (int64_t j = r; j < stride; ++j) to[i * stride + j] = 0;
  }
}

template <typename W>
void pack_right_as(const void* source, void* target, int64_t n, int64_t r, int64_t begin, int64_t end) {
  using acc = typename W::scalar;
  const acc* from = static_cast<const acc*>(source);
  acc* to = static_cast<acc*>(target);
  constexpr int64_t kVec = W::kVecLanes;
  for (int64_t i = begin; i < rounded_up(end, kColumns<W>); i += kVec) {
    acc* panel = to + i / kColumns<W> * kColumns<W> * r + i % kColumns<W>;
    if (i < n) {
      transpose<W>(from + i * r, r, from + end * r, smaller(kVec, n - i), r, panel, kColumns<W>);
    } else {
      for (int64_t j = 0; j < r; ++j) store(panel + j * kColumns<W>, typename W::Vec{});
    }
  }
}

using half_vf = float __attribute__((vector_size(kBytes / 2)));

// A vector of doubles from consecutive elements, and back.
inline vd widen_to_double(const float* p) { return __builtin_convertvector(load<half_vf>(p), vd); }
inline vd widen_to_double(const double* p) { return load<vd>(p); }
inline void narrow_from_double(vd v, float* p) { store(p, __builtin_convertvector(v, half_vf)); }
inline void narrow_from_double(vd v, double* p) { store(p, v); }

// Features [begin, end) of the total [n, r].
template <typename W>
void reduce_as(const void* source, void* target, int64_t splits, int64_t n, int64_t r, int64_t begin, int64_t end) {
  using acc = typename W::scalar;
  constexpr int kVec = W::kVecLanes, kDoubles = kBytes / 8, kParts = kVec / kDoubles;
  const acc* partial = static_cast<const acc*>(source);
  acc* total = static_cast<acc*>(target);
  constexpr int kAhead = 256 / sizeof(acc);
  const int64_t stride = partial_stride(n);
  for (int64_t f = begin; f < end; f += kVec) {
    const int64_t features = smaller(kVec, end - f);
    for (int64_t first = 0; first < r; first += kVec) {
      const int64_t ranks = smaller(kVec, r - first);
      acc sums[kVec][kVec], turned[kVec][kVec];
      for (int64_t j = 0; j < ranks; ++j) {
        vd sum[kParts] = {};
        for (int64_t s = 0; s < splits; ++s) {
          const acc* from = partial + (s * r + first + j) * stride + f;
          __builtin_prefetch(from + kAhead);  // too many rows for the prefetchers of the hardware
#pragma GCC unroll 2
          for (int k = 0; k < kParts; ++k) sum[k] += widen_to_double(from + k * kDoubles);
        }
#pragma GCC unroll 2
        for (int k = 0; k < kParts; ++k) narrow_from_double(sum[k], sums[j] + k * kDoubles);
      }
      transpose<W>(sums[0], kVec, sums[0] + kVec * kVec, ranks, kVec, turned[0], kVec);
      acc* to = total + f * r + first;
      if (ranks == kVec) {
        for (int64_t i = 0; i < features; ++i) store(to + i * r, load<typename W::Vec>(turned[i]));
      } else {
        for (int64_t i = 0; i < features; ++i) {
          for (int64_t j = 0; j < ranks; ++j) to[i * r + j] = turned[i][j];
        }
      }
    }
  }
}

}  // namespace
}  // namespace frodkernels::cpu::FRODKERNELS_ISA
