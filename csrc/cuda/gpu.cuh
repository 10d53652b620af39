// SPDX-License-Identifier: Apache-2.0
//
// The one header that kernels and launchers include. Under nvcc it is CUDA; under g++ -DSIMT_EMU it is the executor of
// csrc/simt, which runs the same source on the CPU for tests.
//
//   SIMT_SHARED(float, tile, [16][17]);                     a shared array, 16-byte aligned
//   SIMT_DYN_SHARED(float, p);                              the launch's dynamic shared memory as float* p
//   SIMT_LAUNCH((kernel<256>), grid, block, bytes, stream, arguments...);   brackets where the name has a comma
//   gpu::allow_shared(kernel, bytes)                        before a launch with more than 48 KiB of dynamic shared
//   memory gpu::load<V>(p), gpu::store(p, v)                       one access of sizeof(V) bytes, p aligned to it
//   gpu::device()                                           what the current device offers; cached
//   gpu::launch_error()                                     after launches: nullptr, or what went wrong
//   gpu::loading_error(kernel)                              nullptr, or why the current device cannot run the kernel
#pragma once
#if defined(SIMT_EMU)

#include "simt/device_functions.h"
#include "simt/language.h"

#define SIMT_SHARED(T, name, ...) \
  static char simt_key_##name;    \
  auto& name = *static_cast<T(*) __VA_ARGS__>(::simt::shared_variable(&simt_key_##name, sizeof(T __VA_ARGS__)))
#define SIMT_DYN_SHARED(T, name) T* name = static_cast<T*>(::simt::dynamic_shared())
#define SIMT_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  ::simt::launch_kernel(#kernel, (grid), (block), (bytes), (stream), (kernel), ##__VA_ARGS__)

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>

#define SIMT_SHARED(T, name, ...) __shared__ __align__(16) T name __VA_ARGS__
#define SIMT_DYN_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char simt_dyn_shared[]; \
  T* name = reinterpret_cast<T*>(simt_dyn_shared)
#define SIMT_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  (kernel)<<<(grid), (block), (bytes), (stream)>>>(__VA_ARGS__)

#endif

#include "cuda/ptx.cuh"

namespace gpu {

constexpr int kSharedWithoutAsking = 48 * 1024;

struct Device {
  int sms;               // streaming multiprocessors
  int shared_per_block;  // bytes a block may have after allow_shared
  int capability;        // 80, 86, 90, ...
};

#if defined(SIMT_EMU)

inline Device device() { return {simt::config.sms, simt::config.shared_per_block, simt::config.capability}; }

template <class... Parameters>
void allow_shared(void (*kernel)(Parameters...), int64_t bytes) {
  simt::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}

inline const char* launch_error() { return nullptr; }  // a fault is an exception

template <class... Parameters>
const char* loading_error(void (*)(Parameters...)) {
  return nullptr;
}

#else

template <class V>
__device__ __forceinline__ V load(const void* from) {
  return *static_cast<const V*>(from);
}

template <class V>
__device__ __forceinline__ void store(void* to, V value) {
  *static_cast<V*>(to) = value;
}

// All zero where the runtime does not answer; launch_error() has its message.
inline Device device() {
  constexpr int kDevices = 64;
  static std::mutex mutex;
  static Device devices[kDevices];
  int ordinal = 0;
  if (cudaGetDevice(&ordinal) != cudaSuccess || ordinal >= kDevices) return {};
  const std::lock_guard<std::mutex> lock(mutex);
  if (devices[ordinal].capability != 0) return devices[ordinal];
  int sms = 0, shared = 0, major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, ordinal) != cudaSuccess ||
      cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal) != cudaSuccess) {
    return {};
  }
  devices[ordinal] = {sms, shared, major * 10 + minor};
  return devices[ordinal];
}

// A refusal is kept by the runtime: launch_error() reports it.
template <class... Parameters>
void allow_shared(void (*kernel)(Parameters...), int64_t bytes) {
  if (bytes > kSharedWithoutAsking) {
    (void)cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes));
  }
}

template <class... Parameters>
const char* loading_error(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  (void)cudaGetLastError();  // it has been reported here
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

inline const char* launch_error() {
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

#endif

}  // namespace gpu
