// SPDX-License-Identifier: Apache-2.0
//
// Factors in the order in which tensor cores want them: units of 16 (depth) x 16 (columns) numbers, as B fragments.
//
// A unit is kParts parts of 512 bytes. In a part, lane (g, q) of a warp owns 16 bytes: for column g, then for column
// 8 + g, the numbers of depth 2q, 2q + 1, 2q + 8 and 2q + 9 in 16 bits each. The parts add up to the number: a part is
// what the parts before it have left, rounded. Three of bfloat16 are all 24 bits of a float. So are three of float16,
// of numbers that are scaled by column and unit to lie near the top of its range: to 2^-39 of the largest. Its 16
// inverse scales follow.
#pragma once
#include "cuda/householder.h"
#include "cuda/scalars.cuh"

namespace frodkernels::cuda::householder {

constexpr int kPackThreads = 256;  // a warp a unit
constexpr int kParts = 3, kPartBytes = 512, kRightUnitBytes = 2 * kPartBytes;

template <typename scalar_t>
constexpr int kUnitBytes = kParts * kPartBytes + (std::is_same_v<scalar_t, __half> ? 64 : 0);

template <typename scalar_t>
__device__ __forceinline__ float2 widened_pair(uint32_t pair) {
  if constexpr (std::is_same_v<scalar_t, __half>) {
    return make_float2(__half2float(same_bits<__half>(static_cast<uint16_t>(pair))),
                       __half2float(same_bits<__half>(static_cast<uint16_t>(pair >> 16))));
  } else {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
}

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) <= 3.402823466e38f; }

// Two numbers rounded; what is left of them stays. Nothing is left of infinities.
template <typename scalar_t>
__device__ __forceinline__ uint32_t take_part(float (&x)[2]) {
  const uint32_t pair = rounded_pair<scalar_t>(x[0], x[1]);
  const float2 taken = widened_pair<scalar_t>(pair);
  x[0] = is_finite(taken.x) ? x[0] - taken.x : 0;
  x[1] = is_finite(taken.y) ? x[1] - taken.y : 0;
  return pair;
}

// A power of two that brings `largest` into [2^14, 2^15), as far as floats go.
__device__ __forceinline__ float unit_scale(float largest) {
  if (largest == 0) return 1;
  const int exponent = 14 - ilogbf(largest);
  return ldexpf(1.0f, exponent > 126 ? 126 : exponent);
}

// A lane's share of a unit in global or shared memory.
template <typename scalar_t>
__device__ __forceinline__ void load_unit(uint4 (&parts)[kParts], float2 (&scales)[2], const char* unit, int lane) {
#pragma unroll
  for (int p = 0; p < kParts; ++p) parts[p] = gpu::load<uint4>(unit + p * kPartBytes + lane * 16);
  if constexpr (std::is_same_v<scalar_t, __half>) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      scales[j] = gpu::load<float2>(unit + kParts * kPartBytes + j * 32 + (lane & 3) * 8);
    }
  }
}

// sums += d, whose columns 2q and 2q + 1 are scaled.
template <typename scalar_t>
__device__ __forceinline__ void add_scaled(float (&sums)[4], const float (&d)[4], float2 scale) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<scalar_t, __half>) {
      sums[i] += d[i] * (i % 2 == 0 ? scale.x : scale.y);
    } else {
      sums[i] += d[i];
    }
  }
}

// A matrix to pack: number (k, c), k the depth, is from[k * k_step + c * c_step]; unit (k / 16, c / 16) is the
// (k / 16 * k_place + c / 16 * c_place)-th.
struct Pack {
  const float* from;
  char* to;
  int64_t k_step, c_step, depth, columns;
  int64_t units, c_units, k_place, c_place;  // in all, and side by side
};

template <typename scalar_t, int kCount, bool kScaled>
__device__ __forceinline__ void pack_unit(const Pack& p, int64_t index, int bytes, int lane) {
  const int64_t k_unit = index / p.c_units, c_unit = index - k_unit * p.c_units;
  const int q = lane & 3, g = lane >> 2;
  char* const to = p.to + (k_unit * p.k_place + c_unit * p.c_place) * bytes;
  float v[4][2];  // column g: depths 2q, 2q + 1; 2q + 8, 2q + 9; then column 8 + g
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int64_t c = c_unit * 16 + j * 8 + g;
    float largest = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t k = k_unit * 16 + 2 * q + i % 2 + i / 2 * 8;
      const float x = k < p.depth && c < p.columns ? p.from[k * p.k_step + c * p.c_step] : 0;
      v[j * 2 + i / 2][i % 2] = x;
      if (is_finite(x)) largest = fmaxf(largest, fabsf(x));
    }
    if constexpr (kScaled) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      const float scale = unit_scale(largest);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[j * 2 + i / 2][i % 2] *= scale;
      if (q == 0) gpu::store(to + kCount * kPartBytes + (j * 8 + g) * 4, 1 / scale);
    }
  }
#pragma unroll
  for (int part = 0; part < kCount; ++part) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = take_part<scalar_t>(v[i]);
    gpu::store(to + part * kPartBytes + lane * 16, make_uint4(words[0], words[1], words[2], words[3]));
  }
}

// `first` and `second` as left factors; kRight: `second` as a right one, two parts of bfloat16.
template <typename scalar_t, bool kRight>
__global__ void __launch_bounds__(kPackThreads) householder_pack_kernel(const Pack first, const Pack second) {
  const int lane = threadIdx.x % 32;
  const int64_t unit = int64_t(blockIdx.x) * (kPackThreads / 32) + threadIdx.x / 32;
  constexpr bool kScaled = std::is_same_v<scalar_t, __half>;
  if (unit < first.units) {
    pack_unit<scalar_t, kParts, kScaled>(first, unit, kUnitBytes<scalar_t>, lane);
  } else if (unit - first.units < second.units) {
    if constexpr (kRight) {
      pack_unit<__nv_bfloat16, 2, false>(second, unit - first.units, kRightUnitBytes, lane);
    } else {
      pack_unit<scalar_t, kParts, kScaled>(second, unit - first.units, kUnitBytes<scalar_t>, lane);
    }
  }
}

}  // namespace frodkernels::cuda::householder
