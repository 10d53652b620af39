// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/reduce.h"
#include "cuda/sparse_core_fma_gradient.cuh"
#include "cuda/sparse_core_fma_plan.h"

namespace frodkernels::cuda {
namespace {

// A sum that grows from tile to tile in float loses a little each time: splits end the chain. Fewer of them where they
// would take more than kScratchBytes.
constexpr int64_t kTilesInChain = 16, kScratchBytes = int64_t(64) << 20, kMaxGridY = 65535;

struct GradientPlan {
  TilePlan tiles;
  int64_t splits = 0, split_tokens = 0, stride = 0;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename scalar_t>
GradientPlan plan_gradient(const Gradient& a) {
  GradientPlan plan;
  const gpu::Device device = gpu::device();
  // Rows of partial sums start on sectors.
  plan.stride = ceil_div(a.view.nnz + (a.dlam.data == nullptr ? 0 : a.view.rows), 8) * 8;
  if (a.T == 0 || plan.stride == 0) return plan;
  plan.tiles = plan_tiles(a.view, a.T, kTileTokens<scalar_t>, kGradientSlots<scalar_t>, kGradientStage, device);
  const int64_t tiles = ceil_div(a.T, kTileTokens<scalar_t>);
  const int64_t room = std::max<int64_t>(kScratchBytes / int64_t(sizeof(acc_t<scalar_t>)) / plan.stride, 1);
  const int64_t most = std::min(room, kMaxGridY);
  int64_t chain = std::min(tiles, std::max(kTilesInChain, ceil_div(tiles, most)));
  if (plan.tiles.threads > 0) {
    // Splits are the grid's second dimension: of the allowed lengths, the longest among those that finish first.
    const int64_t slots = int64_t(std::max(device.sms, 1)) * (512 / plan.tiles.threads);
    int64_t best = INT64_MAX;
    for (int64_t c = chain, shortest = std::max<int64_t>(ceil_div(tiles, most), 1); c >= shortest; --c) {
      const int64_t time = ceil_div(plan.tiles.row_blocks * ceil_div(tiles, c), slots) * c;
      if (time < best) best = time, chain = c;
    }
  }
  plan.splits = ceil_div(tiles, chain);
  plan.split_tokens = chain * kTileTokens<scalar_t>;
  return plan;
}

template <typename scalar_t>
int64_t scratch_bytes(const Gradient& a) {
  const GradientPlan plan = plan_gradient<scalar_t>(a);
  return plan.splits * plan.stride * static_cast<int64_t>(sizeof(acc_t<scalar_t>));
}

template <typename scalar_t>
void launch_partials(const Gradient& a, const GradientPlan& plan, void* scratch, cudaStream_t stream) {
  GradientArgs<scalar_t> args{a.view,
                              rows_of<scalar_t>(a.in, a.in_stride),
                              rows_of<scalar_t>(a.z, a.z_stride),
                              static_cast<acc_t<scalar_t>*>(scratch),
                              a.T,
                              plan.stride,
                              plan.split_tokens,
                              a.dvalues.data != nullptr && a.view.nnz > 0,
                              a.dlam.data != nullptr,
                              static_cast<unsigned>(plan.tiles.row_blocks),
                              plan.tiles.features,
                              0};
  if (plan.tiles.threads > 0 && args.values) {
    gpu::allow_shared(gradient_tiles_kernel<scalar_t>, plan.tiles.shared);
    SIMT_LAUNCH((gradient_tiles_kernel<scalar_t>), static_cast<unsigned>(plan.tiles.row_blocks * plan.splits),
                static_cast<unsigned>(plan.tiles.threads), static_cast<size_t>(plan.tiles.shared), stream, args);
    return;
  }
  const bool vectors = args.u.aligned && args.z.aligned && a.T % kVec<scalar_t> == 0;
  const int64_t tokens = std::min(a.T, plan.split_tokens), units = vectors ? tokens / kVec<scalar_t> : tokens;
  while (args.log_lanes < 5 && (int64_t(1) << args.log_lanes) < units) ++args.log_lanes;
  const dim3 grid(static_cast<unsigned>(ceil_div(a.view.rows, kGradientRowsThreads / 32)),
                  static_cast<unsigned>(plan.splits));
  if (vectors) {
    SIMT_LAUNCH((gradient_rows_kernel<scalar_t, kVec<scalar_t>>), grid, kGradientRowsThreads, 0, stream, args);
  } else {
    SIMT_LAUNCH((gradient_rows_kernel<scalar_t, 1>), grid, kGradientRowsThreads, 0, stream, args);
  }
}

template <typename scalar_t>
const char* launch(const Gradient& a, void* scratch, cudaStream_t stream) {
  const GradientPlan plan = plan_gradient<scalar_t>(a);
  if (plan.stride == 0) return nullptr;
  if (plan.splits > 0) {
    launch_partials<scalar_t>(a, plan, scratch, stream);
    if (const char* error = gpu::launch_error()) return error;
  }
  Partials partials{scratch, sizeof(acc_t<scalar_t>) == 8, plan.splits, a.view.nnz, plan.stride};
  if (a.dlam.data != nullptr) partials.count += a.view.rows;
  return reduce_sources(partials, {a.view.perm, a.view.nnz, a.view.nnz, a.dvalues, a.dlam}, stream);
}

}  // namespace

int64_t gradient_fma_scratch(const Gradient& a) {
  switch (a.type) {
    case Scalar::kF32:
      return scratch_bytes<float>(a);
    case Scalar::kF64:
      return scratch_bytes<double>(a);
    case Scalar::kBF16:
      return scratch_bytes<__nv_bfloat16>(a);
    case Scalar::kF16:
      return scratch_bytes<__half>(a);
  }
  return 0;
}

const char* gradient_fma(const Gradient& a, void* scratch, CUstream_st* stream) {
  if (a.dvalues.data == nullptr && a.dlam.data == nullptr) return nullptr;
  switch (a.type) {
    case Scalar::kF32:
      return launch<float>(a, scratch, stream);
    case Scalar::kF64:
      return launch<double>(a, scratch, stream);
    case Scalar::kBF16:
      return launch<__nv_bfloat16>(a, scratch, stream);
    case Scalar::kF16:
      return launch<__half>(a, scratch, stream);
  }
  return nullptr;
}

}  // namespace frodkernels::cuda
