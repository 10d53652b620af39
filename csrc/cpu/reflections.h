// SPDX-License-Identifier: Apache-2.0
//
// What is r-sized in a chain of reflections, on the CPU: torch-free interface of passes over contiguous matrices
// [rows, r], a few thousand rows of a few columns. One entry per ISA level, chosen at run time.
//
// `kind` is float32 or float64, what a matrix holds and is summed in; `type` is any storage type. Every pass takes the
// rows of one task; what it adds to is that task's own.
#pragma once
#include <cstdint>

#include "isa.h"
#include "scalars.h"

namespace frodkernels::cpu {

struct ReflectionKernels {
  // sums[j] += Σ_i u_ij², in float64.
  void (*squares)(Scalar type, const void* u, int64_t rows, int64_t r, double* sums);
  // to_ij = u_ij · factors[j], worked out in float64.
  void (*scale)(Scalar type, const void* u, const double* factors, Scalar kind, void* to, int64_t rows, int64_t r);
  // sums += aᵀ b, [r][r] in float64; chains of at most kRowsInChain rows are summed in `kind`.
  void (*inner)(Scalar kind, const void* a, const void* b, int64_t rows, int64_t r, double* sums);
  // to = rows · square, which has row_stride(r) numbers from row to row, all of them finite or meant.
  void (*product)(Scalar kind, const void* from, const void* square, void* to, int64_t rows, int64_t r);
  // to_ij = (a_ij − b_ij) · factors[j], the product in float64.
  void (*scaled_difference)(Scalar kind, const void* a, const void* b, const double* factors, Scalar type, void* to,
                            int64_t rows, int64_t r);
  void (*narrow)(const double* from, float* to, int64_t count);
};

constexpr int64_t kRowsInChain = 64;

// From one row to the next of the small square matrices: whole vectors of every level.
constexpr int64_t row_stride(int64_t r) { return (r + 15) / 16 * 16; }

const ReflectionKernels& reflection_kernels(Isa isa);

namespace portable {
extern const ReflectionKernels kReflectionKernels;
}
namespace avx2 {
extern const ReflectionKernels kReflectionKernels;
}
namespace avx512 {
extern const ReflectionKernels kReflectionKernels;
}

}  // namespace frodkernels::cpu
