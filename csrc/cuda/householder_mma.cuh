// SPDX-License-Identifier: Apache-2.0
//
// The Householder map on tensor cores, for 16-bit tokens.
//
//   coefficients = x left;   out = base - coefficients right^T
//
// Shapes   x [T, n], base [T, m]: rows that start on 16 bytes; out [T, m], any row stride and alignment; left and right
//          packed (householder_mma_pack.cuh): left by (16 features, 16 ranks), right^T by (16 features, 16 ranks) of
//          out
// Types    scalar_t = __half | __nv_bfloat16. left comes in three parts of 16 bits that together are float; float16's
// are
//          scaled by powers of two, one for 16 numbers of a column. Coefficients and right are cut in two parts of
//          bfloat16 for pass two, whose result is rounded to 16 bits: 16 bits of theirs are enough.
// Sums     float. Tensor cores cut what they add to a sum, towards zero: 16 features are summed there from zero, then
//          added as floats are, rounded to nearest.
// Method   A block of 8 warps owns 16 kTiles tokens: the packed factors come from L2 once for all of them. In pass one
//          a warp sums 32 ranks over every eighth (fourth, second) 16 features; the warps' sums are added in order. In
//          pass two a warp makes 16 features of a chunk, in place in shared memory, and stores them from there.
// Grid     x: tiles of tokens. No atomics; the order of sums is fixed by the shapes.
// NaN and infinity stay in their token, but an infinity may become NaN: its products with the parts of a factor have
//          both signs.
// Needs    1 <= r <= 128, n >= 1, at least two slots of the ring; x and base aligned.
#pragma once
#include "cuda/householder_common.cuh"
#include "cuda/householder_mma_pack.cuh"

namespace frodkernels::cuda::householder {

constexpr int kMostTiles = 5;
constexpr int kMmaLogVectors = 4, kMmaFeatures = 128;  // of a chunk
constexpr int kMmaPitch = kMmaFeatures * 2 + 16;       // bytes; rows fall in different banks, eight by eight
constexpr int kExchangePitch = kGroupRanks + 8;        // floats
constexpr int kMmaExchange = kWarps * 16 * kExchangePitch * 4;

__host__ __device__ constexpr int coefficient_pitch(int units) { return units * 32 + 16; }  // bytes

template <typename scalar_t>
struct MmaArgs {
  Rows<const scalar_t> x, base;
  Rows<scalar_t> out;
  const char* left;   // [chunks of n * 8, units] packed units
  const char* right;  // [chunks of m * 8, units]
  float* coefficients;
  int64_t T, n, m;
  int r, groups, units;  // groups of 32 ranks: 1, 2 or 4; units of 16 ranks
  Steps steps;
};

// 16 features x up to 32 ranks of left, on their way from L2 to the tensor cores.
template <typename scalar_t>
struct LeftFragments {
  uint4 parts[2][kParts];
  float2 scales[2][2];

  __device__ __forceinline__ void load(const char* from, int units, int lane) {
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      if (u < units) load_unit<scalar_t>(parts[u], scales[u], from + u * kUnitBytes<scalar_t>, lane);
    }
  }
};

template <typename scalar_t, int kTiles>
__global__ void __launch_bounds__(kThreads, 1) householder_mma_kernel(const MmaArgs<scalar_t> a) {
  constexpr int kTokens = 16 * kTiles, kSlot = kTokens * kMmaPitch;
  SIMT_DYN_SHARED(char, shared);
  const int pitch = coefficient_pitch(a.units);
  char* const high = shared;                 // coefficients, the upper parts: [tokens, pitch]
  char* const low = high + kTokens * pitch;  // and the lower ones
  float* const exchange = reinterpret_cast<float*>(low + kTokens * pitch);
  char* const ring = reinterpret_cast<char*>(exchange) + kMmaExchange;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, q = lane & 3, g = lane >> 2;
  const int group = warp % a.groups, slice = warp / a.groups, slices = kWarps / a.groups;
  const int64_t t0 = int64_t(blockIdx.x) * kTokens;
  const int row_address = lane & 15, half_address = (lane >> 4) * 16;  // of a lane in ldmatrix

  const auto copy = [&](int step) {
    if (a.steps.absent(step)) {
      const bool one = step < a.steps.first;
      copy_piece<scalar_t>(ring + a.steps.slot(step) * kSlot, kMmaPitch, kTokens, kMmaLogVectors,
                           either(one, a.x, a.base), t0, a.T, int64_t(a.steps.chunk(step)) * kMmaFeatures,
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

  const int mine = a.units - group * 2;  // units of 16 ranks; two at most
  const char* const left = a.left + group * 2 * kUnitBytes<scalar_t>;
  const int64_t last = int64_t(a.steps.first) * 8 - slices + slice;  // 16 features
  const auto fetch = [&](LeftFragments<scalar_t>& to, int64_t at) {
    to.load(left + min(at, last) * a.units * kUnitBytes<scalar_t>, mine, lane);
  };
  LeftFragments<scalar_t> next;
  fetch(next, slice);
  float sums[kTiles][4][4] = {};
  for (int step = 0; step < a.steps.first; ++step) {
    begin(step);
    const char* const chunk = ring + a.steps.slot(step) * kSlot + row_address * kMmaPitch + half_address;
    for (int k = slice; k < 8; k += slices) {
      const LeftFragments<scalar_t> now = next;
      fetch(next, int64_t(step) * 8 + k + slices);
      uint32_t x[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) ptx::ldmatrix_x4(x[m], chunk + m * 16 * kMmaPitch + k * 32);
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        if (u >= mine) continue;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float sixteen[kTiles][4] = {};
#pragma unroll
          for (int p = kParts - 1; p >= 0; --p) {
            const uint32_t b[2] = {j == 0 ? now.parts[u][p].x : now.parts[u][p].z,
                                   j == 0 ? now.parts[u][p].y : now.parts[u][p].w};
#pragma unroll
            for (int m = 0; m < kTiles; ++m) ptx::mma_m16n8k16<scalar_t>(sixteen[m], x[m], b);
          }
#pragma unroll
          for (int m = 0; m < kTiles; ++m) add_scaled<scalar_t>(sums[m][u * 2 + j], sixteen[m], now.scales[u][j]);
        }
      }
    }
  }

  // The warps' sums, 16 tokens at a time: added up in order, stored, and cut in two for pass two.
  const int pairs = a.units * 8;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    float* const own = exchange + (warp * 16 + g) * kExchangePitch + 2 * q;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      gpu::store(own + j * 8, make_float2(sums[m][j][0], sums[m][j][1]));
      gpu::store(own + 8 * kExchangePitch + j * 8, make_float2(sums[m][j][2], sums[m][j][3]));
    }
    __syncthreads();
    for (int e = threadIdx.x; e < 16 * pairs; e += kThreads) {
      const int row = e / pairs, c = (e - row * pairs) * 2, t = m * 16 + row;
      float two[2] = {0, 0};
      for (int s = 0; s < slices; ++s) {
        const int from = s * a.groups + c / kGroupRanks;
        const float2 part = gpu::load<float2>(exchange + (from * 16 + row) * kExchangePitch + c % kGroupRanks);
        two[0] += part.x;
        two[1] += part.y;
      }
      if (t0 + t < a.T) {
        float* const to = a.coefficients + (t0 + t) * a.r + c;
        if (a.r % 2 == 0) {
          if (c < a.r) gpu::store(to, make_float2(two[0], two[1]));
        } else {
          if (c < a.r) to[0] = two[0];
          if (c + 1 < a.r) to[1] = two[1];
        }
      }
      if (c >= a.r) two[0] = 0;  // not NaN where x is
      if (c + 1 >= a.r) two[1] = 0;
      gpu::store(high + t * pitch + c * 2, take_part<__nv_bfloat16>(two));
      gpu::store(low + t * pitch + c * 2, take_part<__nv_bfloat16>(two));
    }
    __syncthreads();
  }

  // Pass two.
  uint4 next_high, next_low;
  const auto fetch_right = [&](int step, int unit) {
    if (step >= a.steps.all()) return;
    const int64_t features = int64_t(a.steps.chunk(step)) * 8 + warp;
    const char* const from = a.right + (features * a.units + unit) * kRightUnitBytes + lane * 16;
    next_high = gpu::load<uint4>(from);
    next_low = gpu::load<uint4>(from + kPartBytes);
  };
  fetch_right(a.steps.first, 0);
  for (int step = a.steps.first; step < a.steps.all(); ++step) {
    begin(step);
    float back[kTiles][2][4] = {};
    for (int unit = 0; unit < a.units; ++unit) {
      const uint4 right_high = next_high, right_low = next_low;
      const bool more = unit + 1 < a.units;
      fetch_right(more ? step : step + 1, more ? unit + 1 : 0);
      const uint32_t bh[2][2] = {{right_high.x, right_high.y}, {right_high.z, right_high.w}};
      const uint32_t bl[2][2] = {{right_low.x, right_low.y}, {right_low.z, right_low.w}};
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const int at = (m * 16 + row_address) * pitch + unit * 32 + half_address;
        uint32_t ch[4], cl[4];
        ptx::ldmatrix_x4(ch, high + at);
        ptx::ldmatrix_x4(cl, low + at);
#pragma unroll
        for (int j = 0; j < 2; ++j) ptx::mma_m16n8k16<__nv_bfloat16>(back[m][j], ch, bl[j]);
#pragma unroll
        for (int j = 0; j < 2; ++j) ptx::mma_m16n8k16<__nv_bfloat16>(back[m][j], cl, bh[j]);
#pragma unroll
        for (int j = 0; j < 2; ++j) ptx::mma_m16n8k16<__nv_bfloat16>(back[m][j], ch, bh[j]);
      }
    }
    // In place: the warp's 16 features of all tokens, then out, 16 bytes a lane.
    char* const chunk = ring + a.steps.slot(step) * kSlot + warp * 32;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // column tile i % 2, upper or lower eight tokens
        char* const at = chunk + (m * 16 + i / 2 * 8 + g) * kMmaPitch + i % 2 * 16 + q * 4;
        const float2 from = widened_pair<scalar_t>(gpu::load<uint32_t>(at));
        const float* const two = back[m][i % 2] + i / 2 * 2;
        gpu::store(at, rounded_pair<scalar_t>(from.x - two[0], from.y - two[1]));
      }
    }
    __syncwarp();
    // Rows two apart share no banks: eight lanes read four such rows.
    const int row = (lane >> 1 & 3) * 2 + (lane >> 3 & 1) + (lane >> 4) * 8;
    const int64_t f = int64_t(a.steps.chunk(step)) * kMmaFeatures + warp * 16 + (lane & 1) * 8;
    const int live = live_tokens<scalar_t>(a.m, f);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      const int t = m * 16 + row;
      if (t0 + t >= a.T || live == 0) continue;
      const char* const at = chunk + t * kMmaPitch + (lane & 1) * 16;
      scalar_t* const to = a.out.data + (t0 + t) * a.out.stride + f;
      if (live == 8 && a.out.aligned) {
        // As one instruction: the compiler splits the plain assignment in four.
        __stwb(reinterpret_cast<uint4*>(to), gpu::load<uint4>(at));
      } else {
        for (int k = 0; k < live; ++k) to[k] = reinterpret_cast<const scalar_t*>(at)[k];
      }
    }
  }
  ptx::cp_async_wait<0>();
}

}  // namespace frodkernels::cuda::householder
