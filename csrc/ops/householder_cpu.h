// SPDX-License-Identifier: Apache-2.0
//
// How a call is cut into tasks and run on the kernels of csrc/cpu/householder.h, for the bindings that use them.
//
// How the tokens are cut follows from shapes alone, so results never depend on the threads. A tile's rows are read by
// every pass over them: small tiles stay near (kTileBytes; measured best from 64 to 192 KiB on Zen 5). But factors and
// partial sums are read once a tile, and above a rank of kLowRank sums outweigh the rows (kSumTileBytes). Partial sums:
// at least kSplits of them, for parallelism; more for long inputs, whose sums would lose accuracy in one chain; fewer
// where they would hold more than kPartialBytes.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <utility>

#include "../cpu/householder.h"
#include "tensors.h"

namespace frodkernels::ops {

inline constexpr int64_t kGrain = int64_t(1) << 17;  // multiply-adds a thread should have to be worth waking
inline constexpr int64_t kTokenGroup = 12, kMostGroups = 4, kLowRank = 16;
inline constexpr int64_t kTileBytes = int64_t(128) << 10, kSumTileBytes = int64_t(512) << 10;
inline constexpr int64_t kSplits = 8, kMostSplits = 64, kTokensInSplit = 128, kPartialBytes = int64_t(32) << 20;

inline int64_t tile_tokens(int64_t T, int64_t row_bytes, int64_t tile_bytes) {
  const int64_t fitting = tile_bytes / (kTokenGroup * std::max<int64_t>(row_bytes, 1));
  const int64_t spread = T / (16 * kTokenGroup);  // many threads should each find one
  return kTokenGroup * std::clamp<int64_t>(std::min(fitting, spread), 1, kMostGroups);
}

inline int64_t split_count(int64_t T, int64_t tiles, int64_t partial_bytes) {
  const int64_t room = std::max<int64_t>(kPartialBytes / std::max<int64_t>(partial_bytes, 1), 1);
  return std::min({tiles, std::clamp(T / kTokensInSplit, kSplits, kMostSplits), room});
}

inline int64_t bytes_of(cpu::Scalar type) { return type == cpu::Scalar::kF64 ? 8 : type == cpu::Scalar::kF32 ? 4 : 2; }

// float32 or float64, by its name in the kernels.
inline cpu::Scalar kind_of(torch::headeronly::ScalarType type) {
  return type == torch::headeronly::ScalarType::Double ? cpu::Scalar::kF64 : cpu::Scalar::kF32;
}

// The tensor with unit stride along its rows.
inline torch::stable::Tensor with_rows(const torch::stable::Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : as_contiguous(t);
}

inline cpu::Rows rows_of(const torch::stable::Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0)};
}

// `t` as contiguous `type`.
inline torch::stable::Tensor as_type(const torch::stable::Tensor& t, torch::headeronly::ScalarType type,
                                     const char* name) {
  scalar_of<cpu::Scalar>(t, name);  // refuses what is no floating-point type of ours
  return as_contiguous(t.scalar_type() == type ? t : torch::stable::to(t, type));
}

// Memory for one call, which its thread keeps for the next one unless it is a lot: fresh pages would cost as much as
// what is written to them.
class Scratch {
  struct Buffer {
    std::unique_ptr<char, decltype(&std::free)> data{nullptr, &std::free};
    size_t size = 0;
  };
  static constexpr size_t kAlignment = 64, kKept = size_t(8) << 20;
  enum { kSlots = 5 };
  static Buffer& kept(int slot) {
    thread_local Buffer buffers[kSlots];
    return buffers[slot];
  }
  const int slot_;
  Buffer buffer_;

 public:
  enum Slot { kLeft, kRight, kOutSums, kInSums, kReflections };

  Scratch(Slot slot, int64_t bytes) : slot_(slot), buffer_(std::move(kept(slot))) {
    if (buffer_.data != nullptr && buffer_.size >= size_t(bytes)) return;
    buffer_.size = (size_t(bytes) / kAlignment + 1) * kAlignment;
    buffer_.data.reset();
    buffer_.data.reset(static_cast<char*>(std::aligned_alloc(kAlignment, buffer_.size)));
    if (buffer_.data == nullptr) throw std::bad_alloc();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (buffer_.size <= kKept) kept(slot_) = std::move(buffer_);
  }
  char* data() const { return buffer_.data.get(); }
};

// f(begin, end) over features in multiples of cpu::kUnit, on as many threads as the work per feature is worth.
template <typename F>
void over_features(int64_t n, int64_t work, F f) {
  constexpr int64_t kUnit = cpu::kUnit;
  const int64_t grain = std::max<int64_t>(kGrain / (kUnit * std::max<int64_t>(work, 1)), 1);
  torch::stable::parallel_for(0, (n + kUnit - 1) / kUnit, grain,
                              [&](int64_t begin, int64_t end) { f(begin * kUnit, std::min(end * kUnit, n)); });
}

// A factor [n, r] of the accumulation type as the kernels want it: where it is, if they take it so.
class Packed {
  const cpu::HouseholderKernels& kernels_;
  const cpu::Scalar type_;
  const bool left_;
  const int64_t n_, r_;
  const void* const from_;
  std::optional<Scratch> packed_;

 public:
  Packed(const cpu::HouseholderKernels& kernels, cpu::Scalar type, bool left, const void* from, int64_t n, int64_t r)
      : kernels_(kernels), type_(type), left_(left), n_(n), r_(r), from_(from) {
    const int64_t size = (left ? kernels.left_size : kernels.right_size)(type, n, r);
    if (size > 0) packed_.emplace(left ? Scratch::kLeft : Scratch::kRight, size * bytes_of(type));
  }
  const void* data() const { return packed_.has_value() ? packed_->data() : from_; }
  // Features [begin, end), begin a multiple of cpu::kUnit.
  void pack(int64_t begin, int64_t end) const {
    if (packed_.has_value())
      (left_ ? kernels_.pack_left : kernels_.pack_right)(type_, from_, packed_->data(), n_, r_, begin, end);
  }
  void pack_all() const {
    if (packed_.has_value()) over_features(n_, r_, [&](int64_t begin, int64_t end) { pack(begin, end); });
  }
};

// Partial sums over [n, r]. Uninitialised on purpose: each task writes its own part, and touches its pages first.
class Sums {
  const cpu::HouseholderKernels& kernels_;
  const cpu::Scalar type_;
  const int64_t splits_, n_, r_;
  const Scratch partial_;

 public:
  Sums(const cpu::HouseholderKernels& kernels, cpu::Scalar type, Scratch::Slot slot, int64_t splits, int64_t n,
       int64_t r)
      : kernels_(kernels),
        type_(type),
        splits_(splits),
        n_(n),
        r_(r),
        partial_(slot, splits * r * cpu::partial_stride(n) * bytes_of(type)) {}
  void* data() const { return partial_.data(); }
  // Features [begin, end) of the total `to` [n, r], begin a multiple of cpu::kUnit.
  void total(void* to, int64_t begin, int64_t end) const {
    kernels_.reduce(type_, partial_.data(), to, splits_, n_, r_, begin, end);
  }
  void total(void* to) const {
    over_features(n_, splits_ * r_, [&](int64_t begin, int64_t end) { total(to, begin, end); });
  }
};

// f(begin, end) over the splits of `a` on torch's threads.
template <typename F>
void over_splits(const cpu::Householder& a, F f) {
  const int64_t work = (a.T * (a.n_in + a.n_out) * std::max<int64_t>(a.r, 1)) / std::max<int64_t>(a.splits, 1);
  torch::stable::parallel_for(0, a.splits, std::max<int64_t>(kGrain / std::max<int64_t>(work, 1), 1), f);
}

inline void run(const cpu::Householder& a, const cpu::HouseholderKernels& kernels) {
  over_splits(a, [&](int64_t begin, int64_t end) { kernels.run(a, begin, end); });
}

// Products of tokens [T, n_in], and sums over them where there are to be any; a task a tile.
inline cpu::Householder problem(cpu::Scalar type, int64_t T, int64_t n_in, int64_t n_out, int64_t r, bool sums) {
  cpu::Householder a;
  a.type = type;
  a.T = T;
  a.n_in = n_in;
  a.n_out = n_out;
  a.r = r;
  a.tile = tile_tokens(T, bytes_of(type) * n_in, sums && r > kLowRank ? kSumTileBytes : kTileBytes);
  a.splits = a.tiles();
  return a;
}

inline const cpu::HouseholderKernels& chosen_kernels(cpu::Scalar type, bool rounded) {
  const cpu::Isa isa = cpu::chosen_isa();
  const cpu::HouseholderKernels* faster =
      rounded && type == cpu::Scalar::kBF16 ? cpu::householder_bf16_kernels(isa) : nullptr;
  return faster == nullptr ? cpu::householder_kernels(isa) : *faster;
}

}  // namespace frodkernels::ops
