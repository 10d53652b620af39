// SPDX-License-Identifier: Apache-2.0
//
// native_householder, native_householder_backward and native_householder_gradient on CUDA tensors (and, in the
// executor's build, on CPU tensors): check, bring operands into the kernels' layout, allocate, launch.
//
// Factors are never rounded to the tokens' 16 bits, even where that is allowed: the tensor cores take them in several
// parts. The tensor-core kernels serve 16-bit tokens whose rows start on 16 bytes; the fused multiply-add kernels the
// rest.
#include "cuda/householder.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../householder.h"
#include "ops/cuda/device.h"
#include "ops/cuda/stream.h"

namespace frodkernels::ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows of contiguous features: as they are where the layout allows, else a copy.
Tensor rows_of(const Tensor& t) { return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t); }

// From row to row; a single row may carry any stride.
int64_t row_stride(const Tensor& t) { return t.size(0) > 1 ? t.stride(0) : 0; }

void check_token_matrix(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(on_device(t), name, " must be on this kernel's device");
  scalar_of<cuda::Scalar>(t, name);
}

void check_rank(int64_t r) {
  STD_TORCH_CHECK(r <= cuda::kMostRanks, "the kernels serve ranks up to ", cuda::kMostRanks, ", got ", r);
}

void check_launch(const char* error, const char* op) {
  STD_TORCH_CHECK(error == nullptr, op, ": the launch failed: ", error == nullptr ? "" : error);
}

// A factor in the dtype of the sums. Its name is for the executor.
Tensor factor_of(const Tensor& t, ScalarType sums, const char* name) {
  scalar_of<cuda::Scalar>(t, name);
  const Tensor made = torch::stable::contiguous(t.scalar_type() == sums ? t : torch::stable::to(t, sums));
  observe(made, name, Access::kRead);
  return made;
}

Tensor scratch(const Tensor& like, int64_t bytes) {
  Tensor out = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  observe(out, "scratch", Access::kWrite);
  return out;
}

Tensor copy_of(const Tensor& t) {
  Tensor out = torch::stable::new_empty(t, {t.size(0), t.size(1)});
  return torch::stable::copy_(out, t);
}

Tensor zeros(const Tensor& like, int64_t rows, int64_t columns, ScalarType type) {
  Tensor out = torch::stable::new_empty(like, {rows, columns}, type);
  return torch::stable::zero_(out);
}

// (base - (x left) right^T, x left); without `right` the first is empty.
std::tuple<Tensor, Tensor> map(const Tensor& x, const Tensor& left, const OptionalTensor& right,
                               const OptionalTensor& base, ScalarType sums, const char* op) {
  const int64_t T = x.size(0), n = x.size(1), r = left.size(1), m = right.has_value() ? right->size(0) : 0;
  check_rank(r);
  if (T == 0 || n == 0 || r == 0) {
    Tensor out = !right.has_value() ? torch::stable::new_empty(x, {0}) : copy_of(base.has_value() ? *base : x);
    return {out, zeros(x, T, r, sums)};
  }
  Tensor out = right.has_value() ? torch::stable::new_empty(x, {T, m}) : torch::stable::new_empty(x, {0});
  Tensor coefficients = torch::stable::new_empty(x, {T, r}, sums);
  const Tensor in = rows_of(x), from = base.has_value() ? rows_of(*base) : in;
  const Tensor dense_left = factor_of(left, sums, "left");
  const Tensor dense_right = m > 0 ? factor_of(*right, sums, "right") : dense_left;
  observe(in, "x", Access::kRead);
  observe(from, "base", Access::kRead);
  observe(out, "out", Access::kWrite);
  observe(coefficients, "coefficients", Access::kWrite);

  cuda::Householder a;
  a.type = scalar_of<cuda::Scalar>(x, "x");
  a.x = in.const_data_ptr();
  a.left = dense_left.const_data_ptr();
  a.coefficients = coefficients.mutable_data_ptr();
  a.T = T, a.n = n, a.r = r;
  a.x_stride = row_stride(in);
  if (m > 0) {
    a.m = m;
    a.right = dense_right.const_data_ptr();
    a.out = out.mutable_data_ptr();
    a.out_stride = m;
    if (base.has_value()) {
      a.base = from.const_data_ptr();
      a.base_stride = row_stride(from);
    }
  }
  CUstream_st* stream = current_cuda_stream(x.get_device_index());
  if (cuda::householder_on_tensor_cores(a)) {
    Tensor packed = scratch(x, cuda::householder_mma_scratch(a));
    check_launch(cuda::householder_mma(a, packed.mutable_data_ptr(), stream), op);
  } else {
    Tensor packed = scratch(x, cuda::householder_fma_scratch(a));
    check_launch(cuda::householder_fma(a, packed.mutable_data_ptr(), stream), op);
  }
  return {out, coefficients};
}

// x^T q, plus y^T p where there is a second pair.
Tensor gradient(const Tensor& x, const Tensor& q, const Tensor* y, const Tensor* p, ScalarType sums, const char* op) {
  const int64_t T = x.size(0), n = x.size(1), r = q.size(1);
  check_rank(r);
  if (T == 0 || n == 0 || r == 0) return zeros(x, n, r, sums);
  Tensor out = torch::stable::new_empty(x, {n, r}, sums);
  observe(out, "sums", Access::kWrite);
  const Tensor features[2] = {rows_of(x), rows_of(y == nullptr ? x : *y)};
  const Tensor factors[2] = {factor_of(q, sums, "q"), factor_of(p == nullptr ? q : *p, sums, "coefficients")};

  cuda::HouseholderGradient a;
  a.type = scalar_of<cuda::Scalar>(x, "x");
  a.count = y == nullptr ? 1 : 2;
  for (int k = 0; k < a.count; ++k) {
    observe(features[k], "tokens", Access::kRead);
    a.pairs[k] = {features[k].const_data_ptr(), factors[k].const_data_ptr(), row_stride(features[k])};
  }
  a.out = out.mutable_data_ptr();
  a.T = T, a.n = n, a.r = r;
  CUstream_st* stream = current_cuda_stream(x.get_device_index());
  if (cuda::householder_on_tensor_cores(a)) {
    Tensor room = scratch(x, cuda::householder_gradient_mma_scratch(a));
    check_launch(cuda::householder_gradient_mma(a, room.mutable_data_ptr(), stream), op);
  } else {
    Tensor room = scratch(x, cuda::householder_gradient_fma_scratch(a));
    check_launch(cuda::householder_gradient_fma(a, room.mutable_data_ptr(), stream), op);
  }
  return out;
}

OptionalTensor wide(const OptionalTensor& t) {
  return t.has_value() ? OptionalTensor(torch::stable::to(*t, ScalarType::Double)) : t;
}

std::tuple<Tensor, Tensor> householder(const Tensor& x, const Tensor& left, const OptionalTensor& right,
                                       const OptionalTensor& base, bool) {
  constexpr char kOp[] = "native_householder";
  check_householder(x, left, right, base);
  check_token_matrix(x, "x");
  const DeviceGuard guard(x.get_device_index());
  const ScalarType sums = accumulation_type({&x, &left, right.has_value() ? &*right : &left});
  if (sums == x.scalar_type() || sums != ScalarType::Double) return map(x, left, right, base, sums, kOp);
  auto [out, coefficients] = map(torch::stable::to(x, sums), left, right, wide(base), sums, kOp);
  return {torch::stable::to(out, x.scalar_type()), coefficients};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> householder_backward(const Tensor& g, const Tensor& x,
                                                                const Tensor& coefficients, const Tensor& left,
                                                                const Tensor& right, const OptionalTensor& base,
                                                                std::vector<bool> needs, bool) {
  constexpr char kOp[] = "native_householder_backward";
  check_householder_backward(g, x, coefficients, left, right, base, needs.size());
  check_token_matrix(g, "g");
  const ScalarType sums = accumulation_type({&g, &left, &right, &coefficients});
  if (sums == ScalarType::Double && g.scalar_type() != sums) {
    auto [dx, q, sum_x, sum_g] = householder_backward(torch::stable::to(g, sums), torch::stable::to(x, sums),
                                                      coefficients, left, right, wide(base), needs, false);
    return {torch::stable::to(dx, g.scalar_type()), q, sum_x, sum_g};
  }
  const DeviceGuard guard(g.get_device_index());
  const OptionalTensor wanted_right = needs[0] ? OptionalTensor(right) : std::nullopt;
  auto [dx, q] = map(g, left, wanted_right, base, sums, kOp);
  const Tensor none = torch::stable::new_empty(q, {0});
  if (!needs[1]) return {dx, q, none, none};
  if (!base.has_value()) return {dx, q, gradient(x, q, &g, &coefficients, sums, kOp), none};
  return {dx, q, gradient(x, q, nullptr, nullptr, sums, kOp), gradient(g, coefficients, nullptr, nullptr, sums, kOp)};
}

Tensor householder_gradient(const Tensor& x, const Tensor& q) {
  check_householder_gradient(x, q);
  check_token_matrix(x, "x");
  const DeviceGuard guard(x.get_device_index());
  const ScalarType sums = accumulation_type({&x, &q});
  const bool widen = sums == ScalarType::Double && x.scalar_type() != sums;
  return gradient(widen ? torch::stable::to(x, sums) : x, q, nullptr, nullptr, sums, "native_householder_gradient");
}

}  // namespace
}  // namespace frodkernels::ops

#if defined(SIMT_EMU)
STABLE_TORCH_LIBRARY_FRAGMENT(FRODKERNELS_OP_NAMESPACE, m) {
  m.def(frodkernels::ops::kHouseholderSchema);
  m.def(frodkernels::ops::kHouseholderBackwardSchema);
  m.def(frodkernels::ops::kHouseholderGradientSchema);
}
#endif

STABLE_TORCH_LIBRARY_IMPL(FRODKERNELS_OP_NAMESPACE, FRODKERNELS_OP_DEVICE, m) {
  m.impl("native_householder", TORCH_BOX(&frodkernels::ops::householder));
  m.impl("native_householder_backward", TORCH_BOX(&frodkernels::ops::householder_backward));
  m.impl("native_householder_gradient", TORCH_BOX(&frodkernels::ops::householder_gradient));
}
