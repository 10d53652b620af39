// SPDX-License-Identifier: Apache-2.0
//
// frodkernels::native_reflections, native_reflections_again and native_reflections_gradient on CPU tensors. A call is a
// fraction of a layer's: ten small ops of torch, each with its own pass over [n, r] and its own waking of threads,
// would cost as much as the kernels that they prepare.
#include "reflections.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../cpu/scalars.h"

namespace frodkernels::ops {
namespace {

using cpu::Scalar;
using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

// Elements of [n, r] that a thread should have. The cut follows from shapes alone: sums never depend on the threads.
constexpr int64_t kChunk = int64_t(1) << 15, kMostChunks = 16;

int64_t chunks_of(int64_t elements) { return std::clamp<int64_t>(elements / kChunk, 1, kMostChunks); }

// f(chunk, first row, end) on torch's threads.
template <typename F>
void over_rows(int64_t n, int64_t r, F f) {
  const int64_t chunks = chunks_of(n * r);
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) f(k, n * k / chunks, n * (k + 1) / chunks);
  });
}

float read(float x) { return x; }
double read(double x) { return x; }
struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
float read(Bf16 x) { return cpu::bf16_to_float(x.bits); }
float read(Half x) { return cpu::half_to_float(x.bits); }
void write(float* to, double x) { *to = float(x); }
void write(double* to, double x) { *to = x; }
void write(Bf16* to, double x) { to->bits = cpu::float_to_bf16(float(x)); }
void write(Half* to, double x) { to->bits = cpu::float_to_half(float(x)); }

// f(pointer to the elements of t, of its dtype)
template <typename F>
void by_type(const Tensor& t, const char* name, void* data, F f) {
  switch (scalar_of<Scalar>(t, name)) {
    case Scalar::kF32:
      return f(static_cast<float*>(data));
    case Scalar::kF64:
      return f(static_cast<double*>(data));
    case Scalar::kBF16:
      return f(static_cast<Bf16*>(data));
    case Scalar::kF16:
      return f(static_cast<Half*>(data));
  }
}

// Likewise for sums: float32 or float64.
template <typename F>
void by_sums(ScalarType type, F f) {
  return type == ScalarType::Double ? f(double{}) : f(float{});
}

void* data_of(const Tensor& t) { return const_cast<void*>(t.const_data_ptr()); }

Tensor checked(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(t.device().is_cpu(), name, " must be a CPU tensor");
  STD_TORCH_CHECK(t.dim() == 2 && (rows < 0 || t.size(0) == rows) && (columns < 0 || t.size(1) == columns), name,
                  " has the wrong shape");
  return torch::stable::contiguous(t);
}

Tensor checked_sums(const Tensor& t, const char* name, int64_t rows, int64_t columns, ScalarType type) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, " must have the dtype of the sums");
  return checked(t, name, rows, columns);
}

Tensor checked_norms(const Tensor& norms, int64_t r) {
  STD_TORCH_CHECK(norms.device().is_cpu() && norms.dim() == 1 && norms.size(0) == r, "norms must be [", r, "]");
  STD_TORCH_CHECK(norms.scalar_type() == ScalarType::Float || norms.scalar_type() == ScalarType::Double,
                  "norms must be float32 or float64");
  return torch::stable::contiguous(norms);
}

// |u_j|; squares are summed in float64, chunk by chunk.
std::vector<double> column_norms(const Tensor& u, int64_t n, int64_t r) {
  const int64_t chunks = chunks_of(n * r);
  std::vector<double> partial(size_t(chunks * r), 0.0), norms(size_t(r), 0.0);
  by_type(u, "u", data_of(u), [&](auto* from) {
    over_rows(n, r, [&](int64_t chunk, int64_t begin, int64_t end) {
      double* to = partial.data() + chunk * r;
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t j = 0; j < r; ++j) to[j] += double(read(from[i * r + j])) * double(read(from[i * r + j]));
      }
    });
  });
  for (int64_t j = 0; j < r; ++j) {
    double sum = 0;
    for (int64_t k = 0; k < chunks; ++k) sum += partial[size_t(k * r + j)];
    norms[size_t(j)] = std::sqrt(sum);
  }
  return norms;
}

// u with unit columns. A zero column is 0 · ∞: NaN.
Tensor unit_columns(const Tensor& u, const Tensor& norms, ScalarType type) {
  const int64_t n = u.size(0), r = u.size(1);
  Tensor unit = torch::stable::new_empty(u, {n, r}, type);
  std::vector<double> inverse(static_cast<size_t>(r));
  by_type(norms, "norms", data_of(norms), [&](auto* from) {
    for (int64_t j = 0; j < r; ++j) inverse[size_t(j)] = 1 / double(read(from[j]));
  });
  by_sums(type, [&](auto kind) {
    using acc = decltype(kind);
    acc* to = static_cast<acc*>(unit.mutable_data_ptr());
    by_type(u, "u", data_of(u), [&](auto* from) {
      over_rows(n, r, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          for (int64_t j = 0; j < r; ++j) to[i * r + j] = acc(double(read(from[i * r + j])) * inverse[size_t(j)]);
        }
      });
    });
  });
  return unit;
}

// S^-1 for the upper triangular S = striu(G) + diag(G) / 2, in float64, row by row from the last.
Tensor inverse_of_half(const Tensor& gram, int64_t r) {
  Tensor inverse = torch::stable::new_empty(gram, {r, r});
  by_sums(gram.scalar_type(), [&](auto kind) {
    using acc = decltype(kind);
    const acc* G = static_cast<const acc*>(gram.const_data_ptr());
    std::vector<double> X(size_t(r * r), 0.0);
    for (int64_t i = r - 1; i >= 0; --i) {
      double* row = X.data() + i * r;
      const double diagonal = 2 / double(G[i * r + i]);
      row[i] = 1;
      for (int64_t k = i + 1; k < r; ++k) {
        const double factor = double(G[i * r + k]);
        const double* other = X.data() + k * r;
        for (int64_t j = k; j < r; ++j) row[j] -= factor * other[j];
      }
      for (int64_t j = i; j < r; ++j) row[j] *= diagonal;
    }
    acc* to = static_cast<acc*>(inverse.mutable_data_ptr());
    for (int64_t k = 0; k < r * r; ++k) to[k] = acc(X[size_t(k)]);
  });
  return inverse;
}

Tensor solved(const Tensor& unit, const Tensor& inverse, bool transpose) {
  return product_on_cpu(unit, transpose ? torch::stable::contiguous(torch::stable::transpose(inverse, 0, 1)) : inverse);
}

Tensor as_type(const Tensor& t, ScalarType type) { return t.scalar_type() == type ? t : torch::stable::to(t, type); }

// Factors of float32 directions come from float64: an error in them is an error of every token.
std::tuple<Tensor, Tensor, Tensor, Tensor> reflections(const Tensor& u, bool wide, bool transpose) {
  const Tensor dense = checked(u, "u", -1, -1);
  const int64_t n = dense.size(0), r = dense.size(1);
  const ScalarType sums = wide || u.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const ScalarType type = u.scalar_type() == ScalarType::Float ? ScalarType::Double : sums;
  const std::vector<double> lengths = column_norms(dense, n, r);
  Tensor norms = torch::stable::new_empty(dense, {r}, type);
  by_sums(type, [&](auto kind) {
    auto* to = static_cast<decltype(kind)*>(norms.mutable_data_ptr());
    for (int64_t j = 0; j < r; ++j) to[j] = decltype(kind)(lengths[size_t(j)]);
  });
  const Tensor unit = unit_columns(dense, norms, type);
  const Tensor inverse = inverse_of_half(inner_on_cpu(unit, unit), r);
  const Tensor left = solved(unit, inverse, transpose);
  return {as_type(unit, sums), as_type(left, sums), inverse, norms};
}

std::tuple<Tensor, Tensor> reflections_again(const Tensor& u, const Tensor& inverse, const Tensor& norms, bool wide,
                                             bool transpose) {
  const Tensor dense = checked(u, "u", -1, -1), lengths = checked_norms(norms, dense.size(1));
  const ScalarType type = lengths.scalar_type();
  const Tensor square = checked_sums(inverse, "inverse", dense.size(1), dense.size(1), type);
  const ScalarType sums = wide || u.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor unit = unit_columns(dense, lengths, type), left = solved(unit, square, transpose);
  return {as_type(unit, sums), as_type(left, sums)};
}

Tensor reflections_gradient(const Tensor& u, const Tensor& unit, const Tensor& norms, const Tensor& sums,
                            const Tensor& a, const Tensor& b) {
  checked(unit, "unit", -1, -1);
  const int64_t n = unit.size(0), r = unit.size(1);
  checked(u, "u", n, r);
  const Tensor lengths = checked_norms(norms, r);
  const ScalarType type = unit.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "unit must be float32 or float64");
  std::vector<double> length(static_cast<size_t>(r));
  by_type(lengths, "norms", data_of(lengths), [&](auto* from) {
    for (int64_t j = 0; j < r; ++j) length[size_t(j)] = double(read(from[j]));
  });
  const Tensor q = checked_sums(unit, "unit", n, r, type), given = checked_sums(sums, "sums", n, r, type);
  const Tensor first = checked_sums(a, "a", -1, r, type), second = checked_sums(b, "b", first.size(0), r, type);
  const Tensor inner = inner_on_cpu(first, second);
  Tensor symmetric = torch::stable::new_empty(inner, {r, r});
  Tensor du = torch::stable::new_empty(u, {n, r});
  by_sums(type, [&](auto kind) {
    using acc = decltype(kind);
    const acc* from = static_cast<const acc*>(inner.const_data_ptr());
    acc* to = static_cast<acc*>(symmetric.mutable_data_ptr());
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = 0; j < r; ++j) to[i * r + j] = i < j ? from[i * r + j] : from[j * r + i];
    }
    const Tensor moved = product_on_cpu(q, symmetric);
    const acc* x = static_cast<const acc*>(moved.const_data_ptr());
    const acc* y = static_cast<const acc*>(given.const_data_ptr());
    by_type(du, "u", du.mutable_data_ptr(), [&](auto* out) {
      over_rows(n, r, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          for (int64_t j = 0; j < r; ++j)
            write(out + i * r + j, double(x[i * r + j] - y[i * r + j]) / length[size_t(j)]);
        }
      });
    });
  });
  return du;
}

}  // namespace
}  // namespace frodkernels::ops

STABLE_TORCH_LIBRARY_FRAGMENT(frodkernels, m) {
  m.def(frodkernels::ops::kReflectionsSchema);
  m.def(frodkernels::ops::kReflectionsAgainSchema);
  m.def(frodkernels::ops::kReflectionsGradientSchema);
}

STABLE_TORCH_LIBRARY_IMPL(frodkernels, CPU, m) {
  m.impl("native_reflections", TORCH_BOX(&frodkernels::ops::reflections));
  m.impl("native_reflections_again", TORCH_BOX(&frodkernels::ops::reflections_again));
  m.impl("native_reflections_gradient", TORCH_BOX(&frodkernels::ops::reflections_gradient));
}
