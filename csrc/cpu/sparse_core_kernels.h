// SPDX-License-Identifier: Apache-2.0
//
// The sparse core's kernels for one ISA level; sparse_core.h is the contract. Compiled once for each level, by
// sparse_core_isa.cpp, and once more for bf16 features where pairs of those are multiplied, by sparse_core_bf16.cpp.
#pragma once
#include <type_traits>

#include "sparse_core.h"
#include "tiles.h"

namespace frodkernels::cpu::FRODKERNELS_ISA {

// Start of range `i` of `parts` nearly equal ones.
static int64_t part(int64_t size, int64_t i, int64_t parts) { return size * i / parts; }

// Independent chains of multiply-adds in flight: latency x throughput of the FMA units.
constexpr int kChains = 8;

// The rows of a packed tile that slots gather. Where they come from L2, or L3, that of a later slot is asked for while
// others are multiplied: from the near caches of the core, or for one or two of its lines, that would only be work.
template <typename S, int kChunks, typename Index>
class Gathered {
  using tile_t = typename S::tile;
  static constexpr int64_t kSlotsAhead = 12;
  const tile_t* const tile_;
  const int64_t width_, last_;
  const Index* const indices_;
  const bool far_;

 public:
  Gathered(const Product& a, const tile_t* tile, int64_t width)
      : tile_(tile),
        width_(width),
        last_(a.plan.nnz - 1),
        indices_(static_cast<const Index*>(a.plan.indices)),
        far_(a.tiling.far) {}

  // f(whether to ask, at compile time): one loop over slots or the other.
  template <typename F>
  [[gnu::always_inline]] void choose(F f) const {
    if constexpr (kChunks * kBytes >= 256) {
      if (far_) return f(std::true_type{});
    }
    f(std::false_type{});
  }

  template <bool kAsk>
  [[gnu::always_inline]] const tile_t* row(int64_t slot) const {
    if constexpr (kAsk) {
      const tile_t* later = tile_ + int64_t(indices_[smaller(slot + kSlotsAhead, last_)]) * width_;
#pragma GCC unroll 16
      for (int byte = 0; byte < kChunks * kBytes; byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(later) + byte, 0, 3);
    }
    return tile_ + int64_t(indices_[slot]) * width_;
  }
};

// ---- forward -------------------------------------------------------------------------------------------------------

// acc += sum_p values[p] rows.row(p), begin <= p < end. Few accumulators would make one long chain of dependent
// multiply-adds, so slots are dealt to several sets of them, added up in a fixed order.
template <bool kAsk, typename S, int kChunks, typename Index>
static inline void gather(const Gathered<S, kChunks, Index>& rows, const typename S::acc* values, int32_t begin,
                          int32_t end, typename S::Vec* acc) {
  using Vec = typename S::Vec;
  constexpr int kAcc = kChunks * S::kVecs;
  constexpr int kSets = kAcc >= kChains ? 1 : kChains / kAcc;
  auto add = [&](int32_t p, Vec* to) {
    const typename S::tile* row = rows.template row<kAsk>(p);
    const typename S::acc value = values[p];
    Vec x[kAcc];
#pragma GCC unroll 16
    for (int c = 0; c < kChunks; ++c) S::unpack(row + c * S::kTokens, x + c * S::kVecs);
#pragma GCC unroll 16
    for (int k = 0; k < kAcc; ++k) to[k] += value * x[k];
  };
  int32_t p = begin;
  if constexpr (kSets > 1) {
    if (end - begin >= kSets) {
      Vec sets[kSets - 1][kAcc] = {};
      for (; p + kSets <= end; p += kSets) {
        add(p, acc);
#pragma GCC unroll 16
        for (int s = 1; s < kSets; ++s) add(p + s, sets[s - 1]);
      }
#pragma GCC unroll 16
      for (int s = 1; s < kSets; ++s) {
#pragma GCC unroll 16
        for (int k = 0; k < kAcc; ++k) acc[k] += sets[s - 1][k];
      }
    }
  }
  for (; p < end; ++p) add(p, acc);
}

// Groups [g0, g1) over kChunks chunks of a packed tile, from column `at` of it.
template <typename S, int kChunks, typename Index>
static void forward_groups(const Product& a, const typename S::tile* tile, int64_t width, int64_t at, int64_t t0,
                           int64_t count, int64_t g0, int64_t g1) {
  using Vec = typename S::Vec;
  using acc_t = typename S::acc;
  constexpr int kAcc = kChunks * S::kVecs;
  const acc_t* __restrict__ values = static_cast<const acc_t*>(a.plan.values);
  const acc_t* __restrict__ lam = static_cast<const acc_t*>(a.plan.lam);
  tile += at;
  const Gathered<S, kChunks, Index> rows(a, tile, width);
  RowWriter<S, kChunks> out(a.out, t0 + at, count - at, a.add);
  for (int64_t g = g0; g < g1; ++g) {
    Vec acc[kAcc];
    if (lam != nullptr) {
#pragma GCC unroll 16
      for (int c = 0; c < kChunks; ++c) S::unpack(tile + g * width + c * S::kTokens, acc + c * S::kVecs);
#pragma GCC unroll 16
      for (int k = 0; k < kAcc; ++k) acc[k] *= lam[g];
    } else {
#pragma GCC unroll 16
      for (int k = 0; k < kAcc; ++k) acc[k] = Vec{};
    }
    rows.choose([&](auto ask) { gather<ask.value>(rows, values, a.plan.indptr[g], a.plan.indptr[g + 1], acc); });
    out.write(acc, g);
  }
  out.flush();
}

template <typename S, int kChunks, typename Index>
static void forward_tasks(const Product& a, int64_t begin, int64_t end) {
  const int64_t width = tile_tokens(a.type, a.tiling.lines);
  auto* tile = reinterpret_cast<typename S::tile*>(scratch(0, size_t(a.n_in * width) * sizeof(typename S::tile)));
  int64_t packed = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t which = task / a.tiling.blocks, block = task % a.tiling.blocks;
    const int64_t t0 = which * width, count = smaller(width, a.T - t0);
    if (which != packed) pack_tile<S>(a.in, a.n_in, t0, count, width, tile);
    packed = which;
    const int64_t g0 = part(a.n_out, block, a.tiling.blocks), g1 = part(a.n_out, block + 1, a.tiling.blocks);
    for (int64_t at = 0; at < count; at += kChunks * S::kTokens)
      forward_groups<S, kChunks, Index>(a, tile, width, at, t0, count, g0, g1);
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------

// Dot products waiting for their horizontal sums: a full set of vectors is summed by one tree of shuffles, and lane k
// of the result is added to the k-th partial sum from `next`. Always inline: its counters belong in registers.
template <typename S>
struct Dots {
  using Vec = typename S::Vec;
  Vec pending[S::kVecLanes];
  typename S::acc* next;
  int filled = 0;

  explicit Dots(typename S::acc* to) : next(to) {}

  [[gnu::always_inline]] void add(Vec dot) {
    pending[filled++] = dot;
    if (filled < S::kVecLanes) return;
    store(next, load<Vec>(next) + sum_each<Vec, typename S::Mask>(pending));
    next += S::kVecLanes;
    filled = 0;
  }

  [[gnu::always_inline]] void finish() {
    if (filled == 0) return;
    for (int k = filled; k < S::kVecLanes; ++k) pending[k] = Vec{};
    const Vec sums = sum_each<Vec, typename S::Mask>(pending);
    for (int k = 0; k < filled; ++k) next[k] += sums[k];
  }
};

// One packed row in registers, and its inner products with others. x: the other row unpacked, if that is at hand.
template <typename S, int kChunks>
struct Row {
  using Vec = typename S::Vec;
  static constexpr int kCount = kChunks * S::kVecs;
  Vec own[kCount];

  explicit Row(const typename S::tile* row) {
#pragma GCC unroll 16
    for (int c = 0; c < kChunks; ++c) S::unpack(row + c * S::kTokens, own + c * S::kVecs);
  }

  Vec dot(const typename S::tile* row, const Vec (&x)[kCount]) const {
    Vec sum = x[0] * own[0];
#pragma GCC unroll 16
    for (int k = 1; k < kCount; ++k) sum += x[k] * own[k];
    return sum;
  }
};

#if defined(__AVX512BF16__)
// By VDPBF16PS, which adds two products of bf16 numbers to a float32 sum: nothing to unpack.
template <int kChunks>
struct Row<BF16, kChunks> {
  __m512i own[kChunks];

  explicit Row(const uint16_t* row) {
#pragma GCC unroll 16
    for (int c = 0; c < kChunks; ++c) own[c] = _mm512_loadu_si512(row + c * BF16::kTokens);
  }

  vf dot(const uint16_t* row, const vf (&)[kChunks * BF16::kVecs]) const {
    __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int c = 0; c < kChunks; ++c) {
      const __m512i x = _mm512_loadu_si512(row + c * BF16::kTokens);
      sum = _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)own[c]);
    }
    return bits<vf>(sum);
  }
};
#endif

// As forward_groups on u, with the products against row g of z taken along: each gathered row of u is read once.
template <typename S, int kChunks, typename Index, bool kWantDz, bool kWantValues>
static void backward_groups(const Product& a, const typename S::tile* u, const typename S::tile* z, int64_t z_rows0,
                            int64_t width, int64_t at, int64_t t0, int64_t count, int64_t g0, int64_t g1, Ahead ahead,
                            typename S::acc* partial_values, typename S::acc* partial_lam) {
  using Vec = typename S::Vec;
  using acc_t = typename S::acc;
  constexpr int kAcc = kChunks * S::kVecs;
  const acc_t* __restrict__ values = static_cast<const acc_t*>(a.plan.values);
  const acc_t* __restrict__ lam = static_cast<const acc_t*>(a.plan.lam);
  u += at;
  z += at;
  const Gathered<S, kChunks, Index> rows(a, u, width);
  RowWriter<S, kChunks> out(a.out, t0 + at, count - at, a.add);
  Dots<S> by_slot(kWantValues ? partial_values + a.plan.indptr[g0] : nullptr);
  Dots<S> by_group(partial_lam != nullptr ? partial_lam + g0 : nullptr);
  for (int64_t g = g0; g < g1; ++g) {
    Vec acc[kAcc], own[kAcc];
    const Row<S, kChunks> zg(z + (g - z_rows0) * width);
    if (lam != nullptr) {
#pragma GCC unroll 16
      for (int c = 0; c < kChunks; ++c) S::unpack(u + g * width + c * S::kTokens, own + c * S::kVecs);
      if (partial_lam != nullptr) by_group.add(zg.dot(u + g * width, own));
    }
    if constexpr (kWantDz) {
#pragma GCC unroll 16
      for (int k = 0; k < kAcc; ++k) acc[k] = lam != nullptr ? own[k] * lam[g] : Vec{};
    }
    ahead.step();
    rows.choose([&](auto ask) {
      const int32_t end = a.plan.indptr[g + 1];
      for (int32_t p = a.plan.indptr[g]; p < end; ++p) {
        const typename S::tile* row = rows.template row<ask.value>(p);
        Vec x[kAcc];
#pragma GCC unroll 16
        for (int c = 0; c < kChunks; ++c) S::unpack(row + c * S::kTokens, x + c * S::kVecs);
        if constexpr (kWantDz) {
          const acc_t value = values[p];
#pragma GCC unroll 16
          for (int k = 0; k < kAcc; ++k) acc[k] += value * x[k];
        }
        if constexpr (kWantValues) by_slot.add(zg.dot(row, x));
      }
    });
    if constexpr (kWantDz) out.write(acc, g);
  }
  if constexpr (kWantDz) out.flush();
  if constexpr (kWantValues) by_slot.finish();
  if (partial_lam != nullptr && lam != nullptr) by_group.finish();
}

template <typename S, int kChunks, typename Index>
static void backward_tasks(const Product& a, int64_t begin, int64_t end) {
  using tile_t = typename S::tile;
  using acc_t = typename S::acc;
  const int64_t width = tile_tokens(a.type, a.tiling.lines);
  auto* u = reinterpret_cast<tile_t*>(scratch(0, size_t(a.n_in * width) * sizeof(tile_t)));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t split = task / a.tiling.blocks, block = task % a.tiling.blocks;
    const int64_t g0 = part(a.n_out, block, a.tiling.blocks), g1 = part(a.n_out, block + 1, a.tiling.blocks);
    auto* partial_values = static_cast<acc_t*>(a.partial_values);
    auto* partial_lam = static_cast<acc_t*>(a.partial_lam);
    if (partial_values != nullptr) {
      partial_values += split * a.plan.nnz;
      const int64_t p0 = a.plan.indptr[g0], p1 = a.plan.indptr[g1];
      std::memset(partial_values + p0, 0, size_t(p1 - p0) * sizeof(acc_t));
    }
    if (partial_lam != nullptr) {
      partial_lam += split * a.n_out;
      std::memset(partial_lam + g0, 0, size_t(g1 - g0) * sizeof(acc_t));
    }
    const int64_t first = part(a.tiling.tiles, split, a.tiling.splits);
    const int64_t last = part(a.tiling.tiles, split + 1, a.tiling.splits);
    for (int64_t which = first; which < last; ++which) {
      const int64_t t0 = which * width, count = smaller(width, a.T - t0);
      pack_tile<S>(a.in, a.n_in, t0, count, width, u);
      // z is streamed: a few rows at a time through L1, so that u keeps L2 to itself.
      constexpr int64_t kRows = 32;
      auto* z = reinterpret_cast<tile_t*>(scratch(1, size_t(kRows * width) * sizeof(tile_t)));
      for (int64_t r0 = g0; r0 < g1; r0 += kRows) {
        const int64_t r1 = smaller(r0 + kRows, g1);
        Features rows = a.z;
        rows.data = static_cast<typename S::scalar*>(a.z.data) + r0 * a.z.row;
        pack_tile<S>(rows, r1 - r0, t0, count, width, z);
        // The next rows' lines, while these are multiplied.
        const bool more = r1 < g1 && a.z.row == 1 && a.z.token != 1;
        const auto* next = static_cast<const typename S::scalar*>(rows.data) + (r1 - r0) + t0 * a.z.token;
        const int64_t stride = a.z.token * int64_t(sizeof(typename S::scalar));
        for (int64_t at = 0; at < count; at += kChunks * S::kTokens) {
          const Ahead ahead(more ? next + at * a.z.token : nullptr, stride, smaller(kChunks * S::kTokens, count - at),
                            r1 - r0);
          auto run = [&](auto dz, auto dvalues) {
            backward_groups<S, kChunks, Index, dz.value, dvalues.value>(a, u, z, r0, width, at, t0, count, r0, r1,
                                                                        ahead, partial_values, partial_lam);
          };
          const bool want_dz = a.out.data != nullptr, want_values = partial_values != nullptr;
          if (want_dz && want_values) {
            run(std::true_type{}, std::true_type{});
          } else if (want_dz) {
            run(std::true_type{}, std::false_type{});
          } else if (want_values) {
            run(std::false_type{}, std::true_type{});
          } else {
            run(std::false_type{}, std::false_type{});
          }
        }
      }
    }
  }
}

// ---- dispatch over storage, index width and chunks in registers -----------------------------------------------------

template <typename S, int kMost, typename F>
static void with_chunks(const Product& a, F f) {
  const int chunks = int(tile_tokens(a.type, a.tiling.lines) / S::kTokens);
  auto index = [&](auto n) {
    if (a.plan.narrow) {
      f(n, uint16_t{});
    } else {
      f(n, int32_t{});
    }
  };
  if constexpr (kMost >= 8) {
    if (chunks >= 8) return index(std::integral_constant<int, 8>{});
  }
  if constexpr (kMost >= 4) {
    if (chunks >= 4) return index(std::integral_constant<int, 4>{});
  }
  if (chunks >= 2) return index(std::integral_constant<int, 2>{});
  if constexpr (kBytes == 64) index(std::integral_constant<int, 1>{});  // narrower vectors: a line is 2 chunks or more
}

// Chunks whose accumulators fit the registers: 32 vectors with AVX-512, 16 below.
template <typename S>
constexpr int kForwardChunks = kBytes == 64 ? 4 : 8 / S::kVecs;
template <typename S>
constexpr int kBackwardChunks = kBytes == 64 ? 4 : 4 / S::kVecs;

template <typename S>
static void forward_as(const Product& a, int64_t begin, int64_t end) {
  with_chunks<S, kForwardChunks<S>>(
      a, [&](auto n, auto index) { forward_tasks<S, n.value, decltype(index)>(a, begin, end); });
}

template <typename S>
static void backward_as(const Product& a, int64_t begin, int64_t end) {
  with_chunks<S, kBackwardChunks<S>>(
      a, [&](auto n, auto index) { backward_tasks<S, n.value, decltype(index)>(a, begin, end); });
}

}  // namespace frodkernels::cpu::FRODKERNELS_ISA
