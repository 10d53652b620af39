// SPDX-License-Identifier: Apache-2.0
//
// How the tile kernels of sparse_core_fma*.cuh are launched: from shapes, and from what the device offers.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cuda/gpu.cuh"
#include "cuda/sparse_core.h"

namespace frodkernels::cuda {

constexpr int kTileFeatureBytes = 128;     // sparse_core_fma_common.cuh: kFeatureTile
constexpr int kReservedShared = 1024;      // of every block, by the driver
constexpr int64_t kRowsKernelTokens = 64;  // up to here a warp that reads its entries' tokens from L2 is no slower

struct TilePlan {
  int threads = 0;  // of a block; 0: no tiles, a warp a row instead
  int features = 0, shared = 0;
  int64_t tiles = 0, row_blocks = 0;
};

// Blocks of 512 threads read `in` least often; smaller ones spread few tiles over more multiprocessors, and two or four
// of them share one, so that registers and shared memory are full either way. Tiles pay when entries outnumber the
// features that are copied for them.
inline TilePlan plan_tiles(const Compressed& view, int64_t T, int tile_tokens, int slots, int stage_bytes,
                           const gpu::Device& device) {
  TilePlan plan;
  if (T <= kRowsKernelTokens || view.nnz == 0 || view.nnz > INT32_MAX - 16) return plan;
  plan.tiles = (T + tile_tokens - 1) / tile_tokens;
  for (int threads = 512, resident = 1; threads >= 128; threads /= 2, resident *= 2) {
    const int64_t rows = int64_t(threads) / 8 * slots;
    plan.row_blocks = (view.rows + rows - 1) / rows;
    const int room = device.shared_per_block / resident - (resident > 1 ? kReservedShared : 0);
    const int fit = (room - threads / 32 * stage_bytes) / (2 * kTileFeatureBytes) / 8 * 8;
    if (fit < 8) break;
    plan.threads = threads;
    plan.features = static_cast<int>(std::min<int64_t>(fit, (view.columns + 7) / 8 * 8));
    plan.shared = 2 * plan.features * kTileFeatureBytes + threads / 32 * stage_bytes;
    if (plan.row_blocks * plan.tiles >= device.sms * resident) break;
  }
  const bool pays = view.nnz > view.columns * plan.row_blocks && plan.row_blocks * plan.tiles <= INT32_MAX;
  if (!pays) plan.threads = 0;
  return plan;
}

}  // namespace frodkernels::cuda
