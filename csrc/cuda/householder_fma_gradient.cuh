// SPDX-License-Identifier: Apache-2.0
//
// Gradients of the Householder map's factors with fused multiply-adds, as partial sums over fixed splits of the tokens.
//
//   partial[s, f, c] = sum over the pairs (x, q) and the tokens t of split s of x[t, f] q[t, c]
//
// Shapes   x [T, n], any row stride and alignment; q [tokens, ranks], padded with zeros by householder_pad_kernel;
//          partial [splits, n, r], all of it written
// Types    scalar_t = float | double | __half | __nv_bfloat16; sums and q are float, double for double.
// Method   A block of 8 warps owns 256 features (128, 64 with more than 32, 64 ranks), a warp 32 features x 32 ranks, a
//          lane 8 x 4. Pieces of 16 tokens of x and q pass through a ring of shared memory.
// Grid     x: features, y: splits. No atomics; the order of sums is fixed by splits and shapes.
#pragma once
#include "cuda/householder_fma.cuh"

namespace frodkernels::cuda::householder {

constexpr int kFmaPieceTokens = 16;

template <typename scalar_t>
struct FmaGradientArgs {
  Rows<const scalar_t> x[2];
  const acc_t<scalar_t>* q[2];  // [pieces * 16, groups * 32]
  acc_t<scalar_t>* partial;
  int64_t T, n;
  int pairs, r, groups, slots;
  int64_t pieces;  // of 16 tokens, in all
};

template <typename scalar_t>
__host__ __device__ constexpr int fma_gradient_features(int groups) {
  return kWarps / groups * 32;
}
template <typename scalar_t>
__host__ __device__ constexpr int fma_gradient_pitch(int groups) {
  return fma_gradient_features<scalar_t>(groups) * int(sizeof(scalar_t)) + 16;
}
template <typename scalar_t>
__host__ __device__ constexpr int fma_gradient_slot(int groups) {
  return kFmaPieceTokens * (fma_gradient_pitch<scalar_t>(groups) + groups * kGroupRanks * int(sizeof(acc_t<scalar_t>)));
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) householder_gradient_fma_kernel(const FmaGradientArgs<scalar_t> a) {
  using acc = acc_t<scalar_t>;
  constexpr int kV = kVec<scalar_t>;
  SIMT_DYN_SHARED(char, ring);
  const int ranks = a.groups * kGroupRanks, features = fma_gradient_features<scalar_t>(a.groups);
  const int pitch = fma_gradient_pitch<scalar_t>(a.groups), slot_bytes = fma_gradient_slot<scalar_t>(a.groups);
  const int log_vectors = 31 - __clz(features / kV);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = warp % a.groups, rank = group * kGroupRanks + lane % 8 * 4;
  const int feature = warp / a.groups * 32 + lane / 8 * 8;
  const int64_t f0 = int64_t(blockIdx.x) * features;
  const int64_t first = a.pieces * blockIdx.y / gridDim.y, each = a.pieces * (blockIdx.y + 1) / gridDim.y - first;
  const int64_t steps = each * a.pairs;

  const auto copy = [&](int64_t step) {
    if (step < steps) {
      const bool one = step < each;
      const int64_t t = (first + (one ? step : step - each)) * kFmaPieceTokens;
      char* const slot = ring + step % a.slots * slot_bytes;
      copy_piece<scalar_t>(slot, pitch, kFmaPieceTokens, log_vectors, either(one, a.x[0], a.x[1]), t, a.T, f0, a.n);
      copy_bytes(slot + kFmaPieceTokens * pitch, reinterpret_cast<const char*>((one ? a.q[0] : a.q[1]) + t * ranks),
                 kFmaPieceTokens * ranks * static_cast<int>(sizeof(acc)));
    }
    ptx::cp_async_commit();
  };
  for (int64_t step = 0; step < a.slots - 1; ++step) copy(step);

  acc sums[8][4] = {};
  for (int64_t step = 0; step < steps; ++step) {
    wait_for_piece(a.slots);
    __syncthreads();
    copy(step + a.slots - 1);
    const char* const slot = ring + step % a.slots * slot_bytes;
    const acc* const q = reinterpret_cast<const acc*>(slot + kFmaPieceTokens * pitch) + rank;
#pragma unroll 4
    for (int t = 0; t < kFmaPieceTokens; ++t) {
      acc c[4];
      load_four(c, q + t * ranks);
#pragma unroll
      for (int i = 0; i < 8; i += kV) {
        acc x[kV];
        unpack<scalar_t>(gpu::load<uint4>(slot + t * pitch + (feature + i) * static_cast<int>(sizeof(scalar_t))), x);
#pragma unroll
        for (int k = 0; k < kV; ++k) {
#pragma unroll
          for (int w = 0; w < 4; ++w) sums[i + k][w] += x[k] * c[w];
        }
      }
    }
  }
  ptx::cp_async_wait<0>();

  acc* const partial = a.partial + int64_t(blockIdx.y) * a.n * a.r;
  const int live = rank < a.r ? min(a.r - rank, 4) : 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t f = f0 + feature + i;
    if (f < a.n) store_features<acc>(partial + f * a.r + rank, sums[i], live, a.r % 4 == 0);
  }
}

}  // namespace frodkernels::cuda::householder
