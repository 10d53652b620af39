// SPDX-License-Identifier: Apache-2.0
//
// What the Householder kernels share: pieces of token-major matrices on their way through a ring of shared memory, and
// the order in which the map's two passes ask for them.
//
// A block owns some tokens. Pass one reads all of x, a chunk of features at a time, and sums the coefficients; pass two
// reads base and writes out. The ring has as many slots as shared memory allows. Where base is x, pass two walks the
// chunks backwards: those that the ring still holds are not read again (none, where all of them fit), the next ones
// are the likeliest to be in L2.
#pragma once
#include "cuda/householder.h"
#include "cuda/scalars.cuh"

namespace frodkernels::cuda::householder {

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kGroupRanks = 32;  // ranks a warp sums
constexpr int kMostSlots = 8;    // of a ring, beyond which waiting is stricter than need be

// Rows [row, row + rows) of `from`, 2^log_vectors 16-byte vectors from column `column` on, to `to`, whose rows are
// `pitch` bytes apart; zeros outside of [all_rows, all_columns]. Asynchronous where rows are aligned: commit, wait and
// a barrier make it visible.
template <typename scalar_t>
__device__ __forceinline__ void copy_piece(char* to, int pitch, int rows, int log_vectors,
                                           const Rows<const scalar_t>& from, int64_t row, int64_t all_rows,
                                           int64_t column, int64_t all_columns) {
  for (int i = threadIdx.x; i < rows << log_vectors; i += kThreads) {
    const int r = i >> log_vectors, v = i & ((1 << log_vectors) - 1);
    const int64_t c = column + v * kVec<scalar_t>;
    const int live = row + r < all_rows ? live_tokens<scalar_t>(all_columns, c) : 0;
    const scalar_t* source = from.data + (live > 0 ? (row + r) * from.stride + c : 0);
    if (from.aligned) {
      ptx::cp_async<16>(to + r * pitch + v * 16, source, live * static_cast<int>(sizeof(scalar_t)));
    } else {
      gpu::store(to + r * pitch + v * 16, load_tokens(source, live, false));
    }
  }
}

// One of two matrices, field by field: a choice of whole structures would go through memory.
template <typename scalar_t>
__device__ __forceinline__ Rows<const scalar_t> either(bool first, const Rows<const scalar_t>& a,
                                                       const Rows<const scalar_t>& b) {
  return {first ? a.data : b.data, first ? a.stride : b.stride, first ? a.aligned : b.aligned};
}

// `bytes`, a multiple of 16, that follow each other in both places.
__device__ __forceinline__ void copy_bytes(char* to, const char* from, int bytes) {
  for (int i = threadIdx.x * 16; i < bytes; i += kThreads * 16) ptx::cp_async<16>(to + i, from + i);
}

// Waits until at most slots - 2 groups of copies are in flight: each step of a ring closes one group, and works on the
// piece that was asked for slots - 1 steps before.
__device__ __forceinline__ void wait_for_piece(int slots) {
  switch (slots) {
    case 2:
      return ptx::cp_async_wait<0>();
    case 3:
      return ptx::cp_async_wait<1>();
    case 4:
      return ptx::cp_async_wait<2>();
    case 5:
      return ptx::cp_async_wait<3>();
    case 6:
      return ptx::cp_async_wait<4>();
    case 7:
      return ptx::cp_async_wait<5>();
    default:
      return ptx::cp_async_wait<kMostSlots - 2>();
  }
}

// The map's steps: `first` chunks of pass one, then `second` of pass two.
struct Steps {
  int first, second, slots;
  bool same;  // base is x

  __device__ __forceinline__ int all() const { return first + second; }
  __device__ __forceinline__ int chunk(int step) const {
    return step < first ? step : same ? first - 1 - (step - first) : step - first;
  }
  __device__ __forceinline__ int slot(int step) const { return (same ? chunk(step) : step) % slots; }
  // Is the chunk not in its slot yet?
  __device__ __forceinline__ bool absent(int step) const {
    return step < first || (step < all() && !(same && chunk(step) >= first - slots));
  }
};

}  // namespace frodkernels::cuda::householder
