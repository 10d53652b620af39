// SPDX-License-Identifier: Apache-2.0
//
// frodkernels::native_sparse_core and native_sparse_core_backward on CPU tensors, and both adding to what is there
// (..._add_): check what memory safety needs, lay out scratch, run the kernels of csrc/cpu/sparse_core.h on torch's
// threads, reduce the partial sums in order.
#include "sparse_core.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "slots.h"

namespace frodkernels::ops {
namespace {

using cpu::Scalar;
using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

// Accumulation-type copies of the parameters: values in slot order.
template <typename Acc>
struct Parameters {
  std::vector<Acc> values, lam;

  Parameters(const Tensor& v, const OptionalTensor& l, const Slots& slots, int64_t n_in) : values(slots.nnz) {
    check_cpu(v, "values");
    check_vector(v, "values", slots.nnz);
    const Tensor dense = as_contiguous(v);
    const Scalar type = scalar_of(v, "values");
    const void* data = dense.const_data_ptr();
    const bool good = by_scalar(type, [&](auto t) {
      return slots.narrow() ? fill<t.value, uint16_t>(data, slots, n_in) : fill<t.value, int32_t>(data, slots, n_in);
    });
    STD_TORCH_CHECK(good, "indices or perm have entries out of range");
    if (!l.has_value()) return;
    check_cpu(*l, "lam");
    check_vector(*l, "lam", slots.groups);
    STD_TORCH_CHECK(n_in == slots.groups, "lam needs a square pattern");
    const Tensor diagonal = as_contiguous(*l);
    const Scalar lam_type = scalar_of(*l, "lam");
    lam.resize(slots.groups);
    by_scalar(lam_type, [&](auto t) {
      for (int64_t i = 0; i < slots.groups; ++i) lam[i] = read<Acc, t.value>(diagonal.const_data_ptr(), i);
    });
  }

  // values[p] = data[perm[p]]; false when an index of the plan is out of range.
  template <Scalar kType, typename Index>
  bool fill(const void* data, const Slots& slots, int64_t n_in) {
    std::atomic<bool> good{true};
    const int32_t* order = slots.order();
    const Index* index = static_cast<const Index*>(slots.indices.const_data_ptr());
    const uint64_t nnz = uint64_t(slots.nnz), rows = uint64_t(n_in);
    parallel_for(0, slots.nnz, kGrain, [&](int64_t begin, int64_t end) {
      bool fine = true;
      for (int64_t p = begin; p < end; ++p) {
        const bool inside = uint64_t(int64_t(order[p])) < nnz && uint64_t(int64_t(index[p])) < rows;
        fine &= inside;
        values[p] = inside ? read<Acc, kType>(data, order[p]) : Acc(0);
      }
      if (!fine) good = false;
    });
    return good;
  }

  cpu::Plan plan(const Slots& slots) const {
    cpu::Plan plan;
    plan.indptr = static_cast<const int32_t*>(slots.indptr.const_data_ptr());
    plan.indices = slots.indices.const_data_ptr();
    plan.narrow = slots.narrow();
    plan.values = values.data();
    plan.lam = lam.empty() ? nullptr : lam.data();
    plan.nnz = slots.nnz;
    return plan;
  }
};

// out = (S + D) z, or out += S z.
template <typename Acc>
void forward_into(Tensor& out, const Tensor& z, const OptionalTensor& lam, const Tensor& values, const Slots& slots,
                  bool add) {
  const Parameters<Acc> parameters(values, lam, slots, z.size(0));
  if (out.numel() == 0) return;
  cpu::Product a;
  a.type = scalar_of(z, "z");
  a.n_in = z.size(0);
  a.n_out = slots.groups;
  a.T = z.size(1);
  a.plan = parameters.plan(slots);
  a.tiling = tiling(a.type, a.n_in, a.n_out, slots.nnz, a.T, false);
  a.in = features(z);
  a.out = features(out);
  a.add = add;
  const cpu::Kernels& kernels = cpu::kernels(cpu::chosen_isa(), a.type);
  parallel_for(0, a.tiling.tiles * a.tiling.blocks, 1,
               [&](int64_t begin, int64_t end) { kernels.forward(a, begin, end); });
}

template <typename Acc>
Tensor run_forward(const Tensor& z, const OptionalTensor& lam, const Tensor& values, const Slots& slots,
                   bool token_major) {
  Tensor out = new_features(z, slots.groups, z.size(1), token_major);
  forward_into<Acc>(out, z, lam, values, slots, false);
  return out;
}

// What is not to be computed has no entries. dz is written, or added to.
template <typename Acc>
void backward_into(Tensor& dz, Tensor& dlam, Tensor& dvalues, const Tensor& u, const Tensor& z,
                   const OptionalTensor& lam, const Tensor& values, const Slots& slots, bool add) {
  const Parameters<Acc> parameters(values, lam, slots, u.size(0));
  cpu::Product a;
  a.type = scalar_of(u, "u");
  a.n_in = u.size(0);
  a.n_out = slots.groups;
  a.T = u.size(1);
  a.plan = parameters.plan(slots);
  a.tiling = tiling(a.type, a.n_in, a.n_out, slots.nnz, a.T, true);
  a.in = features(u);
  a.z = features(z);
  if (dz.numel() > 0) a.out = features(dz);
  a.add = add;
  // Uninitialised on purpose: each task clears its own part, and touches its pages first.
  const std::unique_ptr<Acc[]> partial_values(new Acc[dvalues.numel() * a.tiling.splits]);
  const std::unique_ptr<Acc[]> partial_lam(new Acc[dlam.numel() * a.tiling.splits]);
  if (dvalues.numel() > 0) a.partial_values = partial_values.get();
  if (dlam.numel() > 0) a.partial_lam = partial_lam.get();
  const cpu::Kernels& kernels = cpu::kernels(cpu::chosen_isa(), a.type);
  parallel_for(0, a.tiling.splits * a.tiling.blocks, 1,
               [&](int64_t begin, int64_t end) { kernels.backward(a, begin, end); });
  reduce(partial_values.get(), a.tiling.splits, slots.order(), dvalues, "values");
  reduce(partial_lam.get(), a.tiling.splits, nullptr, dlam, "lam");
}

template <typename Acc>
std::tuple<Tensor, Tensor, Tensor> run_backward(const Tensor& u, const Tensor& z, const OptionalTensor& lam,
                                                const Tensor& values, const Slots& slots,
                                                const std::vector<bool>& needs, bool token_major) {
  const int64_t n_out = slots.groups, T = u.size(1);
  Tensor dz = needs[0] ? new_features(u, n_out, T, token_major) : torch::stable::new_empty(u, {0});
  Tensor dlam = lam.has_value()
                    ? torch::stable::new_empty(*lam, {needs[1] ? n_out : 0})
                    : torch::stable::new_empty(values, {0}, sizeof(Acc) == 8 ? ScalarType::Double : ScalarType::Float);
  Tensor dvalues = torch::stable::new_empty(values, {needs[2] ? slots.nnz : 0});
  backward_into<Acc>(dz, dlam, dvalues, u, z, lam, values, slots, false);
  return {dz, dlam, dvalues};
}

Tensor sparse_core(const Tensor& z, const OptionalTensor& lam, const Tensor& values, const Tensor& indptr,
                   const Tensor& indices, const Tensor& perm, bool token_major, OptionalTensors tiles) {
  check_features(z, "z");
  if (wants_double(z, values)) {
    const Tensor wide = sparse_core(torch::stable::to(z, ScalarType::Double), lam, values, indptr, indices, perm,
                                    token_major, std::nullopt);
    return torch::stable::to(wide, z.scalar_type());
  }
  const Slots slots(indptr, indices, perm);
  return z.scalar_type() == ScalarType::Double ? run_forward<double>(z, lam, values, slots, token_major)
                                               : run_forward<float>(z, lam, values, slots, token_major);
}

std::tuple<Tensor, Tensor, Tensor> sparse_core_backward(const Tensor& u, const Tensor& z, const OptionalTensor& lam,
                                                        const Tensor& values, const Tensor& indptr,
                                                        const Tensor& indices, const Tensor& perm,
                                                        std::vector<bool> needs, bool token_major,
                                                        OptionalTensors tiles) {
  check_features(u, "u");
  check_features(z, "z");
  check_pair(u, z, needs.size());
  if (wants_double(u, values)) {
    auto [dz, dlam, dvalues] =
        sparse_core_backward(torch::stable::to(u, ScalarType::Double), torch::stable::to(z, ScalarType::Double), lam,
                             values, indptr, indices, perm, needs, token_major, std::nullopt);
    return {torch::stable::to(dz, u.scalar_type()), dlam, dvalues};
  }
  const Slots slots(indptr, indices, perm);
  STD_TORCH_CHECK(z.size(0) == slots.groups, "z must have one row per group of the plan");
  return u.scalar_type() == ScalarType::Double ? run_backward<double>(u, z, lam, values, slots, needs, token_major)
                                               : run_backward<float>(u, z, lam, values, slots, needs, token_major);
}

void check_sum(const Tensor& out, const char* name, const Tensor& like, int64_t rows) {
  check_features(out, name);
  STD_TORCH_CHECK(out.scalar_type() == like.scalar_type() && out.size(0) == rows && out.size(1) == like.size(1), name,
                  " must be [", rows, ", ", like.size(1), "] in the features' dtype");
}

void check_sums(const Tensor& x, const Tensor& values) {
  STD_TORCH_CHECK(!wants_double(x, values), "values must not be float64 where the features are not");
}

void sparse_core_add(Tensor out, const Tensor& z, const Tensor& values, const Tensor& indptr, const Tensor& indices,
                     const Tensor& perm) {
  check_features(z, "z");
  check_sums(z, values);
  const Slots slots(indptr, indices, perm);
  check_sum(out, "out", z, slots.groups);
  if (z.scalar_type() == ScalarType::Double) {
    forward_into<double>(out, z, std::nullopt, values, slots, true);
  } else {
    forward_into<float>(out, z, std::nullopt, values, slots, true);
  }
}

Tensor sparse_core_backward_add(Tensor dz, const Tensor& u, const Tensor& z, const Tensor& values, const Tensor& indptr,
                                const Tensor& indices, const Tensor& perm, bool want_values) {
  check_features(u, "u");
  check_features(z, "z");
  check_pair(u, z, 3);
  check_sums(u, values);
  const Slots slots(indptr, indices, perm);
  STD_TORCH_CHECK(z.size(0) == slots.groups, "z must have one row per group of the plan");
  check_sum(dz, "dz", u, slots.groups);
  Tensor dvalues = torch::stable::new_empty(values, {want_values ? slots.nnz : 0});
  Tensor no_lam = torch::stable::new_empty(values, {0});
  if (u.scalar_type() == ScalarType::Double) {
    backward_into<double>(dz, no_lam, dvalues, u, z, std::nullopt, values, slots, true);
  } else {
    backward_into<float>(dz, no_lam, dvalues, u, z, std::nullopt, values, slots, true);
  }
  return dvalues;
}

int64_t tile_block(const Tensor& like, int64_t columns) { return 0; }

std::string why_not(const Tensor& like) { return ""; }

std::string cpu_isa() { return cpu::isa_name(cpu::chosen_isa()); }

}  // namespace
}  // namespace frodkernels::ops

STABLE_TORCH_LIBRARY_FRAGMENT(frodkernels, m) {
  m.def("native_cpu_isa() -> str");
  m.def(frodkernels::ops::kSparseCoreSchema);
  m.def(frodkernels::ops::kSparseCoreBackwardSchema);
  m.def(
      "native_sparse_core_add_(Tensor(a!) out, Tensor z, Tensor values, Tensor indptr, Tensor indices, Tensor perm) "
      "-> ()");
  m.def(
      "native_sparse_core_backward_add_(Tensor(a!) dz, Tensor u, Tensor z, Tensor values, Tensor indptr, "
      "Tensor indices, Tensor perm, bool want_values) -> Tensor");
  m.def(frodkernels::ops::kTileBlockSchema);
  m.def(frodkernels::ops::kWhyNotSchema);
}

STABLE_TORCH_LIBRARY_IMPL(frodkernels, CompositeExplicitAutograd, m) {
  m.impl("native_cpu_isa", TORCH_BOX(&frodkernels::ops::cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(frodkernels, CPU, m) {
  m.impl("native_tile_block", TORCH_BOX(&frodkernels::ops::tile_block));
  m.impl("native_why_not", TORCH_BOX(&frodkernels::ops::why_not));
  m.impl("native_sparse_core", TORCH_BOX(&frodkernels::ops::sparse_core));
  m.impl("native_sparse_core_backward", TORCH_BOX(&frodkernels::ops::sparse_core_backward));
  m.impl("native_sparse_core_add_", TORCH_BOX(&frodkernels::ops::sparse_core_add));
  m.impl("native_sparse_core_backward_add_", TORCH_BOX(&frodkernels::ops::sparse_core_backward_add));
}
