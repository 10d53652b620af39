// SPDX-License-Identifier: Apache-2.0
//
// frodkernels::native_scale_rows(Tensor z, Tensor lam) -> Tensor on CUDA: checks, allocates, launches.
#include "cuda/scale_rows.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "ops/cuda/device.h"
#include "ops/cuda/stream.h"

namespace frodkernels::ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cuda::Storage storage_of(const Tensor& z) {
  switch (z.scalar_type()) {
    case ScalarType::Float:
      return cuda::Storage::kFloat;
    case ScalarType::Half:
      return cuda::Storage::kHalf;
    case ScalarType::BFloat16:
      return cuda::Storage::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "native_scale_rows: z must be float32, float16 or bfloat16");
  }
}

Tensor scale_rows(const Tensor& z, const Tensor& lam) {
  STD_TORCH_CHECK(z.dim() == 2, "native_scale_rows: z must be [n, T], got ", z.dim(), " dimensions");
  const int64_t n = z.size(0), T = z.size(1);
  STD_TORCH_CHECK(lam.dim() == 1 && lam.size(0) == n, "native_scale_rows: lam must be [", n, "] to match z");
  STD_TORCH_CHECK(lam.scalar_type() == ScalarType::Float && lam.is_contiguous(),
                  "native_scale_rows: lam must be float32 and contiguous");
  STD_TORCH_CHECK(on_device(lam) && lam.get_device_index() == z.get_device_index(),
                  "native_scale_rows: lam must be on z's device");
  STD_TORCH_CHECK(n < (int64_t(1) << 31), "native_scale_rows: z has ", n, " rows; the grid takes fewer than 2^31");
  const cuda::Storage storage = storage_of(z);

  const DeviceGuard guard(z.get_device_index());
  const int64_t sizes[] = {n, T};
  Tensor out = torch::stable::new_empty(z, sizes);
  observe(z, "z", Access::kRead);
  observe(lam, "lam", Access::kRead);
  observe(out, "out", Access::kWrite);
  const char* error =
      cuda::scale_rows(z.const_data_ptr(), static_cast<const float*>(lam.const_data_ptr()), out.mutable_data_ptr(),
                       storage, n, T, z.stride(0), z.stride(1), current_cuda_stream(z.get_device_index()));
  STD_TORCH_CHECK(error == nullptr, "native_scale_rows: the launch failed: ", error);
  return out;
}

}  // namespace
}  // namespace frodkernels::ops

#if defined(SIMT_EMU)
STABLE_TORCH_LIBRARY_FRAGMENT(FRODKERNELS_OP_NAMESPACE, m) {
  m.def("native_scale_rows(Tensor z, Tensor lam) -> Tensor");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(FRODKERNELS_OP_NAMESPACE, FRODKERNELS_OP_DEVICE, m) {
  m.impl("native_scale_rows", TORCH_BOX(&frodkernels::ops::scale_rows));
}
