// SPDX-License-Identifier: Apache-2.0
//
// frodkernels::native_householder, native_householder_backward and native_householder_gradient on CPU tensors: check,
// pack the two factors, run the kernels of csrc/cpu/householder.h on torch's threads, reduce the partial sums in order.
#include "householder.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "householder_cpu.h"

namespace frodkernels::ops {
namespace {

using cpu::Scalar;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Scalar scalar_of(const Tensor& t, const char* name) { return ops::scalar_of<Scalar>(t, name); }

// A tensor [n, r] as a packed factor of `type`.
struct Factor {
  const Tensor tensor;
  const Packed packed;

  Factor(const Tensor& factor, ScalarType type, const char* name, bool left, const cpu::HouseholderKernels& kernels)
      : tensor(as_type(factor, type, name)),
        packed(kernels, kind_of(type), left, tensor.const_data_ptr(), tensor.size(0), tensor.size(1)) {
    packed.pack_all();
  }
  const void* data() const { return packed.data(); }
};

Tensor total(const Sums& sums, const Tensor& like, int64_t n, int64_t r, ScalarType type) {
  Tensor sum = torch::stable::new_empty(like, {n, r}, type);
  sums.total(sum.mutable_data_ptr());
  return sum;
}

std::tuple<Tensor, Tensor> householder(const Tensor& x, const Tensor& left, const OptionalTensor& right,
                                       const OptionalTensor& base, bool rounded) {
  check_householder(x, left, right, base);
  const ScalarType type = accumulation_type({&x, &left, right.has_value() ? &*right : &left});
  if (type == ScalarType::Double && x.scalar_type() != type) {
    scalar_of(x, "x");
    OptionalTensor wide_base;
    if (base.has_value()) wide_base = torch::stable::to(*base, type);
    auto [out, coefficients] = householder(torch::stable::to(x, type), left, right, wide_base, false);
    return {torch::stable::to(out, x.scalar_type()), coefficients};
  }
  const cpu::HouseholderKernels& kernels = chosen_kernels(scalar_of(x, "x"), rounded);
  const int64_t T = x.size(0), r = left.size(1), m = right.has_value() ? right->size(0) : 0;
  cpu::Householder a = problem(scalar_of(x, "x"), T, x.size(1), m, r, false);
  Tensor coefficients = torch::stable::new_empty(x, {T, r}, type);
  Tensor out = right.has_value() ? torch::stable::new_empty(x, {T, m}) : torch::stable::new_empty(x, {0});
  const Tensor in = with_rows(x), from = base.has_value() ? with_rows(*base) : in;
  const Factor packed_left(left, type, "left", true, kernels);
  a.in = rows_of(in);
  a.left = packed_left.data();
  a.coefficients = coefficients.mutable_data_ptr();
  if (!right.has_value()) {
    run(a, kernels);
    return {out, coefficients};
  }
  const Factor packed_right(*right, type, "right", false, kernels);
  a.base = rows_of(from);
  a.out = rows_of(out);
  a.right = packed_right.data();
  run(a, kernels);
  return {out, coefficients};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> householder_backward(const Tensor& g, const Tensor& x,
                                                                const Tensor& coefficients, const Tensor& left,
                                                                const Tensor& right, const OptionalTensor& base,
                                                                std::vector<bool> needs, bool rounded) {
  check_householder_backward(g, x, coefficients, left, right, base, needs.size());
  const ScalarType type = accumulation_type({&g, &left, &right, &coefficients});
  if (type == ScalarType::Double && g.scalar_type() != type) {
    scalar_of(g, "g");
    OptionalTensor wide_base;
    if (base.has_value()) wide_base = torch::stable::to(*base, type);
    auto [dx, q, sum_x, sum_g] = householder_backward(torch::stable::to(g, type), torch::stable::to(x, type),
                                                      coefficients, left, right, wide_base, needs, false);
    return {torch::stable::to(dx, g.scalar_type()), q, sum_x, sum_g};
  }
  const cpu::HouseholderKernels& kernels = chosen_kernels(scalar_of(g, "g"), rounded);
  const int64_t T = g.size(0), m = g.size(1), n = x.size(1), r = left.size(1);
  cpu::Householder a = problem(scalar_of(g, "g"), T, m, n, r, needs[1]);
  Tensor dx = needs[0] ? torch::stable::new_empty(g, {T, n}) : torch::stable::new_empty(g, {0});
  Tensor q = torch::stable::new_empty(g, {T, r}, type);
  const Tensor in = with_rows(g), features = with_rows(x), from = base.has_value() ? with_rows(*base) : in;
  const Tensor saved = as_type(coefficients, type, "coefficients");
  const Factor packed_left(left, type, "left", true, kernels);
  scalar_of(right, "right");
  a.in = rows_of(in);
  a.left = packed_left.data();
  a.coefficients = q.mutable_data_ptr();
  std::optional<Factor> packed_right;
  if (needs[0]) {
    packed_right.emplace(right, type, "right", false, kernels);
    a.base = rows_of(from);
    a.out = rows_of(dx);
    a.right = packed_right->data();
  }
  Tensor sum_x = torch::stable::new_empty(g, {0}, type), sum_g = torch::stable::new_empty(g, {0}, type);
  if (!needs[1]) {
    run(a, kernels);
    return {dx, q, sum_x, sum_g};
  }
  a.joint = !base.has_value();
  a.x = rows_of(features);
  a.saved = saved.const_data_ptr();
  const int64_t widest = a.joint ? n : std::max(n, m);
  a.splits = split_count(T, a.tiles(), r * widest * bytes_of(kind_of(type)));
  const Scalar kind = kind_of(type);
  const Sums of_x(kernels, kind, Scratch::kOutSums, a.splits, n, r);
  const Sums of_g(kernels, kind, Scratch::kInSums, a.splits, a.joint ? 0 : m, r);
  a.partial_out = of_x.data();
  if (!a.joint) a.partial_in = of_g.data();
  run(a, kernels);
  sum_x = total(of_x, g, n, r, type);
  if (!a.joint) sum_g = total(of_g, g, m, r, type);
  return {dx, q, sum_x, sum_g};
}

Tensor householder_gradient(const Tensor& x, const Tensor& q) {
  check_householder_gradient(x, q);
  const ScalarType type = accumulation_type({&x, &q});
  scalar_of(x, "x");
  if (type == ScalarType::Double && x.scalar_type() != type) return householder_gradient(torch::stable::to(x, type), q);
  const cpu::HouseholderKernels& kernels = cpu::householder_kernels(cpu::chosen_isa());
  const Tensor features = with_rows(x), factors = as_type(q, type, "q");
  cpu::Householder a = problem(scalar_of(x, "x"), x.size(0), x.size(1), x.size(1), q.size(1), true);
  a.n_in = 0;
  a.project = false;
  a.x = rows_of(features);
  a.coefficients = const_cast<void*>(factors.const_data_ptr());
  a.splits = split_count(a.T, a.tiles(), a.r * a.n_out * bytes_of(kind_of(type)));
  const Sums sums(kernels, kind_of(type), Scratch::kOutSums, a.splits, a.n_out, a.r);
  a.partial_out = sums.data();
  run(a, kernels);
  return total(sums, x, a.n_out, a.r, type);
}

}  // namespace
}  // namespace frodkernels::ops

STABLE_TORCH_LIBRARY_FRAGMENT(frodkernels, m) {
  m.def(frodkernels::ops::kHouseholderSchema);
  m.def(frodkernels::ops::kHouseholderBackwardSchema);
  m.def(frodkernels::ops::kHouseholderGradientSchema);
}

STABLE_TORCH_LIBRARY_IMPL(frodkernels, CPU, m) {
  m.impl("native_householder", TORCH_BOX(&frodkernels::ops::householder));
  m.impl("native_householder_backward", TORCH_BOX(&frodkernels::ops::householder_backward));
  m.impl("native_householder_gradient", TORCH_BOX(&frodkernels::ops::householder_gradient));
}
