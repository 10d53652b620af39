// SPDX-License-Identifier: Apache-2.0
#include "scatter.h"

#include <type_traits>

namespace frodkernels::cpu {
namespace {

// How a type is stored, read and written.
struct Float {
  using storage = float;
  using acc = float;
  static acc read(storage x) { return x; }
  static storage round(float x) { return x; }
  static storage round(double x) { return float(x); }
};
struct Double {
  using storage = double;
  using acc = double;
  static acc read(storage x) { return x; }
  static storage round(double x) { return x; }
};
struct Bfloat16 {
  using storage = uint16_t;
  using acc = float;
  static acc read(storage x) { return bf16_to_float(x); }
  static storage round(double x) { return float_to_bf16(float(x)); }
};
struct Half {
  using storage = uint16_t;
  using acc = float;
  static acc read(storage x) { return half_to_float(x); }
  static storage round(double x) { return float_to_half(float(x)); }
};

template <typename Weight, typename Values, typename Index>
void run(const Scatter& s, int64_t begin, int64_t end) {
  using storage = typename Weight::storage;
  using acc = std::conditional_t<std::is_same_v<typename Weight::acc, double>, double, typename Values::acc>;
  storage* weight = static_cast<storage*>(s.weight);
  const Index* indices = static_cast<const Index*>(s.indices);
  const auto* values = static_cast<const typename Values::storage*>(s.values);
  storage* old = static_cast<storage*>(s.old);
  const acc scale = acc(s.scale);
  const bool copy = !s.accumulate && s.scale == 1 && std::is_same_v<Weight, Values>;
  const auto ask = [&](int64_t g) {
    const storage* row = weight + g * s.row;
    for (int32_t p = s.indptr[g]; p < s.indptr[g + 1]; ++p) __builtin_prefetch(row + indices[p] * s.column, 1);
  };
  if (begin < end) ask(begin);
  for (int64_t g = begin; g < end; ++g) {
    if (g + 1 < end) ask(g + 1);
    storage* row = weight + g * s.row;
    for (int32_t p = s.indptr[g]; p < s.indptr[g + 1]; ++p) {
      storage& entry = row[indices[p] * s.column];
      const int32_t k = s.perm[p];
      if (old != nullptr) old[k] = entry;
      if constexpr (std::is_same_v<Weight, Values>) {
        if (copy) {
          entry = values[k];
          continue;
        }
      }
      const acc change = scale * acc(Values::read(values[k]));
      entry = Weight::round(s.accumulate ? acc(Weight::read(entry)) + change : change);
    }
  }
}

template <typename F>
void by_type(Scalar type, F f) {
  switch (type) {
    case Scalar::kF32:
      return f(Float{});
    case Scalar::kF64:
      return f(Double{});
    case Scalar::kBF16:
      return f(Bfloat16{});
    case Scalar::kF16:
      return f(Half{});
  }
}

}  // namespace

void scatter(const Scatter& s, int64_t begin, int64_t end) {
  by_type(s.type, [&](auto weight) {
    by_type(s.values_type, [&](auto values) {
      if (s.narrow) {
        run<decltype(weight), decltype(values), uint16_t>(s, begin, end);
      } else {
        run<decltype(weight), decltype(values), int32_t>(s, begin, end);
      }
    });
  });
}

}  // namespace frodkernels::cpu
