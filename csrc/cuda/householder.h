// SPDX-License-Identifier: Apache-2.0
//
// Launchers of the CUDA kernels for chained Householder reflections, for callers that know neither nvcc nor its types.
// All pointers are device pointers; every launcher enqueues on `stream` and returns nullptr, or the CUDA runtime's
// message when a launch failed.
//
//   map        coefficients = x left;  out = base - coefficients right^T
//   gradient   out = sum over the pairs (x, q) of x^T q
//
// Matrices are token-major: [T, features], contiguous features, any row stride. Factors, coefficients and sums are
// contiguous, float, or double where x is double. Ranks 1 to kMostRanks, T, n and m at least 1.
#pragma once
#include <cstdint>

#include "cuda/sparse_core.h"  // Scalar

namespace frodkernels::cuda {

constexpr int64_t kMostRanks = 128;

struct Householder {
  Scalar type = Scalar::kF32;
  const void* x = nullptr;       // [T, n]
  const void* left = nullptr;    // [n, r]
  const void* right = nullptr;   // [m, r]; null: coefficients alone
  const void* base = nullptr;    // [T, m]; null: x, and m = n
  void* coefficients = nullptr;  // [T, r]
  void* out = nullptr;           // [T, m]
  int64_t T = 0, n = 0, m = 0, r = 0;
  int64_t x_stride = 0, base_stride = 0, out_stride = 0;
};

struct HouseholderPair {
  const void* x = nullptr;  // [T, n]
  const void* q = nullptr;  // [T, r]
  int64_t x_stride = 0;
};

struct HouseholderGradient {
  Scalar type = Scalar::kF32;
  HouseholderPair pairs[2];
  int count = 1;        // of the pairs
  void* out = nullptr;  // [n, r]
  int64_t T = 0, n = 0, r = 0;
};

// Fused multiply-add kernels: every dtype, any alignment. `scratch` holds ..._scratch(a) bytes, aligned to 256.
int64_t householder_fma_scratch(const Householder& a);
const char* householder_fma(const Householder& a, void* scratch, CUstream_st* stream);
int64_t householder_gradient_fma_scratch(const HouseholderGradient& a);
const char* householder_gradient_fma(const HouseholderGradient& a, void* scratch, CUstream_st* stream);

// Tensor-core kernels: float16 and bfloat16 whose rows all start on 16 bytes (those of out too).
bool householder_on_tensor_cores(const Householder& a);
int64_t householder_mma_scratch(const Householder& a);
const char* householder_mma(const Householder& a, void* scratch, CUstream_st* stream);
bool householder_on_tensor_cores(const HouseholderGradient& a);
int64_t householder_gradient_mma_scratch(const HouseholderGradient& a);
const char* householder_gradient_mma(const HouseholderGradient& a, void* scratch, CUstream_st* stream);

}  // namespace frodkernels::cuda
