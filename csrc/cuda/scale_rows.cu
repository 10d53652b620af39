// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/scale_rows.cuh"
#include "cuda/scale_rows.h"

namespace frodkernels::cuda {
namespace {

template <typename storage_t>
void launch(const void* z, const float* lam, void* out, int64_t n, int64_t T, int64_t z_row, int64_t z_token,
            cudaStream_t stream) {
  const int64_t blocks = std::min(kMaxGridY, (T + kScaleThreads - 1) / kScaleThreads);
  const dim3 grid(static_cast<unsigned>(n), static_cast<unsigned>(blocks));
  SIMT_LAUNCH((scale_rows_kernel<storage_t>), grid, kScaleThreads, 0, stream, static_cast<const storage_t*>(z), lam,
              static_cast<storage_t*>(out), T, z_row, z_token);
}

}  // namespace

const char* scale_rows(const void* z, const float* lam, void* out, Storage storage, int64_t n, int64_t T, int64_t z_row,
                       int64_t z_token, CUstream_st* stream) {
  if (n == 0 || T == 0) return nullptr;
  switch (storage) {
    case Storage::kFloat:
      launch<float>(z, lam, out, n, T, z_row, z_token, stream);
      break;
    case Storage::kHalf:
      launch<__half>(z, lam, out, n, T, z_row, z_token, stream);
      break;
    case Storage::kBFloat16:
      launch<__nv_bfloat16>(z, lam, out, n, T, z_row, z_token, stream);
      break;
  }
  return gpu::launch_error();
}

}  // namespace frodkernels::cuda
