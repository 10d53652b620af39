// SPDX-License-Identifier: Apache-2.0
//
// The words that the kernels read: what tiles.h calls meta, as addresses, one 32-bit word a lane and step.
//
//   bits 0..13    where the feature of slot (octet l >> 4, k = l & 7) lies, in units of 16 bytes of the block's buffer
//   bits 14..27   the same for slot (octet 2 + (l >> 4), k = l & 7)
//   bits 28..29   p1 of lane l;   bits 30..31   p2 of lane l
//
// A feature of 32 tokens takes four units; its first 8 tokens lie in unit  4 p + (p / 2) % 4  for position p, its
// others in the units that differ from it in the two lowest bits (csrc/cuda/mma_common.cuh).
#pragma once
#include <cstdint>

namespace frodkernels::tiles {

inline uint32_t first_unit(uint32_t position) { return position * 4 + (position / 2 & 3); }

// meta and words: the 32 lanes of one step.
inline void lane_words(const uint16_t* meta, int32_t* words) {
  for (uint32_t l = 0; l < 32; ++l) {
    const uint32_t low = meta[(l >> 4) * 8 + (l & 7)] & 4095u, high = meta[(2 + (l >> 4)) * 8 + (l & 7)] & 4095u;
    words[l] = static_cast<int32_t>(first_unit(low) | first_unit(high) << 14 | uint32_t(meta[l]) >> 12 << 28);
  }
}

}  // namespace frodkernels::tiles
