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
constexpr int kBlockUnit = 128;                  // a block is a multiple of it
constexpr unsigned kNoFeature = 65535;           // an unused position of a block
constexpr unsigned kUnitMask = 0x3fff;           // of a word: csrc/tiles/words.h
constexpr int kStepOctets = 4, kStepSlots = 32;  // a step gathers 4 octets of features

__device__ __forceinline__ int chunk_offset(int position, int chunk) {
  return position * kFeatureBytes + ((chunk ^ (position >> 1)) & (kChunks - 1)) * 16;
}

// Where features come from: rows of [features, T], `stride` elements apart, each starting on 16 bytes.
struct Source16 {
  const uint16_t* data;
  int64_t T, stride;
};

// Eight tokens from t of feature f to shared memory, asynchronously; zeros beyond T.
__device__ __forceinline__ void copy_chunk(char* to, const Source16& from, int64_t f, int64_t t) {
  const int64_t left = from.T - t;
  const int live = left >= 8 ? 8 : left > 0 ? static_cast<int>(left) : 0;
  ptx::cp_async<16>(to, from.data + f * from.stride + (live > 0 ? t : 0), live * 2);
}

// The block's features, tokens [t, t + kTokens), by kThreads threads. `order` is the block's feature_order. Four
// threads take two positions side by side; of neighbouring fours one begins with the even, one with the odd position,
// so that the 128 bytes that eight threads write fall in all banks.
template <int kThreads>
__device__ __forceinline__ void copy_block(char* buffer, const uint16_t* order, int block, const Source16& from,
                                           int64_t t) {
  const int chunk = threadIdx.x & (kChunks - 1), odd = threadIdx.x / kChunks & 1;
#pragma unroll 2
  for (int pair = threadIdx.x / kChunks; pair < block / 2; pair += kThreads / kChunks) {
    const uint32_t features = gpu::load<uint32_t>(order + 2 * pair);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int side = i ^ odd;
      const unsigned f = features >> 16 * side & 0xffffu;
      if (f != kNoFeature) copy_chunk(buffer + chunk_offset(2 * pair + side, chunk), from, f, t + chunk * 8);
    }
  }
}

// Keeps the compiler from computing what follows from x once for all rounds of a loop and holding it in registers.
__device__ __forceinline__ void recompute(uint32_t& x) {
#if !defined(SIMT_EMU)
  asm volatile("" : "+r"(x));
#endif
}

// Where a lane's features of a step begin: offset[h] for the slot of octet 2h or 2h + 1 that the word names.
__device__ __forceinline__ void feature_offsets(int (&offset)[2], uint32_t word) {
  offset[0] = static_cast<int>(word << 4 & kUnitMask << 4);
  offset[1] = static_cast<int>(word >> 10 & kUnitMask << 4);
}

}  // namespace frodkernels::cuda
