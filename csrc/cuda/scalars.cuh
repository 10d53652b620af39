// SPDX-License-Identifier: Apache-2.0
//
// Storage types on the device: float, double, __half, __nv_bfloat16. Sums are float, double for double; 16 bytes of
// storage are unpacked to sums and packed from them, each number rounded once.
//
//   acc_t<scalar_t>                  what scalar_t is summed in
//   kVec<scalar_t>                   elements in 16 bytes
//   unpack<scalar_t>(raw, x)         16 bytes to kVec sums;   pack<scalar_t>(x)  the reverse, rounded
//   read_scalar<acc>(vector, k)      entry k of a vector whose dtype is known at run time;   write_scalar  the reverse
//   rounded_pair<scalar_t>(a, b)     two numbers of 16 bits in 32
//   Rows<scalar_t>                   a [features, T] matrix and whether its rows start on 16 bytes
//   load_tokens, store_tokens        up to kVec tokens of a row: one 16-byte access where alignment allows, else one
//   each
#pragma once
#include <cstring>
#include <type_traits>

#include "cuda/gpu.cuh"
#include "cuda/sparse_core.h"

namespace frodkernels::cuda {

template <typename scalar_t>
using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename scalar_t>
constexpr int kVec = 16 / static_cast<int>(sizeof(scalar_t));

template <typename To, typename From>
__device__ __forceinline__ To same_bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "same_bits keeps the size");
  To to;
  memcpy(&to, &value, sizeof(To));
  return to;
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename scalar_t, typename acc>
__device__ __forceinline__ scalar_t rounded(acc x) {
  if constexpr (std::is_same_v<scalar_t, __half>) {
    if constexpr (std::is_same_v<acc, double>) return __double2half(x);
    return __float2half_rn(static_cast<float>(x));
  } else if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
    if constexpr (std::is_same_v<acc, double>) return __double2bfloat16(x);
    return __float2bfloat16_rn(static_cast<float>(x));
  } else {
    return static_cast<scalar_t>(x);
  }
}

// Two numbers of 16 bits each, the first in the lower half.
template <typename scalar_t>
__device__ __forceinline__ uint32_t rounded_pair(float low, float high) {
  if constexpr (std::is_same_v<scalar_t, __half>) {
    return same_bits<uint32_t>(__floats2half2_rn(low, high));
  } else {
    return same_bits<uint32_t>(__floats2bfloat162_rn(low, high));
  }
}

template <typename scalar_t>
__device__ __forceinline__ void unpack(uint4 raw, acc_t<scalar_t> (&x)[kVec<scalar_t>]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<scalar_t, float>) {
      x[i] = __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<scalar_t, double>) {
      if (i < 2) x[i] = same_bits<double>(static_cast<uint64_t>(words[2 * i + 1]) << 32 | words[2 * i]);
    } else if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    } else {
      x[2 * i] = __half2float(same_bits<__half>(static_cast<uint16_t>(words[i])));
      x[2 * i + 1] = __half2float(same_bits<__half>(static_cast<uint16_t>(words[i] >> 16)));
    }
  }
}

template <typename scalar_t>
__device__ __forceinline__ uint4 pack(const acc_t<scalar_t> (&x)[kVec<scalar_t>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<scalar_t, float>) {
      words[i] = __float_as_uint(x[i]);
    } else if constexpr (std::is_same_v<scalar_t, double>) {
      words[i] = static_cast<uint32_t>(same_bits<uint64_t>(x[i / 2]) >> 32 * (i % 2));
    } else if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
      words[i] = same_bits<uint32_t>(__floats2bfloat162_rn(x[2 * i], x[2 * i + 1]));
    } else {
      words[i] = same_bits<uint32_t>(__floats2half2_rn(x[2 * i], x[2 * i + 1]));
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <typename acc>
__device__ __forceinline__ acc read_scalar(const Vector& from, int64_t k) {
  switch (from.type) {
    case Scalar::kF32:
      return static_cast<acc>(static_cast<const float*>(from.data)[k]);
    case Scalar::kF64:
      return static_cast<acc>(static_cast<const double*>(from.data)[k]);
    case Scalar::kBF16:
      return static_cast<acc>(__bfloat162float(static_cast<const __nv_bfloat16*>(from.data)[k]));
    case Scalar::kF16:
      return static_cast<acc>(__half2float(static_cast<const __half*>(from.data)[k]));
  }
  return acc(0);
}

template <typename acc>
__device__ __forceinline__ void write_scalar(const Vector& to, int64_t k, acc value) {
  switch (to.type) {
    case Scalar::kF32:
      static_cast<float*>(to.data)[k] = rounded<float>(value);
      return;
    case Scalar::kF64:
      static_cast<double*>(to.data)[k] = static_cast<double>(value);
      return;
    case Scalar::kBF16:
      static_cast<__nv_bfloat16*>(to.data)[k] = rounded<__nv_bfloat16>(value);
      return;
    case Scalar::kF16:
      static_cast<__half*>(to.data)[k] = rounded<__half>(value);
      return;
  }
}

// The column of slot p of a compressed view.
__device__ __forceinline__ int32_t read_index(const Compressed& view, int64_t p) {
  return view.narrow ? static_cast<int32_t>(static_cast<const uint16_t*>(view.indices)[p])
                     : static_cast<const int32_t*>(view.indices)[p];
}

template <typename scalar_t>
struct Rows {
  scalar_t* data;
  int64_t stride;
  bool aligned;  // data and the rows' distance are multiples of 16 bytes
};

template <typename scalar_t>
Rows<scalar_t> rows_of(void* data, int64_t stride) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kVec<scalar_t> == 0;
  return {static_cast<scalar_t*>(data), stride, aligned};
}
template <typename scalar_t>
Rows<const scalar_t> rows_of(const void* data, int64_t stride) {
  const Rows<scalar_t> rows = rows_of<scalar_t>(const_cast<void*>(data), stride);
  return {rows.data, rows.stride, rows.aligned};
}

// Of the kVec tokens from t: how many there are.
template <typename scalar_t>
__device__ __forceinline__ int live_tokens(int64_t T, int64_t t) {
  const int64_t left = T - t;
  return left >= kVec<scalar_t> ? kVec<scalar_t> : left > 0 ? static_cast<int>(left) : 0;
}

// The first `live` of kVec tokens, zeros after them.
template <typename scalar_t>
__device__ __forceinline__ uint4 load_tokens(const scalar_t* from, int live, bool aligned) {
  if (aligned && live == kVec<scalar_t>) return gpu::load<uint4>(from);
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < kVec<scalar_t>; ++i) {
    if constexpr (sizeof(scalar_t) == 8) {
      const uint64_t bits = i < live ? same_bits<uint64_t>(from[i]) : 0;
      words[2 * i] = static_cast<uint32_t>(bits);
      words[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
    } else if constexpr (sizeof(scalar_t) == 4) {
      words[i] = i < live ? same_bits<uint32_t>(from[i]) : 0;
    } else {
      const uint32_t bits = i < live ? same_bits<uint16_t>(from[i]) : 0;
      words[i / 2] |= bits << 16 * (i % 2);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <typename scalar_t>
__device__ __forceinline__ void store_tokens(scalar_t* to, const acc_t<scalar_t> (&x)[kVec<scalar_t>], int live,
                                             bool aligned) {
  if (aligned && live == kVec<scalar_t>) {
    gpu::store(to, pack<scalar_t>(x));
    return;
  }
#pragma unroll
  for (int i = 0; i < kVec<scalar_t>; ++i) {
    if (i < live) to[i] = rounded<scalar_t>(x[i]);
  }
}

}  // namespace frodkernels::cuda
