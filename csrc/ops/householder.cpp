// SPDX-License-Identifier: Apache-2.0
//
// frodkernels::native_householder, native_householder_backward and native_householder_gradient on CPU tensors: check,
// pack the two factors, run the kernels of csrc/cpu/householder.h on torch's threads, reduce the partial sums in order.
#include "householder.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include "../cpu/householder.h"

namespace frodkernels::ops {
namespace {

using cpu::Scalar;
using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr int64_t kGrain = int64_t(1) << 17;  // multiply-adds a thread should have to be worth waking

// How the tokens are cut follows from shapes alone, so results never depend on the threads. A tile's rows should stay
// in L2 between the passes over them (kTileBytes); the factors are read once a tile. Partial sums: at least kSplits of
// them, for parallelism; more for long inputs, whose sums would lose accuracy in one chain; fewer where they would hold
// more than kPartialBytes.
constexpr int64_t kGroup = 12, kMostGroups = 4, kTileBytes = int64_t(512) << 10;
constexpr int64_t kSplits = 8, kMostSplits = 64, kTokensInSplit = 128, kPartialBytes = int64_t(32) << 20;

Scalar scalar_of(const Tensor& t, const char* name) { return ops::scalar_of<Scalar>(t, name); }

int64_t tile_tokens(int64_t T, int64_t row_bytes) {
  const int64_t fitting = kTileBytes / (kGroup * std::max<int64_t>(row_bytes, 1));
  const int64_t spread = T / (16 * kGroup);  // many threads should each find one
  return kGroup * std::clamp<int64_t>(std::min(fitting, spread), 1, kMostGroups);
}

int64_t split_count(int64_t T, int64_t tiles, int64_t partial_bytes) {
  const int64_t room = std::max<int64_t>(kPartialBytes / std::max<int64_t>(partial_bytes, 1), 1);
  return std::min({tiles, std::clamp(T / kTokensInSplit, kSplits, kMostSplits), room});
}

// The tensor with unit stride along its rows.
Tensor with_rows(const Tensor& t) { return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t); }

cpu::Rows rows(const Tensor& t) { return {const_cast<void*>(t.const_data_ptr()), t.stride(0)}; }

Tensor as_type(const Tensor& t, ScalarType type, const char* name) {
  scalar_of(t, name);  // refuses what is no floating-point type of ours
  return torch::stable::contiguous(t.scalar_type() == type ? t : torch::stable::to(t, type));
}

// A factor as the kernels want it: the tensor itself, where that is so already.
class Factor {
  Tensor tensor_;
  std::unique_ptr<char[]> packed_;

 public:
  const void* data = nullptr;

  Factor(const Tensor& contiguous, bool left, const cpu::HouseholderKernels& kernels) : tensor_(contiguous) {
    const Scalar type = scalar_of(tensor_, "a factor");
    const int64_t n = tensor_.size(0), r = tensor_.size(1);
    const int64_t size = (left ? kernels.left_size : kernels.right_size)(type, n, r);
    const void* from = tensor_.const_data_ptr();
    data = from;
    if (left && size == n * r) return;
    packed_.reset(new char[size_t(size) * (type == Scalar::kF64 ? 8 : 4)]);
    data = packed_.get();
    auto* pack = left ? kernels.pack_left : kernels.pack_right;
    const int64_t unit = left ? 1 : cpu::kRightBlock;
    parallel_for(0, (n + unit - 1) / unit, std::max<int64_t>(kGrain / (unit * std::max<int64_t>(r, 1)), 1),
                 [&](int64_t begin, int64_t end) { pack(type, from, packed_.get(), n, r, begin, end); });
  }
};

// Partial sums over [n, r], and their total.
class Sums {
  std::unique_ptr<char[]> partial_;
  Tensor total_;

 public:
  Sums(const Tensor& like, ScalarType type, int64_t n, int64_t r)
      : total_(torch::stable::new_empty(like, {n, r}, type)) {}

  void* allocate(int64_t splits) {
    const int64_t size = splits * total_.size(1) * cpu::partial_stride(total_.size(0));
    // Uninitialised on purpose: each task writes its own part, and touches its pages first.
    partial_.reset(new char[size_t(size) * (total_.scalar_type() == ScalarType::Double ? 8 : 4)]);
    return partial_.get();
  }

  Tensor reduce(int64_t splits, const cpu::HouseholderKernels& kernels) {
    const int64_t n = total_.size(0), r = total_.size(1);
    void* to = total_.mutable_data_ptr();
    const Scalar type = scalar_of(total_, "sums");
    constexpr int64_t kUnit = 64;
    const int64_t work = kUnit * std::max<int64_t>(splits * r, 1);
    parallel_for(0, (n + kUnit - 1) / kUnit, std::max<int64_t>(kGrain / work, 1), [&](int64_t begin, int64_t end) {
      kernels.reduce(type, partial_.get(), to, splits, n, r, begin * kUnit, std::min(end * kUnit, n));
    });
    return total_;
  }
};

void run(const cpu::Householder& a, const cpu::HouseholderKernels& kernels) {
  const int64_t work = (a.T * (a.n_in + a.n_out) * std::max<int64_t>(a.r, 1)) / std::max<int64_t>(a.splits, 1);
  parallel_for(0, a.splits, std::max<int64_t>(kGrain / std::max<int64_t>(work, 1), 1),
               [&](int64_t begin, int64_t end) { kernels.run(a, begin, end); });
}

cpu::Householder problem(const Tensor& tokens, const char* name, int64_t n_out, int64_t r) {
  cpu::Householder a;
  a.type = scalar_of(tokens, name);
  a.T = tokens.size(0);
  a.n_in = tokens.size(1);
  a.n_out = n_out;
  a.r = r;
  const int64_t bytes = a.type == Scalar::kF64 ? 8 : a.type == Scalar::kF32 ? 4 : 2;
  a.tile = tile_tokens(a.T, bytes * a.n_in);
  a.splits = a.tiles();
  return a;
}

std::tuple<Tensor, Tensor> householder(const Tensor& x, const Tensor& left, const OptionalTensor& right,
                                       const OptionalTensor& base) {
  check_householder(x, left, right, base);
  const ScalarType type = accumulation_type({&x, &left, right.has_value() ? &*right : &left});
  if (type == ScalarType::Double && x.scalar_type() != type) {
    scalar_of(x, "x");
    OptionalTensor wide_base;
    if (base.has_value()) wide_base = torch::stable::to(*base, type);
    auto [out, coefficients] = householder(torch::stable::to(x, type), left, right, wide_base);
    return {torch::stable::to(out, x.scalar_type()), coefficients};
  }
  const cpu::HouseholderKernels& kernels = cpu::householder_kernels(cpu::chosen_isa());
  const int64_t T = x.size(0), r = left.size(1), m = right.has_value() ? right->size(0) : 0;
  cpu::Householder a = problem(x, "x", m, r);
  Tensor coefficients = torch::stable::new_empty(x, {T, r}, type);
  Tensor out = right.has_value() ? torch::stable::new_empty(x, {T, m}) : torch::stable::new_empty(x, {0});
  const Tensor in = with_rows(x), from = base.has_value() ? with_rows(*base) : in;
  const Factor packed_left(as_type(left, type, "left"), true, kernels);
  a.in = rows(in);
  a.left = packed_left.data;
  a.coefficients = coefficients.mutable_data_ptr();
  if (!right.has_value()) {
    run(a, kernels);
    return {out, coefficients};
  }
  const Factor packed_right(as_type(*right, type, "right"), false, kernels);
  a.base = rows(from);
  a.out = rows(out);
  a.right = packed_right.data;
  run(a, kernels);
  return {out, coefficients};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> householder_backward(const Tensor& g, const Tensor& x,
                                                                const Tensor& coefficients, const Tensor& left,
                                                                const Tensor& right, const OptionalTensor& base,
                                                                std::vector<bool> needs) {
  check_householder_backward(g, x, coefficients, left, right, base, needs.size());
  const ScalarType type = accumulation_type({&g, &left, &right, &coefficients});
  if (type == ScalarType::Double && g.scalar_type() != type) {
    scalar_of(g, "g");
    OptionalTensor wide_base;
    if (base.has_value()) wide_base = torch::stable::to(*base, type);
    auto [dx, q, sum_x, sum_g] = householder_backward(torch::stable::to(g, type), torch::stable::to(x, type),
                                                      coefficients, left, right, wide_base, needs);
    return {torch::stable::to(dx, g.scalar_type()), q, sum_x, sum_g};
  }
  const cpu::HouseholderKernels& kernels = cpu::householder_kernels(cpu::chosen_isa());
  const int64_t T = g.size(0), m = g.size(1), n = x.size(1), r = left.size(1);
  cpu::Householder a = problem(g, "g", n, r);
  Tensor dx = needs[0] ? torch::stable::new_empty(g, {T, n}) : torch::stable::new_empty(g, {0});
  Tensor q = torch::stable::new_empty(g, {T, r}, type);
  const Tensor in = with_rows(g), features = with_rows(x), from = base.has_value() ? with_rows(*base) : in;
  const Tensor saved = as_type(coefficients, type, "coefficients");
  const Factor packed_left(as_type(left, type, "left"), true, kernels);
  const Tensor dense_right = as_type(right, type, "right");
  a.in = rows(in);
  a.left = packed_left.data;
  a.coefficients = q.mutable_data_ptr();
  std::unique_ptr<Factor> packed_right;
  if (needs[0]) {
    packed_right = std::make_unique<Factor>(dense_right, false, kernels);
    a.base = rows(from);
    a.out = rows(dx);
    a.right = packed_right->data;
  }
  Tensor sum_x = torch::stable::new_empty(g, {0}, type), sum_g = torch::stable::new_empty(g, {0}, type);
  if (!needs[1]) {
    run(a, kernels);
    return {dx, q, sum_x, sum_g};
  }
  a.joint = !base.has_value();
  a.x = rows(features);
  a.saved = saved.const_data_ptr();
  const int64_t widest = a.joint ? n : std::max(n, m);
  a.splits = split_count(T, a.tiles(), r * widest * (type == ScalarType::Double ? 8 : 4));
  Sums of_x(g, type, n, r), of_g(g, type, a.joint ? 0 : m, r);
  a.partial_out = of_x.allocate(a.splits);
  if (!a.joint) a.partial_in = of_g.allocate(a.splits);
  run(a, kernels);
  sum_x = of_x.reduce(a.splits, kernels);
  if (!a.joint) sum_g = of_g.reduce(a.splits, kernels);
  return {dx, q, sum_x, sum_g};
}

Tensor householder_gradient(const Tensor& x, const Tensor& q) {
  check_householder_gradient(x, q);
  const ScalarType type = accumulation_type({&x, &q});
  scalar_of(x, "x");
  if (type == ScalarType::Double && x.scalar_type() != type) return householder_gradient(torch::stable::to(x, type), q);
  const cpu::HouseholderKernels& kernels = cpu::householder_kernels(cpu::chosen_isa());
  const Tensor features = with_rows(x), factors = as_type(q, type, "q");
  cpu::Householder a = problem(x, "x", x.size(1), q.size(1));
  a.n_in = 0;
  a.x = rows(features);
  a.coefficients = const_cast<void*>(factors.const_data_ptr());
  a.splits = split_count(a.T, a.tiles(), a.r * a.n_out * (type == ScalarType::Double ? 8 : 4));
  Sums sums(x, type, a.n_out, a.r);
  a.partial_out = sums.allocate(a.splits);
  run(a, kernels);
  return sums.reduce(a.splits, kernels);
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
