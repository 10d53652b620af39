// SPDX-License-Identifier: Apache-2.0
//
// The sampled product of 16-bit features by way of dense blocks on tensor cores: see sampled_common.cuh.
//
// Shapes   a [columns, T], b [rows, T], both with contiguous tokens or both with contiguous features (kTokenMajor);
//          rows of either start on 16 bytes
// Types    scalar_t = __half | __nv_bfloat16; products are exact, sums float. Tensor cores cut what they add to a sum,
//          towards zero: they sum 32 tokens from zero, tiles are added as floats are, rounded to nearest.
// Method   A block is 128 rows x 192 columns, a warp makes 64 x 48 of it in registers. Tiles of 32 tokens pass through
//          a ring of kStages in shared memory. Contiguous tokens: ldmatrix takes both fragments as they lie; contiguous
//          features: turned. Either way rows of 16 bytes that are read together fall in different banks.
// Grid     x: row blocks x ranges of columns, row blocks first;  y: token splits. 256 threads. No atomics; the order of
//          sums is fixed by splits and shapes.
// NaN and infinity stay with the entries of their own features: a sum meets two features, and zeros beyond T in both.
// Needs    nnz < 2^31, columns < 2^31; fewer than 2^31 tiles of tokens.
#pragma once
#include "cuda/sampled_common.cuh"

namespace frodkernels::cuda::sampled {

constexpr int kMmaRows = 128, kMmaColumns = 192, kMmaTokens = 32, kMmaStages = 4;
constexpr int kMmaBytes = kMmaTokens * 2;            // of a feature in a tile
constexpr int kMmaColumnsAt = kMmaRows * kMmaBytes;  // in a stage: the columns' features
constexpr int kMmaStage = (kMmaRows + kMmaColumns) * kMmaBytes;
constexpr int kMmaShared = kMmaStages * kMmaStage;
constexpr int kMmaSegment = 64;                              // tiles
constexpr int kMmaPitch = kMmaColumns + 8, kMmaStaged = 32;  // of staged sums: numbers, rows
static_assert(kMmaStaged * kMmaPitch * 4 <= kMmaShared, "sums are staged where tiles were");

// kFeatures features from `first` of `all`, tokens [t, t + 32); zeros beyond T. Features beyond `all` are any: nobody
// asks for their sums. Contiguous tokens: four chunks of 8 tokens a feature, two features fill 128 bytes, and eight of
// them take a chunk's eight places. Contiguous features: `all` is rounded up to eights.
template <int kFeatures, bool kTokenMajor>
__device__ __forceinline__ void copy_mma_tile(char* to, const Features& from, int64_t first, int64_t all, int64_t t,
                                              int64_t T) {
  const auto* data = static_cast<const uint16_t*>(from.data);
  const int thread = Thread().index;
  if constexpr (!kTokenMajor) {
    constexpr int kStep = kThreads / 4;
    const int f = thread / 4, chunk = thread % 4, live = live_tokens<__half>(T, t + chunk * 8);
    char* const place = to + f * kMmaBytes + ((chunk ^ (f >> 1)) & 3) * 16;
    const int64_t token = live > 0 ? t + chunk * 8 : 0;
#pragma unroll
    for (int i = 0; i < kFeatures; i += kStep) {
      const int64_t feature = min(first + i + f, all - 1);
      ptx::cp_async<16>(place + i * kMmaBytes, data + feature * from.stride + token, live * 2);
    }
  } else {
    static_assert(kThreads == 8 * kMmaTokens, "eight threads a token");
    const int k = thread / 8, chunk = thread % 8;
    const bool live = t + k < T;
    char* const place = to + k * kFeatures * 2 + (chunk ^ (k & 7)) * 16;
    const uint16_t* const row = data + (live ? t + k : 0) * from.stride + first + chunk * 8;
#pragma unroll
    for (int i = 0; i < kFeatures; i += 64) {
      ptx::cp_async<16>(place + i * 2, first + i + chunk * 8 < all ? row + i : data, live ? 16 : 0);
    }
  }
}

// 16 rows from `row` x 16 tokens from 16 k, as mma's A.
template <bool kTokenMajor>
__device__ __forceinline__ void load_rows(uint32_t (&r)[4], const char* tile, int row, int k, int lane) {
  if constexpr (!kTokenMajor) {
    const int f = row + (lane & 15), chunk = k * 2 + (lane >> 4);
    ptx::ldmatrix_x4(r, tile + f * kMmaBytes + ((chunk ^ (f >> 1)) & 3) * 16);
  } else {
    const int token = k * 16 + (lane >> 4) * 8 + (lane & 7), chunk = row / 8 + (lane >> 3 & 1);
    ptx::ldmatrix_x4_trans(r, tile + token * kMmaRows * 2 + (chunk ^ (token & 7)) * 16);
  }
}

// 8 columns from `column` x 32 tokens, as mma's B twice.
template <bool kTokenMajor>
__device__ __forceinline__ void load_columns(uint32_t (&r)[4], const char* tile, int column, int lane) {
  if constexpr (!kTokenMajor) {
    const int f = column + (lane & 7), chunk = lane >> 3;
    ptx::ldmatrix_x4(r, tile + f * kMmaBytes + ((chunk ^ (f >> 1)) & 3) * 16);
  } else {
    ptx::ldmatrix_x4_trans(r, tile + lane * kMmaColumns * 2 + (column / 8 ^ (lane & 7)) * 16);
  }
}

template <typename scalar_t, bool kTokenMajor>
__global__ void __launch_bounds__(kThreads, 1) sampled_mma_kernel(const Args p) {
  SIMT_DYN_SHARED(char, shared);
  using Place = Walk<kMmaRows, kMmaColumns, kMmaTokens>;
  SIMT_SHARED(Place, walks, [1]);
  Place& walk = walks[0];
  walk.start(p);
  while (walk.next(p.view)) {
    do {
      const auto tiles = [&] { return min(walk.end_tile - walk.tile, kMmaSegment); };
      const auto copy = [&](int tile) {
        if (tile < tiles()) {
          char* const stage = shared + tile % kMmaStages * kMmaStage;
          const int64_t t = int64_t(walk.tile + tile) * kMmaTokens;
          copy_mma_tile<kMmaRows, kTokenMajor>(stage, p.b, walk.row, p.view.rows, t, p.T);
          copy_mma_tile<kMmaColumns, kTokenMajor>(stage + kMmaColumnsAt, p.a, walk.column, p.view.columns, t, p.T);
        }
        ptx::cp_async_commit();
      };
      for (int tile = 0; tile < kMmaStages - 1; ++tile) copy(tile);

      float sums[4][6][4] = {};
      for (int tile = 0; tile < tiles(); ++tile) {
        ptx::cp_async_wait<kMmaStages - 2>();
        __syncthreads();  // this tile is there, and every warp has left the one whose place comes next
        copy(tile + kMmaStages - 1);
        const char* const stage = shared + tile % kMmaStages * kMmaStage;
        const Thread at;
        uint32_t rows[4][2][4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
#pragma unroll
          for (int k = 0; k < 2; ++k) load_rows<kTokenMajor>(rows[m][k], stage, at.warp % 2 * 64 + m * 16, k, at.lane);
        }
#pragma unroll
        for (int j = 0; j < 6; ++j) {
          uint32_t columns[4];
          load_columns<kTokenMajor>(columns, stage + kMmaColumnsAt, at.warp / 2 * 48 + j * 8, at.lane);
          const uint32_t low[2] = {columns[0], columns[1]}, high[2] = {columns[2], columns[3]};
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            float tile_sums[4] = {0, 0, 0, 0};
            ptx::mma_m16n8k16<scalar_t>(tile_sums, rows[m][0], low);
            ptx::mma_m16n8k16<scalar_t>(tile_sums, rows[m][1], high);
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[m][j][i] += tile_sums[i];
          }
        }
      }
      ptx::cp_async_wait<0>();

      // 16 rows of each of the two rows of warps at a time.
      const Thread at;
      float* const staged = reinterpret_cast<float*>(shared);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        __syncthreads();  // tiles, or the rows before, have been read
        float* const to = staged + (at.warp % 2 * 16 + at.lane / 4) * kMmaPitch + at.warp / 2 * 48 + at.lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < 6; ++j) {
          gpu::store(to + j * 8, make_float2(sums[m][j][0], sums[m][j][1]));
          gpu::store(to + 8 * kMmaPitch + j * 8, make_float2(sums[m][j][2], sums[m][j][3]));
        }
        __syncthreads();
        pick_entries(staged, kMmaPitch, kMmaStaged, [m](int s) { return s / 16 * 64 + m * 16 + s % 16; }, walk, p);
      }
    } while (walk.next_segment(kMmaSegment));
  }
}

}  // namespace frodkernels::cuda::sampled
