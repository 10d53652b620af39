// SPDX-License-Identifier: Apache-2.0
//
// The Householder map with fused multiply-adds, and the operands that its kernels read.
//
//   coefficients = x left;   out = base - coefficients right^T
//
// Shapes   x [T, n], base and out [T, m], any row stride and alignment; left [n, ranks] and right^T [ranks, m rounded
//          up], both padded with zeros by householder_pad_kernel; coefficients [T, r]
// Types    scalar_t = float | double | __half | __nv_bfloat16; sums and factors are float, double for double.
// Method   A block of 8 warps owns 32 tokens. A warp sums 32 ranks over every eighth (fourth, second) 16-byte vector of
//          features: a lane 8 tokens x 4 ranks. The warps' sums are added in order. In pass two a lane sums
//          tokens x 4 features over the ranks, and subtracts them from the chunk in shared memory on its way out.
// Grid     x: tiles of 32 tokens. No atomics; the order of sums is fixed by the shapes.
// Needs    1 <= r <= 128, n >= 1, at least two slots of the ring.
#pragma once
#include "cuda/householder_common.cuh"

namespace frodkernels::cuda::householder {

constexpr int kFmaTokens = 32;
constexpr int kFmaLogVectors = 5, kFmaVectors = 1 << kFmaLogVectors;  // 16-byte vectors of a chunk's row
constexpr int kFmaPitch = kFmaVectors * 16 + 16;  // bytes; the odd vector keeps rows out of each other's banks
constexpr int kFmaSlot = kFmaTokens * kFmaPitch;  // bytes of a chunk
constexpr int kPadThreads = 256;

template <typename scalar_t>
constexpr int kFmaFeatures = kFmaVectors * kVec<scalar_t>;  // of a chunk

// to[i, j] = from[i * row_step + j * column_step] for i < rows, j < columns, zero elsewhere.
struct Pad {
  const void* from;
  void* to;
  int64_t row_step, column_step, rows, columns, count, width;  // `count` numbers in rows of `width`
};

template <typename acc>
__device__ __forceinline__ void pad_one(const Pad& p, int64_t e) {
  const int64_t i = e / p.width, j = e - i * p.width;
  const bool there = i < p.rows && j < p.columns;
  static_cast<acc*>(p.to)[e] = there ? static_cast<const acc*>(p.from)[i * p.row_step + j * p.column_step] : acc(0);
}

template <typename acc>
__global__ void __launch_bounds__(kPadThreads) householder_pad_kernel(const Pad first, const Pad second) {
  const int64_t e = int64_t(blockIdx.x) * kPadThreads + threadIdx.x;
  if (e < first.count) {
    pad_one<acc>(first, e);
  } else if (e - first.count < second.count) {
    pad_one<acc>(second, e - first.count);
  }
}

// Four numbers of a lane, in 16-byte accesses of `acc`.
template <typename acc>
__device__ __forceinline__ void load_four(acc (&to)[4], const acc* from) {
  acc part[kVec<acc>];
#pragma unroll
  for (int i = 0; i < 4; i += kVec<acc>) {
    unpack<acc>(gpu::load<uint4>(from + i), part);
#pragma unroll
    for (int k = 0; k < kVec<acc>; ++k) to[i + k] = part[k];
  }
}
template <typename acc>
__device__ __forceinline__ void store_four(acc* to, const acc (&from)[4]) {
  acc part[kVec<acc>];
#pragma unroll
  for (int i = 0; i < 4; i += kVec<acc>) {
#pragma unroll
    for (int k = 0; k < kVec<acc>; ++k) part[k] = from[i + k];
    gpu::store(to + i, pack<acc>(part));
  }
}

// Four features of storage, widened; and rounded, to memory that is aligned for them if `whole`.
template <typename scalar_t>
__device__ __forceinline__ void load_features(acc_t<scalar_t> (&x)[4], const scalar_t* from) {
  if constexpr (sizeof(scalar_t) > 2) {
    load_four(x, from);
  } else {
    const uint2 raw = gpu::load<uint2>(from);
    acc_t<scalar_t> eight[8];
    unpack<scalar_t>(make_uint4(raw.x, raw.y, 0, 0), eight);
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = eight[k];
  }
}
template <typename scalar_t>
__device__ __forceinline__ void store_features(scalar_t* to, const acc_t<scalar_t> (&x)[4], int live, bool aligned) {
  if (aligned && live >= 4) {
    if constexpr (sizeof(scalar_t) > 2) {
      store_four(to, x);
    } else {
      const acc_t<scalar_t> eight[8] = {x[0], x[1], x[2], x[3], 0, 0, 0, 0};
      const uint4 raw = pack<scalar_t>(eight);
      gpu::store(to, make_uint2(raw.x, raw.y));
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (k < live) to[k] = rounded<scalar_t>(x[k]);
  }
}

template <typename scalar_t>
struct FmaArgs {
  Rows<const scalar_t> x, base;
  Rows<scalar_t> out;
  const acc_t<scalar_t>* left;   // [chunks of n, groups * 32]
  const acc_t<scalar_t>* right;  // [groups * 32, chunks of m]
  acc_t<scalar_t>* coefficients;
  int64_t T, n, m;
  int r, groups;  // groups of 32 ranks: 1, 2 or 4
  Steps steps;
};

// Bytes of shared memory beside the ring: coefficients with rows that start in different banks, and the warps' sums.
template <typename acc>
constexpr int kFmaExchange = kWarps * 4 * kGroupRanks * int(sizeof(acc));
template <typename acc>
constexpr int fma_coefficient_bytes(int groups) {
  return kFmaTokens * (groups * kGroupRanks + kVec<acc>)*int(sizeof(acc));
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) householder_fma_kernel(const FmaArgs<scalar_t> a) {
  using acc = acc_t<scalar_t>;
  constexpr int kV = kVec<scalar_t>, kFeatures = kFmaFeatures<scalar_t>;
  SIMT_DYN_SHARED(char, shared);
  const int ranks = a.groups * kGroupRanks, pitch = ranks + kVec<acc>;
  acc* const coefficients = reinterpret_cast<acc*>(shared);  // [tokens, pitch]
  acc* const exchange = coefficients + kFmaTokens * pitch;   // [warps, 4 tokens, 32 ranks]
  char* const ring = reinterpret_cast<char*>(exchange + kWarps * 4 * kGroupRanks);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int token = lane / 8, four = lane % 8 * 4;  // a lane's tokens are `token` and each fourth after it
  const int group = warp % a.groups, slice = warp / a.groups, slices = kWarps / a.groups;
  const int64_t t0 = int64_t(blockIdx.x) * kFmaTokens;

  const auto copy = [&](int step) {
    if (a.steps.absent(step)) {
      const bool one = step < a.steps.first;
      copy_piece<scalar_t>(ring + a.steps.slot(step) * kFmaSlot, kFmaPitch, kFmaTokens, kFmaLogVectors,
                           either(one, a.x, a.base), t0, a.T, int64_t(a.steps.chunk(step)) * kFeatures,
                           one ? a.n : a.m);
    }
    ptx::cp_async_commit();
  };
  // Step `step` may begin: its chunk has landed, and the slot of the step before is free for another.
  const auto begin = [&](int step) {
    wait_for_piece(a.steps.slots);
    __syncthreads();
    copy(step + a.steps.slots - 1);
  };
  for (int step = 0; step < a.steps.slots - 1; ++step) copy(step);

  acc sums[8][4] = {};
  for (int step = 0; step < a.steps.first; ++step) {
    begin(step);
    const char* const chunk = ring + a.steps.slot(step) * kFmaSlot;
    const acc* const left = a.left + int64_t(step) * kFeatures * ranks + group * kGroupRanks + four;
    acc part[8][4] = {};  // of the chunk: short chains of sums round less
    for (int v = slice; v < kFmaVectors; v += slices) {
      acc factor[kV][4];
#pragma unroll
      for (int k = 0; k < kV; ++k) load_four(factor[k], left + (v * kV + k) * ranks);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        acc x[kV];
        unpack<scalar_t>(gpu::load<uint4>(chunk + (i * 4 + token) * kFmaPitch + v * 16), x);
#pragma unroll
        for (int k = 0; k < kV; ++k) {
#pragma unroll
          for (int c = 0; c < 4; ++c) part[i][c] += x[k] * factor[k][c];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[i][c] += part[i][c];
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    store_four(exchange + (warp * 4 + token) * kGroupRanks + four, sums[i]);
    __syncthreads();
    for (int e = threadIdx.x; e < 4 * ranks; e += kThreads) {
      const int row = e / ranks, c = e - row * ranks, t = i * 4 + row;
      acc sum = 0;
      for (int s = 0; s < slices; ++s) {
        sum += exchange[((s * a.groups + c / kGroupRanks) * 4 + row) * kGroupRanks + c % kGroupRanks];
      }
      coefficients[t * pitch + c] = c < a.r ? sum : acc(0);
      if (c < a.r && t0 + t < a.T) a.coefficients[(t0 + t) * a.r + c] = sum;
    }
    __syncthreads();
  }

  // Pass two: a warp takes 32 features of a chunk, and all tokens or a part of them.
  constexpr int kColumns = kFeatures / 32, kEach = kColumns;  // warps side by side; tokens of a lane
  const int f = warp % kColumns * 32 + four, t_first = warp / kColumns * kEach * 4 + token;
  const int64_t width = int64_t(a.steps.second) * kFeatures;
  for (int step = a.steps.first; step < a.steps.all(); ++step) {
    begin(step);
    const int64_t column = int64_t(a.steps.chunk(step)) * kFeatures + f;
    acc back[kEach][4] = {};
    for (int k = 0; k < ranks; k += kVec<acc>) {
      if (k >= a.r) break;
      acc factor[kVec<acc>][4];
#pragma unroll
      for (int j = 0; j < kVec<acc>; ++j) load_four(factor[j], a.right + (k + j) * width + column);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        acc c[kVec<acc>];
        unpack<acc>(gpu::load<uint4>(coefficients + (t_first + i * 4) * pitch + k), c);
#pragma unroll
        for (int j = 0; j < kVec<acc>; ++j) {
#pragma unroll
          for (int w = 0; w < 4; ++w) back[i][w] += c[j] * factor[j][w];
        }
      }
    }
    const char* const chunk = ring + a.steps.slot(step) * kFmaSlot;
    const int live = column < a.m ? static_cast<int>(min(a.m - column, int64_t(4))) : 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int t = t_first + i * 4;
      if (t0 + t >= a.T || live == 0) continue;
      acc x[4];
      load_features<scalar_t>(x, reinterpret_cast<const scalar_t*>(chunk + t * kFmaPitch) + f);
#pragma unroll
      for (int w = 0; w < 4; ++w) x[w] -= back[i][w];
      store_features<scalar_t>(a.out.data + (t0 + t) * a.out.stride + column, x, live, a.out.aligned);
    }
  }
  ptx::cp_async_wait<0>();
}

}  // namespace frodkernels::cuda::householder
