// SPDX-License-Identifier: Apache-2.0
//
// Schemas of the ops on what is r-sized in a chain of reflections (frodkernels/ops/reflections.py has the formulas),
// and the products of householder.cpp that they are made of.
#pragma once
#include <tuple>

#include "tensors.h"

namespace frodkernels::ops {

inline constexpr char kReflectionsSchema[] =
    "native_reflections(Tensor u, bool wide, bool transpose) -> (Tensor, Tensor, Tensor, Tensor)";
inline constexpr char kReflectionsAgainSchema[] =
    "native_reflections_again(Tensor u, Tensor inverse, Tensor norms, bool wide, bool transpose) -> (Tensor, Tensor)";
inline constexpr char kReflectionsGradientSchema[] =
    "native_reflections_gradient(Tensor u, Tensor unit, Tensor norms, Tensor sums, Tensor a, Tensor b) -> Tensor";

// rows [n, k] times square [k, r], and aᵀb, on CPU tensors of float32 or float64.
torch::stable::Tensor product_on_cpu(const torch::stable::Tensor& rows, const torch::stable::Tensor& square);
torch::stable::Tensor inner_on_cpu(const torch::stable::Tensor& a, const torch::stable::Tensor& b);

}  // namespace frodkernels::ops
