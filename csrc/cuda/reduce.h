// SPDX-License-Identifier: Apache-2.0
//
// Launcher of reduce.cuh. Pointers are device pointers.
#pragma once
#include <cstdint>

#include "cuda/sparse_core.h"

namespace frodkernels::cuda {

// Partial sums [splits, count], `stride` elements from split to split, in float or double.
struct Partials {
  const void* data = nullptr;
  bool wide = false;  // double
  int64_t splits = 0, count = 0, stride = 0;
};

// Where the sums go: sum e belongs to place source[e], or to place e from `mapped` on. Places below nnz are entries of
// dvalues, those from nnz on entries of dlam; -1 is nowhere. A vector without data takes nothing.
struct Places {
  const int32_t* source = nullptr;  // [mapped]
  int64_t mapped = 0, nnz = 0;
  Vector dvalues, dlam;
};

// Adds up the splits in order. Returns nullptr, or the CUDA runtime's message when the launch failed.
const char* reduce_sources(const Partials& partials, const Places& places, CUstream_st* stream);

}  // namespace frodkernels::cuda
