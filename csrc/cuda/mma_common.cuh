// SPDX-License-Identifier: Apache-2.0
//
// What the tensor-core kernels of the sparse core share: the layout of a feature block in shared memory, and copies
// into it.
//
// A buffer holds `block` features x kTokens tokens of 16 bits, 64 bytes a feature, cut in 16-byte chunks of 8 tokens.
// Chunk c of the feature at position p lies at  p * 64 + ((c ^ (p >> 1)) & 3) * 16.  For any one chunk, features fall
// in the same shared-memory banks exactly when their positions agree modulo 8: the plan (csrc/tiles) gives features
// that are gathered together different positions modulo 8. The copies fill 128 bytes, two features, at a time: no
// conflicts.
#pragma once
#include "cuda/gpu.cuh"
#include "cuda/sparse_core.h"

namespace frodkernels::cuda {

constexpr int kTokens = 32;                      // tokens of a tile
constexpr int kFeatureBytes = kTokens * 2;       // of one feature in a buffer
constexpr int kChunks = kTokens / 8;             // 16-byte chunks of a feature
constexpr int kThreadOrder = 128;                // csrc/tiles/tiles.h: entry a * J + i is position a + 128 i
constexpr unsigned kNoFeature = 65535;           // an unused position of a block
constexpr int kPositionBits = 12;                // of a meta word; then two bits each of p1 and p2
constexpr int kStepOctets = 4, kStepSlots = 32;  // a step gathers 4 octets of features

__device__ __forceinline__ int chunk_offset(int position, int chunk) {
  return position * kFeatureBytes + ((chunk ^ (position >> 1)) & (kChunks - 1)) * 16;
}

// Where features come from: rows of [features, T], `stride` elements apart. `aligned`: every row starts on 16 bytes.
struct Source16 {
  const uint16_t* data;
  int64_t T, stride;
  bool aligned;
};

// Eight tokens from t of feature f to shared memory; zeros beyond T. Asynchronous where rows are aligned.
__device__ __forceinline__ void copy_chunk(char* to, const Source16& from, int64_t f, int64_t t) {
  const int64_t left = from.T - t;
  const int live = left >= 8 ? 8 : left > 0 ? static_cast<int>(left) : 0;
  const uint16_t* row = from.data + f * from.stride + (live > 0 ? t : 0);
  if (from.aligned) {
    ptx::cp_async<16>(to, row, live * 2);
    return;
  }
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = 2 * i < live ? row[2 * i] : 0, high = 2 * i + 1 < live ? row[2 * i + 1] : 0;
    words[i] = low | high << 16;
  }
  gpu::store(to, make_uint4(words[0], words[1], words[2], words[3]));
}

// The block's features, tokens [t, t + kTokens), by kThreads threads. `order` is the block's feature_order.
template <int kThreads>
__device__ __forceinline__ void copy_block(char* buffer, const uint16_t* order, int block, const Source16& from,
                                           int64_t t) {
  const int chunk = threadIdx.x & (kChunks - 1), per_thread = block / kThreadOrder;
#pragma unroll 2
  for (int p = threadIdx.x / kChunks; p < block; p += kThreads / kChunks) {
    const unsigned f = order[(p & (kThreadOrder - 1)) * per_thread + p / kThreadOrder];
    if (f != kNoFeature) copy_chunk(buffer + chunk_offset(p, chunk), from, f, t + chunk * 8);
  }
}

// Keeps the compiler from computing what follows from x once for all rounds of a loop and holding it in registers.
__device__ __forceinline__ void recompute(uint32_t& x) {
#if !defined(SIMT_EMU)
  asm volatile("" : "+r"(x));
#endif
}

// The features of one step: lane l gathers the feature at `position`; x[c][j] is octet j of them, chunk c.
template <bool kTranspose>
__device__ __forceinline__ void gather(uint32_t (&x)[kChunks][kStepOctets], const char* buffer, int position) {
  const int first = chunk_offset(position, 0);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const char* row = buffer + (first ^ c * 16);
    if constexpr (kTranspose) {
      ptx::ldmatrix_x4_trans(x[c], row);
    } else {
      ptx::ldmatrix_x4(x[c], row);
    }
  }
}

// The feature of slot k of a compressed view.
__device__ __forceinline__ int64_t read_index(const Compressed& view, int64_t k) {
  return view.narrow ? static_cast<const uint16_t*>(view.indices)[k] : static_cast<const int32_t*>(view.indices)[k];
}

}  // namespace frodkernels::cuda
