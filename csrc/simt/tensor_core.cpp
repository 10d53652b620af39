// SPDX-License-Identifier: Apache-2.0
//
// mma and ldmatrix, with the fragment layouts of cuda/ptx.cuh. Products are exact; the sum of an mma and what it is
// added to is kept in double and then cut to fp32 towards zero, which is how tensor cores have been found to round.
// What they cut within one mma, and their order there, is not modelled.
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>

#include "simt/block.h"

namespace simt {
namespace {

struct MmaLane {
  Element element;
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// The float of each half: the toolkit's conversion works bit by bit on the host.
const std::vector<float> kHalves = [] {
  std::vector<float> floats(1 << 16);
  for (uint32_t i = 0; i < floats.size(); ++i) floats[i] = __half(__half_raw{static_cast<unsigned short>(i)});
  return floats;
}();

template <Element kElement>
float element(uint32_t pair, int high) {
  if constexpr (kElement == Element::kBFloat16) {
    const uint32_t bits = high ? pair & 0xffff0000u : pair << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  } else {
    return kHalves[pair >> (16 * high) & 0xffff];
  }
}

// The fp32 next to `sum` on the side of zero; infinities and NaN as they are.
float cut(double sum) {
  const float nearest = static_cast<float>(sum);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(sum) ? std::nextafterf(nearest, 0.0f) : nearest;
}

template <Element kElement>
void mma_lanes(void** lanes, uint32_t, Warp&) {
  float a[16][16], b[16][8];
  double d[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& m = *static_cast<MmaLane*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int h = 0; h < 2; ++h) {
      a[g][t + h] = element<kElement>(m.a[0], h);
      a[g + 8][t + h] = element<kElement>(m.a[1], h);
      a[g][t + 8 + h] = element<kElement>(m.a[2], h);
      a[g + 8][t + 8 + h] = element<kElement>(m.a[3], h);
      b[t + h][g] = element<kElement>(m.b[0], h);
      b[t + 8 + h][g] = element<kElement>(m.b[1], h);
      d[g][t + h] = m.d[h];
      d[g + 8][t + h] = m.d[2 + h];
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) d[i][j] += static_cast<double>(a[i][k]) * static_cast<double>(b[k][j]);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& m = *static_cast<MmaLane*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int h = 0; h < 2; ++h) {
      m.d[h] = cut(d[g][t + h]);
      m.d[2 + h] = cut(d[g + 8][t + h]);
    }
  }
  ++block->counts.mma;
}

struct LdmatrixLane {
  uint32_t* fragments;
  const void* row;
  int matrices;
  bool transposed;
  const void* pc;
};

void read_row(const LdmatrixLane& lane, int matrix, int row, bool transposed, const void* pc, Warp& w, uint16_t* out) {
  if (reinterpret_cast<uintptr_t>(lane.row) % 16) {
    fail("misaligned ldmatrix: the address of row %d of matrix %d is not a multiple of 16, at %s", row, matrix,
         pc_text(pc).c_str());
  }
  auto thread = [&](int i) -> const Thread& { return block->threads[static_cast<size_t>(w.number * kWarp + i)]; };
  // Counted as a read of the lane that names the row; ordered as one of two lanes that receive of it, so that whoever
  // wrote the row without a barrier is another thread than one of them.
  checked_access(lane.row, 16, kRead, pc, thread(matrix * 8 + row));
  const int receiver = transposed ? row / 2 : row * 4;
  checked_access(lane.row, 16, kRead | kShadow, pc, thread(receiver));
  checked_access(lane.row, 16, kRead | kShadow, pc, thread(transposed ? receiver + 4 : receiver + 1));
  std::memcpy(out, lane.row, 16);
}

void ldmatrix_lanes(void** lanes, uint32_t, Warp& w) {
  auto at = [&](int i) -> LdmatrixLane& { return *static_cast<LdmatrixLane*>(lanes[i]); };
  const int matrices = at(0).matrices;
  const bool transposed = at(0).transposed;
  for (int j = 0; j < matrices; ++j) {
    uint16_t m[8][8];
    for (int r = 0; r < 8; ++r) read_row(at(j * 8 + r), j, r, transposed, at(0).pc, w, m[r]);
    for (int lane = 0; lane < kWarp; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      const uint32_t low = transposed ? m[t][g] : m[g][t], high = transposed ? m[t + 1][g] : m[g][t + 1];
      at(lane).fragments[j] = low | high << 16;
    }
  }
  ++block->counts.ldmatrix;
}

}  // namespace

void mma_m16n8k16(Element element, float* d, const uint32_t* a, const uint32_t* b, Place place) {
  MmaLane lane{element, d, a, b};
  const Combine combine = element == Element::kHalf ? mma_lanes<Element::kHalf> : mma_lanes<Element::kBFloat16>;
  collective(kAllLanes, &lane, combine, true, true, place);
}

void ldmatrix(uint32_t* fragments, int matrices, bool transposed, const void* row, Place place) {
  LdmatrixLane lane{fragments, row, matrices, transposed, __builtin_return_address(0)};
  collective(kAllLanes, &lane, ldmatrix_lanes, true, true, place);
}

}  // namespace simt
