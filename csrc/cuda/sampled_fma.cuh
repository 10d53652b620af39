// SPDX-License-Identifier: Apache-2.0
//
// The sampled product of float and double features by way of dense blocks, with fused multiply-adds: see
// sampled_common.cuh.
//
// Shapes   a [columns, T], b [rows, T], each with contiguous tokens or with contiguous features, at any alignment
// Types    scalar_t = float | double, and so are the sums: of 16 tokens each, which are added up for a segment.
// Method   A block is 128 x 128 (double: 64 x 64), a thread makes 8 x 8 (4 x 4) of it in registers. Tiles of 16 tokens
//          pass through a ring of kStages in shared memory, there with contiguous features, 16-byte chunks of a token
//          exchanged by its lower three bits: contiguous tokens are turned as they are copied, element by element.
// Grid     x: row blocks x ranges of columns, row blocks first;  y: token splits. 256 threads. No atomics; the order of
//          sums is fixed by splits and shapes.
// NaN and infinity stay with the entries of their own features.
// Needs    nnz < 2^31, columns < 2^31; fewer than 2^31 tiles of tokens.
#pragma once
#include "cuda/sampled_common.cuh"

namespace frodkernels::cuda::sampled {

template <typename scalar_t>
constexpr int kFmaSide = 32 * kVec<scalar_t>;  // rows, and columns
constexpr int kFmaTokens = 16, kFmaStages = 4;
constexpr int kFmaRow = 512, kFmaStage = kFmaTokens * 2 * kFmaRow;  // bytes: a side's features of a token; a tile
constexpr int kFmaShared = kFmaStages * kFmaStage;
constexpr int kFmaSegment = 32;  // tiles

// Features from `first` of `all`, tokens [t, t + 16), to rows of kFmaRow bytes, 2 kFmaRow apart; zeros outside.
template <typename scalar_t>
__device__ __forceinline__ void copy_fma_tile(char* to, const Features& from, int64_t first, int64_t all, int64_t t,
                                              int64_t T) {
  constexpr int kSide = kFmaSide<scalar_t>, kSize = static_cast<int>(sizeof(scalar_t)), kPer = kVec<scalar_t>;
  const auto* data = static_cast<const scalar_t*>(from.data);
  const auto place = [&](int token, int chunk) { return to + token * (2 * kFmaRow) + (chunk ^ (token & 7)) * 16; };
  const int features = static_cast<int>(min(all - first, int64_t(kSide)));
  if (!from.token_major) {
    // Eight lanes take a sector of tokens, the next eight its neighbour in the chunk: all banks.
    const int token = threadIdx.x % 8, f = threadIdx.x / 8;
    const scalar_t* next = data + (first + f) * from.stride + t + token;
#pragma unroll
    for (int i = 0; i < kSide; i += kThreads / 8, next += kThreads / 8 * from.stride) {
#pragma unroll
      for (int k = 0; k < kFmaTokens; k += 8) {
        const bool there = i + f < features && t + token + k < T;
        ptx::cp_async<kSize>(place(token + k, (i + f) / kPer) + f % kPer * kSize, there ? next + k : data,
                             there ? kSize : 0);
      }
    }
    return;
  }
  if (reinterpret_cast<uintptr_t>(data) % 16 == 0 && from.stride % kPer == 0) {
    const int chunk = threadIdx.x % 32, live = max(min(features - chunk * kPer, kPer), 0);
#pragma unroll
    for (int i = 0; i < kFmaTokens / kWarps; ++i) {
      const int k = i * kWarps + threadIdx.x / 32, there = t + k < T ? live : 0;
      ptx::cp_async<16>(place(k, chunk), there > 0 ? data + (t + k) * from.stride + first + chunk * kPer : data,
                        there * kSize);
    }
    return;
  }
  for (int i = threadIdx.x; i < kFmaTokens * kSide; i += kThreads) {
    const int k = i / kSide, f = i % kSide;
    const bool there = f < features && t + k < T;
    ptx::cp_async<kSize>(place(k, f / kPer) + f % kPer * kSize, there ? data + (t + k) * from.stride + first + f : data,
                         there ? kSize : 0);
  }
}

// Two chunks of a token's features, 16 chunks apart.
template <typename scalar_t>
__device__ __forceinline__ void load_chunks(scalar_t (&x)[2 * kVec<scalar_t>], const char* row, int chunk, int token) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    scalar_t four[kVec<scalar_t>];
    unpack<scalar_t>(gpu::load<uint4>(row + ((chunk + 16 * h) ^ (token & 7)) * 16), four);
#pragma unroll
    for (int v = 0; v < kVec<scalar_t>; ++v) x[h * kVec<scalar_t> + v] = four[v];
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 1) sampled_fma_kernel(const Args p) {
  constexpr int kSide = kFmaSide<scalar_t>, kV = kVec<scalar_t>, kMicro = 2 * kV;
  SIMT_DYN_SHARED(char, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int x = warp % 2 * 8 + lane % 8,
            y = warp / 2 * 4 + lane / 8;  // chunks of columns and of rows: these, and 16 on
  using Place = Walk<kSide, kSide, kFmaTokens>;
  SIMT_SHARED(Place, walks, [1]);
  Place& walk = walks[0];
  walk.start(p);
  while (walk.next(p.view)) {
    do {
      const auto tiles = [&] { return min(walk.end_tile - walk.tile, kFmaSegment); };
      const auto copy = [&](int tile) {
        if (tile < tiles()) {
          char* const stage = shared + tile % kFmaStages * kFmaStage;
          const int64_t t = int64_t(walk.tile + tile) * kFmaTokens;
          copy_fma_tile<scalar_t>(stage, p.b, walk.row, p.view.rows, t, p.T);
          copy_fma_tile<scalar_t>(stage + kFmaRow, p.a, walk.column, p.view.columns, t, p.T);
        }
        ptx::cp_async_commit();
      };
      for (int tile = 0; tile < kFmaStages - 1; ++tile) copy(tile);

      scalar_t sums[kMicro][kMicro] = {};
      for (int tile = 0; tile < tiles(); ++tile) {
        ptx::cp_async_wait<kFmaStages - 2>();
        __syncthreads();  // this tile is there, and every warp has left the one whose place comes next
        copy(tile + kFmaStages - 1);
        const char* const stage = shared + tile % kFmaStages * kFmaStage;
        scalar_t tile_sums[kMicro][kMicro] = {};
#pragma unroll 8
        for (int k = 0; k < kFmaTokens; ++k) {
          scalar_t rows[kMicro], columns[kMicro];
          load_chunks<scalar_t>(rows, stage + k * (2 * kFmaRow), y, k);
          load_chunks<scalar_t>(columns, stage + k * (2 * kFmaRow) + kFmaRow, x, k);
#pragma unroll
          for (int i = 0; i < kMicro; ++i) {
#pragma unroll
            for (int j = 0; j < kMicro; ++j) tile_sums[i][j] += rows[i] * columns[j];
          }
        }
#pragma unroll
        for (int i = 0; i < kMicro; ++i) {
#pragma unroll
          for (int j = 0; j < kMicro; ++j) sums[i][j] += tile_sums[i][j];
        }
      }
      ptx::cp_async_wait<0>();

      // The upper half of the rows, then the lower one.
      auto* const staged = reinterpret_cast<scalar_t*>(shared);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        __syncthreads();  // tiles, or the rows before, have been read
#pragma unroll
        for (int v = 0; v < kV; ++v) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            scalar_t chunk[kV];
#pragma unroll
            for (int j = 0; j < kV; ++j) chunk[j] = sums[half * kV + v][h * kV + j];
            gpu::store(staged + (y * kV + v) * kSide + (x + 16 * h) * kV, pack<scalar_t>(chunk));
          }
        }
        __syncthreads();
        pick_entries(staged, kSide, kSide / 2, [half](int s) { return half * (kSide / 2) + s; }, walk, p);
      }
    } while (walk.next_segment(kFmaSegment));
  }
}

}  // namespace frodkernels::cuda::sampled
