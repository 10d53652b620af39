// SPDX-License-Identifier: Apache-2.0
//
// Sampling a product at fixed positions on the CPU, by dense blocks: torch-free interface of the kernels. One entry per
// ISA level, chosen at run time. (One inner product an entry is sparse_core.h's backward, without dz.)
//
//   out[perm[p]] = sum_t a[indices[p], t] b[g, t],     indptr[g] <= p < indptr[g + 1]
//
// Shapes   a [columns, T], b [groups, T], any strides; out [nnz]. indices ascend within a group.
// Types    storage f32, f64, bf16 or f16 of a and b; sums f32, f64 for f64; out in a dtype of its own, rounded once.
//
// Work     a task is one block of at most kBlock groups by kBlock columns. Its dense product stays in a buffer that L2
//          holds, with the packed features of some tokens; sums of that many tokens stay in registers, and long sums
//          are joined in f64. Then the block's entries are picked. A block without entries costs a search.
// Order    sums run over tokens in an order fixed by T alone, never by the number of threads or the block's place.
// Needs    indices < columns, perm < nnz, monotone indptr: checked by the binding. Memory: one block a thread.
#pragma once
#include <cstdint>

#include "isa.h"
#include "scalars.h"
#include "sparse_core.h"

namespace frodkernels::cpu {

struct Sampled {
  Scalar type = Scalar::kF32;  // of a and b
  int64_t groups = 0, columns = 0, T = 0;
  Features a, b;
  const int32_t* indptr = nullptr;
  const void* indices = nullptr;
  bool narrow = true;  // 16-bit indices
  const int32_t* perm = nullptr;
  void* out = nullptr;
  Scalar out_type = Scalar::kF32;

  static constexpr int64_t kBlock = 192;
  int64_t row_blocks() const { return (groups + kBlock - 1) / kBlock; }
  int64_t column_blocks() const { return (columns + kBlock - 1) / kBlock; }
};

struct SampledKernels {
  // Run blocks [begin, end) of row_blocks() * column_blocks(), those of a row of blocks in turn.
  void (*run)(const Sampled&, int64_t begin, int64_t end);
};

const SampledKernels& sampled_kernels(Isa isa);

// The kernels for bf16 features; null where this CPU multiplies bf16 numbers no faster.
const SampledKernels* sampled_bf16_kernels(Isa isa);

namespace portable {
extern const SampledKernels kSampledKernels;
}
namespace avx2 {
extern const SampledKernels kSampledKernels;
}
namespace avx512 {
extern const SampledKernels kSampledKernels;
}
namespace avx512bf16 {
extern const SampledKernels kSampledKernels;
}

}  // namespace frodkernels::cpu
