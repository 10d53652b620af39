// SPDX-License-Identifier: Apache-2.0
//
// Product of the sparse core with fused multiply-adds.
//
//   out[i, t] = lam[i] in[i, t] + sum over p in row i of values[perm[p]] in[indices[p], t]
//
// Shapes   in [columns, T], out [rows, T]: tokens contiguous, any row stride   lam [rows] or none   values [nnz] in COO
//          order   the view: csrc/cuda/sparse_core.h; indices ascend within a row
// Types    scalar_t = float | double | __half | __nv_bfloat16; sums are float, double for double, rounded once. lam and
//          values have dtypes of their own.
// Kernels  pack_entries_kernel   (column, value) pairs in slot order: one 8-byte load an entry (16 for double)
//          product_tiles_kernel  many tokens. Tiles of 128 bytes of tokens; features in shared memory; sums in
//          registers.
//                                grid: row blocks x tiles, row blocks first, so that those of one tile share it in L2.
//                                `in` is read once per row block. Terms of a sum: lam, then entries ascending.
//          product_rows_kernel   few tokens, or few entries. A warp owns a row; its lanes are 2^k tokens (or 16-byte
//                                vectors of tokens) x 32 / 2^k entries. Partial sums meet in a fixed butterfly.
//                                grid: x rows, y tokens.
// Order    fixed by shapes; no atomics: two runs give the same bits. Only stored entries are multiplied.
// Needs    nnz < 2^31, columns < 2^31; fewer than 2^31 thread blocks (rows * T below 2^44 at least).
#pragma once
#include "cuda/sparse_core_fma_common.cuh"

namespace frodkernels::cuda {

constexpr int kProductThreads = 512;  // at most: 128 registers a thread
constexpr int kRowsThreads = 256;
constexpr int kPackThreads = 256;

// 64 registers of sums a thread.
template <typename scalar_t>
constexpr int kProductSlots = sizeof(scalar_t) == 2 ? 8 : 16;

template <typename acc>
struct Entry {
  std::conditional_t<sizeof(acc) == 8, int64_t, int32_t> column;
  acc value;
};

template <typename acc>
using EntryBits = std::conditional_t<sizeof(acc) == 8, uint4, uint2>;

// Bytes between the entries staged by neighbouring groups: two pairs of groups half a row of banks apart.
template <typename acc>
__device__ __forceinline__ int stage_offset(int group) {
  constexpr int kBytes = kGroup * static_cast<int>(sizeof(Entry<acc>));
  return group * kBytes + (sizeof(acc) == 4 ? (group >> 1) * 32 : 0);
}
template <typename acc>
constexpr int kStageBytes = 32 * static_cast<int>(sizeof(Entry<acc>)) + 32;  // of a warp

template <typename acc>
__global__ void __launch_bounds__(kPackThreads)
    pack_entries_kernel(Compressed view, Vector values, Entry<acc>* __restrict__ entries) {
  const int64_t step = int64_t(gridDim.x) * kPackThreads;
  for (int64_t p = int64_t(blockIdx.x) * kPackThreads + threadIdx.x; p < view.nnz; p += step) {
    Entry<acc> entry;
    entry.column = read_index(view, p);
    entry.value = read_scalar<acc>(values, view.perm[p]);
    gpu::store(entries + p, same_bits<EntryBits<acc>>(entry));
  }
}

template <typename scalar_t>
struct ProductTiles {
  Compressed view;
  const Entry<acc_t<scalar_t>>* entries;  // [nnz], aligned to 32 bytes
  Vector lam;
  Rows<const scalar_t> in;
  Rows<scalar_t> out;
  int64_t T;
  unsigned row_blocks;
  int features;  // of a buffer
};

template <typename scalar_t>
__global__ void __launch_bounds__(kProductThreads) product_tiles_kernel(ProductTiles<scalar_t> a) {
  using acc = acc_t<scalar_t>;
  constexpr int kSlots = kProductSlots<scalar_t>, kSector = 32 / static_cast<int>(sizeof(Entry<acc>));
  SIMT_DYN_SHARED(char, shared);
  const int lane = threadIdx.x % kGroup, group = threadIdx.x % 32 / kGroup, warp = threadIdx.x / 32;
  const int64_t tile = blockIdx.x / a.row_blocks;
  const int64_t first_row = int64_t(blockIdx.x % a.row_blocks) * (blockDim.x / kGroup * kSlots);
  const int64_t row0 = first_row + warp * (kGroups * kSlots) + group;  // and kGroups on for each slot
  const int64_t t0 = tile * kTileTokens<scalar_t>, t = t0 + lane * kVec<scalar_t>;
  const int live = live_tokens<scalar_t>(a.T, t);
  const unsigned columns = static_cast<unsigned>(a.view.columns), step = static_cast<unsigned>(a.features);
  const int buffer_bytes = a.features * kFeatureTile;
  char* const stage = shared + 2 * buffer_bytes + warp * kStageBytes<acc> + stage_offset<acc>(group);

  copy_features(shared, a.in, 0, static_cast<int>(least(step, columns)), t0, a.T);
  ptx::cp_async_commit();

  Cursors<kSlots> cursors;
  cursors.start(a.view, row0);
  acc sum[kSlots][kVec<scalar_t>];
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const int64_t row = row0 + s * kGroups;
    const bool diagonal = a.lam.data != nullptr && row < a.view.rows;
    const acc factor = diagonal ? read_scalar<acc>(a.lam, row) : acc(0);
    const uint4 raw =
        load_tokens(a.in.data + (diagonal ? row * a.in.stride + t : 0), diagonal ? live : 0, a.in.aligned);
    unpack<scalar_t>(raw, sum[s]);
#pragma unroll
    for (int v = 0; v < kVec<scalar_t>; ++v) sum[s][v] = diagonal ? sum[s][v] * factor : acc(0);
  }

  // The window of a slot: kGroup entries from the start of the cursor's sector, one a lane. Fetched one slot ahead.
  const int32_t last = static_cast<int32_t>(a.view.nnz) - 1;
  const auto fetch = [&](int32_t at) {
    const int32_t p = least((at & ~(kSector - 1)) + lane, last);
    return same_bits<Entry<acc>>(gpu::load<EntryBits<acc>>(a.entries + p));
  };
  Entry<acc> ahead = fetch(cursors.begin_of(0));

  int buffer = 0;
  for (unsigned f0 = 0; f0 < columns; f0 += step, buffer ^= 1) {
    ptx::cp_async_wait<0>();
    __syncthreads();                // this buffer is filled, and every warp has left the other
    const unsigned f1 = f0 + step;  // no overflow: columns < 2^31
    if (f1 < columns) {
      const int count = static_cast<int>(least(step, columns - f1));
      copy_features(shared + (buffer ^ 1) * buffer_bytes, a.in, f1, count, t0, a.T);
      ptx::cp_async_commit();
    }
    const char* const features = shared + buffer * buffer_bytes + lane * 16;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      int32_t at = cursors.begin_of(s);
      const int32_t end = cursors.end_of(s);
      Entry<acc> entry = ahead;
      ahead = fetch(cursors.begin_of((s + 1) % kSlots));
      for (;;) {
        const int32_t p = (at & ~(kSector - 1)) + lane;
        const bool inside = p >= at && p < end && static_cast<unsigned>(entry.column) < f1;
        const unsigned mask = __ballot_sync(kAllLanes, inside) >> (group * kGroup) & (1u << kGroup) - 1;
        if (inside) {
          entry.column = (static_cast<int32_t>(entry.column) - static_cast<int32_t>(f0)) * kFeatureTile;
          gpu::store(stage + (p - at) * static_cast<int>(sizeof(entry)), same_bits<EntryBits<acc>>(entry));
        }
        __syncwarp();
        const int count = __popc(mask);
#pragma unroll 2  // gathers in flight: with 16 warps more than shared memory can serve
        for (int k = 0; k < count; ++k) {
          const auto staged =
              same_bits<Entry<acc>>(gpu::load<EntryBits<acc>>(stage + k * static_cast<int>(sizeof(entry))));
          acc x[kVec<scalar_t>];
          unpack<scalar_t>(gpu::load<uint4>(features + staged.column), x);
#pragma unroll
          for (int v = 0; v < kVec<scalar_t>; ++v) sum[s][v] += staged.value * x[v];
        }
        __syncwarp();  // before the stage is written again
        at += count;
        // Only a window that is inside to its last lane may be followed by more of this block.
        if (!__any_sync(kAllLanes, mask >> (kGroup - 1))) break;
        entry = fetch(at);
      }
      cursors.move(s, at);
    }
  }
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const int64_t row = row0 + s * kGroups;
    if (row < a.view.rows && live > 0) store_tokens(a.out.data + row * a.out.stride + t, sum[s], live, a.out.aligned);
  }
}

template <typename scalar_t>
struct ProductRows {
  Compressed view;
  Vector values, lam;
  Rows<const scalar_t> in;
  Rows<scalar_t> out;
  int64_t T;
  int log_lanes;  // lanes of one entry
};

// kTokens tokens a lane: 1, or kVec where rows are aligned and T is a multiple of it.
template <typename scalar_t, int kTokens>
__global__ void __launch_bounds__(kRowsThreads, 1) product_rows_kernel(ProductRows<scalar_t> a) {
  using acc = acc_t<scalar_t>;
  const int64_t row = int64_t(blockIdx.x) * (kRowsThreads / 32) + threadIdx.x / 32;
  if (row >= a.view.rows) return;
  const int lane = threadIdx.x % 32, token = lane & ((1 << a.log_lanes) - 1), group = lane >> a.log_lanes;
  const int groups = 32 >> a.log_lanes;
  const int64_t begin = a.view.indptr[row], end = a.view.indptr[row + 1];
  const auto add = [](acc(&sum)[kTokens], const scalar_t* from, acc factor) {
    acc x[kTokens];
    if constexpr (kTokens == 1) {
      x[0] = widen(*from);
    } else {
      unpack<scalar_t>(gpu::load<uint4>(from), x);
    }
#pragma unroll
    for (int v = 0; v < kTokens; ++v) sum[v] += factor * x[v];
  };
  const int64_t step = (int64_t(gridDim.y) << a.log_lanes) * kTokens;
  for (int64_t t0 = (int64_t(blockIdx.y) << a.log_lanes) * kTokens; t0 < a.T; t0 += step) {
    const int64_t t = t0 + token * kTokens;
    const bool live = t < a.T;
    acc sum[kTokens] = {};
    if (a.lam.data != nullptr && group == 0 && live) {
      add(sum, a.in.data + row * a.in.stride + t, read_scalar<acc>(a.lam, row));
    }
    for (int64_t p0 = begin; p0 < end; p0 += 32) {
      const int64_t p = least<int64_t>(p0 + lane, end - 1);
      const int32_t column = read_index(a.view, p);
      const acc value = read_scalar<acc>(a.values, a.view.perm[p]);
      const int count = static_cast<int>(least<int64_t>(32, end - p0));
#pragma unroll 4
      for (int k = 0; k < count; k += groups) {
        const int e = k + group;
        const int64_t j = __shfl_sync(kAllLanes, column, e % 32);
        const acc factor = __shfl_sync(kAllLanes, value, e % 32);
        if (live && e < count) add(sum, a.in.data + j * a.in.stride + t, factor);
      }
    }
    for (int lanes = 1 << a.log_lanes; lanes < 32; lanes <<= 1) {
#pragma unroll
      for (int v = 0; v < kTokens; ++v) sum[v] += __shfl_xor_sync(kAllLanes, sum[v], lanes);
    }
    if (group == 0 && live) {
      scalar_t* to = a.out.data + row * a.out.stride + t;
      if constexpr (kTokens == 1) {
        *to = rounded<scalar_t>(sum[0]);
      } else {
        gpu::store(to, pack<scalar_t>(sum));
      }
    }
  }
}

}  // namespace frodkernels::cuda
