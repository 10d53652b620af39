// SPDX-License-Identifier: Apache-2.0
//
// native_sampled_product and native_scatter_values_ on CUDA tensors (and, in the executor's build, on CPU tensors):
// check what can be checked without reading device memory, bring operands into the kernels' layout, allocate, launch.
//
// One inner product an entry is the gradient of the sparse core, which reads features with contiguous tokens. The way
// by blocks reads contiguous features too: activations as they are.
#include "../sampled.h"

#include <torch/csrc/stable/library.h>

#include "cuda/sampled.h"
#include "ops/cuda/device.h"
#include "ops/cuda/stream.h"
#include "ops/cuda/view.h"

namespace frodkernels::ops {
namespace {

constexpr char kSampledOp[] = "native_sampled_product", kScatterOp[] = "native_scatter_values_";

bool is_16_bit(const Tensor& t) {
  return t.scalar_type() == ScalarType::Half || t.scalar_type() == ScalarType::BFloat16;
}

// Contiguous tokens, at any stride from feature to feature.
bool feature_major(const Tensor& t) { return t.size(1) <= 1 || (t.stride(1) == 1 && t.stride(0) >= t.size(1)); }

// Contiguous features, at any stride from token to token.
bool token_major(const Tensor& t) { return t.size(1) > 1 && t.stride(0) == 1 && t.stride(1) >= t.size(0); }

// As the tensor cores need activations: `t` itself where its tokens start on 16 bytes and fill them; else one copy,
// with zeros for the features that fill them up.
Tensor pitched_tokens(const Tensor& t) {
  const int64_t n = t.size(0), pitch = whole_eights(n);
  if (starts_on_16_bytes(t.const_data_ptr()) && t.stride(1) % 8 == 0 && n == pitch) return t;
  Tensor room = torch::stable::transpose(torch::stable::new_empty(t, {t.size(1), pitch}), 0, 1);
  if (n == pitch) return torch::stable::copy_(room, t);
  Tensor copy = torch::stable::narrow(room, 0, 0, n), rest = torch::stable::narrow(room, 0, n, pitch - n);
  torch::stable::copy_(copy, t);
  torch::stable::zero_(rest);
  return room;
}

cuda::Features features_of(const Tensor& t) {
  const bool tokens = !feature_major(t);
  return {t.const_data_ptr(), tokens ? t.stride(1) : row_stride(t), tokens};
}

// By dense blocks. Mixed layouts cost 16-bit features one copy, others none.
void run_blocks(const Tensor& in_a, const Tensor& in_b, const View& view, Tensor& out, CUstream_st* stream) {
  Tensor a = in_a, b = in_b;
  if (is_16_bit(a)) {
    const bool tokens = token_major(a) && token_major(b) && !(feature_major(a) && feature_major(b));
    a = tokens ? pitched_tokens(a) : pitched(rows_of(a));
    b = tokens ? pitched_tokens(b) : pitched(rows_of(b));
  } else {
    if (!token_major(a)) a = rows_of(a);
    if (!token_major(b)) b = rows_of(b);
  }
  observe(a, "a", Access::kRead);
  observe(b, "b", Access::kRead);
  cuda::Sampled s;
  s.view = view.compressed;
  s.out = vector_of(out, "out");
  s.type = scalar_of<cuda::Scalar>(a, "a");
  s.a = features_of(a);
  s.b = features_of(b);
  s.T = a.size(1);
  Tensor partial = scratch(a, cuda::sampled_scratch(s));
  check_launch(cuda::sampled_product(s, partial.mutable_data_ptr(), stream), kSampledOp);
}

// One inner product an entry.
void run_entries(const Tensor& in_a, const Tensor& in_b, const View& view, Tensor& out, CUstream_st* stream) {
  const bool tensor_cores = view.on_tensor_cores(in_a);
  const Tensor rows_a = rows_of(in_a), rows_b = rows_of(in_b);
  const Tensor a = tensor_cores ? pitched(rows_a) : rows_a, b = tensor_cores ? pitched(rows_b) : rows_b;
  observe(a, "a", Access::kRead);
  observe(b, "b", Access::kRead);
  cuda::Gradient g;
  g.view = view.compressed;
  g.dvalues = vector_of(out, "out");
  g.type = scalar_of<cuda::Scalar>(a, "a");
  g.in = a.const_data_ptr();
  g.z = b.const_data_ptr();
  g.T = a.size(1);
  g.in_stride = row_stride(a);
  g.z_stride = row_stride(b);
  if (tensor_cores) {
    Tensor partial = scratch(a, cuda::gradient_mma_scratch(g, view.tiled));
    check_launch(cuda::gradient_mma(g, view.tiled, partial.mutable_data_ptr(), stream), kSampledOp);
  } else {
    Tensor partial = scratch(a, cuda::gradient_fma_scratch(g));
    check_launch(cuda::gradient_fma(g, partial.mutable_data_ptr(), stream), kSampledOp);
  }
}

Tensor sampled_product(const Tensor& a, const Tensor& b, const Tensor& indptr, const Tensor& indices,
                       const Tensor& perm, ScalarType dtype, bool tiled, OptionalTensors tiles) {
  check_features(a, "a");
  check_features(b, "b");
  check_device(b, "b", a);
  const DeviceGuard guard(a.get_device_index());
  if (dtype == ScalarType::Double && a.scalar_type() != ScalarType::Double) {
    return sampled_product(torch::stable::to(a, dtype), torch::stable::to(b, dtype), indptr, indices, perm, dtype,
                           tiled, std::nullopt);
  }
  const View view(indptr, indices, perm, tiled ? std::nullopt : tiles, a);
  check_sampled(a, b, view.compressed.rows);
  scalar_of<cuda::Scalar>(a, "a");
  Tensor out = torch::stable::new_empty(a, {view.compressed.nnz}, dtype);
  scalar_of<cuda::Scalar>(out, "dtype");
  if (view.compressed.nnz == 0) return out;
  observe(out, "out", Access::kWrite);
  CUstream_st* stream = current_cuda_stream(a.get_device_index());
  if (tiled) {
    run_blocks(a, b, view, out, stream);
  } else {
    run_entries(a, b, view, out, stream);
  }
  return out;
}

void scatter_values(Tensor weight, const Tensor& values, const Tensor& indptr, const Tensor& indices,
                    const Tensor& perm, double scale, bool accumulate, OptionalTensor old) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must be a matrix");
  STD_TORCH_CHECK(on_device(weight), "weight must be on this kernel's device");
  check_device(values, "values", weight);
  const DeviceGuard guard(weight.get_device_index());
  // The weight's columns are the columns that indices count.
  const View view(indptr, indices, perm, std::nullopt, torch::stable::transpose(weight, 0, 1));
  const int64_t nnz = view.compressed.nnz;
  STD_TORCH_CHECK(weight.size(0) == view.compressed.rows, "weight must have one row per group of the plan");
  check_vector(values, "values", nnz);
  cuda::Scatter s;
  s.view = view.compressed;
  s.weight = vector_of(weight, "weight");
  s.values = vector_of(values, "values");
  if (old.has_value()) {
    check_device(*old, "old", weight);
    check_vector(*old, "old", nnz);
    STD_TORCH_CHECK(old->scalar_type() == weight.scalar_type(), "old must have weight's dtype");
    s.old = vector_of(*old, "old");
    s.old_stride = old->stride(0);
  }
  if (nnz == 0) return;
  s.row_stride = weight.stride(0);
  s.column_stride = weight.stride(1);
  s.values_stride = values.stride(0);
  s.scale = scale;
  s.accumulate = accumulate;
  observe(weight, "weight", Access::kReadWrite);
  observe(values, "values", Access::kRead);
  if (old.has_value()) observe(*old, "old", Access::kWrite);
  check_launch(cuda::scatter_values(s, current_cuda_stream(weight.get_device_index())), kScatterOp);
}

}  // namespace
}  // namespace frodkernels::ops

#if defined(SIMT_EMU)
STABLE_TORCH_LIBRARY_FRAGMENT(FRODKERNELS_OP_NAMESPACE, m) {
  m.def(frodkernels::ops::kSampledProductSchema);
  m.def(frodkernels::ops::kScatterValuesSchema);
}
#endif

STABLE_TORCH_LIBRARY_IMPL(FRODKERNELS_OP_NAMESPACE, FRODKERNELS_OP_DEVICE, m) {
  m.impl("native_sampled_product", TORCH_BOX(&frodkernels::ops::sampled_product));
  m.impl("native_scatter_values_", TORCH_BOX(&frodkernels::ops::scatter_values));
}
