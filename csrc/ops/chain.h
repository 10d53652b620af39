// SPDX-License-Identifier: Apache-2.0
//
// The factors of a chain of reflections on the CPU (frodkernels/ops/reflections.py has the formulas), formed block by
// block of rows in memory that calls share: a call is a fraction of a layer's, and ten small ops of torch, each with
// its own pass over [n, r] and its own waking of threads, would cost as much as the kernels that they prepare.
#pragma once
#include <cstdint>
#include <vector>

#include "../cpu/reflections.h"
#include "householder_cpu.h"

namespace frodkernels::ops {

class Chain {
  const cpu::ReflectionKernels& kernels_;
  const torch::stable::Tensor u_;
  const cpu::Scalar type_, kind_, sums_;
  const int64_t n_, r_;
  const Scratch memory_;
  char *unit_, *left_;  // [n, r] of kind
  char *unit_sums_, *left_sums_;
  char* square_;                 // [r][row_stride(r)]
  std::vector<double> factors_;  // 1 / |u_j|
  bool has_unit_ = false;

  const char* u_row(int64_t i) const;
  void form_block(int64_t begin, int64_t end);

 public:
  // u [n, r], contiguous, on the CPU. What it is applied to is float64 if `wide`. Factors go to `unit` and `left`
  // [n, r], or memory of the chain's own where these are null.
  Chain(const torch::stable::Tensor& u, bool wide, void* unit = nullptr, void* left = nullptr);

  // float64 where u or what it is applied to is, float32 otherwise; `kind` is float64 for float32 u, too: an error in
  // the factors is an error of every token.
  static torch::headeronly::ScalarType sums_type(const torch::stable::Tensor& u, bool wide);
  static torch::headeronly::ScalarType kind_type(const torch::stable::Tensor& u, bool wide);

  // From u: norms [r] and inverse [r, r], both of `kind`.
  void measure(void* norms, void* inverse);
  // What `form` needs of these: S^-1, or its transpose.
  void prepare(const void* norms, const void* inverse, bool transpose);
  // What `gradient` needs of them.
  void set_norms(const void* norms);

  const void* unit() const { return unit_sums_; }
  const void* left() const { return left_sums_; }

  // unit = u / |u| and left = unit S^-1, in the type of the sums; f(begin, end) on every finished block of features, of
  // cpu::kUnit or the last few.
  template <typename F>
  void form(F f) {
    over_blocks([&](int64_t begin, int64_t end) {
      form_block(begin, end);
      f(begin, end);
    });
  }

  // sums [r, r] += aᵀ b over the tokens [first, first + rows) of a and b [_, r], of the type of the sums.
  void add_inner(const void* a, const void* b, int64_t first, int64_t rows, double* sums) const;
  // aᵀ b over all of them.
  std::vector<double> inner(const void* a, const void* b, int64_t rows) const;

  // du [n, r] = (unit (dG + dGᵀ) − sums) / |u| for dS [r, r]; sums(begin, end): the rows from `begin` on.
  template <typename F>
  void gradient(const std::vector<double>& dS, F sums, const torch::stable::Tensor& du) {
    set_symmetric(dS);
    over_blocks([&](int64_t begin, int64_t end) { finish_block(begin, end, sums(begin, end), du); });
  }

 private:
  template <typename F>
  void over_blocks(F f) {
    const int64_t work = cpu::kUnit * r_ * (r_ + 8);
    torch::stable::parallel_for(0, (n_ + cpu::kUnit - 1) / cpu::kUnit, std::max<int64_t>(kGrain / work, 1),
                                [&](int64_t first, int64_t last) {
                                  for (int64_t k = first; k < last; ++k)
                                    f(k * cpu::kUnit, std::min((k + 1) * cpu::kUnit, n_));
                                });
  }
  void set_symmetric(const std::vector<double>& dS);
  void finish_block(int64_t begin, int64_t end, const void* sums, const torch::stable::Tensor& du);
};

}  // namespace frodkernels::ops
