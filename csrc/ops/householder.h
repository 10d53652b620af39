// SPDX-License-Identifier: Apache-2.0
//
// What the bindings of the Householder products share, whatever the device: schemas, dtypes, checks.
#pragma once
#include <cstdint>
#include <vector>

#include "tensors.h"

namespace frodkernels::ops {

// rounded: factors and coefficients may be rounded to the dtype of the tokens where they enter a product.
inline constexpr char kHouseholderSchema[] =
    "native_householder(Tensor x, Tensor left, Tensor? right, Tensor? base=None, bool rounded=False) "
    "-> (Tensor, Tensor)";
inline constexpr char kHouseholderBackwardSchema[] =
    "native_householder_backward(Tensor g, Tensor x, Tensor coefficients, Tensor left, Tensor right, Tensor? base, "
    "bool[2] needs, bool rounded=False) -> (Tensor, Tensor, Tensor, Tensor)";
inline constexpr char kHouseholderGradientSchema[] = "native_householder_gradient(Tensor x, Tensor q) -> Tensor";

// [rows, columns], on the device of `like`.
inline void check_matrix(const torch::stable::Tensor& t, const char* name, int64_t rows, int64_t columns,
                         const torch::stable::Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, " must be [", rows, ", ", columns,
                  "]");
  STD_TORCH_CHECK(t.device() == like.device(), name, " must be on the device of the tokens");
}

// The dtype of sums and coefficients: float32, or float64 where the tokens or a factor of theirs are.
inline torch::headeronly::ScalarType accumulation_type(std::initializer_list<const torch::stable::Tensor*> tensors) {
  using torch::headeronly::ScalarType;
  for (const torch::stable::Tensor* t : tensors) {
    if (t->scalar_type() == ScalarType::Double) return ScalarType::Double;
  }
  return ScalarType::Float;
}

// What householder takes, checked: x [T, n], left [n, r], right [m, r], base [T, m] like x (none: x itself, m = n).
inline void check_householder(const torch::stable::Tensor& x, const torch::stable::Tensor& left,
                              const OptionalTensor& right, const OptionalTensor& base) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be [T, features]");
  STD_TORCH_CHECK(left.dim() == 2, "left must be [features, rank]");
  check_matrix(left, "left", x.size(1), left.size(1), x);
  if (!right.has_value()) return;  // base is of no use then
  STD_TORCH_CHECK(right->dim() == 2, "right must be [features, rank]");
  check_matrix(*right, "right", base.has_value() ? right->size(0) : x.size(1), left.size(1), x);
  if (!base.has_value()) return;
  check_matrix(*base, "base", x.size(0), right->size(0), x);
  STD_TORCH_CHECK(base->scalar_type() == x.scalar_type(), "base must have the dtype of x");
}

// What householder_backward takes: g [T, m], x [T, n], coefficients [T, r], left [m, r], right [n, r], base [T, n] like
// x (none: g itself, m = n).
inline void check_householder_backward(const torch::stable::Tensor& g, const torch::stable::Tensor& x,
                                       const torch::stable::Tensor& coefficients, const torch::stable::Tensor& left,
                                       const torch::stable::Tensor& right, const OptionalTensor& base, size_t needs) {
  STD_TORCH_CHECK(needs == 2, "needs must be 2 bools");
  STD_TORCH_CHECK(g.dim() == 2, "g must be [T, features]");
  STD_TORCH_CHECK(left.dim() == 2, "left must be [features, rank]");
  check_matrix(left, "left", g.size(1), left.size(1), g);
  STD_TORCH_CHECK(x.dim() == 2, "x must be [T, features]");
  check_matrix(x, "x", g.size(0), base.has_value() ? x.size(1) : g.size(1), g);
  STD_TORCH_CHECK(x.scalar_type() == g.scalar_type(), "x must have the dtype of g");
  check_matrix(coefficients, "coefficients", g.size(0), left.size(1), g);
  check_matrix(right, "right", x.size(1), left.size(1), g);
  if (!base.has_value()) return;
  check_matrix(*base, "base", x.size(0), x.size(1), g);
  STD_TORCH_CHECK(base->scalar_type() == g.scalar_type(), "base must have the dtype of g");
}

inline void check_householder_gradient(const torch::stable::Tensor& x, const torch::stable::Tensor& q) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be [T, features]");
  STD_TORCH_CHECK(q.dim() == 2, "q must be [T, rank]");
  check_matrix(q, "q", x.size(0), q.size(1), x);
}

}  // namespace frodkernels::ops
