// SPDX-License-Identifier: Apache-2.0
//
// Products of tokens with a tall, thin pair of matrices on the CPU: torch-free interface of their kernels. One entry
// per ISA level, chosen at run time.
//
//   coefficients = in · left                                          [T, r]
//   out          = base − coefficients · rightᵀ                       [T, n_out]
//   sum_out      = xᵀ coefficients (+ inᵀ saved where `joint`)        [n_out, r], as partial sums
//   sum_in       = inᵀ saved                                          [n_in, r], as partial sums
//
// The coefficients are given unless `project`; the others are left away where their data is null.
//
// Shapes   in [T, n_in]; base, out, x [T, n_out]: rows of unit stride, any distance between rows. left [n_in, r] and
//          right [n_out, r] as `pack_left` and `pack_right` lay them out. coefficients, saved [T, r], contiguous.
// Types    storage f32, f64, bf16 or f16 of in, base, out, x; everything else in the accumulation type, f32, or f64
//          for f64; one rounding at the end.
//
// Places   out may be base, and where there is no sum_in also in: what a block of features needs of them is read before
//          it is written.
//
// Work     a task is a split: consecutive tiles of tokens. A tile's rows are read once from memory, for all results.
// Order    sums run over features and tokens in an order fixed by shapes, tile and splits, never by the number of
//          threads. Zeros that fill up vectors only ever meet lanes which are not stored.
#pragma once
#include <cstdint>

#include "isa.h"
#include "scalars.h"

namespace frodkernels::cpu {

// [T, features]; distance between rows in elements, the type says the element.
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;
};

struct Householder {
  Scalar type = Scalar::kF32;
  int64_t T = 0, n_in = 0, n_out = 0, r = 0;
  int64_t tile = 0;    // tokens
  int64_t splits = 0;  // tasks, of consecutive tiles
  bool project = true;
  Rows in, base, out, x;
  const void* left = nullptr;   // packed
  const void* right = nullptr;  // packed
  void* coefficients = nullptr;
  const void* saved = nullptr;
  // Partial sums [splits][r][partial_stride(n)], every split's own written in full.
  void* partial_out = nullptr;
  void* partial_in = nullptr;
  bool joint = false;  // inᵀ saved belongs to sum_out; n_in = n_out

  int64_t tiles() const { return tile > 0 ? (T + tile - 1) / tile : 0; }
  // Of split i, which ends where the next one begins.
  int64_t first_tile(int64_t i) const { return tiles() * i / splits; }
  int64_t first_token(int64_t i) const { return first_tile(i) * tile < T ? first_tile(i) * tile : T; }
};

struct HouseholderKernels {
  // Elements of the accumulation type that the packed matrix [n, r] needs; 0: the kernels take it as it is.
  int64_t (*left_size)(Scalar type, int64_t n, int64_t r);
  int64_t (*right_size)(Scalar type, int64_t n, int64_t r);
  // Pack rows [begin, end) of a contiguous [n, r]; begin is a multiple of kUnit.
  void (*pack_left)(Scalar type, const void* from, void* to, int64_t n, int64_t r, int64_t begin, int64_t end);
  void (*pack_right)(Scalar type, const void* from, void* to, int64_t n, int64_t r, int64_t begin, int64_t end);
  // Run the splits [begin, end).
  void (*run)(const Householder&, int64_t begin, int64_t end);
  // Features [begin, end) of sum [n, r], begin a multiple of kUnit: the partial sums of all splits, added up in order,
  // transposed.
  void (*reduce)(Scalar type, const void* partial, void* sum, int64_t splits, int64_t n, int64_t r, int64_t begin,
                 int64_t end);
};

// Features are dealt to threads in multiples of this where they are packed or reduced.
constexpr int64_t kUnit = 64;

// From one rank to the next in partial sums over n features: whole vectors, and not a power of two.
constexpr int64_t partial_stride(int64_t n) { return (n + kUnit - 1) / kUnit * kUnit + 16; }

const HouseholderKernels& householder_kernels(Isa isa);

// The kernels for bf16 tokens whose factors and coefficients may be rounded to bf16 where they enter a product; null
// where this CPU multiplies bf16 numbers no faster. Factors are packed from, and sums are, float32.
const HouseholderKernels* householder_bf16_kernels(Isa isa);

namespace portable {
extern const HouseholderKernels kHouseholderKernels;
}
namespace avx2 {
extern const HouseholderKernels kHouseholderKernels;
}
namespace avx512 {
extern const HouseholderKernels kHouseholderKernels;
}
namespace avx512bf16 {
extern const HouseholderKernels kHouseholderKernels;
}

}  // namespace frodkernels::cpu
