// SPDX-License-Identifier: Apache-2.0
//
// Tensor-core product with a sparse matrix plus diagonal, for 16-bit features.
//
//   out[i, t] = lam[i] in[i, t] + sum over row i's entries (j, v) of v in[j, t]
//
// Shapes   in [columns, T], out [rows, T], contiguous tokens, strides between rows; the plan is csrc/tiles/tiles.h.
// Types    scalar_t = half | bf16. Parameters are rounded to scalar_t (half: after scaling all of them by one power of
//          two that puts the largest near the top of half's range); sums are fp32, rounded once.
// Method   A thread block keeps kTokens tokens of one feature block in shared memory and walks all feature blocks, two
//          buffers deep; each warp holds up to kProductGroups groups of 8 rows in accumulators. For a step of 32
//          entries of a group, ldmatrix gathers 32 features (each lane names two) and transposes them into A fragments;
//          the B fragments are built in registers from two values a lane, 8 bytes a lane and step in all.
// Grid     persistent: every block takes items (token tile, row block) in turn, row blocks of a tile side by side so
//          that they share it in L2. 512 threads. No atomics, fixed order: two runs give the same bits.
// Infinity and NaN: a gathered feature meets the zeros of the other seven rows in the tensor core, where inf * 0 is
// NaN.
//          A group whose sums are not all finite is summed again entry by entry, so they reach exactly the rows that
//          have an entry there.
// Needs    rows of in and out that start on 16 bytes and have room for T rounded up to 8; columns < 65535, block <=
// 4096 and a multiple of 128, 64 steps < 2^31, items < 2^31; offsets in features are
//          64-bit.
#pragma once
#include "cuda/mma_common.cuh"
#include "cuda/scalars.cuh"
#include "cuda/sparse_core.h"

namespace frodkernels::cuda {

constexpr int kProductWarps = 16, kProductThreads = kProductWarps * 32;
constexpr int kProductGroups = 8;               // groups of 8 rows a warp holds: 64 accumulators a lane
constexpr int kStageBytes = 8 * kFeatureBytes;  // a group's results on their way out, per warp
constexpr int kPackThreads = 256, kScaleBlocks = 64;

// Scratch of a call: one header, then the packed steps: for each lane its two values and its word, 8 bytes.
struct PackedHeader {
  float inverse_scale;
  float unused[3];
  float largest[kScaleBlocks];  // finite magnitudes, one per block
};
constexpr int64_t kHeaderBytes = 512;
constexpr int kStepsAhead = 2;  // steps that are asked for early, beyond the last too

struct PackArgs {
  const int32_t* source;  // [lanes, 2]
  const uint32_t* words;  // [lanes]
  Vector values, lam;
  int64_t nnz, rows, lanes;  // of all steps
};

// largest[b] = the largest finite |parameter| that block b sees. Only half needs it.
__global__ void __launch_bounds__(kPackThreads) largest_parameter_kernel(PackArgs a, PackedHeader* header) {
  SIMT_SHARED(float, warps, [kPackThreads / 32]);
  const int64_t count = a.nnz + (a.lam.data != nullptr ? a.rows : 0);
  float largest = 0;
  for (int64_t k = int64_t(blockIdx.x) * kPackThreads + threadIdx.x; k < count; k += kScaleBlocks * kPackThreads) {
    const float v = fabsf(k < a.nnz ? read_scalar<float>(a.values, k) : read_scalar<float>(a.lam, k - a.nnz));
    if (v <= 3.4e38f && v > largest) largest = v;
  }
#pragma unroll
  for (int o = 16; o > 0; o /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, o));
  if ((threadIdx.x & 31) == 0) warps[threadIdx.x / 32] = largest;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kPackThreads / 32; ++w) largest = fmaxf(largest, warps[w]);
    header->largest[blockIdx.x] = largest;
  }
}

// A power of two that brings `largest` into [2^14, 2^15), within reason.
__device__ __forceinline__ float scale_for(float largest) {
  if (largest == 0) return 1;
  const int exponent = 14 - ilogbf(largest);
  return ldexpf(1.0f, exponent > 100 ? 100 : exponent < -100 ? -100 : exponent);
}

// packed[l] = {parameters source[l][0] and source[l][1], scaled and rounded to scalar_t, zero where there is none;
// word}.
template <typename scalar_t, bool kScaled>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(PackArgs a, PackedHeader* header, uint2* packed) {
  float scale = 1;
  if constexpr (kScaled) {
    float largest = 0;
    for (int b = 0; b < kScaleBlocks; ++b) largest = fmaxf(largest, header->largest[b]);
    scale = scale_for(largest);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) header->inverse_scale = 1 / scale;
  const int64_t l = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  if (l >= a.lanes) {  // the steps that are read ahead and not used
    if (l < a.lanes + kStepsAhead * kStepSlots) gpu::store(packed + l, make_uint2(0, 0));
    return;
  }
  const uint2 sources = gpu::load<uint2>(a.source + l * 2);
  const int32_t source[2] = {static_cast<int32_t>(sources.x), static_cast<int32_t>(sources.y)};
  float v[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (source[i] >= 0 && source[i] < a.nnz) v[i] = read_scalar<float>(a.values, source[i]);
    if (source[i] >= a.nnz && a.lam.data != nullptr) v[i] = read_scalar<float>(a.lam, source[i] - a.nnz);
  }
  gpu::store(packed + l, make_uint2(rounded_pair<scalar_t>(v[0] * scale, v[1] * scale), a.words[l]));
}

struct ProductMma {
  Product a;
  Tiles tiles;
  const PackedHeader* header;
  const uint2* packed;  // [steps, 32]
  int items;            // token tiles * row_blocks
  int row_blocks, blocks;
  int rounds;  // groups / kProductWarps, rounded up
};

// Sums the group's rows for token t as the definition does.
template <typename scalar_t>
__device__ __forceinline__ void exact_group(const ProductMma& p, int64_t group, int64_t t) {
  const scalar_t* in = static_cast<const scalar_t*>(p.a.in);
  if (t >= p.a.T) return;
  for (int n = 0; n < 8; ++n) {
    const int32_t row = p.tiles.row_order[group * 8 + n];
    if (row < 0) continue;
    float sum = p.a.lam.data == nullptr ? 0 : read_scalar<float>(p.a.lam, row) * widen(in[row * p.a.in_stride + t]);
    for (int32_t k = p.a.view.indptr[row]; k < p.a.view.indptr[row + 1]; ++k) {
      const int64_t j = read_index(p.a.view, k);
      sum += read_scalar<float>(p.a.values, p.a.view.perm[k]) * widen(in[j * p.a.in_stride + t]);
    }
    static_cast<scalar_t*>(p.a.out)[row * p.a.out_stride + t] = rounded<scalar_t>(sum);
  }
}

// B fragments of a step: lane (q, n) holds `low` at k = 2q of octet p1, `high` at k = 2q + 1 of octet p2, else zeros.
__device__ __forceinline__ void value_fragments(uint32_t (&b)[kStepOctets], uint32_t values, uint32_t word) {
  const uint64_t low = static_cast<uint64_t>(values & 0xffffu) << (word >> 24 & 48);  // 16 bits for each octet
  const uint64_t high = static_cast<uint64_t>(values >> 16) << (word >> 26 & 48);
  const uint32_t l0 = static_cast<uint32_t>(low), l1 = static_cast<uint32_t>(low >> 32);
  const uint32_t h0 = static_cast<uint32_t>(high), h1 = static_cast<uint32_t>(high >> 32);
  b[0] = __byte_perm(l0, h0, 0x5410);
  b[1] = __byte_perm(l0, h0, 0x7632);
  b[2] = __byte_perm(l1, h1, 0x5410);
  b[3] = __byte_perm(l1, h1, 0x7632);
}

// A group's results from accumulators (token, row pairs) to rows of 8 tokens a lane, through the warp's own 512 bytes.
// Lane (n, q) stores tokens 8q .. 8q + 7 of row n: ldmatrix transposes, and its row addresses choose the tokens.
template <typename scalar_t>
__device__ __forceinline__ void store_group(const ProductMma& p, const float (&acc)[2][4], float scale, char* stage,
                                            int32_t row, int64_t t0) {
  uint32_t here = threadIdx.x;
  recompute(here);
  const int lane = here & 31, q = lane & 3, g = lane >> 2;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const uint32_t pair = rounded_pair<scalar_t>(acc[c / 2][c % 2 * 2] * scale, acc[c / 2][c % 2 * 2 + 1] * scale);
    gpu::store(stage + (c * 8 + (g ^ 2 * c)) * 16 + q * 4, pair);
  }
  __syncwarp();
  const int j = lane >> 3, r = lane & 7, chunk = r >> 1;
  uint32_t tokens[4];
  ptx::ldmatrix_x4_trans(tokens, stage + (chunk * 8 + ((2 * j + (r & 1)) ^ 2 * chunk)) * 16);
  __syncwarp();
  // Rows have room for whole eights of tokens: what is stored beyond T are sums of zeros.
  const int64_t t = t0 + q * 8;
  if (row < 0 || t >= p.a.T) return;
  // As one instruction: the compiler splits the plain assignment in four.
  __stwb(reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.a.out) + row * p.a.out_stride + t),
         make_uint4(tokens[0], tokens[1], tokens[2], tokens[3]));
}

// The stages of one thread block: (item, feature block) pairs in order.
struct Stages {
  const ProductMma& p;
  __device__ int item(int stage) const { return blockIdx.x + stage / p.blocks * gridDim.x; }
  __device__ int block(int stage) const { return stage % p.blocks; }
  __device__ bool exists(int stage) const { return item(stage) < p.items; }
  __device__ int64_t token(int stage) const { return int64_t(item(stage) / p.row_blocks) * kTokens; }
};

// The groups of a warp in an item: `count` from `first`. Row blocks are whole rounds of the warps, so that all warps of
// an item have equally many groups: they wait for each other after every feature block.
struct WarpGroups {
  int first, count;
  __device__ WarpGroups(const ProductMma& p, int item) {
    const int groups = static_cast<int>(p.tiles.groups), warp = threadIdx.x / 32, row_block = item % p.row_blocks;
    const int from = min(row_block * p.rounds / p.row_blocks * kProductWarps, groups);
    const int to = min((row_block + 1) * p.rounds / p.row_blocks * kProductWarps, groups);
    const int share = (to - from) / kProductWarps, more = (to - from) % kProductWarps;
    first = from + warp * share + min(warp, more);
    count = share + (warp < more);
  }
};

template <typename scalar_t>
__global__ void __launch_bounds__(kProductThreads, 1) product_mma_kernel(const ProductMma p) {
  SIMT_DYN_SHARED(char, shared);
  const int lane = threadIdx.x & 31, block = static_cast<int>(p.tiles.block);
  const int buffer_bytes = block * kFeatureBytes;
  char* stage_out = shared + 2 * buffer_bytes + threadIdx.x / 32 * kStageBytes;
  char* orders = shared + 2 * buffer_bytes + kProductWarps * kStageBytes;  // two feature orders
  const Stages stages{p};
  const Source16 in{static_cast<const uint16_t*>(p.a.in), p.a.T, p.a.in_stride};
  const int half = (lane >> 3 & 1) * 16;

  auto copy_order = [&](int stage) {
    if (static_cast<int>(threadIdx.x) >= block / 8 || !stages.exists(stage)) return;
    const uint16_t* from = p.tiles.feature_order + stages.block(stage) * block;
    ptx::cp_async<16>(orders + (stage & 1) * block * 2 + threadIdx.x * 16, from + threadIdx.x * 8);
  };
  auto copy_features = [&](int stage) {
    if (!stages.exists(stage)) return;
    const uint16_t* order = reinterpret_cast<const uint16_t*>(orders + (stage & 1) * block * 2);
    copy_block<kProductThreads>(shared + (stage & 1) * buffer_bytes, order, block, in, stages.token(stage));
  };
  // Lane i has the first step of the warp's group i, lane `count` the end.
  auto group_steps = [&](int stage) {
    if (!stages.exists(stage)) return 0;
    const WarpGroups groups(p, stages.item(stage));
    const int at = stages.block(stage) * (static_cast<int>(p.tiles.groups) + 1) + groups.first;
    return p.tiles.step_ptr[at + min(lane, groups.count)];
  };

  copy_order(0);
  copy_order(1);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  copy_features(0);
  ptx::cp_async_commit();
  copy_features(1);
  ptx::cp_async_commit();
  int steps = group_steps(0);
  ptx::cp_async_wait<1>();
  __syncthreads();
  copy_order(2);
  ptx::cp_async_commit();

  // The steps to come, asked for two ahead: they come from L2. What is read beyond a warp's last step is not used.
  const uint2* ahead = nullptr;
  uint2 packed[2];
  auto fetch_first = [&] {
    ahead = p.packed + int64_t(__shfl_sync(0xffffffffu, steps, 0)) * 32 + lane;
#pragma unroll
    for (int i = 0; i < 2; ++i) packed[i] = gpu::load<uint2>(ahead + i * 32);
    ahead += 64;
  };
  fetch_first();

  float acc[kProductGroups][2][4];
  for (int stage = 0; stages.exists(stage); ++stage) {
    if (stages.block(stage) == 0) {
#pragma unroll
      for (int o = 0; o < kProductGroups; ++o) {
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[o][i / 4][i % 4] = 0;
      }
    }
    const char* buffer = shared + (stage & 1) * buffer_bytes;
    const int next_steps = group_steps(stage + 1);
    int s = __shfl_sync(0xffffffffu, steps, 0);
#pragma unroll
    for (int o = 0; o < kProductGroups; ++o) {
      const int end = __shfl_sync(0xffffffffu, steps, o + 1);
      for (; s < end; ++s) {
        const uint2 now = packed[0];
        packed[0] = packed[1];
        packed[1] = gpu::load<uint2>(ahead);
        ahead += 32;
        int offset[2];
        feature_offsets(offset, now.y);
        uint32_t b[kStepOctets];
        value_fragments(b, now.x, now.y);
        // Lanes 8 .. 15 and 24 .. 31 name the second 8 of 16 tokens: the four matrices are a fragment as it is.
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t values[2] = {b[2 * h], b[2 * h + 1]};
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            uint32_t features[4];
            ptx::ldmatrix_x4_trans(features, buffer + (offset[h] ^ half ^ m * 32));
            ptx::mma_m16n8k16<scalar_t>(acc[o][m], features, values);
          }
        }
      }
    }
    steps = next_steps;
    fetch_first();
    ptx::cp_async_wait<0>();
    __syncthreads();
    copy_features(stage + 2);
    copy_order(stage + 3);
    ptx::cp_async_commit();

    if (stages.block(stage) != p.blocks - 1) continue;
    const WarpGroups groups(p, stages.item(stage));
    const int64_t t0 = stages.token(stage);
    const float scale = p.header->inverse_scale;
    unsigned again = 0;
#pragma unroll
    for (int o = 0; o < kProductGroups; ++o) {
      if (o >= groups.count) break;
      float probe = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) probe += acc[o][i / 4][i % 4] * 0.0f;  // NaN unless every sum is finite
      if (__any_sync(0xffffffffu, probe != 0)) again |= 1u << o;
      const int32_t row = p.tiles.row_order[(groups.first + o) * 8 + (lane >> 2)];
      store_group<scalar_t>(p, acc[o], scale, stage_out, row, t0);
    }
    __syncwarp();  // other lanes' results come before the exact ones
    for (int o = 0; again != 0; ++o, again >>= 1) {
      if (again & 1) exact_group<scalar_t>(p, groups.first + o, t0 + lane);
    }
  }
  ptx::cp_async_wait<0>();
}

}  // namespace frodkernels::cuda
