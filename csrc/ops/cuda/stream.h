// SPDX-License-Identifier: Apache-2.0
//
// The current CUDA stream, in a library that also loads where torch has no CUDA. The executor has no streams.
#pragma once
#include <cstdint>

struct CUstream_st;

#if defined(SIMT_EMU)

namespace frodkernels::ops {

inline CUstream_st* current_cuda_stream(int32_t) { return nullptr; }

}  // namespace frodkernels::ops

#else

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

// Weak: only a CUDA build of torch defines it, and a CPU build must load us all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace frodkernels::ops {

inline CUstream_st* current_cuda_stream(int32_t device_index) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "this build of torch has no CUDA: install a CUDA build of torch to run this op on a GPU");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<CUstream_st*>(stream);
}

}  // namespace frodkernels::ops

#endif
