// SPDX-License-Identifier: Apache-2.0
//
// native_sparse_core and native_sparse_core_backward on CUDA tensors (and, in the executor's build, on CPU tensors):
// check what can be checked without reading device memory, bring operands into the kernels' layout, allocate, launch.
//
// The tensor-core kernels serve 16-bit features where the caller gives tiles and there are tokens enough; the fused
// multiply-add kernels serve the rest.
#include "cuda/sparse_core.h"

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "../sparse_core.h"
#include "ops/cuda/device.h"
#include "ops/cuda/stream.h"
#include "ops/cuda/view.h"

namespace frodkernels::ops {
namespace {

// lam and values as the kernels want them. Held here, since a copy must outlive the launch.
struct Parameters {
  Tensor values;
  OptionalTensor lam;

  Parameters(const Tensor& v, const OptionalTensor& l, const View& view, const Tensor& features)
      : values(torch::stable::contiguous(v)) {
    check_device(v, "values", features);
    check_vector(v, "values", view.compressed.nnz);
    observe(values, "values", Access::kRead);
    if (!l.has_value()) return;
    check_device(*l, "lam", features);
    check_vector(*l, "lam", view.compressed.rows);
    STD_TORCH_CHECK(view.compressed.columns == view.compressed.rows, "lam needs a square pattern");
    lam = torch::stable::contiguous(*l);
    observe(*lam, "lam", Access::kRead);
  }
};

// (S + D) in, for features `in` [columns, T] of contiguous tokens.
Tensor product(const Tensor& in, const Parameters& parameters, const View& view, bool token_major, CUstream_st* stream,
               const char* op) {
  const int64_t T = in.size(1), rows = view.compressed.rows;
  const bool tensor_cores = view.on_tensor_cores(in) && rows > 0;
  const Tensor from = tensor_cores ? pitched(in) : in;
  Tensor whole = torch::stable::new_empty(in, {rows, tensor_cores ? whole_eights(T) : T});
  const Tensor out = first_tokens(whole, T);
  if (out.numel() > 0) {
    observe(from, "in", Access::kRead);
    observe(whole, "out", Access::kWrite);
    cuda::Product a;
    a.view = view.compressed;
    a.values = vector_of(parameters.values, "values");
    if (parameters.lam.has_value()) a.lam = vector_of(*parameters.lam, "lam");
    a.type = scalar_of<cuda::Scalar>(in, "z");
    a.in = from.const_data_ptr();
    a.out = whole.mutable_data_ptr();
    a.T = T;
    a.in_stride = row_stride(from);
    a.out_stride = whole.size(1);
    if (tensor_cores) {
      Tensor packed = scratch(in, cuda::packed_bytes(view.tiled));
      check_launch(cuda::product_mma(a, view.tiled, packed.mutable_data_ptr(), stream), op);
    } else {
      Tensor entries = scratch(in, cuda::product_fma_scratch(a));
      check_launch(cuda::product_fma(a, entries.numel() > 0 ? entries.mutable_data_ptr() : nullptr, stream), op);
    }
  }
  if (!token_major) return torch::stable::contiguous(out);
  Tensor turned = new_features(in, rows, T, true);
  return torch::stable::copy_(turned, out);
}

void gradient(const Tensor& rows_u, const Tensor& rows_z, Tensor& dlam, Tensor& dvalues, const View& view,
              CUstream_st* stream, const char* op) {
  if (dlam.numel() + dvalues.numel() == 0) return;
  const bool tensor_cores = view.on_tensor_cores(rows_u);
  const Tensor u = tensor_cores ? pitched(rows_u) : rows_u, z = tensor_cores ? pitched(rows_z) : rows_z;
  observe(u, "u", Access::kRead);
  observe(z, "z", Access::kRead);
  observe(dlam, "dlam", Access::kWrite);
  observe(dvalues, "dvalues", Access::kWrite);
  cuda::Gradient a;
  a.view = view.compressed;
  if (dvalues.numel() > 0) a.dvalues = vector_of(dvalues, "values");
  if (dlam.numel() > 0) a.dlam = vector_of(dlam, "lam");
  a.type = scalar_of<cuda::Scalar>(u, "u");
  a.in = u.const_data_ptr();
  a.z = z.const_data_ptr();
  a.T = u.size(1);
  a.in_stride = row_stride(u);
  a.z_stride = row_stride(z);
  if (tensor_cores) {
    Tensor partial = scratch(u, cuda::gradient_mma_scratch(a, view.tiled));
    check_launch(cuda::gradient_mma(a, view.tiled, partial.mutable_data_ptr(), stream), op);
  } else {
    Tensor partial = scratch(u, cuda::gradient_fma_scratch(a));
    check_launch(cuda::gradient_fma(a, partial.mutable_data_ptr(), stream), op);
  }
}

Tensor sparse_core(const Tensor& z, const OptionalTensor& lam, const Tensor& values, const Tensor& indptr,
                   const Tensor& indices, const Tensor& perm, bool token_major, OptionalTensors tiles) {
  check_features(z, "z");
  const DeviceGuard guard(z.get_device_index());
  if (wants_double(z, values)) {
    const Tensor wide = sparse_core(torch::stable::to(z, ScalarType::Double), lam, values, indptr, indices, perm,
                                    token_major, std::nullopt);
    return torch::stable::to(wide, z.scalar_type());
  }
  const View view(indptr, indices, perm, tiles, z);
  const Parameters parameters(values, lam, view, z);
  return product(rows_of(z), parameters, view, token_major, current_cuda_stream(z.get_device_index()),
                 "native_sparse_core");
}

std::tuple<Tensor, Tensor, Tensor> sparse_core_backward(const Tensor& u, const Tensor& z, const OptionalTensor& lam,
                                                        const Tensor& values, const Tensor& indptr,
                                                        const Tensor& indices, const Tensor& perm,
                                                        std::vector<bool> needs, bool token_major,
                                                        OptionalTensors tiles) {
  check_features(u, "u");
  check_features(z, "z");
  check_device(z, "z", u);
  check_pair(u, z, needs.size());
  const DeviceGuard guard(u.get_device_index());
  if (wants_double(u, values)) {
    auto [dz, dlam, dvalues] =
        sparse_core_backward(torch::stable::to(u, ScalarType::Double), torch::stable::to(z, ScalarType::Double), lam,
                             values, indptr, indices, perm, needs, token_major, std::nullopt);
    return {torch::stable::to(dz, u.scalar_type()), dlam, dvalues};
  }
  const View view(indptr, indices, perm, tiles, u);
  STD_TORCH_CHECK(z.size(0) == view.compressed.rows, "z must have one row per group of the plan");
  const Parameters parameters(values, lam, view, u);
  CUstream_st* stream = current_cuda_stream(u.get_device_index());
  const Tensor rows_u = rows_of(u);
  Tensor dz = needs[0] ? product(rows_u, parameters, view, token_major, stream, "native_sparse_core_backward")
                       : torch::stable::new_empty(u, {0});
  const ScalarType sums = u.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor dlam = lam.has_value() ? torch::stable::new_empty(*lam, {needs[1] ? view.compressed.rows : 0})
                                : torch::stable::new_empty(values, {0}, sums);
  Tensor dvalues = torch::stable::new_empty(values, {needs[2] ? view.compressed.nnz : 0});
  gradient(rows_u, rows_of(z), dlam, dvalues, view, stream, "native_sparse_core_backward");
  return {dz, dlam, dvalues};
}

int64_t tile_block(const Tensor& like, int64_t columns) {
  const DeviceGuard guard(like.get_device_index());
  return cuda::tile_block(columns);
}

std::string why_not(const Tensor& like) {
  const DeviceGuard guard(like.get_device_index());
  const char* reason = cuda::why_not();
  return reason == nullptr ? "" : reason;
}

}  // namespace
}  // namespace frodkernels::ops

#if defined(SIMT_EMU)
STABLE_TORCH_LIBRARY_FRAGMENT(FRODKERNELS_OP_NAMESPACE, m) {
  m.def(frodkernels::ops::kSparseCoreSchema);
  m.def(frodkernels::ops::kSparseCoreBackwardSchema);
  m.def(frodkernels::ops::kTileBlockSchema);
  m.def(frodkernels::ops::kWhyNotSchema);
}
#endif

STABLE_TORCH_LIBRARY_IMPL(FRODKERNELS_OP_NAMESPACE, FRODKERNELS_OP_DEVICE, m) {
  m.impl("native_why_not", TORCH_BOX(&frodkernels::ops::why_not));
  m.impl("native_tile_block", TORCH_BOX(&frodkernels::ops::tile_block));
  m.impl("native_sparse_core", TORCH_BOX(&frodkernels::ops::sparse_core));
  m.impl("native_sparse_core_backward", TORCH_BOX(&frodkernels::ops::sparse_core_backward));
}
