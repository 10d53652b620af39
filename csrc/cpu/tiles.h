// SPDX-License-Identifier: Apache-2.0
//
// Packed token tiles: [features][row elements], 64-byte aligned, zero-padded past the last token. Packing makes every
// gathered row contiguous (a matrix with a power-of-two number of tokens would put all rows into a few cache sets)
// and takes any strides; the two unit-stride layouts are vectorised.
#pragma once
#include <type_traits>

#include "scratch.h"
#include "simd.h"
#include "sparse_core.h"

namespace frodkernels::cpu::FRODKERNELS_ISA {

template <typename S>
inline typename S::tile to_tile(typename S::scalar x) {
  if constexpr (std::is_same_v<S, F16>) {
    return half_to_float(x);
  } else {
    return x;
  }
}

// One feature row with unit token stride.
template <typename S>
inline void pack_row(const typename S::scalar* from, int64_t count, int64_t width, typename S::tile* to) {
  int64_t t = 0;
  for (; t + S::kTokens <= count; t += S::kTokens) S::pack(from + t, to + t);
  for (; t < count; ++t) to[t] = to_tile<S>(from[t]);
  for (; t < width; ++t) to[t] = 0;
}

// Neighbouring features of a chunk's tokens, transposed in registers: as many as there are tokens.
template <typename S>
inline void pack_block(const typename S::scalar* from, int64_t token, int64_t width, typename S::tile* to) {
  if constexpr (std::is_same_v<S, BF16>) {
    transpose_pairs([&](int t) { return load<vs>(from + t * token); },
                    [&](int f, vs row) { store(to + f * width, row); });
  } else {
    vu r[kLanes];
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) r[l] = S::words(from + l * token);
    transpose_words(r);
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) store(to + l * width, r[l]);
  }
}

// Tokens [t0, t0 + count) of all `rows` features into to[rows][width].
template <typename S>
inline void pack_tile(const Features& x, int64_t rows, int64_t t0, int64_t count, int64_t width, typename S::tile* to) {
  using scalar = typename S::scalar;
  const scalar* data = static_cast<const scalar*>(x.data) + t0 * x.token;
  if (x.token == 1) {
    for (int64_t f = 0; f < rows; ++f) pack_row<S>(data + f * x.row, count, width, to + f * width);
    return;
  }
  int64_t f = 0;
  if constexpr (!std::is_same_v<S, F64>) {
    if (x.row == 1) {
      const int64_t whole = count / S::kTokens * S::kTokens;
      constexpr int64_t kLine = 64 / int64_t(sizeof(scalar)), kAhead = 2 * kLine;
      for (; f + S::kTokens <= rows; f += S::kTokens) {
        typename S::tile* block = to + f * width;
        // Rows far apart defeat the prefetchers of the hardware: features further on are asked for here.
        const bool ask = f % kLine == 0 && f + kAhead < rows;
        const auto ask_for = [&](int64_t begin, int64_t end) {
          if (!ask) return;
          for (int64_t t = begin; t < end; ++t) __builtin_prefetch(data + f + kAhead + t * x.token, 0, 2);
        };
        for (int64_t t = 0; t < whole; t += S::kTokens) {
          pack_block<S>(data + f + t * x.token, x.token, width, block + t);
          ask_for(t, t + S::kTokens);
        }
        ask_for(whole, count);
        for (int l = 0; l < S::kTokens; ++l) {
          int64_t t = whole;
          for (; t < count; ++t) block[l * width + t] = to_tile<S>(data[f + l + t * x.token]);
          for (; t < width; ++t) block[l * width + t] = 0;
        }
      }
    }
  }
  for (; f < rows; ++f) {
    typename S::tile* row = to + f * width;
    int64_t t = 0;
    for (; t < count; ++t) row[t] = to_tile<S>(data[f * x.row + t * x.token]);
    for (; t < width; ++t) row[t] = 0;
  }
}

// `count` neighbouring numbers of storage: to = from, or to += from, rounded once.
template <typename S>
inline void put(typename S::scalar* to, const typename S::scalar* from, int64_t count, bool add) {
  using scalar = typename S::scalar;
  if (!add) {
    std::memcpy(to, from, size_t(count) * sizeof(scalar));
    return;
  }
  const int64_t whole = count / S::kTokens * S::kTokens;
  for (int64_t i = 0; i < whole; i += S::kTokens) {
    if constexpr (std::is_same_v<S, F16>) {
      floats_to_halves(halves_to_floats(to + i) + halves_to_floats(from + i), to + i);
    } else {
      typename S::Vec x[S::kVecs], y[S::kVecs];
      S::unpack(to + i, x);
      S::unpack(from + i, y);
#pragma GCC unroll 2
      for (int v = 0; v < S::kVecs; ++v) x[v] += y[v];
      S::write(x, to + i);
    }
  }
  for (int64_t i = whole; i < count; ++i) {
    if constexpr (std::is_same_v<S, BF16>) {
      to[i] = float_to_bf16(bf16_to_float(to[i]) + bf16_to_float(from[i]));
    } else if constexpr (std::is_same_v<S, F16>) {
      to[i] = float_to_half(half_to_float(to[i]) + half_to_float(from[i]));
    } else {
      to[i] += from[i];
    }
  }
}

// Cache lines that will be needed soon, asked for a few at a time while other work goes on: all at once they would hold
// up that work's own loads. Rows far apart defeat the prefetchers of the hardware, which do fetch a line's neighbours.
class Ahead {
  const char* next_;
  int64_t stride_, left_, each_;

 public:
  // `count` of them, `stride` bytes apart, in `steps` steps; none if first is null.
  Ahead(const void* first, int64_t stride, int64_t count, int64_t steps)
      : next_(static_cast<const char*>(first)),
        stride_(stride),
        left_(first == nullptr ? 0 : count),
        each_((count + steps - 1) / steps) {}

  [[gnu::always_inline]] void step() {
    const int64_t some = smaller(each_, left_);
    for (int64_t i = 0; i < some; ++i, next_ += stride_) __builtin_prefetch(next_, 0, 3);
    left_ -= some;
  }
};

// Writes, or adds, output rows, kChunks chunks of tokens [t0, t0 + count) each, in ascending order of features. Rows
// with unit token stride go straight out; others wait for a block of features, so that a token's line is written at
// once: where features are neighbours, after a transpose in registers.
template <typename S, int kChunks>
class RowWriter {
  using scalar = typename S::scalar;
  static constexpr int kWidth = kChunks * S::kTokens;
  static constexpr int kRows = 64 / int(sizeof(scalar));  // a cache line of features
  const Features& out_;
  const int64_t t0_, count_;
  const bool add_;
  int64_t first_ = 0;
  int filled_ = 0;
  Ahead ahead_{nullptr, 0, 0, 1};
  alignas(64) scalar block_[kRows][kWidth];

 public:
  RowWriter(const Features& out, int64_t t0, int64_t count, bool add)
      : out_(out), t0_(t0), count_(count < kWidth ? count : kWidth), add_(add) {}

  void write(const typename S::Vec* acc, int64_t feature) {
    scalar* to = static_cast<scalar*>(out_.data) + feature * out_.row + t0_ * out_.token;
    const bool direct = out_.token == 1 && count_ == kWidth && !add_;
    scalar* row = direct ? to : block_[filled_];
#pragma GCC unroll 16
    for (int c = 0; c < kChunks; ++c) S::write(acc + c * S::kVecs, row + c * S::kTokens);
    if (direct) return;
    if (out_.token == 1) {
      put<S>(to, row, count_, add_);
      return;
    }
    if (filled_++ == 0) {
      first_ = feature;
      if (out_.row == 1) ahead_ = Ahead(to, out_.token * int64_t(sizeof(scalar)), count_, kRows - 2);
    }
    ahead_.step();
    if (filled_ == kRows) flush();
  }

  void flush() {
    scalar* const to = static_cast<scalar*>(out_.data) + first_ * out_.row + t0_ * out_.token;
    int64_t t = 0;
    if constexpr (!std::is_same_v<S, F64> && kWidth % (4 / int(sizeof(scalar)) * kLanes) == 0) {
      if (filled_ == kRows && out_.row == 1) t = flush_words(to);
    }
    for (; t < count_; ++t) {
      scalar line[kRows];
      for (int r = 0; r < filled_; ++r) line[r] = block_[r][t];
      if (out_.row == 1) {
        put<S>(to + t * out_.token, line, filled_, add_);
      } else {
        for (int r = 0; r < filled_; ++r) put<S>(to + t * out_.token + r * out_.row, line + r, 1, add_);
      }
    }
    filled_ = 0;
  }

 private:
  // Whole blocks of the tokens that a vector of words holds; how many tokens that was.
  int64_t flush_words(scalar* to) {
    constexpr int kStep = 4 / int(sizeof(scalar));  // tokens in a word
    int64_t t = 0;
    for (; t + kStep * kLanes <= count_; t += kStep * kLanes) {
      alignas(64) scalar lines[kStep * kLanes][kRows];
      for (int f = 0; f < kRows; f += kStep * kLanes) {
        if constexpr (kStep == 2) {
          transpose_pairs([&](int l) { return load<vs>(&block_[f + l][t]); },
                          [&](int k, vs line) { store(&lines[k][f], line); });
        } else {
          vu r[kLanes];
#pragma GCC unroll 16
          for (int l = 0; l < kLanes; ++l) r[l] = load<vu>(&block_[f + l][t]);
          transpose_words(r);
#pragma GCC unroll 16
          for (int l = 0; l < kLanes; ++l) store(&lines[l][f], r[l]);
        }
      }
      for (int k = 0; k < kStep * kLanes; ++k) put<S>(to + (t + k) * out_.token, lines[k], kRows, add_);
    }
    return t;
  }
};

}  // namespace frodkernels::cpu::FRODKERNELS_ISA
