// SPDX-License-Identifier: Apache-2.0
//
// The passes of reflections.h for one ISA level. Elementwise ones take kLanes rows at a time: a whole number of
// vectors, whatever r, over which the factors of the columns repeat.
#include "products.h"
#include "reflections.h"
#include "scratch.h"

namespace frodkernels::cpu::FRODKERNELS_ISA {
namespace {

// by_storage for a `kind`.
template <typename F>
void by_kind(Scalar kind, F f) {
  return kind == Scalar::kF64 ? f(F64{}) : f(F32{});
}

// Memory of a pass, for `all` numbers of either kind.
double* buffers(int64_t all) { return reinterpret_cast<double*>(scratch(1, size_t(all) * sizeof(double))); }

// `count` elements as accumulators: where they are, if they are that already.
template <typename S>
const typename Wide<S>::scalar* widened(const typename S::scalar* from, typename Wide<S>::scalar* buffer,
                                        int64_t count) {
  if constexpr (std::is_same_v<typename S::scalar, typename Wide<S>::scalar>) {
    return from;
  } else {
    widen_row<S>(from, buffer, count);
    return buffer;
  }
}

// f(first element, elements) for groups of kLanes rows.
template <typename F>
void over_groups(int64_t rows, int64_t r, F f) {
  const int64_t all = rows * r, group = kLanes * r;
  for (int64_t i = 0; i < all; i += group) f(i, smaller(group, all - i));
}

// Likewise f(first element, elements, them as accumulators), which may be in `room`.
template <typename F>
void over_wide_groups(Scalar type, const void* source, int64_t rows, int64_t r, double* room, F f) {
  by_storage(type, [&](auto storage) {
    using S = decltype(storage);
    const auto* from = static_cast<const typename S::scalar*>(source);
    auto* wide = reinterpret_cast<typename Wide<S>::scalar*>(room);
    over_groups(rows, r, [&](int64_t first, int64_t count) { f(first, count, widened<S>(from + first, wide, count)); });
  });
}

void squares(Scalar type, const void* u, int64_t rows, int64_t r, double* sums) {
  const int64_t group = kLanes * r;
  double* held = buffers(2 * group + kLanes);
  for (int64_t i = 0; i < group; ++i) held[i] = 0;
  over_wide_groups(type, u, rows, r, held + group, [&](int64_t, int64_t count, const auto* x) {
    for (int64_t i = 0; i < count; ++i) held[i] += double(x[i]) * double(x[i]);
  });
  for (int64_t i = 0; i < group; i += r) {
    for (int64_t j = 0; j < r; ++j) sums[j] += held[i + j];
  }
}

// The factors of a group of rows, in `to`.
void repeat(const double* factors, int64_t r, double* to) {
  for (int64_t i = 0; i < kLanes; ++i) std::memcpy(to + i * r, factors, size_t(r) * sizeof(double));
}

void scale(Scalar type, const void* u, const double* factors, Scalar kind, void* target, int64_t rows, int64_t r) {
  const int64_t group = kLanes * r;
  double* repeated = buffers(2 * group + kLanes);
  repeat(factors, r, repeated);
  by_kind(kind, [&](auto result) {
    using out = typename decltype(result)::scalar;
    out* to = static_cast<out*>(target);
    over_wide_groups(type, u, rows, r, repeated + group, [&](int64_t first, int64_t count, const auto* x) {
      for (int64_t i = 0; i < count; ++i) to[first + i] = out(double(x[i]) * repeated[i]);
    });
  });
}

void scaled_difference(Scalar kind, const void* first_source, const void* second_source, const double* factors,
                       Scalar type, void* target, int64_t rows, int64_t r) {
  by_kind(kind, [&](auto wide) {
    using acc = typename decltype(wide)::scalar;
    const acc *a = static_cast<const acc*>(first_source), *b = static_cast<const acc*>(second_source);
    const int64_t group = kLanes * r;
    double* repeated = buffers(2 * group + kLanes);
    repeat(factors, r, repeated);
    by_storage(type, [&](auto storage) {
      using S = decltype(storage);
      using out = typename Wide<S>::scalar;
      auto* to = static_cast<typename S::scalar*>(target);
      out* held = reinterpret_cast<out*>(repeated + group);
      over_groups(rows, r, [&](int64_t first, int64_t count) {
        for (int64_t i = 0; i < count; ++i) held[i] = out(double(a[first + i] - b[first + i]) * repeated[i]);
        narrow_row<S>(held, to + first, count);
      });
    });
  });
}

// kHere columns of a with kVectors vectors of columns of b: sums over the rows, whose lanes past r are not added.
template <typename W, int kHere, int kVectors>
void inner_block(const typename W::scalar* a, const typename W::scalar* b, int64_t step, int64_t rows, int64_t columns,
                 double* sums, int64_t stride) {
  typename W::Vec sum[kHere][kVectors] = {};
  multiply<W, 1>(a, step, b, step, rows, sum);
  typename W::scalar all[kHere][kVectors * W::kVecLanes];
  std::memcpy(all, sum, sizeof(sum));
  for (int i = 0; i < kHere; ++i) {
    for (int64_t k = 0; k < columns; ++k) sums[i * stride + k] += double(all[i][k]);
  }
}

template <typename W>
void inner_rows(const typename W::scalar* a, const typename W::scalar* b, int64_t step, int64_t rows, int64_t r,
                double* sums) {
  in_groups<kRanks>(r, [&](auto ranks, int64_t j) {
    for (int64_t c = 0; c < r; c += 2 * W::kVecLanes) {
      const int64_t columns = smaller(2 * W::kVecLanes, r - c);
      auto block = [&](auto vectors) {
        inner_block<W, ranks.value, vectors.value>(a + j, b + c, step, rows, columns, sums + j * r + c, r);
      };
      if (columns <= W::kVecLanes) {
        block(std::integral_constant<int, 1>{});
      } else {
        block(std::integral_constant<int, 2>{});
      }
    }
  });
}

void inner(Scalar kind, const void* first, const void* second, int64_t rows, int64_t r, double* sums) {
  by_kind(kind, [&](auto storage) {
    using W = decltype(storage);
    using acc = typename W::scalar;
    const acc *a = static_cast<const acc*>(first), *b = static_cast<const acc*>(second);
    // Vectors may reach past a row into those behind it; the last rows are copied to where there is room for that.
    const int64_t wide = r + 2 * W::kVecLanes, beside = (2 * W::kVecLanes + r - 1) / r;
    const int64_t direct = rows > beside ? rows - beside : 0;
    for (int64_t i = 0; i < direct; i += kRowsInChain)
      inner_rows<W>(a + i * r, b + i * r, r, smaller(kRowsInChain, direct - i), r, sums);
    const int64_t rest = rows - direct;
    acc* copies = reinterpret_cast<acc*>(buffers(2 * rest * wide));
    for (int64_t i = 0; i < rest; ++i) {
      std::memcpy(copies + i * wide, a + (direct + i) * r, size_t(r) * sizeof(acc));
      acc* other = copies + (rest + i) * wide;
      std::memcpy(other, b + (direct + i) * r, size_t(r) * sizeof(acc));
      for (int64_t k = r; k < wide; ++k) other[k] = 0;
    }
    inner_rows<W>(copies, copies + rest * wide, wide, rest, r, sums);
  });
}

void product(Scalar kind, const void* source, const void* factor, void* target, int64_t rows, int64_t r) {
  by_kind(kind, [&](auto storage) {
    using W = decltype(storage);
    using acc = typename W::scalar;
    constexpr int kVec = W::kVecLanes;
    const acc *from = static_cast<const acc*>(source), *square = static_cast<const acc*>(factor);
    acc *to = static_cast<acc*>(target), *end = to + rows * r;
    const int64_t stride = row_stride(r);
    in_groups<4>(rows, [&](auto group, int64_t i) {
      constexpr int kRows = group.value;
      for (int64_t j = 0; j < r; j += 2 * kVec) {
        auto block = [&](auto vectors) {
          constexpr int kVectors = vectors.value;
          typename W::Vec sum[kRows][kVectors] = {};
          for (int64_t k = 0; k < r; ++k) {
            typename W::Vec row[kVectors];
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) row[v] = load<typename W::Vec>(square + k * stride + j + v * kVec);
#pragma GCC unroll 4
            for (int l = 0; l < kRows; ++l) {
              const acc x = from[(i + l) * r + k];
#pragma GCC unroll 2
              for (int v = 0; v < kVectors; ++v) sum[l][v] += x * row[v];
            }
          }
#pragma GCC unroll 4
          for (int l = 0; l < kRows; ++l) {
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) {
              acc* at = to + (i + l) * r + j + v * kVec;
              if (r - j >= (v + 1) * kVec || (r <= 2 * kVec && end - at >= kVec)) {
                store(at, sum[l][v]);  // what goes past the row is overwritten by those behind it
              } else if (r - j > v * kVec) {
                narrow_some<W>(sum[l][v], at, r - j - v * kVec);
              }
            }
          }
        };
        if (r - j <= kVec) {
          block(std::integral_constant<int, 1>{});
        } else {
          block(std::integral_constant<int, 2>{});
        }
      }
    });
  });
}

void narrow_all(const double* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = float(from[i]);
}

}  // namespace

extern const ReflectionKernels kReflectionKernels;
const ReflectionKernels kReflectionKernels = {squares, scale, inner, product, scaled_difference, narrow_all};

}  // namespace frodkernels::cpu::FRODKERNELS_ISA
