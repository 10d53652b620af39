// SPDX-License-Identifier: Apache-2.0
//
// The CUDA language for g++: keywords, built-in variables, barriers, warp collectives and launches. gpu.cuh includes
// it in place of cuda_runtime.h.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cstring>
#include <tuple>
#include <type_traits>

#include "simt/runtime.h"

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __noinline__
#undef __shared__
#undef __constant__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __shared__ static_assert(false, "declare shared memory with SIMT_SHARED or SIMT_DYN_SHARED");
#define __constant__ static
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_size())
#define gridDim (::simt::grid_size())
constexpr int warpSize = 32;

typedef struct CUstream_st* cudaStream_t;

#define SIMT_INLINE inline __attribute__((always_inline))

namespace simt {

// Arguments are converted to the parameters' types and copied when the launch is made, as a real launch does.
template <class... Parameters, class... Arguments>
void launch_kernel(const char* name, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   void (*kernel)(Parameters...), Arguments... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  } call{kernel, std::tuple<Parameters...>(static_cast<Parameters>(arguments)...)};
  const Body body = [](const void* p) {
    auto* c = static_cast<const Call*>(p);
    std::apply(c->kernel, c->parameters);
  };
  launch(name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, body, &call, sizeof call);
}

template <class T>
SIMT_INLINE T shuffle_value(Shuffle kind, uint32_t mask, T value, int source_lane, Place place) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
  shuffle(kind, mask, &value, sizeof(T), source_lane, place);
  return value;
}

}  // namespace simt

// --- block barriers
// ----------------------------------------------------------------------------------------------------
SIMT_INLINE void __syncthreads(simt::Place at = simt::Place::here()) { simt::barrier(simt::Barrier::kSync, false, at); }
SIMT_INLINE int __syncthreads_count(int p, simt::Place at = simt::Place::here()) {
  return simt::barrier(simt::Barrier::kCount, p != 0, at);
}
SIMT_INLINE int __syncthreads_and(int p, simt::Place at = simt::Place::here()) {
  return simt::barrier(simt::Barrier::kAnd, p != 0, at);
}
SIMT_INLINE int __syncthreads_or(int p, simt::Place at = simt::Place::here()) {
  return simt::barrier(simt::Barrier::kOr, p != 0, at);
}
SIMT_INLINE void __threadfence() {}
SIMT_INLINE void __threadfence_block() {}
SIMT_INLINE void __threadfence_system() {}

// --- warp collectives
// --------------------------------------------------------------------------------------------------
SIMT_INLINE void __syncwarp(uint32_t mask = 0xffffffffu, simt::Place at = simt::Place::here()) {
  simt::sync_warp(mask, at);
}
SIMT_INLINE unsigned __activemask() { return simt::active_mask(); }

template <class T>
SIMT_INLINE T __shfl_sync(uint32_t mask, T v, int source, int width = 32, simt::Place at = simt::Place::here()) {
  return simt::shuffle_value(simt::Shuffle::kIndex, mask, v, (simt::lane() & ~(width - 1)) | (source & (width - 1)),
                             at);
}
template <class T>
SIMT_INLINE T __shfl_xor_sync(uint32_t mask, T v, int bits, int width = 32, simt::Place at = simt::Place::here()) {
  const int lane = simt::lane(), source = lane ^ bits;
  return simt::shuffle_value(simt::Shuffle::kXor, mask, v, source > (lane | (width - 1)) ? lane : source, at);
}
template <class T>
SIMT_INLINE T __shfl_down_sync(uint32_t mask, T v, unsigned by, int width = 32, simt::Place at = simt::Place::here()) {
  const int lane = simt::lane(), source = lane + static_cast<int>(by);
  return simt::shuffle_value(simt::Shuffle::kDown, mask, v, source > (lane | (width - 1)) ? lane : source, at);
}
template <class T>
SIMT_INLINE T __shfl_up_sync(uint32_t mask, T v, unsigned by, int width = 32, simt::Place at = simt::Place::here()) {
  const int lane = simt::lane(), source = lane - static_cast<int>(by);
  return simt::shuffle_value(simt::Shuffle::kUp, mask, v, source < (lane & ~(width - 1)) ? lane : source, at);
}

SIMT_INLINE unsigned __ballot_sync(uint32_t mask, int p, simt::Place at = simt::Place::here()) {
  return simt::vote(simt::Vote::kBallot, mask, p != 0, at);
}
SIMT_INLINE int __any_sync(uint32_t mask, int p, simt::Place at = simt::Place::here()) {
  return simt::vote(simt::Vote::kOr, mask, p != 0, at) != 0;
}
SIMT_INLINE int __all_sync(uint32_t mask, int p, simt::Place at = simt::Place::here()) {
  return simt::vote(simt::Vote::kAnd, mask, p != 0, at) != 0;
}
template <class T>
SIMT_INLINE unsigned __match_any_sync(uint32_t mask, T v, simt::Place at = simt::Place::here()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "__match_any_sync compares 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof(T));
  return simt::vote(simt::Vote::kMatch, mask, bits, at);
}

#define SIMT_REDUCE(name, type, kind)                                                           \
  SIMT_INLINE type name(uint32_t mask, type v, simt::Place at = simt::Place::here()) {          \
    return static_cast<type>(simt::vote(simt::Vote::kind, mask, static_cast<uint32_t>(v), at)); \
  }
SIMT_REDUCE(__reduce_add_sync, unsigned, kAdd)
SIMT_REDUCE(__reduce_add_sync, int, kAdd)
SIMT_REDUCE(__reduce_min_sync, unsigned, kMinUnsigned)
SIMT_REDUCE(__reduce_min_sync, int, kMin)
SIMT_REDUCE(__reduce_max_sync, unsigned, kMaxUnsigned)
SIMT_REDUCE(__reduce_max_sync, int, kMax)
SIMT_REDUCE(__reduce_and_sync, unsigned, kAnd)
SIMT_REDUCE(__reduce_or_sync, unsigned, kOr)
SIMT_REDUCE(__reduce_xor_sync, unsigned, kXor)
#undef SIMT_REDUCE
