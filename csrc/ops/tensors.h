// SPDX-License-Identifier: Apache-2.0
//
// What the bindings of every op share.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace frodkernels::ops {

using OptionalTensor = std::optional<torch::stable::Tensor>;
using OptionalTensors = std::optional<std::vector<torch::stable::Tensor>>;

// `t` itself where it is contiguous: asking torch costs a call through its dispatcher.
inline torch::stable::Tensor as_contiguous(const torch::stable::Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// The kernels' own name of a tensor's dtype: cpu::Scalar or cuda::Scalar.
template <typename Scalar>
Scalar scalar_of(const torch::stable::Tensor& t, const char* name) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Scalar::kF32;
    case ScalarType::Double:
      return Scalar::kF64;
    case ScalarType::BFloat16:
      return Scalar::kBF16;
    case ScalarType::Half:
      return Scalar::kF16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
  return Scalar::kF32;
}

}  // namespace frodkernels::ops
