// SPDX-License-Identifier: Apache-2.0
//
// frodkernels::native_reflections, native_reflections_again and native_reflections_gradient on CPU tensors.
#include "reflections.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "chain.h"

namespace frodkernels::ops {
namespace {

using cpu::Scalar;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor checked(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(t.device().is_cpu(), name, " must be a CPU tensor");
  STD_TORCH_CHECK(t.dim() == 2 && (rows < 0 || t.size(0) == rows) && (columns < 0 || t.size(1) == columns), name,
                  " has the wrong shape");
  STD_TORCH_CHECK(t.size(1) > 0, name, " must have columns");
  return as_contiguous(t);
}

Tensor checked_sums(const Tensor& t, const char* name, int64_t rows, int64_t columns, ScalarType type) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, " must have the dtype of the sums");
  return checked(t, name, rows, columns);
}

// norms [r] of a kept dtype.
Tensor checked_norms(const Tensor& norms, int64_t r) {
  STD_TORCH_CHECK(norms.device().is_cpu() && norms.dim() == 1 && norms.size(0) == r, "norms must be [", r, "]");
  STD_TORCH_CHECK(norms.scalar_type() == ScalarType::Float || norms.scalar_type() == ScalarType::Double,
                  "norms must be float32 or float64");
  return as_contiguous(norms);
}

// A chain of u [n, r] that writes its factors to tensors.
struct Factors {
  Tensor unit, left;
  Chain chain;

  Factors(const Tensor& u, bool wide)
      : unit(torch::stable::new_empty(u, {u.size(0), u.size(1)}, Chain::sums_type(u, wide))),
        left(torch::stable::new_empty(u, {u.size(0), u.size(1)}, Chain::sums_type(u, wide))),
        chain(u, wide, unit.mutable_data_ptr(), left.mutable_data_ptr()) {}
  void form(const Tensor& norms, const Tensor& inverse, bool transpose) {
    chain.prepare(norms.const_data_ptr(), inverse.const_data_ptr(), transpose);
    chain.form([](int64_t, int64_t) {});
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> reflections(const Tensor& u, bool wide, bool transpose) {
  const Tensor dense = checked(u, "u", -1, -1);
  scalar_of<Scalar>(dense, "u");
  const int64_t r = dense.size(1);
  const ScalarType kind = Chain::kind_type(dense, wide);
  Tensor norms = torch::stable::new_empty(dense, {r}, kind), inverse = torch::stable::new_empty(dense, {r, r}, kind);
  Factors factors(dense, wide);
  factors.chain.measure(norms.mutable_data_ptr(), inverse.mutable_data_ptr());
  factors.form(norms, inverse, transpose);
  return {factors.unit, factors.left, inverse, norms};
}

std::tuple<Tensor, Tensor> reflections_again(const Tensor& u, const Tensor& inverse, const Tensor& norms, bool wide,
                                             bool transpose) {
  const Tensor dense = checked(u, "u", -1, -1), lengths = checked_norms(norms, dense.size(1));
  STD_TORCH_CHECK(lengths.scalar_type() == Chain::kind_type(dense, wide), "norms have the wrong dtype");
  const Tensor square = checked_sums(inverse, "inverse", dense.size(1), dense.size(1), lengths.scalar_type());
  Factors factors(dense, wide);
  factors.form(lengths, square, transpose);
  return {factors.unit, factors.left};
}

Tensor reflections_gradient(const Tensor& u, const Tensor& unit, const Tensor& norms, const Tensor& sums,
                            const Tensor& a, const Tensor& b) {
  const Tensor q = checked(unit, "unit", -1, -1);
  const int64_t n = q.size(0), r = q.size(1);
  const Tensor dense = checked(u, "u", n, r), lengths = checked_norms(norms, r);
  const ScalarType type = q.scalar_type();
  const bool wide = type == ScalarType::Double;
  STD_TORCH_CHECK(type == Chain::sums_type(dense, wide), "unit must be float32 or float64, no narrower than u");
  STD_TORCH_CHECK(lengths.scalar_type() == Chain::kind_type(dense, wide), "norms have the wrong dtype");
  const Tensor given = checked_sums(sums, "sums", n, r, type);
  const Tensor first = checked_sums(a, "a", -1, r, type), second = checked_sums(b, "b", first.size(0), r, type);
  Tensor du = torch::stable::new_empty(dense, {n, r});
  Chain chain(dense, wide, const_cast<void*>(q.const_data_ptr()));
  chain.set_norms(lengths.const_data_ptr());
  const char* from = static_cast<const char*>(given.const_data_ptr());
  chain.gradient(
      chain.inner(first.const_data_ptr(), second.const_data_ptr(), first.size(0)),
      [&](int64_t begin, int64_t) { return from + begin * r * bytes_of(kind_of(type)); }, du);
  return du;
}

}  // namespace
}  // namespace frodkernels::ops

STABLE_TORCH_LIBRARY_FRAGMENT(frodkernels, m) {
  m.def(frodkernels::ops::kReflectionsSchema);
  m.def(frodkernels::ops::kReflectionsAgainSchema);
  m.def(frodkernels::ops::kReflectionsGradientSchema);
}

STABLE_TORCH_LIBRARY_IMPL(frodkernels, CPU, m) {
  m.impl("native_reflections", TORCH_BOX(&frodkernels::ops::reflections));
  m.impl("native_reflections_again", TORCH_BOX(&frodkernels::ops::reflections_again));
  m.impl("native_reflections_gradient", TORCH_BOX(&frodkernels::ops::reflections_gradient));
}
