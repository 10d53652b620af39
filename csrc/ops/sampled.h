// SPDX-License-Identifier: Apache-2.0
//
// What the bindings of the sampled product and the scatter share, whatever the device: schemas and checks.
#pragma once
#include <cstdint>

#include "sparse_core.h"

namespace frodkernels::ops {

// out[perm[p]] = sum_t a[indices[p], t] b[g, t] for the slots p of group g; see frodkernels/ops/sampled.py.
inline constexpr char kSampledProductSchema[] =
    "native_sampled_product(Tensor a, Tensor b, Tensor indptr, Tensor indices, Tensor perm, ScalarType dtype, "
    "bool tiled=False, Tensor[]? tiles=None) -> Tensor";
// weight[g, indices[p]] = scale values[perm[p]] (+ what it was); old[perm[p]] = what it was.
inline constexpr char kScatterValuesSchema[] =
    "native_scatter_values_(Tensor(a!) weight, Tensor values, Tensor indptr, Tensor indices, Tensor perm, "
    "float scale, bool accumulate, Tensor(b!)? old) -> ()";

inline void check_sampled(const torch::stable::Tensor& a, const torch::stable::Tensor& b, int64_t groups) {
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "a and b must share a dtype");
  STD_TORCH_CHECK(b.size(0) == groups, "b must have one row per group of the plan");
  STD_TORCH_CHECK(a.size(1) == b.size(1), "a and b must hold equally many tokens");
}

}  // namespace frodkernels::ops
