// SPDX-License-Identifier: Apache-2.0
//
// How the Householder kernels are launched: from shapes, and from what the device offers.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cuda/gpu.cuh"
#include "cuda/householder_common.cuh"
#include "cuda/reduce.h"

namespace frodkernels::cuda::householder {

constexpr int64_t kMostSplits = 64, kPartialBytes = int64_t(64) << 20;
constexpr int64_t kChainTokens = 1024;  // summed up one by one; splits are joined in double
constexpr int kRing = 4;                // slots of a ring that keeps nothing

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t aligned_bytes(int64_t bytes) { return ceil_div(bytes, 256) * 256; }

// Groups of 32 ranks, as many as divide a block's warps.
inline int rank_groups(int64_t r) { return r <= kGroupRanks ? 1 : r <= 2 * kGroupRanks ? 2 : 4; }

// The map's steps with a ring in `room` bytes of shared memory; slots < 2: there is none.
inline Steps plan_steps(const Householder& a, int64_t features, int64_t slot_bytes, int64_t room) {
  Steps steps;
  steps.same = a.base == nullptr && a.right != nullptr;
  steps.first = static_cast<int>(ceil_div(a.n, features));
  steps.second = a.right == nullptr ? 0 : static_cast<int>(ceil_div(a.m, features));
  const int64_t useful = steps.same ? std::max(steps.first, 2) : kRing;
  steps.slots = static_cast<int>(std::min(room / slot_bytes, useful));
  return steps;
}

// Token splits of a gradient whose blocks own `features` features: what fills whole rounds of the device, by shapes and
// the device's size alone; and enough of them for long sums to stay accurate, as far as memory for them goes.
inline int64_t plan_splits(const HouseholderGradient& a, int64_t features, int64_t pieces, int64_t piece_tokens,
                           int64_t sums_bytes) {
  const int64_t blocks = ceil_div(a.n, features), sms = std::max(gpu::device().sms, 1);
  const int64_t room = std::max<int64_t>(kPartialBytes / (a.n * a.r * sums_bytes), 1);
  const int64_t least = std::min(ceil_div(pieces * piece_tokens, kChainTokens), room);
  const int64_t most = std::max(least, std::min({kMostSplits, room, pieces}));
  int64_t best = least, best_cost = INT64_MAX;
  for (int64_t s = least; s <= most; ++s) {
    // A split begins with an empty ring and ends with a pass over its sums: about four pieces.
    const int64_t cost = ceil_div(blocks * s, sms) * (ceil_div(pieces, s) * a.count + 4);
    if (cost < best_cost) {
      best = s;
      best_cost = cost;
    }
  }
  return best;
}

// out = the sum of the splits' partial sums [splits, n, r], in order.
inline const char* reduce_gradient(const HouseholderGradient& a, const void* partial, int64_t splits, bool wide,
                                   CUstream_st* stream) {
  Partials partials;
  partials.data = partial;
  partials.wide = wide;
  partials.splits = splits;
  partials.count = partials.stride = a.n * a.r;
  Places places;
  places.nnz = partials.count;
  places.dvalues = {a.out, wide ? Scalar::kF64 : Scalar::kF32};
  return reduce_sources(partials, places, stream);
}

}  // namespace frodkernels::cuda::householder
