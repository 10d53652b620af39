// SPDX-License-Identifier: Apache-2.0
//
// Kernels that show what an instruction does, or ask for memory in a pattern whose cost is known.
#pragma once
#include "cuda/gpu.cuh"

namespace simt::planted {

// d += a b; fragments as the lanes hold them: a [32, 4], b [32, 2], d [32, 4].
template <class scalar_t>
__global__ void mma_fragments(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = threadIdx.x;
  const uint32_t fa[4] = {a[4 * lane], a[4 * lane + 1], a[4 * lane + 2], a[4 * lane + 3]};
  const uint32_t fb[2] = {b[2 * lane], b[2 * lane + 1]};
  float fd[4];
  for (int i = 0; i < 4; ++i) fd[i] = d[4 * lane + i];
  ptx::mma_m16n8k16<scalar_t>(fd, fa, fb);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = fd[i];
}

// x [32, 4] uint32: row i is what lane i points to. r [32, kMatrices].
template <int kMatrices, bool kTransposed>
__global__ void ldmatrix_fragments(const uint32_t* x, uint32_t* r) {
  SIMT_SHARED(uint32_t, rows, [32][4]);
  const int lane = threadIdx.x;
  for (int i = 0; i < 4; ++i) rows[lane][i] = x[4 * lane + i];
  __syncthreads();
  uint32_t f[kMatrices];
  if constexpr (kMatrices == 1) kTransposed ? ptx::ldmatrix_x1_trans(f, rows[lane]) : ptx::ldmatrix_x1(f, rows[lane]);
  if constexpr (kMatrices == 2) kTransposed ? ptx::ldmatrix_x2_trans(f, rows[lane]) : ptx::ldmatrix_x2(f, rows[lane]);
  if constexpr (kMatrices == 4) kTransposed ? ptx::ldmatrix_x4_trans(f, rows[lane]) : ptx::ldmatrix_x4(f, rows[lane]);
  for (int i = 0; i < kMatrices; ++i) r[kMatrices * lane + i] = f[i];
}

// y [32, bytes] = what cp.async<kBytes> brings of x [32, bytes] when lane i copies source[i] bytes.
template <int kBytes>
__global__ void copy_bytes(const unsigned char* x, const int* source, unsigned char* y) {
  SIMT_SHARED(uint4, tile, [32]);
  auto* bytes = reinterpret_cast<unsigned char*>(&tile[0]);
  const int lane = threadIdx.x;
  ptx::cp_async<kBytes>(bytes + kBytes * lane, x + kBytes * lane, source[lane]);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  for (int i = 0; i < kBytes; ++i) y[kBytes * lane + i] = bytes[kBytes * lane + i];
}

// y [32, 19]: what each warp collective gives to each lane for x [32].
constexpr int kCollectives = 19;
__global__ static void collectives(const int* x, int* y) {
  const unsigned all = 0xffffffffu;
  const int lane = threadIdx.x, v = x[lane];
  int* out = y + kCollectives * lane;
  *out++ = __shfl_sync(all, v, lane * 5);
  *out++ = __shfl_up_sync(all, v, 3);
  *out++ = __shfl_down_sync(all, v, 3);
  *out++ = __shfl_xor_sync(all, v, 9);
  *out++ = __shfl_sync(all, v, 3, 8);
  *out++ = __shfl_up_sync(all, v, 3, 8);
  *out++ = __shfl_down_sync(all, v, 3, 8);
  *out++ = __shfl_xor_sync(all, v, 9, 8);
  *out++ = static_cast<int>(__ballot_sync(all, v > 0));
  *out++ = __any_sync(all, v == x[31]);
  *out++ = __all_sync(all, v > 0);
  *out++ = static_cast<int>(__match_any_sync(all, v & 3));
  *out++ = __reduce_add_sync(all, v);
  *out++ = __reduce_min_sync(all, v);
  *out++ = __reduce_max_sync(all, v);
  *out++ = static_cast<int>(__reduce_max_sync(all, static_cast<unsigned>(v)));
  *out++ = static_cast<int>(__reduce_and_sync(all, static_cast<unsigned>(v)));
  *out++ = static_cast<int>(__reduce_or_sync(all, static_cast<unsigned>(v)));
  *out++ = static_cast<int>(__reduce_xor_sync(all, static_cast<unsigned>(v)));
}

// y [threads, 3]: the counting barriers for x [threads].
__global__ static void counting_barriers(const int* x, int* y) {
  const int i = threadIdx.x;
  y[3 * i] = __syncthreads_count(x[i] > 0);
  y[3 * i + 1] = __syncthreads_and(x[i] > 0);
  y[3 * i + 2] = __syncthreads_or(x[i] > 0);
}

// y [14]: bit functions of a and b.
__global__ static void bit_functions(const uint32_t* x, uint32_t* y) {
  const uint32_t a = x[0], b = x[1];
  *y++ = static_cast<uint32_t>(__popc(a));
  *y++ = static_cast<uint32_t>(__ffs(static_cast<int>(a)));
  *y++ = static_cast<uint32_t>(__clz(static_cast<int>(a)));
  *y++ = __brev(a);
  *y++ = __byte_perm(a, b, 0x5410);
  *y++ = __byte_perm(a, b, 0xf862);
  *y++ = __funnelshift_l(a, b, 7);
  *y++ = __funnelshift_r(a, b, 7);
  *y++ = __umulhi(a, b);
  *y++ = static_cast<uint32_t>(__mulhi(static_cast<int>(a), static_cast<int>(b)));
  *y++ = __float_as_uint(__uint_as_float(a));
  *y++ = __float_as_uint(fmaf(2.0f, 3.0f, 4.0f));
  *y++ = static_cast<uint32_t>(min(static_cast<int>(a), 3));
  *y++ = __activemask();
}

// The 16-bit vector types: y [4] floats of x * x + x, and x + x, x [2].
template <class scalar2_t>
__global__ void paired_arithmetic(const scalar2_t* x, scalar2_t* y) {
  y[0] = __hfma2(x[0], x[0], x[0]);
  y[1] = __hadd2(x[0], x[0]);
  y[2] = x[0];
  atomicAdd(&y[2], __hmul2(x[0], x[0]));
}

// Lane i of `lanes` loads a V at byte offsets[i]: from global memory ...
template <class V>
__global__ void load_global(const char* x, const int* offsets, V* y, int lanes) {
  if (static_cast<int>(threadIdx.x) >= lanes) return;
  const int offset = offsets[threadIdx.x];
  const V v = gpu::load<V>(x + offset);  // counted: global loads
  gpu::store(y + threadIdx.x, v);
}

// ... and from shared memory, which holds x [bytes].
template <class V>
__global__ void load_shared(const char* x, const int* offsets, V* y, int lanes, int bytes) {
  SIMT_DYN_SHARED(char, p);
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) p[i] = x[i];
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= lanes) return;
  const int offset = offsets[threadIdx.x];
  const V v = gpu::load<V>(p + offset);  // counted: shared loads
  gpu::store(y + threadIdx.x, v);
}

template <class V>
__global__ void store_shared(const int* offsets, V* y, int lanes) {
  SIMT_DYN_SHARED(char, p);
  if (static_cast<int>(threadIdx.x) >= lanes) return;
  const int offset = offsets[threadIdx.x];
  gpu::store(p + offset, V{});  // counted: shared stores
  y[threadIdx.x] = V{};
}

// ldmatrix.x4 with lane i's row at byte offsets[i].
__global__ static void load_rows(const int* offsets, uint32_t* y, int bytes) {
  SIMT_DYN_SHARED(char, p);
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) p[i] = 0;
  __syncthreads();
  const int offset = offsets[threadIdx.x];
  uint32_t r[4];
  ptx::ldmatrix_x4(r, p + offset);  // counted: ldmatrix
  y[threadIdx.x] = r[0] + r[1] + r[2] + r[3];
}

// Each lane copies 16 bytes from x + 16 * stride * lane to its place in shared memory.
__global__ static void copy_sixteens(const char* x, float* y, int stride) {
  SIMT_SHARED(float4, tile, [32]);
  ptx::cp_async<16>(&tile[threadIdx.x], x + 16 * stride * threadIdx.x);  // counted: cp.async
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  y[threadIdx.x] = tile[threadIdx.x].x;
}

// Lane i makes i % 4 + 1 trips of a loop without a collective in it, or with one.
template <bool kCollective>
__global__ void uneven_trips(const float* x, float* y) {
  float sum = 0;
  for (int t = 0; t < 4; ++t) {
    if (t <= static_cast<int>(threadIdx.x) % 4) sum += x[32 * t + threadIdx.x];  // counted: uneven trips
    if (kCollective) __syncwarp();
  }
  y[threadIdx.x] = sum;
}

}  // namespace simt::planted
