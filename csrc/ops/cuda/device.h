// SPDX-License-Identifier: Apache-2.0
//
// What the CUDA bindings need to know of the device, in both builds: for CUDA they register under frodkernels for CUDA
// tensors; for the executor (SIMT_EMU) under the module's own namespace for CPU tensors.
//
//   STABLE_TORCH_LIBRARY_IMPL(FRODKERNELS_OP_NAMESPACE, FRODKERNELS_OP_DEVICE, m)
//   on_device(tensor)          is it where kernels of this build can reach it?
//   DeviceGuard guard(index)   makes it the current device while it lives
//   observe(tensor, "name", Access::kRead)   tells the executor's checker of a buffer: kRead: an input, written by
//                              nobody; kWrite: fresh memory, to be written before it is read; kReadWrite: both at will
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#if defined(SIMT_EMU)
#include "simt/runtime.h"
#define FRODKERNELS_OP_DEVICE CPU
#ifndef FRODKERNELS_OP_NAMESPACE
#error "the executor's build names the namespace of its ops: -DFRODKERNELS_OP_NAMESPACE=..."
#endif
#else
#include <torch/csrc/stable/accelerator.h>
#define FRODKERNELS_OP_DEVICE CUDA
#define FRODKERNELS_OP_NAMESPACE frodkernels
#endif

namespace frodkernels::ops {

enum class Access { kRead, kWrite, kReadWrite };

#if defined(SIMT_EMU)

inline bool on_device(const torch::stable::Tensor& t) { return t.is_cpu(); }

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
  ~DeviceGuard() {}  // not trivial: no warning that a guard is unused
};

// The bytes between the first and the last element: a view is known by its span, holes included.
inline void observe(const torch::stable::Tensor& t, const char* name, Access access) {
  if (t.numel() == 0) return;
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  const size_t bytes = static_cast<size_t>(last + 1) * static_cast<size_t>(t.element_size());
  simt::track(t.const_data_ptr(), bytes, name, access != Access::kRead, access != Access::kWrite);
}

#else

inline bool on_device(const torch::stable::Tensor& t) { return t.is_cuda(); }

using DeviceGuard = torch::stable::accelerator::DeviceGuard;

inline void observe(const torch::stable::Tensor&, const char*, Access) {}

#endif

}  // namespace frodkernels::ops
