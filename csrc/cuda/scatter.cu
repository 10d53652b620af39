// SPDX-License-Identifier: Apache-2.0
#include "cuda/scatter.cuh"

namespace frodkernels::cuda {
namespace {

template <typename scalar_t>
void launch(const Scatter& s, cudaStream_t stream) {
  const int64_t blocks = (s.view.nnz + kScatterThreads - 1) / kScatterThreads;
  SIMT_LAUNCH((scatter_values_kernel<scalar_t>), static_cast<unsigned>(blocks), kScatterThreads, 0, stream, s);
}

}  // namespace

const char* scatter_values(const Scatter& s, CUstream_st* stream) {
  if (s.view.nnz == 0) return nullptr;
  switch (s.weight.type) {
    case Scalar::kF32:
      launch<float>(s, stream);
      break;
    case Scalar::kF64:
      launch<double>(s, stream);
      break;
    case Scalar::kBF16:
      launch<__nv_bfloat16>(s, stream);
      break;
    case Scalar::kF16:
      launch<__half>(s, stream);
      break;
  }
  return gpu::launch_error();
}

}  // namespace frodkernels::cuda
