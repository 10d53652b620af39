// SPDX-License-Identifier: Apache-2.0
//
// Scaled rows: the sparse core of an empty S.
//
//   out[i, t] = lam[i] * z[i, t]
//
// Shapes   z [n, T], any strides   lam [n]   out [n, T], contiguous
// Types    storage_t = float | half | bf16; the product is float, rounded once.
// Grid     x: row i;  y: blocks of kScaleThreads tokens, strided where T needs more than the grid has.
//          No shared memory, no atomics: two runs give the same bits.
// Needs    n < 2^31; offsets are 64-bit. Torch-free on purpose.
#pragma once
#include <cstdint>

#include "cuda/gpu.cuh"

namespace frodkernels::cuda {

constexpr int kScaleThreads = 128;  // one thread per token: neighbours read neighbours
constexpr int64_t kMaxGridY = 65535;

template <typename storage_t>
__global__ void __launch_bounds__(kScaleThreads) scale_rows_kernel(const storage_t* __restrict__ z,  // [n, T]
                                                                   const float* __restrict__ lam,    // [n]
                                                                   storage_t* __restrict__ out,      // [n, T]
                                                                   int64_t T, int64_t z_row, int64_t z_token) {
  const int64_t i = blockIdx.x;
  const float scale = lam[i];
  const int64_t step = int64_t(gridDim.y) * kScaleThreads;
  for (int64_t t = int64_t(blockIdx.y) * kScaleThreads + threadIdx.x; t < T; t += step) {
    out[i * T + t] = static_cast<storage_t>(scale * static_cast<float>(z[i * z_row + t * z_token]));
  }
}

}  // namespace frodkernels::cuda
