// SPDX-License-Identifier: Apache-2.0
//
// Schemas of the ops on what is r-sized in a chain of reflections (frodkernels/ops/reflections.py has the formulas),
// and of those that form it and use it in one call (frodkernels/ops/reflect.py).
#pragma once

namespace frodkernels::ops {

inline constexpr char kReflectionsSchema[] =
    "native_reflections(Tensor u, bool wide, bool transpose) -> (Tensor, Tensor, Tensor, Tensor)";
inline constexpr char kReflectionsAgainSchema[] =
    "native_reflections_again(Tensor u, Tensor inverse, Tensor norms, bool wide, bool transpose) -> (Tensor, Tensor)";
inline constexpr char kReflectionsGradientSchema[] =
    "native_reflections_gradient(Tensor u, Tensor unit, Tensor norms, Tensor sums, Tensor a, Tensor b) -> Tensor";

inline constexpr char kReflectSchema[] =
    "native_reflect(Tensor x, Tensor u, bool transpose, bool rounded=False) -> (Tensor, Tensor, Tensor, Tensor)";
// dx may be g itself.
inline constexpr char kReflectBackwardSchema[] =
    "native_reflect_backward(Tensor g, Tensor x, Tensor u, Tensor coefficients, Tensor inverse, Tensor norms, "
    "Tensor(a!) dx, bool transpose, bool[2] needs, bool rounded=False) -> Tensor";

}  // namespace frodkernels::ops
