// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/reduce.h"
#include "cuda/sparse_core.h"
#include "cuda/sparse_core_mma.cuh"
#include "cuda/sparse_core_mma_gradient.cuh"
#include "tiles/jobs.h"

namespace frodkernels::cuda {
namespace {

constexpr int kLeastCapability = 80;   // cp.async, mma of bfloat16
constexpr int64_t kTilesInChain = 64;  // added up one by one; splits are joined in double
constexpr int64_t kMostSplits = 64, kPartialBytes = int64_t(64) << 20;

int64_t product_shared(int64_t block) {
  return 2 * block * kFeatureBytes + kProductWarps * kStageBytes + 2 * block * int64_t(sizeof(uint16_t));
}

int64_t gradient_shared(int64_t block, int jobs) {
  return 2 * block * kFeatureBytes + kGradientWarps * jobs * kCellBytes;
}

// How many row blocks to cut the groups in: each must fit the accumulators; more than that where it fills the last
// round of the grid better. A round costs the features' way to shared memory besides its share of the entries.
int row_blocks(const Tiles& tiles, int64_t token_tiles, int64_t sms) {
  const int64_t most = kProductWarps * kProductGroups, least_blocks = (tiles.groups + most - 1) / most;
  int64_t best = least_blocks;
  double best_cost = 1e300;
  for (int64_t r = least_blocks; r <= std::max(least_blocks, (tiles.groups + kProductWarps - 1) / kProductWarps); ++r) {
    const double rounds = double((token_tiles * r + sms - 1) / sms);
    const double gathers = double(tiles.steps) / double(r) * (kStepSlots / 8) * kChunks * 1.3;
    const double copies = double(tiles.blocks * tiles.block) * kFeatureBytes / 128;
    const double cost = rounds * (gathers + copies);
    if (cost < best_cost * 0.995) {
      best = r;
      best_cost = cost;
    }
  }
  return static_cast<int>(best);
}

template <typename scalar_t>
const char* run_product(const Product& a, const Tiles& tiles, void* scratch, CUstream_st* stream) {
  PackedHeader* header = static_cast<PackedHeader*>(scratch);
  uint2* packed = reinterpret_cast<uint2*>(static_cast<char*>(scratch) + kHeaderBytes);
  const PackArgs pack{tiles.source, tiles.words, a.values, a.lam, a.view.nnz, a.view.rows, tiles.steps * kStepSlots};
  const unsigned pack_blocks =
      static_cast<unsigned>((pack.lanes + kStepsAhead * kStepSlots + kPackThreads - 1) / kPackThreads);
  constexpr bool kScaled = std::is_same<scalar_t, __half>::value;
  if (kScaled) SIMT_LAUNCH(largest_parameter_kernel, kScaleBlocks, kPackThreads, 0, stream, pack, header);
  SIMT_LAUNCH((pack_kernel<scalar_t, kScaled>), pack_blocks, kPackThreads, 0, stream, pack, header, packed);

  const gpu::Device device = gpu::device();
  const int64_t token_tiles = (a.T + kTokens - 1) / kTokens, shared = product_shared(tiles.block);
  ProductMma p;
  p.a = a;
  p.tiles = tiles;
  p.header = header;
  p.packed = packed;
  p.row_blocks = row_blocks(tiles, token_tiles, device.sms);
  p.items = static_cast<int>(token_tiles * p.row_blocks);
  p.rounds = static_cast<int>((tiles.groups + kProductWarps - 1) / kProductWarps);
  p.blocks = static_cast<int>(tiles.blocks);
  gpu::allow_shared(product_mma_kernel<scalar_t>, shared);
  const unsigned grid = static_cast<unsigned>(std::min(p.items, device.sms));
  SIMT_LAUNCH((product_mma_kernel<scalar_t>), grid, kProductThreads, shared, stream, p);
  return gpu::launch_error();
}

// Chunks of jobs: an upper bound, since the last chunk of each feature block may not be full.
int64_t gradient_chunks(const Tiles& tiles, int jobs) {
  return tiles.job_count / (kGradientWarps * jobs) + tiles.blocks;
}

// Token splits: what fills whole rounds of the device, by shapes and the device's size alone; and enough of them for
// sums of many tokens to stay accurate, as far as memory for them goes.
int64_t gradient_splits(int64_t T, const Tiles& tiles, int jobs) {
  const int64_t token_tiles = (T + kTokens - 1) / kTokens, chunks = gradient_chunks(tiles, jobs);
  const int64_t sms = std::max(gpu::device().sms, 1);
  const int64_t room = std::max<int64_t>(kPartialBytes / (tiles.steps * 2 * kStepSlots * 4 + 1), 1);
  const int64_t least = std::min((token_tiles + kTilesInChain - 1) / kTilesInChain, room);
  const int64_t most = std::max(least, std::min({kMostSplits, room, token_tiles}));
  int64_t best = least, best_cost = INT64_MAX;
  for (int64_t s = least; s <= most; ++s) {
    // A split starts with an empty pipeline and ends with a pass over its sums: about three tiles.
    const int64_t cost = (chunks * s + sms - 1) / sms * ((token_tiles + s - 1) / s + 3);
    if (cost < best_cost) {
      best = s;
      best_cost = cost;
    }
  }
  return best;
}

template <typename scalar_t, int kJobs, int kJobSteps>
const char* run_gradient(const Gradient& a, const Tiles& tiles, void* scratch, CUstream_st* stream) {
  const int64_t shared = gradient_shared(tiles.block, kJobs), splits = gradient_splits(a.T, tiles, kJobs);
  GradientMma p;
  p.a = a;
  p.tiles = tiles;
  p.partial = static_cast<float*>(scratch);
  gpu::allow_shared(gradient_mma_kernel<scalar_t, kJobs, kJobSteps>, shared);
  const dim3 grid(static_cast<unsigned>(gradient_chunks(tiles, kJobs)), static_cast<unsigned>(splits));
  SIMT_LAUNCH((gradient_mma_kernel<scalar_t, kJobs, kJobSteps>), grid, kGradientThreads, shared, stream, p);
  if (const char* error = gpu::launch_error()) return error;
  Partials partials;
  partials.data = p.partial;
  partials.splits = splits;
  partials.count = partials.stride = tiles.steps * 2 * kStepSlots;
  Places places;
  places.source = tiles.source;
  places.mapped = partials.count;
  places.nnz = a.view.nnz;
  places.dvalues = a.dvalues;
  places.dlam = a.dlam;
  return reduce_sources(partials, places, stream);
}

// Four jobs of three steps or three of four: the same sums. Three also where shared memory has no room for four cells.
int jobs_of(const Tiles& tiles) {
  const bool room = gradient_shared(tiles.block, 4) <= gpu::device().shared_per_block;
  return tiles::job_steps(tiles.steps, tiles.groups * tiles.blocks) == 3 && room ? 4 : 3;
}

}  // namespace

const char* why_not() {
  const int capability = gpu::device().capability;
  if (capability == 0) {
    const char* error = gpu::launch_error();
    return error == nullptr ? "no CUDA device answers" : error;
  }
  if (capability < kLeastCapability) return "the device is older than compute capability 8.0";
  return gpu::loading_error(largest_parameter_kernel);
}

int64_t mma_block_limit() {
  if (gpu::device().capability < kLeastCapability) return 0;
  const int64_t most = gpu::device().shared_per_block;
  const int cells = most >= 128 * 1024 ? 4 : 3;
  int64_t block = 0;
  while (product_shared(block + kBlockUnit) <= most && gradient_shared(block + kBlockUnit, cells) <= most) {
    block += kBlockUnit;
  }
  return block;
}

// Feature blocks of about equal size, as few as fit: entries of large blocks spread more evenly over shared memory.
int64_t tile_block(int64_t columns) {
  const int64_t limit = mma_block_limit();
  if (limit == 0 || columns == 0) return 0;
  const int64_t blocks = (columns + limit - 1) / limit, each = (columns + blocks - 1) / blocks;
  return (each + kBlockUnit - 1) / kBlockUnit * kBlockUnit;
}

int64_t packed_bytes(const Tiles& tiles) {
  return kHeaderBytes + (tiles.steps + kStepsAhead) * kStepSlots * int64_t(sizeof(uint2));
}

const char* product_mma(const Product& a, const Tiles& tiles, void* packed, CUstream_st* stream) {
  if (a.T == 0 || a.view.rows == 0) return nullptr;
  return a.type == Scalar::kF16 ? run_product<__half>(a, tiles, packed, stream)
                                : run_product<__nv_bfloat16>(a, tiles, packed, stream);
}

int64_t gradient_mma_scratch(const Gradient& a, const Tiles& tiles) {
  return gradient_splits(a.T, tiles, jobs_of(tiles)) * tiles.steps * 2 * kStepSlots * 4;
}

const char* gradient_mma(const Gradient& a, const Tiles& tiles, void* scratch, CUstream_st* stream) {
  const bool four = jobs_of(tiles) == 4, half = a.type == Scalar::kF16;
  if (four) {
    return half ? run_gradient<__half, 4, 3>(a, tiles, scratch, stream)
                : run_gradient<__nv_bfloat16, 4, 3>(a, tiles, scratch, stream);
  }
  return half ? run_gradient<__half, 3, 4>(a, tiles, scratch, stream)
              : run_gradient<__nv_bfloat16, 3, 4>(a, tiles, scratch, stream);
}

}  // namespace frodkernels::cuda
