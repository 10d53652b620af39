// SPDX-License-Identifier: Apache-2.0
//
// The kernels of householder.h for one ISA level.
#include "householder.h"
#include "householder_layout.h"
#include "products.h"
#include "scratch.h"

namespace frodkernels::cpu::FRODKERNELS_ISA {
namespace {

// Features of the input converted at a time: with the rows of `left` that they meet they stay in L1.
constexpr int64_t kPanel = 256;
constexpr int kPanelStride = kPanel + 16;  // rows a power of two apart would share cache sets

// Features of the update and the sums at a time.
template <typename W>
constexpr int64_t kBlock = 2 * kColumns<W>;

// ---- one tile ------------------------------------------------------------------------------------------------------

// Scratch of a tile, in the accumulation type.
template <typename W>
struct Workspace {
  using acc = typename W::scalar;
  acc* panel;   // [kGroup][kPanelStride] converted input
  acc* sums;    // [tile][left_stride] coefficients, with lanes past the rank
  acc* packed;  // [groups of tokens][r][tokens of the group] coefficients
  acc* first;   // [tile][kBlock] converted features: of x
  acc* second;  // likewise, of the input

  Workspace(int64_t tile, int64_t r) {
    const int64_t sizes[] = {kGroup * kPanelStride, tile * rounded_up(r, W::kVecLanes), tile * r, tile * kBlock<W>,
                             tile * kBlock<W>};
    acc** parts[] = {&panel, &sums, &packed, &first, &second};
    int64_t total = 0;
    for (int64_t size : sizes) total += rounded_up(size, 16);
    acc* at = reinterpret_cast<acc*>(scratch(0, size_t(total) * sizeof(acc)));
    for (int i = 0; i < 5; ++i) {
      *parts[i] = at;
      at += rounded_up(sizes[i], 16);
    }
  }
};

// Coefficients of `count` tokens from t0, for a rank of at most half a vector: vectors run along the features, two
// tokens at a time, whose sums over the lanes come out of one tree of shuffles as one vector.
template <typename S>
void project_low_rank(const Householder& a, int64_t t0, int64_t count) {
  using W = Wide<S>;
  using acc = typename W::scalar;
  using Vec = typename W::Vec;
  constexpr int kVec = W::kVecLanes, kHalf = kVec / 2;
  constexpr int64_t kSlice = 32768 / (kHalf * int64_t(sizeof(acc)));  // features whose part of `left` stays in L1
  const int64_t stride = left_stride<W>(a.n_in, a.r);
  acc* coefficients = static_cast<acc*>(a.coefficients) + t0 * a.r;
  for (int64_t i = 0; i < count * a.r; ++i) coefficients[i] = 0;
  for (int64_t f = 0; f < a.n_in; f += kSlice) {
    const int64_t features = smaller(kSlice, a.n_in - f), whole = features / kVec * kVec;
    const auto* in = static_cast<const typename S::scalar*>(a.in.data) + t0 * a.in.stride + f;
    const acc* left = static_cast<const acc*>(a.left) + f;
    for (int64_t t = 0; t < count; t += 2) {
      const auto* one = in + t * a.in.stride;
      const auto* two = t + 1 < count ? one + a.in.stride : one;
      Vec sum[kVec] = {};
      auto add = [&](Vec x, Vec y, const acc* column) {
#pragma GCC unroll 8
        for (int j = 0; j < kHalf; ++j) {
          const Vec factor = load<Vec>(column + j * stride);
          sum[j] += x * factor;
          sum[kHalf + j] += y * factor;
        }
      };
      for (int64_t i = 0; i < whole; i += kVec) add(widen<S>(one + i), widen<S>(two + i), left + i);
      if (const int64_t rest = features - whole; rest > 0)
        add(widen_some<S>(one + whole, rest), widen_some<S>(two + whole, rest), left + whole);
      acc all[kVec];
      store(all, sum_each<Vec, typename W::Mask>(sum));
      acc* to = coefficients + t * a.r;
      for (int64_t j = 0; j < a.r; ++j) to[j] += all[j];
      if (t + 1 == count) continue;
      for (int64_t j = 0; j < a.r; ++j) to[a.r + j] += all[kHalf + j];
    }
  }
}

// Coefficients of `count` tokens from t0: vectors run along the ranks.
template <typename S>
void project(const Householder& a, const Workspace<Wide<S>>& work, int64_t t0, int64_t count) {
  using W = Wide<S>;
  using acc = typename W::scalar;
  using Vec = typename W::Vec;
  constexpr int kLanesHere = W::kVecLanes;
  const int64_t stride = rounded_up(a.r, W::kVecLanes);
  const auto* in = static_cast<const typename S::scalar*>(a.in.data) + t0 * a.in.stride;
  const acc* left = static_cast<const acc*>(a.left);
  for (int64_t i = 0; i < count * stride; ++i) work.sums[i] = 0;
  for (int64_t f = 0; f < a.n_in; f += kPanel) {
    const int64_t features = smaller(kPanel, a.n_in - f);
    in_groups<kGroup>(count, [&](auto rows, int64_t t) {
      constexpr int kRows = rows.value;
      for (int i = 0; i < kRows; ++i)
        widen_row<S>(in + (t + i) * a.in.stride + f, work.panel + i * kPanelStride, features);
      auto add = [&](auto vectors, int64_t j) {
        Vec sum[kRows][vectors.value] = {};
        multiply<W, kPanelStride>(work.panel, 1, left + f * stride + j, stride, features, sum);
        acc* to = work.sums + t * stride + j;
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
          for (int v = 0; v < vectors.value; ++v) {
            acc* at = to + i * stride + v * kLanesHere;
            store(at, load<Vec>(at) + sum[i][v]);
          }
        }
      };
      int64_t j = 0;
      for (; j + 2 * kLanesHere <= stride; j += 2 * kLanesHere) add(std::integral_constant<int, 2>{}, j);
      if (j < stride) add(std::integral_constant<int, 1>{}, j);
    });
  }
  acc* coefficients = static_cast<acc*>(a.coefficients) + t0 * a.r;
  for (int64_t t = 0; t < count; ++t)
    std::memcpy(coefficients + t * a.r, work.sums + t * stride, size_t(a.r) * sizeof(acc));
}

template <typename W>
void pack_coefficients(const Householder& a, const Workspace<W>& work, int64_t t0, int64_t count) {
  const auto* from = static_cast<const typename W::scalar*>(a.coefficients) + t0 * a.r;
  in_groups<kGroup>(count, [&](auto rows, int64_t t) {
    for (int i = 0; i < rows.value; ++i) {
      for (int64_t j = 0; j < a.r; ++j) work.packed[t * a.r + j * rows.value + i] = from[(t + i) * a.r + j];
    }
  });
}

// out = base − sums for kColumns features. A function of its own where the constants of the rounding would otherwise be
// kept in registers that the accumulators need.
template <typename S>
__attribute__((noinline)) void finish_rows(const typename Wide<S>::scalar* sums, int count,
                                           const typename S::scalar* from, int64_t base_stride, typename S::scalar* to,
                                           int64_t out_stride) {
  using W = Wide<S>;
  constexpr int kVec = W::kVecLanes;
  for (int i = 0; i < count; ++i) {
    narrow<S>(widen<S>(from) - load<typename W::Vec>(sums), to);
    narrow<S>(widen<S>(from + kVec) - load<typename W::Vec>(sums + kVec), to + kVec);
    sums += kColumns<W>;
    from += base_stride;
    to += out_stride;
  }
}

// Features [f, f + width) of out = base − coefficients · rightᵀ
template <typename S>
void update(const Householder& a, const Workspace<Wide<S>>& work, int64_t t0, int64_t count, int64_t f, int64_t width) {
  using W = Wide<S>;
  using Vec = typename W::Vec;
  using scalar = typename S::scalar;
  using acc = typename W::scalar;
  constexpr int kVec = W::kVecLanes;
  const int64_t r = a.r, base_stride = a.base.stride, out_stride = a.out.stride;
  const auto* base = static_cast<const scalar*>(a.base.data) + t0 * base_stride;
  auto* out = static_cast<scalar*>(a.out.data) + t0 * out_stride;
  const auto* right = static_cast<const typename W::scalar*>(a.right);
  in_groups<kGroup>(count, [&](auto rows, int64_t t) {
    constexpr int kRows = rows.value;
    for (int64_t c = f; c < f + width; c += kColumns<W>) {
      Vec sum[kRows][2] = {};
      multiply<W, 1>(work.packed + t * r, kRows, right + c * r, kColumns<W>, r, sum);
      const scalar* from = base + t * base_stride + c;
      scalar* to = out + t * out_stride + c;
      const int64_t rest = f + width - c;
      if (rest >= kColumns<W>) {
        if constexpr (kBytes < 64 && sizeof(scalar) < sizeof(acc)) {
          acc held[kRows * kColumns<W>];
#pragma GCC unroll 16
          for (int i = 0; i < kRows; ++i) {
            store(held + i * kColumns<W>, sum[i][0]);
            store(held + i * kColumns<W> + kVec, sum[i][1]);
          }
          finish_rows<S>(held, kRows, from, base_stride, to, out_stride);
        } else {
#pragma GCC unroll 16
          for (int i = 0; i < kRows; ++i) {
            narrow<S>(widen<S>(from) - sum[i][0], to);
            narrow<S>(widen<S>(from + kVec) - sum[i][1], to + kVec);
            from += base_stride;
            to += out_stride;
          }
        }
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          narrow_some<S>(widen_some<S>(from, smaller(rest, kVec)) - sum[i][0], to, smaller(rest, kVec));
          if (rest > kVec) narrow_some<S>(widen_some<S>(from + kVec, rest - kVec) - sum[i][1], to + kVec, rest - kVec);
          from += base_stride;
          to += out_stride;
        }
      }
    }
  });
}

// One product of features with coefficients, summed over the tokens of a tile.
template <typename B>
struct Term {
  const typename B::scalar* features;  // from the first feature of a block
  int64_t stride;
  const typename Wide<B>::scalar* coefficients;  // [tokens, r]
};

// partial [r][stride], `width` features from where it points: (+)= the terms
template <typename B>
void add_sums(const Term<B>* terms, int count_terms, int64_t count, int64_t r, int64_t width,
              typename Wide<B>::scalar* partial, int64_t stride, bool fresh) {
  using W = Wide<B>;
  using Vec = typename W::Vec;
  in_groups<kRanks>(r, [&](auto ranks, int64_t j) {
    constexpr int kHere = ranks.value;
    for (int64_t c = 0; c < width; c += kColumns<W>) {
      for (int k = 0; k < count_terms; ++k) {
        Vec sum[kHere][2] = {};
        multiply<B, 1>(terms[k].coefficients + j, r, terms[k].features + c, terms[k].stride, count, sum);
        auto* to = partial + j * stride + c;
        const bool first = fresh && k == 0;
#pragma GCC unroll 16
        for (int i = 0; i < kHere; ++i) {
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) {
            auto* at = to + v * W::kVecLanes;
            store(at, first ? sum[i][v] : load<Vec>(at) + sum[i][v]);
          }
          to += stride;
        }
      }
    }
  });
}

// Features [f, f + width): xᵀ coefficients, and the second product where there is one.
template <typename S>
void tile_sums(const Householder& a, const Workspace<Wide<S>>& work, const Rows (&rows)[2],
               const void* const (&factors)[2], int64_t t0, int64_t count, int64_t f, int64_t width,
               typename Wide<S>::scalar* partial, int64_t stride, bool fresh) {
  using W = Wide<S>;
  using acc = typename W::scalar;
  const int used = rows[1].data == nullptr ? 1 : 2;
  Term<S> direct[2];
  for (int k = 0; k < used; ++k) {
    const auto* features = static_cast<const typename S::scalar*>(rows[k].data) + t0 * rows[k].stride + f;
    direct[k] = {features, rows[k].stride, static_cast<const acc*>(factors[k]) + t0 * a.r};
  }
  // Read once: straight from the tensor. Read for several blocks of ranks: converted once, and gathered, as rows a
  // power of two apart would push each other out of L1.
  if (a.r <= kRanks && width == kBlock<W>) return add_sums<S>(direct, used, count, a.r, width, partial, stride, fresh);
  acc* converted[] = {work.first, work.second};
  Term<W> terms[2];
  for (int k = 0; k < used; ++k) {
    for (int64_t t = 0; t < count; ++t) {
      acc* to = converted[k] + t * kBlock<W>;
      if (width < kBlock<W>) {
        for (int64_t i = 0; i < kBlock<W>; ++i) to[i] = 0;
      }
      widen_row<S>(direct[k].features + t * direct[k].stride, to, width);
    }
    terms[k] = {converted[k], kBlock<W>, direct[k].coefficients};
  }
  add_sums<W>(terms, used, count, a.r, width, partial, stride, fresh);
}

template <typename S>
void run_tile(const Householder& a, const Workspace<Wide<S>>& work, int64_t split, int64_t t0, int64_t count,
              bool fresh) {
  using W = Wide<S>;
  using acc = typename W::scalar;
  if (a.project) {
    if (low_rank<W>(a.r)) {
      project_low_rank<S>(a, t0, count);
    } else {
      project<S>(a, work, t0, count);
    }
  }
  if (a.out.data != nullptr) pack_coefficients<W>(a, work, t0, count);
  const int64_t out_stride = partial_stride(a.n_out), in_stride = partial_stride(a.n_in);
  acc* partial_out = static_cast<acc*>(a.partial_out);
  acc* partial_in = static_cast<acc*>(a.partial_in);
  if (partial_out != nullptr) partial_out += split * a.r * out_stride;
  if (partial_in != nullptr) partial_in += split * a.r * in_stride;
  if (a.out.data != nullptr || partial_out != nullptr) {
    for (int64_t f = 0; f < a.n_out; f += kBlock<W>) {
      const int64_t width = smaller(kBlock<W>, a.n_out - f);
      if (partial_out != nullptr) {
        tile_sums<S>(a, work, {a.x, a.joint ? a.in : Rows{}}, {a.coefficients, a.saved}, t0, count, f, width,
                     partial_out + f, out_stride, fresh);
      }
      if (a.out.data != nullptr) update<S>(a, work, t0, count, f, width);
    }
  }
  if (partial_in != nullptr) {
    for (int64_t f = 0; f < a.n_in; f += kBlock<W>) {
      const int64_t width = smaller(kBlock<W>, a.n_in - f);
      tile_sums<S>(a, work, {a.in, Rows{}}, {a.saved, nullptr}, t0, count, f, width, partial_in + f, in_stride, fresh);
    }
  }
}

template <typename S>
void run_as(const Householder& a, int64_t begin, int64_t end) {
  const Workspace<Wide<S>> work(a.tile, a.r);
  for (int64_t split = begin; split < end; ++split) {
    const int64_t first = a.first_tile(split), last = a.first_tile(split + 1);
    for (int64_t which = first; which < last; ++which) {
      const int64_t t0 = which * a.tile;
      run_tile<S>(a, work, split, t0, smaller(a.tile, a.T - t0), which == first);
    }
  }
}

// ---- dispatch over types -------------------------------------------------------------------------------------------

int64_t left_size(Scalar type, int64_t n, int64_t r) {
  return type == Scalar::kF64 ? left_size_as<F64>(n, r) : left_size_as<F32>(n, r);
}

int64_t right_size(Scalar, int64_t n, int64_t r) { return rounded_up(n, kUnit) * r; }

void pack_left(Scalar type, const void* from, void* to, int64_t n, int64_t r, int64_t begin, int64_t end) {
  (type == Scalar::kF64 ? pack_left_as<F64> : pack_left_as<F32>)(from, to, n, r, begin, end);
}

void pack_right(Scalar type, const void* from, void* to, int64_t n, int64_t r, int64_t begin, int64_t end) {
  (type == Scalar::kF64 ? pack_right_as<F64> : pack_right_as<F32>)(from, to, n, r, begin, end);
}

void run(const Householder& a, int64_t begin, int64_t end) {
  by_storage(a.type, [&](auto storage) { run_as<decltype(storage)>(a, begin, end); });
}

void reduce(Scalar type, const void* partial, void* sum, int64_t splits, int64_t n, int64_t r, int64_t begin,
            int64_t end) {
  (type == Scalar::kF64 ? reduce_as<F64> : reduce_as<F32>)(partial, sum, splits, n, r, begin, end);
}

}  // namespace

extern const HouseholderKernels kHouseholderKernels;
const HouseholderKernels kHouseholderKernels = {left_size, right_size, pack_left, pack_right, run, reduce};

}  // namespace frodkernels::cpu::FRODKERNELS_ISA
