// SPDX-License-Identifier: Apache-2.0
//
// Scattering values to fixed positions of a matrix on the CPU, in place.
//
//   weight[g, indices[p]] = scale values[perm[p]] (+ weight[g, indices[p]]);   old[perm[p]] = what it was
//
// Shapes   weight [groups, columns], any strides that do not overlap; values [nnz], contiguous; old [nnz] or null.
// Types    weight and values f32, f64, bf16 or f16, each its own; old is of weight's. Computed in f32, in f64 where one
//          of the two is f64; rounded once. Without `accumulate`, with scale 1 and equal types, bits are copied.
// Work     limited by the latency of memory: the entries of the next group are asked for while one is written.
// Needs    as sampled.h; no two slots have one place.
#pragma once
#include <cstdint>

#include "scalars.h"

namespace frodkernels::cpu {

struct Scatter {
  Scalar type = Scalar::kF32, values_type = Scalar::kF32;
  void* weight = nullptr;
  int64_t row = 0, column = 0;  // strides in elements
  const void* values = nullptr;
  void* old = nullptr;
  const int32_t* indptr = nullptr;
  const void* indices = nullptr;
  bool narrow = true;  // 16-bit indices
  const int32_t* perm = nullptr;
  double scale = 1;
  bool accumulate = true;
};

// Groups [begin, end).
void scatter(const Scatter& s, int64_t begin, int64_t end);

}  // namespace frodkernels::cpu
