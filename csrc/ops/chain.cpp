// SPDX-License-Identifier: Apache-2.0
#include "chain.h"

#include <cmath>

namespace frodkernels::ops {
namespace {

using cpu::Scalar;
using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

// Elements of [n, r], and multiply-adds, that a task of `measure` should have. The cut follows from shapes alone: sums
// never depend on the threads.
constexpr int64_t kElements = int64_t(1) << 15, kProducts = int64_t(1) << 18, kMostChunks = 16;
constexpr int64_t kMostSums = int64_t(1) << 20;  // numbers of all tasks' [r, r]

double read(Scalar kind, const void* from, int64_t i) {
  return kind == Scalar::kF64 ? static_cast<const double*>(from)[i] : double(static_cast<const float*>(from)[i]);
}

void write(Scalar kind, void* to, int64_t i, double x) {
  if (kind == Scalar::kF64) {
    static_cast<double*>(to)[i] = x;
  } else {
    static_cast<float*>(to)[i] = float(x);
  }
}

int64_t chunks_of(int64_t rows, int64_t r) {
  const int64_t most = std::clamp<int64_t>(kMostSums / (r * r), 1, kMostChunks);
  return std::clamp<int64_t>(std::max(rows * r / kElements, rows * r * r / kProducts), 1, most);
}

// f(chunk, first row, rows)
template <typename F>
void over_chunks(int64_t count, int64_t rows, F f) {
  parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) f(k, rows * k / count, rows * (k + 1) / count - rows * k / count);
  });
}

// Matrices of `size` numbers, added up in order.
std::vector<double> total(const std::vector<double>& partial, int64_t size) {
  std::vector<double> sum(size_t(size), 0.0);
  for (size_t i = 0; i < partial.size(); ++i) sum[i % size_t(size)] += partial[i];
  return sum;
}

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// S^-1 for the upper triangular S = striu(G) + diag(G) / 2, row by row from the last.
std::vector<double> inverse_of_half(const std::vector<double>& G, int64_t r) {
  std::vector<double> X(size_t(r * r), 0.0);
  for (int64_t i = r - 1; i >= 0; --i) {
    double* row = X.data() + i * r;
    const double diagonal = 2 / G[size_t(i * r + i)];
    row[i] = 1;
    for (int64_t k = i + 1; k < r; ++k) {
      const double factor = G[size_t(i * r + k)];
      const double* other = X.data() + k * r;
      for (int64_t j = k; j < r; ++j) row[j] -= factor * other[j];
    }
    for (int64_t j = i; j < r; ++j) row[j] *= diagonal;
  }
  return X;
}

}  // namespace

ScalarType Chain::sums_type(const Tensor& u, bool wide) {
  return wide || u.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

ScalarType Chain::kind_type(const Tensor& u, bool wide) {
  return u.scalar_type() == ScalarType::Float ? ScalarType::Double : sums_type(u, wide);
}

Chain::Chain(const Tensor& u, bool wide, void* unit, void* left)
    : kernels_(cpu::reflection_kernels(cpu::chosen_isa())),
      u_(u),
      type_(scalar_of<Scalar>(u, "u")),
      kind_(kind_of(kind_type(u, wide))),
      sums_(kind_of(sums_type(u, wide))),
      n_(u.size(0)),
      r_(u.size(1)),
      memory_(Scratch::kReflections, aligned(r_ * cpu::row_stride(r_) * 8) + 2 * aligned(n_ * r_ * 8) +
                                         2 * aligned(n_ * r_ * bytes_of(sums_))),
      factors_(size_t(r_)) {
  char* at = memory_.data();
  auto take = [&](int64_t bytes) {
    char* memory = at;
    at += aligned(bytes);
    return memory;
  };
  square_ = take(r_ * cpu::row_stride(r_) * 8);
  auto place = [&](void* wanted) {
    return wanted != nullptr ? static_cast<char*>(wanted) : take(n_ * r_ * bytes_of(sums_));
  };
  unit_sums_ = place(unit);
  left_sums_ = place(left);
  unit_ = kind_ == sums_ ? unit_sums_ : take(n_ * r_ * 8);
  left_ = kind_ == sums_ ? left_sums_ : take(n_ * r_ * 8);
}

const char* Chain::u_row(int64_t i) const {
  return static_cast<const char*>(u_.const_data_ptr()) + i * r_ * bytes_of(type_);
}

void Chain::measure(void* norms, void* inverse) {
  const int64_t count = chunks_of(n_, r_), square = r_ * r_;
  std::vector<double> lengths(size_t(count * r_), 0.0), gram(size_t(count * square), 0.0);
  over_chunks(count, n_, [&](int64_t chunk, int64_t first, int64_t rows) {
    kernels_.squares(type_, u_row(first), rows, r_, lengths.data() + chunk * r_);
  });
  const std::vector<double> squared = total(lengths, r_);
  for (int64_t j = 0; j < r_; ++j) write(kind_, norms, j, std::sqrt(squared[size_t(j)]));
  set_norms(norms);
  over_chunks(count, n_, [&](int64_t chunk, int64_t first, int64_t rows) {
    char* unit = unit_ + first * r_ * bytes_of(kind_);
    kernels_.scale(type_, u_row(first), factors_.data(), kind_, unit, rows, r_);
    kernels_.inner(kind_, unit, unit, rows, r_, gram.data() + chunk * square);
  });
  has_unit_ = true;
  const std::vector<double> found = inverse_of_half(total(gram, square), r_);
  for (int64_t i = 0; i < square; ++i) write(kind_, inverse, i, found[size_t(i)]);
}

void Chain::set_norms(const void* norms) {
  for (int64_t j = 0; j < r_; ++j) factors_[size_t(j)] = 1 / read(kind_, norms, j);  // 0 times infinity is NaN
}

void Chain::prepare(const void* norms, const void* inverse, bool transpose) {
  set_norms(norms);
  for (int64_t i = 0; i < r_; ++i) {
    for (int64_t j = 0; j < cpu::row_stride(r_); ++j) {
      const double x = j < r_ ? read(kind_, inverse, transpose ? j * r_ + i : i * r_ + j) : 0;
      write(kind_, square_, i * cpu::row_stride(r_) + j, x);
    }
  }
}

void Chain::form_block(int64_t begin, int64_t end) {
  const int64_t rows = end - begin, at = begin * r_ * bytes_of(kind_), count = rows * r_;
  if (!has_unit_) kernels_.scale(type_, u_row(begin), factors_.data(), kind_, unit_ + at, rows, r_);
  kernels_.product(kind_, unit_ + at, square_, left_ + at, rows, r_);
  if (kind_ == sums_) return;
  auto narrow = [&](const char* from, char* to) {
    kernels_.narrow(reinterpret_cast<const double*>(from + at), reinterpret_cast<float*>(to) + begin * r_, count);
  };
  narrow(unit_, unit_sums_);
  narrow(left_, left_sums_);
}

void Chain::add_inner(const void* a, const void* b, int64_t first, int64_t rows, double* sums) const {
  const int64_t at = first * r_ * bytes_of(sums_);
  kernels_.inner(sums_, static_cast<const char*>(a) + at, static_cast<const char*>(b) + at, rows, r_, sums);
}

std::vector<double> Chain::inner(const void* a, const void* b, int64_t rows) const {
  const int64_t count = chunks_of(rows, r_), square = r_ * r_;
  std::vector<double> partial(size_t(count * square), 0.0);
  over_chunks(count, rows, [&](int64_t chunk, int64_t first, int64_t here) {
    add_inner(a, b, first, here, partial.data() + chunk * square);
  });
  return total(partial, square);
}

void Chain::set_symmetric(const std::vector<double>& dS) {
  const int64_t stride = cpu::row_stride(r_);
  for (int64_t i = 0; i < r_; ++i) {
    for (int64_t j = 0; j < stride; ++j)
      write(sums_, square_, i * stride + j, j < r_ ? dS[size_t(i < j ? i * r_ + j : j * r_ + i)] : 0);
  }
}

void Chain::finish_block(int64_t begin, int64_t end, const void* sums, const Tensor& du) {
  const int64_t rows = end - begin;
  std::vector<double> moved(size_t(rows * r_));
  kernels_.product(sums_, unit_sums_ + begin * r_ * bytes_of(sums_), square_, moved.data(), rows, r_);
  char* to = static_cast<char*>(du.mutable_data_ptr()) + begin * r_ * bytes_of(type_);
  kernels_.scaled_difference(sums_, moved.data(), sums, factors_.data(), type_, to, rows, r_);
}

}  // namespace frodkernels::ops
