// SPDX-License-Identifier: Apache-2.0
//
// Gradients of the sparse core's parameters with fused multiply-adds, as partial sums over fixed splits of the tokens.
//
//   partial[s, p] = sum over tokens t of split s of u[indices[p], t] z[i, t]      p in row i
//   partial[s, nnz + i] = likewise of u[i, t] z[i, t]                             where dlam is wanted
//
// Shapes   u [columns, T], z [rows, T]: tokens contiguous, any row stride   partial [splits, stride]: all splits are
//          written, and everything in them that is wanted
// Types    scalar_t = float | double | __half | __nv_bfloat16; sums are float, double for double.
// Kernels  gradient_tiles_kernel  many tokens. z's rows stay in registers for a tile of 128 bytes of tokens, features
// of
//                                 u pass through shared memory; 8 lanes share a dot product, 8 of which are summed over
//                                 the lanes at once. Sums go on from tile to tile in `partial`, each by one thread.
//                                 grid: row blocks x splits, row blocks first.
//          gradient_rows_kernel   few tokens, or few entries. A warp owns a row, its lanes are 2^k (vectors of) tokens
//          x
//                                 32 / 2^k entries. grid: x rows, y splits.
// Order    fixed by the splits; no atomics: two runs give the same bits. Only stored entries are multiplied.
// Needs    nnz < 2^31, columns < 2^31; fewer than 2^31 thread blocks.
#pragma once
#include "cuda/sparse_core_fma_common.cuh"

namespace frodkernels::cuda {

constexpr int kGradientThreads = 512;  // at most: 128 registers a thread
constexpr int kGradientRowsThreads = 256;
constexpr int kGradientStage = 32 * 4;  // bytes of a warp

// Rows of z a group holds, 4 registers each. Half as many where they are unpacked to twice the registers.
template <typename scalar_t>
constexpr int kGradientSlots = sizeof(scalar_t) == 4 ? 16 : 8;

template <typename scalar_t>
struct GradientArgs {
  Compressed view;
  Rows<const scalar_t> u, z;
  acc_t<scalar_t>* partial;
  int64_t T, stride;
  int64_t split_tokens;
  bool values, diagonal;  // what is wanted
  // gradient_tiles_kernel
  unsigned row_blocks;
  int features;
  // gradient_rows_kernel
  int log_lanes;
};

// Lane l of a group gets the sum over the group's lanes of x[l].
template <typename acc>
__device__ __forceinline__ acc sum_transposed(acc (&x)[kGroup]) {
  const int lane = threadIdx.x % kGroup;
#pragma unroll
  for (int half = kGroup / 2; half > 0; half /= 2) {
    const bool upper = lane & half;
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const acc keep = upper ? x[k + half] : x[k], give = upper ? x[k] : x[k + half];
      x[k] = keep + __shfl_xor_sync(kAllLanes, give, half);
    }
  }
  return x[0];
}

template <typename scalar_t>
__device__ __forceinline__ acc_t<scalar_t> dot(uint4 a, uint4 b) {
  acc_t<scalar_t> x[kVec<scalar_t>], y[kVec<scalar_t>], sum = 0;
  unpack<scalar_t>(a, x);
  unpack<scalar_t>(b, y);
#pragma unroll
  for (int v = 0; v < kVec<scalar_t>; ++v) sum += x[v] * y[v];
  return sum;
}

template <typename scalar_t>
__global__ void __launch_bounds__(kGradientThreads) gradient_tiles_kernel(GradientArgs<scalar_t> a) {
  using acc = acc_t<scalar_t>;
  constexpr int kSlots = kGradientSlots<scalar_t>;
  SIMT_DYN_SHARED(char, shared);
  const int lane = threadIdx.x % kGroup, group = threadIdx.x % 32 / kGroup, warp = threadIdx.x / 32;
  const int64_t split = blockIdx.x / a.row_blocks;
  const int64_t first_row = int64_t(blockIdx.x % a.row_blocks) * (blockDim.x / kGroup * kSlots);
  const int64_t row0 = first_row + warp * (kGroups * kSlots) + group;  // and kGroups on for each slot
  const int64_t begin = split * a.split_tokens, end = least(a.T, begin + a.split_tokens);
  const unsigned columns = static_cast<unsigned>(a.view.columns), step = static_cast<unsigned>(a.features);
  const int buffer_bytes = a.features * kFeatureTile;
  char* const stage = shared + 2 * buffer_bytes + warp * kGradientStage + group * (kGroup * 4);
  acc* const partial = a.partial + split * a.stride;
  const int last = static_cast<int>(a.view.nnz) - 1;
  // The window of a slot: kGroup indices from a multiple of kGroup on, one a lane. Fetched one slot ahead.
  const auto fetch = [&](int32_t at) { return read_index(a.view, least((at & ~(kGroup - 1)) + lane, last)); };
  const auto copy = [&](int buffer, unsigned f0, int64_t t0) {
    const int count = static_cast<int>(least(step, columns - f0));
    copy_features(shared + buffer * buffer_bytes, a.u, f0, count, t0, end);
    ptx::cp_async_commit();
  };

  acc diagonal[kSlots / kGroup] = {};
  if (a.values) copy(0, 0, begin);
  int buffer = 0;
  for (int64_t t0 = begin; t0 < end; t0 += kTileTokens<scalar_t>) {
    const int64_t t = t0 + lane * kVec<scalar_t>;
    const int live = live_tokens<scalar_t>(end, t);
    uint4 z[kSlots];
#pragma unroll
    for (int k = 0; k < kSlots / kGroup; ++k) {
      acc x[kGroup];
#pragma unroll
      for (int s = 0; s < kGroup; ++s) {
        const int64_t row = row0 + (k * kGroup + s) * kGroups;
        const int there = row < a.view.rows ? live : 0;
        const int64_t offset = there > 0 ? t : 0, at = there > 0 ? row : 0;
        z[k * kGroup + s] = load_tokens(a.z.data + at * a.z.stride + offset, there, a.z.aligned);
        x[s] = 0;
        if (a.diagonal) {
          x[s] = dot<scalar_t>(load_tokens(a.u.data + at * a.u.stride + offset, there, a.u.aligned), z[k * kGroup + s]);
        }
      }
      diagonal[k] += sum_transposed(x);
    }
    if (!a.values) continue;
    Cursors<kSlots> cursors;
    cursors.start(a.view, row0);
    int32_t ahead = fetch(cursors.begin_of(0));
    for (unsigned f0 = 0; f0 < columns; f0 += step, buffer ^= 1) {
      ptx::cp_async_wait<0>();
      __syncthreads();                // this buffer is filled, and every warp has left the other
      const unsigned f1 = f0 + step;  // no overflow: columns < 2^31
      if (f1 < columns) {
        copy(buffer ^ 1, f1, t0);
      } else if (t0 + kTileTokens<scalar_t> < end) {
        copy(buffer ^ 1, 0, t0 + kTileTokens<scalar_t>);
      }
      const char* const features = shared + buffer * buffer_bytes + lane * 16;
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        int32_t at = cursors.begin_of(s);
        const int32_t row_end = cursors.end_of(s);
        int32_t column = ahead;
        ahead = fetch(cursors.begin_of((s + 1) % kSlots));
        for (;;) {
          const int32_t p = (at & ~(kGroup - 1)) + lane;
          const bool inside = p >= at && p < row_end && static_cast<unsigned>(column) < f1;
          const unsigned mask = __ballot_sync(kAllLanes, inside) >> (group * kGroup) & (1u << kGroup) - 1;
          const int count = __popc(mask);
          if (inside) {
            gpu::store(stage + (p - at) * 4, (column - static_cast<int32_t>(f0)) * kFeatureTile);
          }
          // Sums so far, asked for before they are needed. The first tile of a split has none.
          acc so_far = 0;
          if (lane < count && t0 > begin) so_far = partial[at + lane];
          __syncwarp();
          acc x[kGroup];
#pragma unroll
          for (int k = 0; k < kGroup; ++k) {
            x[k] = 0;
            if (k < count) {
              x[k] = dot<scalar_t>(gpu::load<uint4>(features + gpu::load<int32_t>(stage + k * 4)), z[s]);
            }
          }
          __syncwarp();  // before the stage is written again
          const acc sum = sum_transposed(x);
          if (lane < count) partial[at + lane] = so_far + sum;
          at += count;
          // Only a window that is inside to its last lane may be followed by more of this block.
          if (!__any_sync(kAllLanes, mask >> (kGroup - 1))) break;
          column = fetch(at);
        }
        cursors.move(s, at);
      }
    }
  }
  if (a.diagonal) {
#pragma unroll
    for (int k = 0; k < kSlots / kGroup; ++k) {
      const int64_t row = row0 + (k * kGroup + lane) * kGroups;
      if (row < a.view.rows) partial[a.view.nnz + row] = diagonal[k];
    }
  }
}

// kTokens tokens a lane: 1, or kVec where rows are aligned and splits are multiples of it.
template <typename scalar_t, int kTokens>
__global__ void __launch_bounds__(kGradientRowsThreads, 1) gradient_rows_kernel(GradientArgs<scalar_t> a) {
  using acc = acc_t<scalar_t>;
  const int64_t row = int64_t(blockIdx.x) * (kGradientRowsThreads / 32) + threadIdx.x / 32;
  if (row >= a.view.rows) return;
  const int lane = threadIdx.x % 32, lanes = 1 << a.log_lanes, groups = 32 >> a.log_lanes;
  const int group = lane >> a.log_lanes, token = (lane & (lanes - 1)) * kTokens;
  const int64_t split = blockIdx.y, begin = split * a.split_tokens, end = least(a.T, begin + a.split_tokens);
  acc* const partial = a.partial + split * a.stride;
  const scalar_t* const z = a.z.data + row * a.z.stride;
  // Over tokens first, first + step, ... of the split.
  const auto products = [&](const scalar_t* u, int64_t first, int step) {
    acc sum = 0;
#pragma unroll 2
    for (int64_t t = first; t < end; t += step) {
      if constexpr (kTokens == 1) {
        sum += static_cast<acc>(widen(u[t])) * static_cast<acc>(widen(z[t]));
      } else {
        sum += dot<scalar_t>(gpu::load<uint4>(u + t), gpu::load<uint4>(z + t));
      }
    }
    return sum;
  };
  if (a.diagonal) {
    acc sum = products(a.u.data + row * a.u.stride, begin + lane * kTokens, 32 * kTokens);
#pragma unroll
    for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(kAllLanes, sum, other);
    if (lane == 0) partial[a.view.nnz + row] = sum;
  }
  if (!a.values) return;
  const int64_t first = a.view.indptr[row], last = a.view.indptr[row + 1];
  for (int64_t p0 = first; p0 < last; p0 += 32) {
    const int32_t column = read_index(a.view, least<int64_t>(p0 + lane, last - 1));
    const int count = static_cast<int>(least<int64_t>(32, last - p0));
    acc mine = 0;  // of entry p0 + lane
    for (int k = 0; k < count; k += groups) {
      const int64_t j = __shfl_sync(kAllLanes, column, (k + group) % 32);
      acc sum = k + group < count ? products(a.u.data + j * a.u.stride, begin + token, lanes * kTokens) : acc(0);
      for (int other = lanes / 2; other > 0; other /= 2) sum += __shfl_xor_sync(kAllLanes, sum, other);
      const acc got = __shfl_sync(kAllLanes, sum, lane % groups << a.log_lanes);
      if (lane - lane % groups == k) mine = got;
    }
    if (lane < count) partial[p0 + lane] = mine;
  }
}

}  // namespace frodkernels::cuda
