// SPDX-License-Identifier: Apache-2.0
//
// Launcher of scale_rows.cuh, for callers that know neither nvcc nor its types. Pointers are device pointers.
#pragma once
#include <cstdint>

struct CUstream_st;

namespace frodkernels::cuda {

enum class Storage { kFloat, kHalf, kBFloat16 };

// out[i, t] = lam[i] * z[i, t] on `stream`. Returns nullptr, or the CUDA runtime's message when the launch failed.
const char* scale_rows(const void* z, const float* lam, void* out, Storage storage, int64_t n, int64_t T, int64_t z_row,
                       int64_t z_token, CUstream_st* stream);

}  // namespace frodkernels::cuda
