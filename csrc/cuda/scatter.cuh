// SPDX-License-Identifier: Apache-2.0
//
// Numbers to their places in a matrix, in place.
//
//   weight[g, indices[p]] = round(scale values[perm[p]])               or, where `accumulate` is set,
//   weight[g, indices[p]] = round(weight[g, indices[p]] + scale values[perm[p]])
//   old[perm[p]] = weight[g, indices[p]] as it was, to the bit          for the slots p of row g
//
// Shapes   weight [rows, n], any strides; values, old [nnz], any strides; old may be null
// Types    scalar_t = weight's and old's; values' own. Computed in float, in double where either is double: product and
//          sum are rounded one by one, as plain torch rounds them, and the result once to scalar_t. Equal types, scale
//          1 and no sum: bits are copied, those of a NaN too.
// Grid     x: blocks of kScatterThreads slots, a thread a slot, its row by binary search in indptr: neighbours search
//          along the same path. No shared memory, no atomics.
// Needs    no place twice in the pattern, no two places at one address; nnz < 2^31.
#pragma once
#include "cuda/sampled.h"
#include "cuda/scalars.cuh"

namespace frodkernels::cuda {

constexpr int kScatterThreads = 256;

template <int kBytes>
using bits_t = std::conditional_t<kBytes == 8, uint64_t, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>;

__device__ __forceinline__ float product_of(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product_of(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float sum_of(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double sum_of(double a, double b) { return __dadd_rn(a, b); }

// What a place becomes.
template <typename scalar_t, typename acc>
__device__ __forceinline__ scalar_t changed(const Scatter& s, int64_t place, scalar_t before) {
  acc change = read_scalar<acc>(s.values, place * s.values_stride);
  if (s.scale != 1) change = product_of(static_cast<acc>(s.scale), change);
  if (s.accumulate) change = sum_of(static_cast<acc>(widen(before)), change);
  return rounded<scalar_t>(change);
}

template <typename scalar_t>
__global__ void __launch_bounds__(kScatterThreads) scatter_values_kernel(const Scatter s) {
  using bits = bits_t<sizeof(scalar_t)>;
  const int64_t p = int64_t(blockIdx.x) * kScatterThreads + threadIdx.x;
  if (p >= s.view.nnz) return;
  // The row: the last that begins at p or before and is not empty.
  int64_t row = 0;
  for (int64_t beyond = s.view.rows; beyond - row > 1;) {
    const int64_t middle = row + (beyond - row) / 2;
    if (s.view.indptr[middle] <= p) {
      row = middle;
    } else {
      beyond = middle;
    }
  }
  const int64_t place = s.view.perm[p];
  bits* const to = static_cast<bits*>(s.weight.data) + row * s.row_stride + read_index(s.view, p) * s.column_stride;
  bits before = 0;
  if (s.accumulate || s.old.data != nullptr) before = *to;
  if (s.old.data != nullptr) static_cast<bits*>(s.old.data)[place * s.old_stride] = before;
  if (!s.accumulate && s.scale == 1 && s.values.type == s.weight.type) {
    *to = static_cast<const bits*>(s.values.data)[place * s.values_stride];
    return;
  }
  const scalar_t was = same_bits<scalar_t>(before);
  const bool wide = std::is_same_v<scalar_t, double> || s.values.type == Scalar::kF64;
  *to = same_bits<bits>(wide ? changed<scalar_t, double>(s, place, was) : changed<scalar_t, float>(s, place, was));
}

}  // namespace frodkernels::cuda
