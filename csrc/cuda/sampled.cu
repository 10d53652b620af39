// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/reduce.h"
#include "cuda/sampled.h"
#include "cuda/sampled_fma.cuh"
#include "cuda/sampled_mma.cuh"

namespace frodkernels::cuda {
namespace {

using namespace sampled;

// Thread blocks for each multiprocessor before ranges hold more than one block of columns: the grid grows with the
// device and with rows / block, never with rows x columns.
constexpr int64_t kMostBlocks = 32;
constexpr int64_t kMostSplits = 64, kPartialBytes = int64_t(64) << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_16_bit(Scalar type) { return type == Scalar::kBF16 || type == Scalar::kF16; }

// A kernel's block, its tile of tokens, and how many tiles' time it spends around them.
struct Block {
  int64_t rows, columns, tokens, around;
};

Block block_of(Scalar type) {
  if (is_16_bit(type)) return {kMmaRows, kMmaColumns, kMmaTokens, 8};
  const int64_t side = type == Scalar::kF64 ? kFmaSide<double> : kFmaSide<float>;
  return {side, side, kFmaTokens, 2};
}

struct SampledPlan {
  int64_t row_blocks = 0, ranges = 0, range_columns = 0, splits = 0, split_tiles = 0, stride = 0;
};

// By shapes and the device's size alone: so is the order of the sums.
SampledPlan plan_sampled(const Sampled& s) {
  SampledPlan plan;
  const Block block = block_of(s.type);
  const int64_t sms = std::max(gpu::device().sms, 1), nnz = s.view.nnz;
  plan.stride = ceil_div(nnz, 4) * 4;  // splits start on sectors
  if (s.T == 0 || nnz == 0) return plan;
  plan.row_blocks = ceil_div(s.view.rows, block.rows);
  const int64_t column_blocks = ceil_div(s.view.columns, block.columns);
  const int64_t most_ranges = std::max<int64_t>(kMostBlocks * sms / plan.row_blocks, 1);
  const int64_t each = ceil_div(column_blocks, std::min(column_blocks, most_ranges));
  plan.ranges = ceil_div(column_blocks, each);
  plan.range_columns = each * block.columns;

  const int64_t blocks = std::min(plan.row_blocks * column_blocks, nnz);  // that can hold entries
  const int64_t tiles = ceil_div(s.T, block.tokens);
  const int64_t room = std::max<int64_t>(kPartialBytes / int64_t(sizeof(double)) / plan.stride, 1);
  int64_t best = INT64_MAX, tiles_each = tiles;
  for (int64_t splits = 1; splits <= std::min({kMostSplits, room, tiles}); ++splits) {
    const int64_t cost = ceil_div(blocks * splits, sms) * (ceil_div(tiles, splits) + block.around);
    if (cost < best) best = cost, tiles_each = ceil_div(tiles, splits);
  }
  plan.splits = ceil_div(tiles, tiles_each);
  plan.split_tiles = tiles_each;
  return plan;
}

template <typename scalar_t, bool kTokenMajor>
void launch_mma(const dim3& grid, const Args& args, cudaStream_t stream) {
  gpu::allow_shared(sampled_mma_kernel<scalar_t, kTokenMajor>, kMmaShared);
  SIMT_LAUNCH((sampled_mma_kernel<scalar_t, kTokenMajor>), grid, kThreads, kMmaShared, stream, args);
}

template <typename scalar_t>
void launch_fma(const dim3& grid, const Args& args, cudaStream_t stream) {
  gpu::allow_shared(sampled_fma_kernel<scalar_t>, kFmaShared);
  SIMT_LAUNCH((sampled_fma_kernel<scalar_t>), grid, kThreads, kFmaShared, stream, args);
}

template <typename scalar_t>
void launch_narrow(bool token_major, const dim3& grid, const Args& args, cudaStream_t stream) {
  if (token_major) {
    launch_mma<scalar_t, true>(grid, args, stream);
  } else {
    launch_mma<scalar_t, false>(grid, args, stream);
  }
}

}  // namespace

int64_t sampled_scratch(const Sampled& s) {
  const SampledPlan plan = plan_sampled(s);
  return plan.splits * plan.stride * int64_t(sizeof(double));
}

const char* sampled_product(const Sampled& s, void* scratch, CUstream_st* stream) {
  const SampledPlan plan = plan_sampled(s);
  if (plan.splits > 0) {
    const Args args{s.view,
                    s.a,
                    s.b,
                    static_cast<double*>(scratch),
                    s.T,
                    plan.stride,
                    plan.range_columns,
                    static_cast<unsigned>(plan.row_blocks),
                    static_cast<int32_t>(plan.split_tiles)};
    const dim3 grid(static_cast<unsigned>(plan.row_blocks * plan.ranges), static_cast<unsigned>(plan.splits));
    switch (s.type) {
      case Scalar::kF32:
        launch_fma<float>(grid, args, stream);
        break;
      case Scalar::kF64:
        launch_fma<double>(grid, args, stream);
        break;
      case Scalar::kBF16:
        launch_narrow<__nv_bfloat16>(s.a.token_major, grid, args, stream);
        break;
      case Scalar::kF16:
        launch_narrow<__half>(s.a.token_major, grid, args, stream);
        break;
    }
    if (const char* error = gpu::launch_error()) return error;
  }
  const Partials partials{scratch, true, plan.splits, s.view.nnz, plan.stride};
  return reduce_sources(partials, {s.view.perm, s.view.nnz, s.view.nnz, s.out, {}}, stream);
}

}  // namespace frodkernels::cuda
