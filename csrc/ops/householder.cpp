// SPDX-License-Identifier: Apache-2.0
//
// frodkernels::native_householder, native_householder_backward and native_householder_gradient on CPU tensors: check,
// pack the two factors, run the kernels of csrc/cpu/householder.h on torch's threads, reduce the partial sums in order.
#include "householder.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../cpu/householder.h"
#include "reflections.h"

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

// Memory for one call, which its thread keeps for the next one unless it is a lot: fresh pages would cost as much as
// what is written to them.
class Scratch {
  struct Buffer {
    std::unique_ptr<char, decltype(&std::free)> data{nullptr, &std::free};
    size_t size = 0;
  };
  static constexpr size_t kAlignment = 64, kKept = size_t(8) << 20;
  enum { kSlots = 4 };
  static Buffer& kept(int slot) {
    thread_local Buffer buffers[kSlots];
    return buffers[slot];
  }
  const int slot_;
  Buffer buffer_;

 public:
  enum Slot { kLeft, kRight, kOutSums, kInSums };

  Scratch(Slot slot, int64_t elements, ScalarType type) : slot_(slot), buffer_(std::move(kept(slot))) {
    const size_t wanted = size_t(elements) * (type == ScalarType::Double ? 8 : 4);
    if (buffer_.data != nullptr && buffer_.size >= wanted) return;
    buffer_.size = (wanted / kAlignment + 1) * kAlignment;
    buffer_.data.reset();
    buffer_.data.reset(static_cast<char*>(std::aligned_alloc(kAlignment, buffer_.size)));
    if (buffer_.data == nullptr) throw std::bad_alloc();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (buffer_.size <= kKept) kept(slot_) = std::move(buffer_);
  }
  void* data() const { return buffer_.data.get(); }
};

// f(begin, end) over features in multiples of cpu::kUnit, on as many threads as the work per feature is worth.
template <typename F>
void over_features(int64_t n, int64_t work, F f) {
  constexpr int64_t kUnit = cpu::kUnit;
  const int64_t grain = std::max<int64_t>(kGrain / (kUnit * std::max<int64_t>(work, 1)), 1);
  parallel_for(0, (n + kUnit - 1) / kUnit, grain,
               [&](int64_t begin, int64_t end) { f(begin * kUnit, std::min(end * kUnit, n)); });
}

// A factor [n, r] as the kernels want it: the tensor itself, where that is so already.
class Factor {
  const Tensor tensor_;
  std::optional<Scratch> packed_;

 public:
  Factor(const Tensor& factor, ScalarType type, const char* name, bool left, const cpu::HouseholderKernels& kernels)
      : tensor_(as_type(factor, type, name)) {
    const Scalar scalar = scalar_of(tensor_, name);
    const int64_t n = tensor_.size(0), r = tensor_.size(1);
    const int64_t size = (left ? kernels.left_size : kernels.right_size)(scalar, n, r);
    if (size == 0) return;
    packed_.emplace(left ? Scratch::kLeft : Scratch::kRight, size, type);
    auto* pack = left ? kernels.pack_left : kernels.pack_right;
    const void* from = tensor_.const_data_ptr();
    over_features(n, r, [&](int64_t begin, int64_t end) { pack(scalar, from, packed_->data(), n, r, begin, end); });
  }
  const void* data() const { return packed_.has_value() ? packed_->data() : tensor_.const_data_ptr(); }
};

// The partial sums over [n, r]. Uninitialised on purpose: each task writes its own part, and touches its pages first.
class Sums {
  const int64_t splits_, n_, r_;
  const ScalarType type_;
  const Scratch partial_;

 public:
  Sums(Scratch::Slot slot, int64_t splits, int64_t n, int64_t r, ScalarType type)
      : splits_(splits), n_(n), r_(r), type_(type), partial_(slot, splits * r * cpu::partial_stride(n), type) {}
  void* data() const { return partial_.data(); }

  Tensor total(const Tensor& like, const cpu::HouseholderKernels& kernels) const {
    Tensor sum = torch::stable::new_empty(like, {n_, r_}, type_);
    void* to = sum.mutable_data_ptr();
    over_features(n_, splits_ * r_, [&](int64_t begin, int64_t end) {
      kernels.reduce(type_ == ScalarType::Double ? Scalar::kF64 : Scalar::kF32, data(), to, splits_, n_, r_, begin,
                     end);
    });
    return sum;
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

const cpu::HouseholderKernels& chosen_kernels(const Tensor& tokens, bool rounded) {
  const cpu::Isa isa = cpu::chosen_isa();
  const bool bf16 = rounded && tokens.scalar_type() == ScalarType::BFloat16;
  const cpu::HouseholderKernels* faster = bf16 ? cpu::householder_bf16_kernels(isa) : nullptr;
  return faster == nullptr ? cpu::householder_kernels(isa) : *faster;
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
  const cpu::HouseholderKernels& kernels = chosen_kernels(x, rounded);
  const int64_t T = x.size(0), r = left.size(1), m = right.has_value() ? right->size(0) : 0;
  cpu::Householder a = problem(x, "x", m, r);
  Tensor coefficients = torch::stable::new_empty(x, {T, r}, type);
  Tensor out = right.has_value() ? torch::stable::new_empty(x, {T, m}) : torch::stable::new_empty(x, {0});
  const Tensor in = with_rows(x), from = base.has_value() ? with_rows(*base) : in;
  const Factor packed_left(left, type, "left", true, kernels);
  a.in = rows(in);
  a.left = packed_left.data();
  a.coefficients = coefficients.mutable_data_ptr();
  if (!right.has_value()) {
    run(a, kernels);
    return {out, coefficients};
  }
  const Factor packed_right(*right, type, "right", false, kernels);
  a.base = rows(from);
  a.out = rows(out);
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
  const cpu::HouseholderKernels& kernels = chosen_kernels(g, rounded);
  const int64_t T = g.size(0), m = g.size(1), n = x.size(1), r = left.size(1);
  cpu::Householder a = problem(g, "g", n, r);
  Tensor dx = needs[0] ? torch::stable::new_empty(g, {T, n}) : torch::stable::new_empty(g, {0});
  Tensor q = torch::stable::new_empty(g, {T, r}, type);
  const Tensor in = with_rows(g), features = with_rows(x), from = base.has_value() ? with_rows(*base) : in;
  const Tensor saved = as_type(coefficients, type, "coefficients");
  const Factor packed_left(left, type, "left", true, kernels);
  scalar_of(right, "right");
  a.in = rows(in);
  a.left = packed_left.data();
  a.coefficients = q.mutable_data_ptr();
  std::optional<Factor> packed_right;
  if (needs[0]) {
    packed_right.emplace(right, type, "right", false, kernels);
    a.base = rows(from);
    a.out = rows(dx);
    a.right = packed_right->data();
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
  const Sums of_x(Scratch::kOutSums, a.splits, n, r, type), of_g(Scratch::kInSums, a.splits, a.joint ? 0 : m, r, type);
  a.partial_out = of_x.data();
  if (!a.joint) a.partial_in = of_g.data();
  run(a, kernels);
  sum_x = of_x.total(g, kernels);
  if (!a.joint) sum_g = of_g.total(g, kernels);
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
  a.project = false;
  a.x = rows(features);
  a.coefficients = const_cast<void*>(factors.const_data_ptr());
  a.splits = split_count(a.T, a.tiles(), a.r * a.n_out * (type == ScalarType::Double ? 8 : 4));
  const Sums sums(Scratch::kOutSums, a.splits, a.n_out, a.r, type);
  a.partial_out = sums.data();
  run(a, kernels);
  return sums.total(x, kernels);
}

}  // namespace

Tensor product_on_cpu(const Tensor& rows, const Tensor& square) {
  return std::get<1>(householder(rows, square, std::nullopt, std::nullopt, false));
}

Tensor inner_on_cpu(const Tensor& a, const Tensor& b) { return householder_gradient(a, b); }

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
