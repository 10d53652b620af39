// SPDX-License-Identifier: Apache-2.0
//
// What the plain kernels of the sparse core share: how warps own rows, and feature blocks in shared memory.
//
// Tiles. A tile is 8 lanes x 16 bytes of tokens: 128 bytes of every feature, so that 8 lanes read one feature across
// all 32 shared-memory banks: the gather is free of conflicts whatever the pattern (factor 1.0). A group of 8 lanes
// owns kSlots rows; a warp's four groups take rows 4 s + q side by side in slot s. A thread block of `threads` owns
// threads / 8 * kSlots rows of one tile, and streams the features through two buffers of `features` features each.
#pragma once
#include "cuda/scalars.cuh"

namespace frodkernels::cuda {

constexpr int kGroup = 8;                  // lanes of a row
constexpr int kGroups = 32 / kGroup;       // rows a warp works on at once
constexpr int kFeatureTile = kGroup * 16;  // bytes of one feature in a tile
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename scalar_t>
constexpr int kTileTokens = kGroup * kVec<scalar_t>;

template <typename Index>
__device__ __forceinline__ Index least(Index a, Index b) {
  return a < b ? a : b;
}

// Features [first, first + count), kTileTokens tokens from t0 (zeros beyond T), to `to`. Asynchronous where rows are
// aligned: commit, wait and a barrier make it visible.
template <typename scalar_t>
__device__ __forceinline__ void copy_features(char* to, const Rows<const scalar_t>& in, int64_t first, int count,
                                              int64_t t0, int64_t T) {
  const int lane = threadIdx.x % kGroup;
  const int64_t t = t0 + lane * kVec<scalar_t>;
  const int live = live_tokens<scalar_t>(T, t);
  const scalar_t* from = in.data + (live > 0 ? t : 0);
  for (int f = threadIdx.x / kGroup; f < count; f += blockDim.x / kGroup) {
    const scalar_t* row = from + (first + f) * in.stride;
    char* place = to + f * kFeatureTile + lane * 16;
    if (in.aligned) {
      ptx::cp_async<16>(place, row, live * static_cast<int>(sizeof(scalar_t)));
    } else {
      gpu::store(place, load_tokens(row, live, false));
    }
  }
}

// Where the entries of a group's rows go on, and where they end: lane l of a group keeps slots l, l + 8, ...
template <int kSlots>
struct Cursors {
  static_assert(kSlots % kGroup == 0, "a lane keeps every eighth slot");
  int32_t at[kSlots / kGroup], end[kSlots / kGroup];

  // row0: the row of slot 0 of this group.
  __device__ __forceinline__ void start(const Compressed& view, int64_t row0) {
#pragma unroll
    for (int k = 0; k < kSlots / kGroup; ++k) {
      const int64_t row = row0 + int64_t(k * kGroup + threadIdx.x % kGroup) * kGroups;
      const bool live = row < view.rows;
      at[k] = live ? view.indptr[row] : 0;
      end[k] = live ? view.indptr[row + 1] : 0;
    }
  }
  __device__ __forceinline__ int32_t begin_of(int slot) const {
    return __shfl_sync(kAllLanes, at[slot / kGroup], slot % kGroup, kGroup);
  }
  __device__ __forceinline__ int32_t end_of(int slot) const {
    return __shfl_sync(kAllLanes, end[slot / kGroup], slot % kGroup, kGroup);
  }
  __device__ __forceinline__ void move(int slot, int32_t to) {
    if (static_cast<int>(threadIdx.x % kGroup) == slot % kGroup) at[slot / kGroup] = to;
  }
};

}  // namespace frodkernels::cuda
