// SPDX-License-Identifier: Apache-2.0
//
// Tensor-core gradient of a sparse matrix's entries, for 16-bit features: a sampled product of two feature matrices.
//
//   partial[split][word] = sum over the split's tokens of u[j, t] z[i, t]   for the entry (i, j) of the word
//
// Shapes   u [columns, T], z [rows, T], contiguous tokens, strides between rows; words [steps, 32, 2] as the plan's
//          `source` (csrc/tiles/tiles.h), partial fp32. Words without an entry get a meaningless number.
// Types    scalar_t = half | bf16, products exact, sums fp32. Entries never mix, so NaN and infinity stay with theirs.
// Method   A thread block keeps one feature block of u, kTokens tokens at a time, two buffers deep, and walks the
//          tokens of its split. Each warp owns kJobs jobs, up to kJobSteps steps of one cell each: ldmatrix gathers
//          32 features as A fragments (rows: entries, depth: tokens), the cell's 8 rows of z are the B fragment, and
//          the 32 x 8 sums, of which the entries are picked at the end, stay in registers for all tokens.
// Grid     x: chunks of kGradientWarps * kJobs jobs of one feature block;  y: token splits. 384 threads. No atomics.
// Needs    as sparse_core_mma.cuh.
#pragma once
#include "cuda/mma_common.cuh"
#include "cuda/sparse_core.h"

namespace frodkernels::cuda {

constexpr int kGradientWarps = 12, kGradientThreads = kGradientWarps * 32;
constexpr int kCellBytes = 8 * kFeatureBytes;  // a cell's rows of z
constexpr uint32_t kNoRow = 0xffffffffu;
constexpr int kExchangeBytes = kStepSlots * 8 * 4;  // a step's sums

struct GradientMma {
  Gradient a;
  Tiles tiles;
  float* partial;  // [splits, steps, 64]
};

template <typename scalar_t, int kJobs, int kJobSteps>
__global__ void __launch_bounds__(kGradientThreads, 1) gradient_mma_kernel(const GradientMma p) {
  SIMT_DYN_SHARED(char, shared);
  constexpr int kChunkJobs = kGradientWarps * kJobs;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, q = lane & 3, g = lane >> 2, half = (lane >> 4) * 16;

  // The chunk: jobs [first, end) of feature block b.
  int b = 0, first = 0, end = 0, chunk = static_cast<int>(blockIdx.x);
  for (; b < p.tiles.blocks; ++b) {
    first = p.tiles.job_ptr[b];
    end = p.tiles.job_ptr[b + 1];
    const int chunks = (end - first + kChunkJobs - 1) / kChunkJobs;
    if (chunk < chunks) break;
    chunk -= chunks;
  }
  if (b == p.tiles.blocks) return;  // the grid is an upper bound
  first += chunk * kChunkJobs;

  const int block = static_cast<int>(p.tiles.block), buffer_bytes = block * kFeatureBytes;
  char* cells = shared + 2 * buffer_bytes + warp * kJobs * kCellBytes;
  const uint16_t* order = p.tiles.feature_order + int64_t(b) * block;  // read again for every tile: it stays in L1
  const Source16 u{static_cast<const uint16_t*>(p.a.in), p.a.T, p.a.in_stride};
  const Source16 z{static_cast<const uint16_t*>(p.a.z), p.a.T, p.a.z_stride};
  const int64_t tiles = (p.a.T + kTokens - 1) / kTokens;
  const int tile0 = static_cast<int>(tiles * blockIdx.y / gridDim.y);
  const int tile1 = static_cast<int>(tiles * (blockIdx.y + 1) / gridDim.y);

  // A warp takes every 12th job: where a chunk is not full, all warps have less.
  auto job_record = [&](int i) {
    const int job = first + i * kGradientWarps + warp;
    return job < end ? gpu::load<uint4>(p.tiles.jobs + int64_t(job) * 4) : make_uint4(0, 0, 0, 0);
  };
  uint32_t z_row[kJobs];
  unsigned counts = 0;  // steps of the jobs, four bits each
  // The word of the lane that names the slot whose row this lane reads: octet 2h + (lane >> 3 & 1), k = lane & 7.
  uint32_t words[kJobs][kJobSteps];
  const int named = (lane >> 3 & 1) * 16 + (lane & 7);
#pragma unroll
  for (int i = 0; i < kJobs; ++i) {
    const uint4 job = job_record(i);
    counts |= job.y << 4 * i;
    z_row[i] = job.y == 0 ? kNoRow : p.tiles.row_order[job.z * 8 + (lane >> 2)];
#pragma unroll
    for (int e = 0; e < kJobSteps; ++e) {
      const bool there = e < static_cast<int>(job.y);
      words[i][e] = there ? p.tiles.words[(static_cast<int>(job.x) + e) * 32 + named] : 0;
    }
  }
  auto has_step = [&](int i, int e) { return static_cast<int>(counts >> 4 * i & 15) > e; };

  auto copy_u = [&](int tile) {
    if (tile < tile1) {
      copy_block<kGradientThreads>(shared + (tile - tile0 & 1) * buffer_bytes, order, block, u,
                                   int64_t(tile) * kTokens);
    }
  };
  auto copy_z = [&](int tile) {
    if (tile >= tile1) return;
#pragma unroll
    for (int i = 0; i < kJobs; ++i) {
      // Rows that do not exist are read as zeros.
      recompute(z_row[i]);
      const int64_t t = z_row[i] == kNoRow ? z.T : int64_t(tile) * kTokens + (lane & 3) * 8;
      copy_chunk(cells + i * kCellBytes + chunk_offset(lane >> 2, lane & 3), z, z_row[i] == kNoRow ? 0 : z_row[i], t);
    }
  };

  copy_u(tile0);
  copy_z(tile0);
  ptx::cp_async_commit();
  copy_u(tile0 + 1);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  __syncthreads();

  float acc[kJobs][kJobSteps][2][4];
#pragma unroll
  for (int i = 0; i < kJobs; ++i) {
#pragma unroll
    for (int k = 0; k < kJobSteps * 8; ++k) acc[i][k / 8][k / 4 % 2][k % 4] = 0;
  }
  for (int tile = tile0; tile < tile1; ++tile) {
    const char* buffer = shared + (tile - tile0 & 1) * buffer_bytes;
    uint32_t rows[kJobs][kChunks];
#pragma unroll
    for (int i = 0; i < kJobs; ++i) {
      ptx::ldmatrix_x4(rows[i], cells + i * kCellBytes + chunk_offset(lane & 7, lane >> 3));
    }
    __syncwarp();  // the cells are in registers: the next tile's may come
    copy_z(tile + 1);
    ptx::cp_async_commit();
#pragma unroll
    for (int i = 0; i < kJobs; ++i) {
#pragma unroll
      for (int e = 0; e < kJobSteps; ++e) {
        if (!has_step(i, e)) continue;
        recompute(words[i][e]);
        int offset[2];
        feature_offsets(offset, words[i][e]);
        // Lanes 16 .. 31 name the second 8 of 16 tokens: the four matrices are a fragment as it is.
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          // Tensor cores cut what they add to a sum, always towards zero: over thousands of tokens that is a bias. They
          // sum a tile; tiles are added up as floats are, rounded to nearest.
          float tile_sums[4] = {0, 0, 0, 0};
#pragma unroll
          for (int m = 0; m < kChunks; m += 2) {
            const uint32_t depth[2] = {rows[i][m], rows[i][m + 1]};
            uint32_t entries[4];
            ptx::ldmatrix_x4(entries, buffer + (offset[h] ^ half ^ m * 16));
            ptx::mma_m16n8k16<scalar_t>(tile_sums, entries, depth);
          }
#pragma unroll
          for (int k = 0; k < 4; ++k) acc[i][e][h][k] += tile_sums[k];
        }
      }
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
    copy_u(tile + 2);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<0>();

  // From (entry, row of the cell) sums to words: lane (q, n) owns k = 2q of octet p1 and k = 2q + 1 of octet p2, row n.
  float* sums = reinterpret_cast<float*>(shared + warp * kExchangeBytes);
#pragma unroll
  for (int i = 0; i < kJobs; ++i) {
    const int first_step = static_cast<int>(job_record(i).x);
#pragma unroll
    for (int e = 0; e < kJobSteps; ++e) {
      if (!has_step(i, e)) continue;
#pragma unroll
      for (int j = 0; j < kStepOctets; ++j) {
        const float* two = acc[i][e][j / 2] + j % 2 * 2;
        gpu::store(sums + (j * 8 + g) * 8 + 2 * q, make_float2(two[0], two[1]));
      }
      __syncwarp();
      const int step = first_step + e;
      const uint32_t word = p.tiles.words[step * 32 + lane];
      const int p1 = word >> 28 & 3, p2 = word >> 30;
      const float2 pair = make_float2(sums[(p1 * 8 + 2 * q) * 8 + g], sums[(p2 * 8 + 2 * q + 1) * 8 + g]);
      gpu::store(p.partial + (blockIdx.y * p.tiles.steps + step) * 64 + lane * 2, pair);
      __syncwarp();
    }
  }
}

}  // namespace frodkernels::cuda
