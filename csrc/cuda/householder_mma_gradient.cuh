// SPDX-License-Identifier: Apache-2.0
//
// Gradients of the Householder map's factors on tensor cores, as partial sums over fixed splits of the tokens.
//
//   partial[s, f, c] = sum over the pairs (x, q) and the tokens t of split s of x[t, f] q[t, c]
//
// Shapes   x [T, n], rows that start on 16 bytes; q packed (householder_mma_pack.cuh) by (16 tokens, 16 ranks);
//          partial [splits, n, r], all of it written
// Types    scalar_t = __half | __nv_bfloat16; q comes in parts of 16 bits that together are float. Sums are float,
// those
//          of 16 tokens on the tensor cores, as in householder_mma.cuh.
// Method   A block of 8 warps owns 256 features (128 with more than 64 ranks), a warp 32 features x 64 ranks. Pieces of
//          32 tokens of x and q pass through a ring of shared memory; ldmatrix turns x.
// Grid     x: features, y: splits. No atomics; the order of sums is fixed by splits and shapes.
// NaN and infinity stay in their feature; an infinity may become NaN.
#pragma once
#include "cuda/householder_common.cuh"
#include "cuda/householder_mma_pack.cuh"

namespace frodkernels::cuda::householder {

constexpr int kMmaPieceTokens = 32;
constexpr int kGradientUnits = 4;  // of 16 ranks, a warp

template <typename scalar_t>
struct MmaGradientArgs {
  Rows<const scalar_t> x[2];
  const char* q[2];  // [pieces * 2, units] packed units
  float* partial;
  int64_t T, n;
  int pairs, r, groups, units, slots;  // groups of 64 ranks: 1 or 2
  int64_t pieces;                      // of 32 tokens, in all
};

__host__ __device__ constexpr int mma_gradient_features(int groups) { return kWarps / groups * 32; }
__host__ __device__ constexpr int mma_gradient_pitch(int groups) { return mma_gradient_features(groups) * 2 + 16; }
template <typename scalar_t>
__host__ __device__ constexpr int mma_gradient_slot(int groups, int units) {
  return kMmaPieceTokens * mma_gradient_pitch(groups) + 2 * units * kUnitBytes<scalar_t>;
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 2) householder_gradient_mma_kernel(const MmaGradientArgs<scalar_t> a) {
  SIMT_DYN_SHARED(char, ring);
  const int features = mma_gradient_features(a.groups), log_vectors = 31 - __clz(features / 8);
  const int pitch = mma_gradient_pitch(a.groups), slot_bytes = mma_gradient_slot<scalar_t>(a.groups, a.units);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = warp % a.groups, feature = warp / a.groups * 32;
  const int mine = a.units - group * kGradientUnits;  // units; four at most
  const int64_t f0 = int64_t(blockIdx.x) * features;
  const int64_t first = a.pieces * blockIdx.y / gridDim.y, each = a.pieces * (blockIdx.y + 1) / gridDim.y - first;
  const int64_t steps = each * a.pairs;

  const auto copy = [&](int64_t step) {
    if (step < steps) {
      const bool one = step < each;
      const int64_t piece = first + (one ? step : step - each);
      const int q_bytes = 2 * a.units * kUnitBytes<scalar_t>;
      char* const slot = ring + step % a.slots * slot_bytes;
      copy_piece<scalar_t>(slot, pitch, kMmaPieceTokens, log_vectors, either(one, a.x[0], a.x[1]),
                           piece * kMmaPieceTokens, a.T, f0, a.n);
      copy_bytes(slot + kMmaPieceTokens * pitch, (one ? a.q[0] : a.q[1]) + piece * q_bytes, q_bytes);
    }
    ptx::cp_async_commit();
  };
  for (int64_t step = 0; step < a.slots - 1; ++step) copy(step);

  float sums[2][kGradientUnits * 2][4] = {};
  // A fragment of x^T is four matrices of 8 tokens x 8 features, turned: features by eights, then tokens.
  const int address = ((lane >> 4) * 8 + (lane & 7)) * pitch + (feature + (lane >> 3 & 1) * 8) * 2;
  for (int64_t step = 0; step < steps; ++step) {
    wait_for_piece(a.slots);
    __syncthreads();
    copy(step + a.slots - 1);
    const char* const slot = ring + step % a.slots * slot_bytes;
    const char* const q = slot + kMmaPieceTokens * pitch + group * kGradientUnits * kUnitBytes<scalar_t>;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t x[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) ptx::ldmatrix_x4_trans(x[m], slot + address + k * 16 * pitch + m * 32);
#pragma unroll
      for (int u = 0; u < kGradientUnits; ++u) {
        if (u >= mine) continue;
        uint4 parts[kParts];
        float2 scales[2];
        load_unit<scalar_t>(parts, scales, q + (k * a.units + u) * kUnitBytes<scalar_t>, lane);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float sixteen[2][4] = {};
#pragma unroll
          for (int p = kParts - 1; p >= 0; --p) {
            const uint32_t b[2] = {j == 0 ? parts[p].x : parts[p].z, j == 0 ? parts[p].y : parts[p].w};
#pragma unroll
            for (int m = 0; m < 2; ++m) ptx::mma_m16n8k16<scalar_t>(sixteen[m], x[m], b);
          }
#pragma unroll
          for (int m = 0; m < 2; ++m) add_scaled<scalar_t>(sums[m][u * 2 + j], sixteen[m], scales[j]);
        }
      }
    }
  }
  ptx::cp_async_wait<0>();

  float* const partial = a.partial + int64_t(blockIdx.y) * a.n * a.r;
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // features by eights
    const int64_t f = f0 + feature + i * 8 + (lane >> 2);
    if (f >= a.n) continue;
#pragma unroll
    for (int j = 0; j < kGradientUnits * 2; ++j) {
      const int c = group * kGradientUnits * 16 + j * 8 + (lane & 3) * 2;
      const float* const two = sums[i / 2][j] + i % 2 * 2;
      float* const to = partial + f * a.r + c;
      if (a.r % 2 == 0) {
        if (c < a.r) gpu::store(to, make_float2(two[0], two[1]));
      } else {
        if (c < a.r) to[0] = two[0];
        if (c + 1 < a.r) to[1] = two[1];
      }
    }
  }
}

}  // namespace frodkernels::cuda::householder
