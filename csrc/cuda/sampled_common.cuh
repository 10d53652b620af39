// SPDX-License-Identifier: Apache-2.0
//
// What the kernels of the sampled product by way of dense blocks share: which blocks hold entries, and what becomes of
// a block's product.
//
//   partial[s, p] = sum over the tokens t of split s of a[indices[p], t] b[g, t]    for the slots p of group g
//
// Blocks. A thread block owns kRows groups, a range of columns and a split of the tokens. It walks the range from one
// block of kColumns columns that holds an entry to the next: the slots of its rows ascend in column, so the least
// column among the rows' next slots says where that is, and each row's part of the block ends where a binary search
// finds it. What lies between costs nothing, whatever its size.
//
// Sums. The block's product stays in registers for a segment of tokens; then it passes through shared memory, some
// rows at a time, and the entries are picked from there, a warp a row, up to the first slot beyond the block. Segments
// are added up in double: a chain of float sums is never longer than a segment.
#pragma once
#include "cuda/mma_common.cuh"
#include "cuda/sampled.h"
#include "cuda/scalars.cuh"

namespace frodkernels::cuda::sampled {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int32_t kNoColumn = INT32_MAX;
constexpr int kRowsAhead = 4;  // whose entries a warp asks for at once

struct Args {
  Compressed view;
  Features a, b;
  double* partial;  // [splits, stride]
  int64_t T, stride;
  int64_t range_columns;
  unsigned row_blocks;
  int32_t split_tiles;  // of tokens
};

// Which thread this is, found out anew each time: what follows from it would take the registers of the sums.
struct Thread {
  int index, lane, warp;
  __device__ __forceinline__ Thread() {
    uint32_t thread = threadIdx.x;
    recompute(thread);
    index = thread;
    lane = index % 32;
    warp = index / 32;
  }
};

// Where a thread block is, in static shared memory: registers are for sums. Thread r < kRows looks after row r. What is
// constant from one barrier to the next is read where it is needed.
template <int kRows, int kColumns, int kTokens>
struct Walk {
  static_assert(kRows % 32 == 0 && kRows <= kThreads, "whole warps look after the rows");
  int64_t row;                   // the first
  int64_t beyond;                // the range's columns
  int32_t column;                // the first of the present block; -1: there is none
  int32_t first_tile, end_tile;  // of the split's tokens
  int32_t tile;                  // the first of the present segment
  int32_t least[kRows / 32];
  int32_t begin[kRows], end[kRows];  // the rows' slots in the present block; end: once they have been picked
  int32_t last[kRows];               // where the rows end

  // All threads, before anything else.
  __device__ __forceinline__ void start(const Args& p) {
    const int64_t first_row = int64_t(blockIdx.x % p.row_blocks) * kRows;
    const int64_t first_column = int64_t(blockIdx.x / p.row_blocks) * p.range_columns;
    if (threadIdx.x == 0) {
      row = first_row;
      beyond = first_column + p.range_columns;
      first_tile = static_cast<int32_t>(blockIdx.y) * p.split_tiles;
      end_tile = static_cast<int32_t>(min((p.T + kTokens - 1) / kTokens, int64_t(first_tile) + p.split_tiles));
    }
    if (threadIdx.x < kRows) {
      const bool there = first_row + threadIdx.x < p.view.rows;
      end[threadIdx.x] = there ? p.view.indptr[first_row + threadIdx.x] : 0;
      last[threadIdx.x] = there ? p.view.indptr[first_row + threadIdx.x + 1] : 0;
    }
    if (first_column > 0) skip(p.view, first_column);
  }

  // Moves the rows to their first slots in the range. A warp looks at 32 places of a row at once, and at several rows:
  // of the memory's latency a few pass, not one for each halving of each row.
  __device__ __forceinline__ void skip(const Compressed& view, int64_t first_column) {
    constexpr int kMine = kRows / kWarps, kAtOnce = 8;
    static_assert(kMine % kAtOnce == 0, "rows are looked at eight by eight");
    const int lane = threadIdx.x % 32;
    __syncthreads();
#pragma unroll 1
    for (int r0 = threadIdx.x / 32 * kMine, r1 = r0 + kMine; r0 < r1; r0 += kAtOnce) {
      int32_t from[kAtOnce], count[kAtOnce], index[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        from[k] = end[r0 + k];
        count[k] = last[r0 + k] - from[k];
      }
      for (bool more = true; more;) {
        more = false;
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int32_t step = count[k] / 32 + (count[k] % 32 > 0), at = lane * step + step - 1;  // the last of a step
          index[k] = step > 0 && at < count[k] ? read_index(view, from[k] + at) : kNoColumn;
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int32_t step = count[k] / 32 + (count[k] % 32 > 0);
          const int32_t passed = __popc(__ballot_sync(kAllLanes, index[k] < first_column)) * step;
          from[k] += passed;
          count[k] = max(min(count[k] - passed, step - 1), 0);
          more |= count[k] > 0;
        }
      }
      __syncwarp();  // every lane has read its rows
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (lane == 0) end[r0 + k] = from[k];
      }
    }
    __syncthreads();
  }

  // Goes to the next block with an entry; false where the range has no more. All threads.
  __device__ __forceinline__ bool next(const Compressed& view) {
    if (threadIdx.x < kRows) {
      const int32_t at = end[threadIdx.x];
      const int32_t mine = __reduce_min_sync(kAllLanes, at < last[threadIdx.x] ? read_index(view, at) : kNoColumn);
      if (threadIdx.x % 32 == 0) least[threadIdx.x / 32] = mine;
    }
    __syncthreads();
    if (threadIdx.x < kRows) begin[threadIdx.x] = end[threadIdx.x];
    if (threadIdx.x == 0) {
      int32_t found = kNoColumn;
#pragma unroll
      for (int w = 0; w < kRows / 32; ++w) found = min(found, least[w]);
      tile = first_tile;
      column = found < beyond && found != kNoColumn ? found / kColumns * kColumns : -1;
    }
    __syncthreads();
    return column >= 0;
  }

  // Goes to the next segment of `tiles`; false where there is none. All threads.
  __device__ __forceinline__ bool next_segment(int tiles) {
    __syncthreads();
    if (threadIdx.x == 0) tile += tiles;
    __syncthreads();
    return tile < end_tile;
  }
};

// Picks the entries of `rows` staged rows of sums, `pitch` numbers apart. row_of: a staged row's place in the block.
template <int kRows, int kColumns, int kTokens, typename acc, typename RowOf>
__device__ __forceinline__ void pick_entries(const acc* staged, int pitch, int rows, RowOf row_of,
                                             Walk<kRows, kColumns, kTokens>& walk, const Args& p) {
  const Thread at;
#pragma unroll 1
  for (int s0 = at.warp; s0 < rows; s0 += kWarps * kRowsAhead) {
    int32_t next[kRowsAhead];
#pragma unroll
    for (int k = 0; k < kRowsAhead; ++k) {
      const int r = row_of(s0 + k * kWarps), begin = walk.begin[r];
      next[k] = at.lane < walk.last[r] - begin ? read_index(p.view, begin + at.lane) : 0;
    }
    const bool first = walk.tile == walk.first_tile;
#pragma unroll
    for (int k = 0; k < kRowsAhead; ++k) {
      const int s = s0 + k * kWarps, r = row_of(s), left = walk.last[r] - walk.begin[r];
      double* const partial = p.partial + blockIdx.y * p.stride + walk.begin[r];
      int32_t index = next[k];
      int count = 0;  // of the row's entries in the block
      for (int slot = at.lane;; slot += 32) {
        const int column = index - walk.column;
        const bool inside = slot < left && column < kColumns;
        if (inside) {
          const double sum = static_cast<double>(staged[s * pitch + column]);
          partial[slot] = first ? sum : partial[slot] + sum;
        }
        const unsigned mask = __ballot_sync(kAllLanes, inside);
        count += __popc(mask);
        if (mask != kAllLanes) break;
        if (slot + 32 < left) index = read_index(p.view, int64_t(walk.begin[r]) + slot + 32);
      }
      if (at.lane == 0) walk.end[r] = walk.begin[r] + count;
    }
  }
}

}  // namespace frodkernels::cuda::sampled
