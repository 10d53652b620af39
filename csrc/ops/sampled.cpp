// SPDX-License-Identifier: Apache-2.0
//
// frodkernels::native_sampled_product and native_scatter_values_ on CPU tensors: check what memory safety needs, choose
// the kernels of csrc/cpu, run them on torch's threads.
#include "sampled.h"

#include <torch/csrc/stable/library.h>

#include <memory>

#include "../cpu/sampled.h"
#include "../cpu/scatter.h"
#include "slots.h"

namespace frodkernels::ops {
namespace {

constexpr int64_t kScatterGroups = 64;  // a thread should have to be worth waking

// One inner product an entry: the sparse core's backward without its product.
template <typename Acc>
void run_entries(const Tensor& a, const Tensor& b, const Slots& slots, Tensor& out) {
  cpu::Product p;
  p.type = scalar_of(a, "a");
  p.n_in = a.size(0);
  p.n_out = slots.groups;
  p.T = a.size(1);
  p.plan.indptr = slots.pointers();
  p.plan.indices = slots.indices.const_data_ptr();
  p.plan.narrow = slots.narrow();
  p.plan.nnz = slots.nnz;
  p.tiling = tiling(p.type, p.n_in, p.n_out, slots.nnz, p.T, true);
  p.in = features(a);
  p.z = features(b);
  // Uninitialised on purpose: each task clears its own part, and touches its pages first.
  const std::unique_ptr<Acc[]> partial(new Acc[slots.nnz * p.tiling.splits]);
  p.partial_values = partial.get();
  const cpu::Kernels& kernels = cpu::kernels(cpu::chosen_isa(), p.type);
  parallel_for(0, p.tiling.splits * p.tiling.blocks, 1,
               [&](int64_t begin, int64_t end) { kernels.backward(p, begin, end); });
  reduce(partial.get(), p.tiling.splits, slots.order(), out, "out");
}

void run_blocks(const Tensor& a, const Tensor& b, const Slots& slots, Tensor& out) {
  cpu::Sampled s;
  s.type = scalar_of(a, "a");
  s.groups = slots.groups;
  s.columns = a.size(0);
  s.T = a.size(1);
  s.a = features(a);
  s.b = features(b);
  s.indptr = slots.pointers();
  s.indices = slots.indices.const_data_ptr();
  s.narrow = slots.narrow();
  s.perm = slots.order();
  s.out = out.mutable_data_ptr();
  s.out_type = scalar_of(out, "out");
  const cpu::Isa isa = cpu::chosen_isa();
  const cpu::SampledKernels* pairs = s.type == Scalar::kBF16 ? cpu::sampled_bf16_kernels(isa) : nullptr;
  const cpu::SampledKernels& kernels = pairs != nullptr ? *pairs : cpu::sampled_kernels(isa);
  parallel_for(0, s.row_blocks() * s.column_blocks(), 1,
               [&](int64_t begin, int64_t end) { kernels.run(s, begin, end); });
}

Tensor sampled_product(const Tensor& a, const Tensor& b, const Tensor& indptr, const Tensor& indices,
                       const Tensor& perm, ScalarType dtype, bool tiled, OptionalTensors tiles) {
  check_features(a, "a");
  check_features(b, "b");
  if (dtype == ScalarType::Double && a.scalar_type() != ScalarType::Double) {
    return sampled_product(torch::stable::to(a, dtype), torch::stable::to(b, dtype), indptr, indices, perm, dtype,
                           tiled, std::nullopt);
  }
  const Slots slots(indptr, indices, perm);
  check_sampled(a, b, slots.groups);
  STD_TORCH_CHECK(slots.in_range(a.size(0)), "indices or perm have entries out of range");
  Tensor out = torch::stable::new_empty(a, {slots.nnz}, dtype);
  if (slots.nnz == 0) return out;
  if (a.size(1) == 0) return torch::stable::zero_(out);
  if (tiled) {
    STD_TORCH_CHECK(slots.ascending(), "indices must ascend within a group");
    run_blocks(a, b, slots, out);
  } else if (a.scalar_type() == ScalarType::Double) {
    run_entries<double>(a, b, slots, out);
  } else {
    run_entries<float>(a, b, slots, out);
  }
  return out;
}

void scatter_values(Tensor weight, const Tensor& values, const Tensor& indptr, const Tensor& indices,
                    const Tensor& perm, double scale, bool accumulate, OptionalTensor old) {
  check_cpu(weight, "weight");
  check_cpu(values, "values");
  const Slots slots(indptr, indices, perm);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == slots.groups,
                  "weight must have one row per group of the plan");
  check_vector(values, "values", slots.nnz);
  if (old.has_value()) {
    check_cpu(*old, "old");
    check_vector(*old, "old", slots.nnz);
    STD_TORCH_CHECK(old->scalar_type() == weight.scalar_type() && old->is_contiguous(),
                    "old must be contiguous, in weight's dtype");
  }
  STD_TORCH_CHECK(slots.in_range(weight.size(1)), "indices or perm have entries out of range");
  if (slots.nnz == 0) return;
  const Tensor from = as_contiguous(values);
  cpu::Scatter s;
  s.type = scalar_of(weight, "weight");
  s.values_type = scalar_of(from, "values");
  s.weight = weight.mutable_data_ptr();
  s.row = weight.stride(0);
  s.column = weight.stride(1);
  s.values = from.const_data_ptr();
  if (old.has_value()) s.old = old->mutable_data_ptr();
  s.indptr = slots.pointers();
  s.indices = slots.indices.const_data_ptr();
  s.narrow = slots.narrow();
  s.perm = slots.order();
  s.scale = scale;
  s.accumulate = accumulate;
  parallel_for(0, slots.groups, kScatterGroups, [&](int64_t begin, int64_t end) { cpu::scatter(s, begin, end); });
}

}  // namespace
}  // namespace frodkernels::ops

STABLE_TORCH_LIBRARY_FRAGMENT(frodkernels, m) {
  m.def(frodkernels::ops::kSampledProductSchema);
  m.def(frodkernels::ops::kScatterValuesSchema);
}

STABLE_TORCH_LIBRARY_IMPL(frodkernels, CPU, m) {
  m.impl("native_sampled_product", TORCH_BOX(&frodkernels::ops::sampled_product));
  m.impl("native_scatter_values_", TORCH_BOX(&frodkernels::ops::scatter_values));
}
