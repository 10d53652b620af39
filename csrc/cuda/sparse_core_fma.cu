// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/sparse_core.h"
#include "cuda/sparse_core_fma.cuh"
#include "cuda/sparse_core_fma_plan.h"

namespace frodkernels::cuda {
namespace {

static_assert(kTileFeatureBytes == kFeatureTile, "the plan counts the bytes that the kernels use");

constexpr int64_t kMaxGridY = 65535, kMaxPackBlocks = int64_t(1) << 20;

template <typename scalar_t>
TilePlan plan_product(const Product& a) {
  using acc = acc_t<scalar_t>;
  return plan_tiles(a.view, a.T, kTileTokens<scalar_t>, kProductSlots<scalar_t>, kStageBytes<acc>, gpu::device());
}

template <typename scalar_t>
int64_t entries_bytes(const Product& a) {
  return plan_product<scalar_t>(a).threads == 0 ? 0 : a.view.nnz * static_cast<int64_t>(sizeof(Entry<acc_t<scalar_t>>));
}

template <typename scalar_t>
void launch_tiles(const Product& a, const TilePlan& plan, void* scratch, cudaStream_t stream) {
  using acc = acc_t<scalar_t>;
  auto* entries = static_cast<Entry<acc>*>(scratch);
  const int64_t pack_blocks = std::min(kMaxPackBlocks, (a.view.nnz + kPackThreads - 1) / kPackThreads);
  SIMT_LAUNCH((pack_entries_kernel<acc>), static_cast<unsigned>(pack_blocks), kPackThreads, 0, stream, a.view, a.values,
              entries);
  const ProductTiles<scalar_t> tiles{a.view,
                                     entries,
                                     a.lam,
                                     rows_of<scalar_t>(a.in, a.in_stride),
                                     rows_of<scalar_t>(a.out, a.out_stride),
                                     a.T,
                                     static_cast<unsigned>(plan.row_blocks),
                                     plan.features};
  gpu::allow_shared(product_tiles_kernel<scalar_t>, plan.shared);
  SIMT_LAUNCH((product_tiles_kernel<scalar_t>), static_cast<unsigned>(plan.row_blocks * plan.tiles),
              static_cast<unsigned>(plan.threads), static_cast<size_t>(plan.shared), stream, tiles);
}

template <typename scalar_t>
void launch_rows(const Product& a, cudaStream_t stream) {
  ProductRows<scalar_t> rows{
      a.view, a.values, a.lam, rows_of<scalar_t>(a.in, a.in_stride), rows_of<scalar_t>(a.out, a.out_stride), a.T, 0};
  const bool vectors = rows.in.aligned && rows.out.aligned && a.T % kVec<scalar_t> == 0;
  const int64_t units = vectors ? a.T / kVec<scalar_t> : a.T;
  while (rows.log_lanes < 5 && (int64_t(1) << rows.log_lanes) < units) ++rows.log_lanes;
  const int64_t warps = kRowsThreads / 32, lanes = int64_t(1) << rows.log_lanes;
  const dim3 grid(static_cast<unsigned>((a.view.rows + warps - 1) / warps),
                  static_cast<unsigned>(std::min(kMaxGridY, (units + lanes - 1) / lanes)));
  if (vectors) {
    SIMT_LAUNCH((product_rows_kernel<scalar_t, kVec<scalar_t>>), grid, kRowsThreads, 0, stream, rows);
  } else {
    SIMT_LAUNCH((product_rows_kernel<scalar_t, 1>), grid, kRowsThreads, 0, stream, rows);
  }
}

template <typename scalar_t>
void launch(const Product& a, void* scratch, cudaStream_t stream) {
  const TilePlan plan = scratch == nullptr ? TilePlan{} : plan_product<scalar_t>(a);
  if (plan.threads > 0) {
    launch_tiles<scalar_t>(a, plan, scratch, stream);
  } else {
    launch_rows<scalar_t>(a, stream);
  }
}

}  // namespace

int64_t product_fma_scratch(const Product& a) {
  switch (a.type) {
    case Scalar::kF32:
      return entries_bytes<float>(a);
    case Scalar::kF64:
      return entries_bytes<double>(a);
    case Scalar::kBF16:
      return entries_bytes<__nv_bfloat16>(a);
    case Scalar::kF16:
      return entries_bytes<__half>(a);
  }
  return 0;
}

const char* product_fma(const Product& a, void* scratch, CUstream_st* stream) {
  if (a.T == 0 || a.view.rows == 0) return nullptr;
  switch (a.type) {
    case Scalar::kF32:
      launch<float>(a, scratch, stream);
      break;
    case Scalar::kF64:
      launch<double>(a, scratch, stream);
      break;
    case Scalar::kBF16:
      launch<__nv_bfloat16>(a, scratch, stream);
      break;
    case Scalar::kF16:
      launch<__half>(a, scratch, stream);
      break;
  }
  return gpu::launch_error();
}

}  // namespace frodkernels::cuda
