// SPDX-License-Identifier: Apache-2.0
//
// Partial sums of fixed splits, added up in order and put where they belong.
//
//   place(e) = source[e] for e < mapped, else e
//   dvalues[place] = sum over s of partial[s, e]  where 0 <= place < nnz;   dlam[place - nnz] likewise from nnz on
//
// Shapes   partial [splits, count], rows `stride` apart   source [mapped] int32   dvalues [nnz]   dlam [rows]
// Types    partial float or double; sums are double; outputs in their own dtypes, rounded once.
// Grid     x: blocks of kReduceThreads sums, strided where there are more. No shared memory, no atomics.
// Needs    no two sums have one place. No splits: zeros.
#pragma once
#include "cuda/reduce.h"
#include "cuda/scalars.cuh"

namespace frodkernels::cuda {

constexpr int kReduceThreads = 256;
constexpr int kReduceAhead = 4;  // loads in flight a thread

template <typename acc>
__global__ void __launch_bounds__(kReduceThreads) reduce_sources_kernel(const acc* __restrict__ partial, int64_t splits,
                                                                        int64_t count, int64_t stride, Places places) {
  const int64_t step = int64_t(gridDim.x) * kReduceThreads;
  for (int64_t e = int64_t(blockIdx.x) * kReduceThreads + threadIdx.x; e < count; e += step) {
    const int64_t place = e < places.mapped ? places.source[e] : e;
    const bool of_values = place < places.nnz;
    const Vector to = of_values ? places.dvalues : places.dlam;
    if (place < 0 || to.data == nullptr) continue;
    double sum = 0;
    int64_t s = 0;
    for (; s + kReduceAhead <= splits; s += kReduceAhead) {
      acc part[kReduceAhead];
#pragma unroll
      for (int k = 0; k < kReduceAhead; ++k) part[k] = partial[(s + k) * stride + e];
#pragma unroll
      for (int k = 0; k < kReduceAhead; ++k) sum += static_cast<double>(part[k]);
    }
    for (; s < splits; ++s) sum += static_cast<double>(partial[s * stride + e]);
    write_scalar(to, of_values ? place : place - places.nnz, sum);
  }
}

}  // namespace frodkernels::cuda
