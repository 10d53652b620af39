// SPDX-License-Identifier: Apache-2.0
//
// What the CPU bindings of ops over a compressed pattern share: its tensors, checked; scalars of any dtype; how tokens
// are cut for the kernels of csrc/cpu/sparse_core.h, and how their partial sums are joined.
#pragma once
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "../cpu/sparse_core.h"
#include "sparse_core.h"

namespace frodkernels::ops {
namespace {

using cpu::Scalar;
using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr int64_t kGrain = 16384;  // entries a thread should have to be worth waking
// Partial sums of the backward. How many there are follows from shapes alone, so results never depend on the threads:
// at least kSplits, for parallelism; more for very long inputs, since a chain of one addition a tile loses what
// pairwise summation keeps; fewer where they would hold more than kPartialBytes.
constexpr int64_t kSplits = 4, kTilesInChain = 16, kPartialBytes = int64_t(4) << 20;

inline Scalar scalar_of(const Tensor& t, const char* name) { return ops::scalar_of<Scalar>(t, name); }

// f(a compile-time Scalar): loops over storage have no branch on its type.
template <typename F>
decltype(auto) by_scalar(Scalar type, F f) {
  switch (type) {
    case Scalar::kF32:
      return f(std::integral_constant<Scalar, Scalar::kF32>{});
    case Scalar::kF64:
      return f(std::integral_constant<Scalar, Scalar::kF64>{});
    case Scalar::kBF16:
      return f(std::integral_constant<Scalar, Scalar::kBF16>{});
    default:
      return f(std::integral_constant<Scalar, Scalar::kF16>{});
  }
}

// Entry k of a storage array as an accumulator, and back from a sum.
template <typename Acc, Scalar kType>
Acc read(const void* data, int64_t k) {
  if constexpr (kType == Scalar::kF32) {
    return Acc(static_cast<const float*>(data)[k]);
  } else if constexpr (kType == Scalar::kF64) {
    return Acc(static_cast<const double*>(data)[k]);
  } else if constexpr (kType == Scalar::kBF16) {
    return Acc(cpu::bf16_to_float(static_cast<const uint16_t*>(data)[k]));
  } else {
    return Acc(cpu::half_to_float(static_cast<const uint16_t*>(data)[k]));
  }
}

template <Scalar kType>
void write(void* data, int64_t k, double value) {
  if constexpr (kType == Scalar::kF32) {
    static_cast<float*>(data)[k] = float(value);
  } else if constexpr (kType == Scalar::kF64) {
    static_cast<double*>(data)[k] = value;
  } else if constexpr (kType == Scalar::kBF16) {
    static_cast<uint16_t*>(data)[k] = cpu::float_to_bf16(float(value));
  } else {
    static_cast<uint16_t*>(data)[k] = cpu::float_to_half(float(value));
  }
}

inline cpu::Features features(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1)};
}

inline void check_cpu(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.device().is_cpu(), name, " must be a CPU tensor, like the features");
}

// The plan's tensors, checked as far as memory safety needs: a pattern is validated when it is made, but an op can be
// called with anything.
struct Slots {
  Tensor indptr, indices, perm;
  int64_t groups, nnz;

  Slots(const Tensor& ptr, const Tensor& index, const Tensor& order)
      : indptr(as_contiguous(ptr)),
        indices(as_contiguous(index)),
        perm(as_contiguous(order)),
        groups(ptr.numel() - 1),
        nnz(index.numel()) {
    check_cpu(ptr, "indptr");
    check_cpu(index, "indices");
    check_cpu(order, "perm");
    STD_TORCH_CHECK(ptr.scalar_type() == ScalarType::Int && ptr.dim() == 1 && groups >= 0,
                    "indptr must be a non-empty int32 vector");
    STD_TORCH_CHECK(index.scalar_type() == ScalarType::UInt16 || index.scalar_type() == ScalarType::Int,
                    "indices must be uint16 or int32");
    STD_TORCH_CHECK(order.scalar_type() == ScalarType::Int, "perm must be int32");
    check_vector(index, "indices", nnz);
    check_vector(order, "perm", nnz);
    STD_TORCH_CHECK(nnz < (int64_t(1) << 31), "indices must have fewer than 2^31 entries");
    const int32_t* p = static_cast<const int32_t*>(indptr.const_data_ptr());
    bool good = p[0] == 0 && p[groups] == nnz;
    for (int64_t g = 0; g < groups; ++g) good &= p[g] <= p[g + 1];
    STD_TORCH_CHECK(good, "indptr must rise from 0 to the number of indices");
  }

  // Whether every index and every place is in range: a pass over the plan.
  bool in_range(int64_t columns) const { return narrow() ? in_range<uint16_t>(columns) : in_range<int32_t>(columns); }

  // Whether indices ascend within every group: what a search in them needs.
  bool ascending() const { return narrow() ? ascending<uint16_t>() : ascending<int32_t>(); }

  bool narrow() const { return indices.scalar_type() == ScalarType::UInt16; }
  const int32_t* order() const { return static_cast<const int32_t*>(perm.const_data_ptr()); }
  const int32_t* pointers() const { return static_cast<const int32_t*>(indptr.const_data_ptr()); }

 private:
  template <typename Index>
  bool ascending() const {
    std::atomic<bool> good{true};
    const int32_t* p = pointers();
    const Index* index = static_cast<const Index*>(indices.const_data_ptr());
    parallel_for(0, groups, kGrain / 64, [&](int64_t begin, int64_t end) {
      bool fine = true;
      for (int64_t g = begin; g < end; ++g) {
        for (int32_t k = p[g] + 1; k < p[g + 1]; ++k) fine &= index[k - 1] < index[k];
      }
      if (!fine) good = false;
    });
    return good;
  }

  template <typename Index>
  bool in_range(int64_t columns) const {
    std::atomic<bool> good{true};
    const int32_t* places = order();
    const Index* index = static_cast<const Index*>(indices.const_data_ptr());
    parallel_for(0, nnz, kGrain, [&](int64_t begin, int64_t end) {
      uint64_t place = 0, column = 0;  // the largest; negative ones become large
      for (int64_t p = begin; p < end; ++p) {
        place = std::max(place, uint64_t(int64_t(places[p])));
        column = std::max(column, uint64_t(int64_t(index[p])));
      }
      if (begin < end && (place >= uint64_t(nnz) || column >= uint64_t(columns))) good = false;
    });
    return good;
  }
};

// Tiles are four lines a feature, from L3 if need be: the more tokens a gathered row has, the fewer rows. They shrink
// to what T fills. In a dense pattern gathered rows are neighbours, and the hardware asks for them by itself. Threads
// without a tile (or split) of their own share one by blocks of groups, which changes no result.
inline cpu::Tiling tiling(Scalar type, int64_t n_in, int64_t n_out, int64_t nnz, int64_t T, bool backward) {
  cpu::Tiling t;
  while (t.lines > 1 && cpu::tile_tokens(type, t.lines / 2) >= T) t.lines /= 2;
  t.far = n_in * 64 * t.lines > cpu::l2_bytes() / 4 && nnz < n_in * n_out / 5;
  const int64_t tokens = cpu::tile_tokens(type, t.lines);
  t.tiles = (T + tokens - 1) / tokens;
  const int64_t room = std::max<int64_t>(kPartialBytes / 4 / (nnz + 1), 1);
  t.splits = std::min({t.tiles, std::max(kSplits, t.tiles / kTilesInChain), room});
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t units = backward ? t.splits : t.tiles;
  const int64_t most = std::max<int64_t>(n_out / 64, 1);
  if (units > 0) t.blocks = std::clamp<int64_t>((threads + units - 1) / units, 1, most);
  return t;
}

inline void check_features(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, name, " must be [features, T]");
  check_cpu(t, name);
}

// to[order[p]] = sum over splits of partial[split][p], in order. A block of sums at a time, so that the partial sums
// are read row by row.
template <typename Acc>
void reduce(const Acc* partial, int64_t splits, const int32_t* order, Tensor& to, const char* name) {
  constexpr int64_t kBlock = 256;
  const int64_t size = to.numel();
  void* data = to.mutable_data_ptr();
  by_scalar(scalar_of(to, name), [&](auto type) {
    parallel_for(0, size, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t p0 = begin; p0 < end; p0 += kBlock) {
        const int64_t count = std::min(kBlock, end - p0);
        double sums[kBlock] = {};
        for (int64_t s = 0; s < splits; ++s) {
          const Acc* from = partial + s * size + p0;
          for (int64_t k = 0; k < count; ++k) sums[k] += double(from[k]);
        }
        for (int64_t k = 0; k < count; ++k) write<type.value>(data, order == nullptr ? p0 + k : order[p0 + k], sums[k]);
      }
    });
  });
}

}  // namespace
}  // namespace frodkernels::ops
