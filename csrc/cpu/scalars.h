// SPDX-License-Identifier: Apache-2.0
//
// Storage types by name, and their scalar conversions (round to nearest even, NaN stays NaN). Internal linkage: the
// same header is compiled under several instruction sets.
#pragma once
#include <cstdint>
#include <cstring>

namespace frodkernels::cpu {

enum class Scalar : uint8_t { kF32, kF64, kBF16, kF16 };

namespace {

inline float word_to_float(uint32_t w) {
  float f;
  std::memcpy(&f, &w, 4);
  return f;
}
inline uint32_t float_to_word(float f) {
  uint32_t w;
  std::memcpy(&w, &f, 4);
  return w;
}

[[maybe_unused]] inline float bf16_to_float(uint16_t h) { return word_to_float(uint32_t(h) << 16); }
[[maybe_unused]] inline uint16_t float_to_bf16(float f) {
  const uint32_t w = float_to_word(f);
  if (f != f) return uint16_t(w >> 16) | 0x40;
  return uint16_t((w + 0x7fff + ((w >> 16) & 1)) >> 16);
}

[[maybe_unused]] inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, body = uint32_t(h & 0x7fff) << 13;
  if ((h & 0x7c00) == 0x7c00) return word_to_float(sign | body | 0x7f800000);  // Inf, NaN
  if (h & 0x7c00) return word_to_float(sign | (body + ((127u - 15u) << 23)));  // normal
  const float f = float(h & 0x3ff) * 5.9604644775390625e-8f;                   // subnormal: units of 2^-24
  return sign ? -f : f;
}
[[maybe_unused]] inline uint16_t float_to_half(float f) {
  const uint32_t w = float_to_word(f), sign = (w >> 16) & 0x8000, a = w & 0x7fffffff;
  if (a > 0x7f800000) return uint16_t(sign | 0x7e00 | ((a >> 13) & 0x3ff));  // NaN
  if (a >= 0x477ff000) return uint16_t(sign | 0x7c00);                       // rounds to infinity
  if (a < 0x38800000) {                                                      // subnormal or zero
    // Adding 0.5 moves the value's 2^-24 units to the low mantissa bits, rounded to nearest even by the addition.
    return uint16_t(sign | (float_to_word(word_to_float(a) + 0.5f) - 0x3f000000));
  }
  return uint16_t(sign | ((a + 0xfff + ((a >> 13) & 1) - ((127u - 15u) << 23)) >> 13));
}

}  // namespace
}  // namespace frodkernels::cpu
