// SPDX-License-Identifier: Apache-2.0
//
// Launchers of the sampled product by way of dense blocks, and of the scatter, for callers that know neither nvcc nor
// its types. All pointers are device pointers; every launcher enqueues on `stream` and returns nullptr, or the CUDA
// runtime's message when a launch failed.
//
//   sampled   out[perm[p]] = sum_t a[indices[p], t] b[g, t]    for the slots p of group g
//   scatter   weight[g, indices[p]] = scale values[perm[p]], or that much more than it was; old[perm[p]] = what it was
//
// Groups are the rows of one compressed view, whose indices ascend within a row. The other way to the sampled product,
// one inner product an entry, is the gradient of sparse_core.h without dlam.
#pragma once
#include <cstdint>

#include "cuda/sparse_core.h"

namespace frodkernels::cuda {

// Features, a [columns, T] or b [rows, T]. Tokens are contiguous and `stride` goes from feature to feature; or, where
// `token_major` is set, features are contiguous and `stride` goes from token to token.
struct Features {
  const void* data = nullptr;
  int64_t stride = 0;
  bool token_major = false;
};

struct Sampled {
  Compressed view;
  Vector out;  // [nnz] in COO order
  Scalar type = Scalar::kF32;
  Features a, b;
  int64_t T = 0;
};

// float16 and bfloat16 go to the tensor cores: both operands in one layout, their rows on 16 bytes; contiguous features
// are read up to the next multiple of eight. float32 and float64 take any alignment and any mix of layouts. `scratch`
// holds sampled_scratch(s) bytes.
int64_t sampled_scratch(const Sampled& s);
const char* sampled_product(const Sampled& s, void* scratch, CUstream_st* stream);

struct Scatter {
  Compressed view;
  Vector weight, values, old;  // old: of weight's type, or null
  int64_t row_stride = 0, column_stride = 0, values_stride = 1, old_stride = 1;
  double scale = 1;
  bool accumulate = true;
};

const char* scatter_values(const Scatter& s, CUstream_st* stream);

}  // namespace frodkernels::cuda
