// SPDX-License-Identifier: Apache-2.0
//
// What the bindings of the sparse core share, whatever the device: schemas, dtypes, checks, results to fill.
#pragma once
#include <cstdint>

#include "tensors.h"

namespace frodkernels::ops {

// tiles: the plan of the tensor-core kernels (csrc/tiles/tiles.h), or nothing.
inline constexpr char kSparseCoreSchema[] =
    "native_sparse_core(Tensor z, Tensor? lam, Tensor values, Tensor indptr, Tensor indices, Tensor perm, "
    "bool token_major=False, Tensor[]? tiles=None) -> Tensor";
inline constexpr char kSparseCoreBackwardSchema[] =
    "native_sparse_core_backward(Tensor u, Tensor z, Tensor? lam, Tensor values, Tensor indptr, Tensor indices, "
    "Tensor perm, bool[3] needs, bool token_major=False, Tensor[]? tiles=None) -> (Tensor, Tensor, Tensor)";

// The feature block that tiles for features like `like` should have; 0: no kernel of its device takes tiles.
inline constexpr char kTileBlockSchema[] = "native_tile_block(Tensor like, int columns) -> int";

// Why the device of `like` cannot run the kernels registered for it, or an empty string.
inline constexpr char kWhyNotSchema[] = "native_why_not(Tensor like) -> str";

inline void check_vector(const torch::stable::Tensor& t, const char* name, int64_t size) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size, name, " must be a vector of ", size, " entries");
}

// Uninitialised [rows, T] features: contiguous, or strides (1, rows).
inline torch::stable::Tensor new_features(const torch::stable::Tensor& like, int64_t rows, int64_t T,
                                          bool token_major) {
  if (!token_major) return torch::stable::new_empty(like, {rows, T});
  return torch::stable::transpose(torch::stable::new_empty(like, {T, rows}), 0, 1);
}

// Whether the parameters ask for sums that the features' dtype would not.
inline bool wants_double(const torch::stable::Tensor& x, const torch::stable::Tensor& values) {
  using torch::headeronly::ScalarType;
  return values.scalar_type() == ScalarType::Double && x.scalar_type() != ScalarType::Double;
}

inline void check_pair(const torch::stable::Tensor& u, const torch::stable::Tensor& z, size_t needs) {
  STD_TORCH_CHECK(u.scalar_type() == z.scalar_type(), "u and z must share a dtype");
  STD_TORCH_CHECK(u.size(1) == z.size(1), "u and z must hold equally many tokens");
  STD_TORCH_CHECK(needs == 3, "needs must be 3 bools");
}

}  // namespace frodkernels::ops
