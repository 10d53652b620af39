// SPDX-License-Identifier: Apache-2.0
//
// frodkernels::native_reflect and native_reflect_backward on CPU tensors: tokens through a chain of reflections,
// factors and all, in one call.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "chain.h"
#include "householder.h"
#include "reflections.h"

namespace frodkernels::ops {
namespace {

using cpu::Scalar;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Tokens of [T, n] that the directions u [n, r] can be applied to; contiguous u.
Tensor checked_directions(const Tensor& u, const Tensor& tokens, const char* name) {
  STD_TORCH_CHECK(tokens.device().is_cpu() && tokens.dim() == 2, name, " must be a CPU tensor [T, features]");
  scalar_of<Scalar>(tokens, name);
  STD_TORCH_CHECK(u.dim() == 2 && u.size(1) > 0, "u must be [features, rank]");
  check_matrix(u, "u", tokens.size(1), u.size(1), tokens);
  scalar_of<Scalar>(u, "u");
  STD_TORCH_CHECK(u.scalar_type() != ScalarType::Double || tokens.scalar_type() == ScalarType::Double,
                  "u must not be float64 beside narrower tokens");
  return as_contiguous(u);
}

// The kernels' problem for these tokens, and the factors that it takes: `chain` forms them, packed as it goes. The
// product with the right one is written to `out`, if there is one.
struct Call {
  const cpu::HouseholderKernels& kernels;
  const Packed left;
  std::optional<Packed> right;
  cpu::Householder problem;

  Call(Chain& chain, const Tensor& tokens, const Tensor* out, int64_t r, Scalar kind, bool sums, bool rounded)
      : kernels(chosen_kernels(scalar_of<Scalar>(tokens, "tokens"), rounded)),
        left(kernels, kind, true, chain.left(), tokens.size(1), r),
        problem(ops::problem(scalar_of<Scalar>(tokens, "tokens"), tokens.size(0), tokens.size(1), tokens.size(1), r,
                             sums)) {
    if (out != nullptr) right.emplace(kernels, kind, false, chain.unit(), tokens.size(1), r);
    chain.form([&](int64_t begin, int64_t end) {
      left.pack(begin, end);
      if (right.has_value()) right->pack(begin, end);
    });
    problem.left = left.data();
    problem.in = problem.base = rows_of(tokens);
    if (out == nullptr) return;
    problem.out = rows_of(*out);
    problem.right = right->data();
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> reflect(const Tensor& x, const Tensor& u, bool transpose, bool rounded) {
  const Tensor dense = checked_directions(u, x, "x"), in = with_rows(x);
  const int64_t T = x.size(0), n = x.size(1), r = dense.size(1);
  const bool wide = x.scalar_type() == ScalarType::Double;
  const ScalarType kind = Chain::kind_type(dense, wide), sums = Chain::sums_type(dense, wide);
  Tensor norms = torch::stable::new_empty(dense, {r}, kind), inverse = torch::stable::new_empty(dense, {r, r}, kind);
  Tensor out = torch::stable::new_empty(x, {T, n}), coefficients = torch::stable::new_empty(x, {T, r}, sums);
  Chain chain(dense, wide);
  chain.measure(norms.mutable_data_ptr(), inverse.mutable_data_ptr());
  chain.prepare(norms.const_data_ptr(), inverse.const_data_ptr(), transpose);
  Call call(chain, in, &out, r, kind_of(sums), false, rounded);
  call.problem.coefficients = coefficients.mutable_data_ptr();
  run(call.problem, call.kernels);
  return {out, coefficients, inverse, norms};
}

// g [T, n] is the gradient of reflect's result; the tokens themselves go backwards through the chain.
Tensor reflect_backward(const Tensor& g, const Tensor& x, const Tensor& u, const Tensor& coefficients,
                        const Tensor& inverse, const Tensor& norms, Tensor dx, bool transpose, std::vector<bool> needs,
                        bool rounded) {
  const Tensor dense = checked_directions(u, g, "g"), in = with_rows(g);
  const int64_t T = g.size(0), n = g.size(1), r = dense.size(1);
  const bool wide = g.scalar_type() == ScalarType::Double;
  const ScalarType kind = Chain::kind_type(dense, wide), sums = Chain::sums_type(dense, wide);
  STD_TORCH_CHECK(needs.size() == 2, "needs must be 2 bools");
  check_matrix(inverse, "inverse", r, r, g);
  STD_TORCH_CHECK(norms.dim() == 1 && norms.size(0) == r && norms.device() == g.device(), "norms must be [", r, "]");
  STD_TORCH_CHECK(inverse.scalar_type() == kind && norms.scalar_type() == kind, "inverse or norms: wrong dtype");
  if (needs[0]) {
    check_matrix(dx, "dx", T, n, g);
    STD_TORCH_CHECK(dx.scalar_type() == g.scalar_type(), "dx must have the dtype of g");
    STD_TORCH_CHECK((n <= 1 || dx.stride(1) == 1) && (T <= 1 || dx.stride(0) >= n),
                    "dx must have rows of unit stride, side by side");
  }
  Chain chain(dense, wide);
  const Tensor lengths = as_contiguous(norms), square = as_contiguous(inverse);
  chain.prepare(lengths.const_data_ptr(), square.const_data_ptr(), !transpose);
  Call call(chain, in, needs[0] ? &dx : nullptr, r, kind_of(sums), needs[1], rounded);
  cpu::Householder& a = call.problem;
  Tensor q = torch::stable::new_empty(g, {T, r}, sums);
  a.coefficients = q.mutable_data_ptr();
  if (!needs[1]) {
    run(a, call.kernels);
    return torch::stable::new_empty(u, {0});
  }
  check_matrix(x, "x", T, n, g);
  STD_TORCH_CHECK(x.scalar_type() == g.scalar_type(), "x must have the dtype of g");
  check_matrix(coefficients, "coefficients", T, r, g);
  STD_TORCH_CHECK(coefficients.scalar_type() == sums, "coefficients must have the dtype of the sums");
  const Tensor features = with_rows(x), saved = as_contiguous(coefficients);
  a.joint = true;
  a.x = rows_of(features);
  a.saved = saved.const_data_ptr();
  a.splits = split_count(T, a.tiles(), r * n * bytes_of(kind_of(sums)) + r * r * int64_t(sizeof(double)));
  const Sums of_x(call.kernels, kind_of(sums), Scratch::kOutSums, a.splits, n, r);
  a.partial_out = of_x.data();
  // dS, or its transpose, of each split
  const void *first = a.coefficients, *second = a.saved;
  if (!transpose) std::swap(first, second);
  std::vector<double> dS(size_t(std::max<int64_t>(a.splits, 1) * r * r), 0.0);
  over_splits(a, [&](int64_t begin, int64_t end) {
    for (int64_t split = begin; split < end; ++split) {
      call.kernels.run(a, split, split + 1);
      const int64_t t0 = a.first_token(split);
      chain.add_inner(first, second, t0, a.first_token(split + 1) - t0, dS.data() + split * r * r);
    }
  });
  for (size_t i = size_t(r * r); i < dS.size(); ++i) dS[i % size_t(r * r)] += dS[i];
  Tensor du = torch::stable::new_empty(dense, {n, r});
  const Scratch sum(Scratch::kInSums, n * r * bytes_of(kind_of(sums)));
  chain.gradient(
      dS,
      [&](int64_t begin, int64_t end) {
        of_x.total(sum.data(), begin, end);
        return sum.data() + begin * r * bytes_of(kind_of(sums));
      },
      du);
  return du;
}

}  // namespace
}  // namespace frodkernels::ops

STABLE_TORCH_LIBRARY_FRAGMENT(frodkernels, m) {
  m.def(frodkernels::ops::kReflectSchema);
  m.def(frodkernels::ops::kReflectBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(frodkernels, CPU, m) {
  m.impl("native_reflect", TORCH_BOX(&frodkernels::ops::reflect));
  m.impl("native_reflect_backward", TORCH_BOX(&frodkernels::ops::reflect_backward));
}
