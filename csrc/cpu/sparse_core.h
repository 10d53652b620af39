// SPDX-License-Identifier: Apache-2.0
//
// Sparse core on the CPU: torch-free interface of its kernels. One entry per ISA level, chosen at run time.
//
//   forward    out[i, t] = lam[i] z[i, t] + sum_p values[p] z[indices[p], t],     indptr[i] <= p < indptr[i + 1]
//   backward   dz[j, t]  = lam[j] u[j, t] + sum_p values[p] u[indices[p], t]      p over group j
//              dvalues[p] = sum_t u[indices[p], t] z[j, t];   dlam[j] = sum_t u[j, t] z[j, t]
//
// Shapes   z [n_in, T], out [n_out, T]; u [n_in, T], z and dz [n_out, T]; any strides (in elements).
//          lam [n_out] or null, values [nnz] in slot order, both in the accumulation type; indptr [n_out + 1] int32;
//          indices [nnz], 16 or 32 bits.
// Types    storage f32, f64, bf16 or f16; accumulation f32, f64 for f64; one rounding at the end. The sums of the
//          splits (below) join in f64.
//
// Work     a task is a tile of tokens (or, backward, a fixed split of the tiles) times a block of groups. A tile of the
//          gathered operand is packed so that it stays in L2; every nonzero then reads whole cache lines of it.
//
// Order    sums run over slots and tokens in an order fixed by shapes and tile size, never by the number of threads.
// Needs    indices < n_in, monotone indptr, indptr[n_out] = nnz < 2^31: checked by the binding.
#pragma once
#include <cstdint>

#include "isa.h"
#include "scalars.h"

namespace frodkernels::cpu {

// Strides in elements; the type says the element.
struct Features {
  void* data = nullptr;
  int64_t row = 0;    // from one feature to the next
  int64_t token = 0;  // from one token to the next
};

struct Plan {
  const int32_t* indptr = nullptr;
  const void* indices = nullptr;
  bool narrow = true;            // 16-bit indices
  const void* values = nullptr;  // slot order, accumulation type
  const void* lam = nullptr;     // accumulation type, or null
  int64_t nnz = 0;
};

struct Tiling {
  int lines = 4;       // cache lines of one feature in a tile: 4, 2 or 1
  int64_t tiles = 0;   // over the tokens
  int64_t splits = 0;  // backward: groups of consecutive tiles, each with its own partial sums
  int64_t blocks = 1;  // of groups, for more threads than tiles
  bool far = false;    // gathered rows are worth asking for ahead: they are few, of more than the near caches hold
};

struct Product {
  Scalar type = Scalar::kF32;
  int64_t n_in = 0, n_out = 0, T = 0;
  Plan plan;
  Tiling tiling;
  Features in, out;  // forward: z, out; backward: u, dz (data null: not needed)
  bool add = false;  // to what out holds: rounded to storage before and after that addition
  // Backward only.
  Features z;
  void* partial_values = nullptr;  // [splits, nnz] accumulation type; null: not needed
  void* partial_lam = nullptr;     // [splits, n_out] likewise
};

// Tokens in a tile of `lines` cache lines a feature.
constexpr int64_t tile_tokens(Scalar type, int lines) {
  return lines * (type == Scalar::kBF16 ? 32 : type == Scalar::kF64 ? 8 : 16);
}

// Run tasks [begin, end): forward has tiles * blocks of them, backward splits * blocks.
struct Kernels {
  void (*forward)(const Product&, int64_t begin, int64_t end);
  void (*backward)(const Product&, int64_t begin, int64_t end);
};

// For features of `type`: bf16 has kernels of its own where the CPU multiplies pairs of such numbers.
const Kernels& kernels(Isa isa, Scalar type);

namespace portable {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512bf16 {
extern const Kernels kKernels;
}

}  // namespace frodkernels::cpu
