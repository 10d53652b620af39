// SPDX-License-Identifier: Apache-2.0
//
// One kernel per class of fault. kBug = 0 is right; the comment of each kernel names the others.
#pragma once
#include "cuda/gpu.cuh"

namespace simt::planted {

constexpr int kThreads = 64;

// y = x with each tile of 64 reversed, tiles one after another through one buffer.
// 1: no barrier after the load.  2: no barrier before the buffer is used again.
template <int kBug>
__global__ void reverse_tiles(const float* x, float* y, int tiles) {
  SIMT_SHARED(float, tile, [kThreads]);
  for (int t = 0; t < tiles; ++t) {
    tile[threadIdx.x] = x[t * kThreads + threadIdx.x];
    if (kBug != 1) __syncthreads();
    y[t * kThreads + threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
    if (kBug != 2) __syncthreads();
  }
}

// The same with cp.async, each thread reading what another one copied.
// 1: no wait.  2: no barrier before the next copy.  3: waits for all groups but the last.  4: waits, no barrier after.
template <int kBug>
__global__ void reverse_copies(const float* x, float* y, int tiles) {
  SIMT_SHARED(float, tile, [kThreads]);
  for (int t = 0; t < tiles; ++t) {
    ptx::cp_async<4>(&tile[threadIdx.x], x + t * kThreads + threadIdx.x);
    ptx::cp_async_commit();
    if (kBug == 3) ptx::cp_async_wait<1>();
    if (kBug != 1 && kBug != 3) ptx::cp_async_wait<0>();
    if (kBug != 4) __syncthreads();
    y[t * kThreads + threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
    if (kBug != 2) __syncthreads();
  }
  if (kBug == 3) ptx::cp_async_wait<0>();
}

// y[c, r] = x[r, c] through a padded tile, blocks of 16 x 16.  1: the indices of the store are swapped.
template <int kBug>
__global__ void transpose(const float* x, float* y, int rows, int columns) {
  SIMT_SHARED(float, tile, [16][17]);
  const int r0 = blockIdx.y * 16, c0 = blockIdx.x * 16, tx = threadIdx.x, ty = threadIdx.y;
  if (r0 + ty < rows && c0 + tx < columns) tile[ty][tx] = x[(r0 + ty) * columns + c0 + tx];
  __syncthreads();
  if (c0 + ty < columns && r0 + tx < rows) {
    const int at = kBug ? (r0 + tx) * rows + c0 + ty : (c0 + ty) * rows + r0 + tx;
    y[at] = tile[tx][ty];
  }
}

// bins[x[i]] += 1, first in shared memory.  1: plain += there.  2: plain += in global memory.
template <int kBug>
__global__ void histogram(const int* x, int* bins, int n, int nbins) {
  SIMT_DYN_SHARED(int, mine);
  for (int i = threadIdx.x; i < nbins; i += blockDim.x) mine[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    if (kBug == 1) {
      mine[x[i]] += 1;
    } else {
      atomicAdd(&mine[x[i]], 1);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < nbins; i += blockDim.x) {
    if (kBug == 2) {
      bins[i] += mine[i];
    } else {
      atomicAdd(&bins[i], mine[i]);
    }
  }
}

// y[0] = sum of the last, partly filled tile.  1: the rest of the tile is not zeroed.
template <int kBug>
__global__ void edge_tile(const float* x, float* y, int n) {
  SIMT_SHARED(float, tile, [kThreads]);
  const int i = threadIdx.x;
  if (i < n) {
    tile[i] = x[i];
  } else if (!kBug) {
    tile[i] = 0;
  }
  __syncthreads();
  if (i > 0) return;
  float sum = 0;
  for (int k = 0; k < kThreads; ++k) sum += tile[k];
  y[0] = sum;
}

// y = x, one thread an element.  1: reads one too many.  2: writes one too many.  3: writes x instead of y.
// 4: writes only half of y.  5: each block writes y[0] too.
template <int kBug>
__global__ void copy(float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (kBug == 1 && i == n) y[0] = x[i];
  if (kBug == 2 && i == n) y[i] = 0;
  if (i >= n) return;
  if (kBug == 3) x[i] = 1;
  if (kBug == 4 && i % 2) return;
  y[i] = x[i];
  if (kBug == 5 && threadIdx.x == 0) y[0] = x[0];
}

// y[i] = first and last of 4 elements.  1: the vector starts one element late.  2: the same without gpu::load.
// 3: a store that is misaligned.
template <int kBug>
__global__ void read_fours(const float* x, float* y, int fours) {
  const int i = threadIdx.x;
  if (i >= fours) return;
  float4 v = gpu::load<float4>(x + 4 * i + (kBug == 1 ? 1 : 0));
  if (kBug == 2) v.x = *reinterpret_cast<const double*>(x + 4 * i + 1) > 0 ? 1 : 0;
  gpu::store(y + 2 * i + (kBug == 3 ? 1 : 0), make_float2(v.x, v.w));
}

// 1: two barriers on two branches.  2: a barrier for half the block, a warp collective for the rest.
// 3: half the block exits before the barrier.
template <int kBug>
__global__ void barriers(float* y) {
  SIMT_SHARED(float, tile, [kThreads]);
  tile[threadIdx.x] = 1;
  if (kBug == 1 && threadIdx.x < 40) {
    __syncthreads();
    tile[threadIdx.x] = 2;
  }
  if (kBug == 2 && threadIdx.x < 40) __syncwarp();
  if (kBug == 3 && threadIdx.x >= 32) return;
  if (kBug != 2 || threadIdx.x >= 40) __syncthreads();
  if (kBug == 2) __syncwarp();
  y[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

__device__ __forceinline__ float warp_sum(float v) {
  for (int by = 16; by > 0; by /= 2) v += __shfl_xor_sync(0xffffffffu, v, by);
  return v;
}

// y[i] = the sum of a warp's 32 ones.  1: two shuffles on two branches.  2: a lane calls that is not in the mask.
// 3: a lane reads from outside the mask.  4: a lane exits first.  5: __syncwarp with two masks.
template <int kBug>
__global__ void warp_sums(float* y) {
  const int lane = threadIdx.x % 32;
  float v = 1;
  if (kBug == 1) v = lane < 16 ? __shfl_xor_sync(0xffffffffu, v, 1) : __shfl_down_sync(0xffffffffu, v, 1);
  if (kBug == 2) v = __shfl_xor_sync(0x0000ffffu, v, 1);
  if (kBug == 3 && lane < 16) v = __shfl_xor_sync(0x0000ffffu, v, 16);
  if (kBug == 4 && lane == 5) return;
  if (kBug == 5) __syncwarp(lane < 16 ? 0xffffffffu : 0xfffffff0u);
  y[threadIdx.x] = warp_sum(v);
}

// y[i] = x[i ^ 1] through shared memory, within a warp.  1: no __syncwarp.
template <int kBug>
__global__ void swap_neighbours(const float* x, float* y) {
  SIMT_SHARED(float, tile, [kThreads]);
  tile[threadIdx.x] = x[threadIdx.x];
  if (!kBug) __syncwarp();
  y[threadIdx.x] = tile[threadIdx.x ^ 1];
}

// d = a b for ones, by whole warps.  1: one lane has exited.  2: ldmatrix by half a warp and mma by the other.
template <int kBug>
__global__ void multiply_ones(float* y) {
  SIMT_SHARED(uint32_t, tile, [32][4]);
  for (int k = 0; k < 4; ++k) tile[threadIdx.x % 32][k] = 0x3f803f80u;
  __syncthreads();
  if (kBug == 1 && threadIdx.x == 7) return;
  uint32_t a[4] = {}, b[2] = {0x3f803f80u, 0x3f803f80u};
  float d[4] = {};
  if (kBug != 2 || threadIdx.x % 32 < 16) ptx::ldmatrix_x4(a, tile[threadIdx.x % 32]);
  ptx::mma_m16n8k16<__nv_bfloat16>(d, a, b);
  y[threadIdx.x] = d[0];
}

// A thread exits with a copy of its own in flight (1); a misaligned copy (2) or ldmatrix row (3); a store to where a
// copy is still to land (4).
template <int kBug>
__global__ void copy_rows(const float* x, float* y) {
  SIMT_SHARED(float, tile, [32 * 4 + 4]);
  const int i = threadIdx.x;
  ptx::cp_async<16>(&tile[4 * i + (kBug == 2 ? 1 : 0)], x + 4 * i);
  ptx::cp_async_commit();
  if (kBug == 1) return;
  if (kBug == 4) tile[4 * i] = 0;
  ptx::cp_async_wait<0>();
  __syncthreads();
  uint32_t r[1];
  ptx::ldmatrix_x1(r, &tile[4 * (i % 8) + (kBug == 3 ? 1 : 0)]);
  y[i] = __uint_as_float(r[0]);
}

// y[0] += 1 for each block, then the last block doubles it: legal on a device, since the fence and the counter order
// the blocks. The checker knows no order between blocks and reports it.
__global__ static void last_block(float* y, int* finished) {
  SIMT_SHARED(int, last, [1]);
  if (threadIdx.x == 0) {
    y[1 + blockIdx.x] = 1;
    __threadfence();
    last[0] = atomicAdd(finished, 1) == static_cast<int>(gridDim.x) - 1;
  }
  __syncthreads();
  if (!last[0] || threadIdx.x) return;
  float sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += y[1 + i];
  y[0] = sum;
}

// Touches all of `floats` of dynamic shared memory.
__global__ static void fill_shared(float* y, int floats) {
  SIMT_DYN_SHARED(float, p);
  for (int i = threadIdx.x; i < floats; i += blockDim.x) p[i] = 1;
  __syncthreads();
  if (threadIdx.x == 0) y[0] = p[floats - 1];
}

#if defined(SIMT_EMU)  // ptxas refuses it outright
__global__ static void too_many_statics(float* y) {
  SIMT_SHARED(float, a, [8 * 1024]);
  SIMT_SHARED(float, b, [8 * 1024]);
  a[threadIdx.x] = b[threadIdx.x] = 1;
  y[threadIdx.x] = a[threadIdx.x] + b[threadIdx.x];
}
#endif

// For the sanitisers.  1: heap overflow.  2: overflow of a shared array.  3: signed overflow.  4: misaligned load.
template <int kBug>
__global__ void unsanitary(float* x, int* k, int n) {
  SIMT_SHARED(float, tile, [kThreads]);
  tile[threadIdx.x] = x[threadIdx.x % n + (kBug == 1 ? n : 0)];
  if (kBug == 2) gpu::store(&tile[0] + threadIdx.x + n, 1.0f);
  if (kBug == 3) k[0] += k[1];
  if (kBug == 4) tile[threadIdx.x] = static_cast<float>(*reinterpret_cast<const double*>(x + 1));
  __syncthreads();
  if (threadIdx.x == 0) x[0] = tile[kThreads - 1];
}

}  // namespace simt::planted
