// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/reduce.cuh"

namespace frodkernels::cuda {
namespace {

constexpr int64_t kMaxBlocks = int64_t(1) << 20;

template <typename acc>
void launch(const Partials& a, const Places& places, cudaStream_t stream) {
  const int64_t blocks = std::min(kMaxBlocks, (a.count + kReduceThreads - 1) / kReduceThreads);
  SIMT_LAUNCH((reduce_sources_kernel<acc>), static_cast<unsigned>(blocks), kReduceThreads, 0, stream,
              static_cast<const acc*>(a.data), a.splits, a.count, a.stride, places);
}

}  // namespace

const char* reduce_sources(const Partials& partials, const Places& places, CUstream_st* stream) {
  if (partials.count == 0 || (places.dvalues.data == nullptr && places.dlam.data == nullptr)) return nullptr;
  if (partials.wide) {
    launch<double>(partials, places, stream);
  } else {
    launch<float>(partials, places, stream);
  }
  return gpu::launch_error();
}

}  // namespace frodkernels::cuda
