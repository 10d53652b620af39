// SPDX-License-Identifier: Apache-2.0
//
// What the library says of itself, and the ops that belong to no family.
//
//   frodkernels::native_build_info() -> str             "key=value" separated by "; ": what this library was built with
//   frodkernels::native_scale_rows(z, lam) -> Tensor    csrc/cuda/scale_rows.cuh; anywhere but on CUDA it says why not
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/version.h>

#include <string>

namespace frodkernels::ops {
namespace {

using torch::stable::Tensor;

#ifdef __clang__
#define FRODKERNELS_COMPILER "clang++ " __clang_version__
#else
#define FRODKERNELS_COMPILER "g++ " __VERSION__
#endif

std::string build_info() {
  std::string info = "compiler=" FRODKERNELS_COMPILER "; torch_headers=" TORCH_VERSION "; torch_target=2.10";
#ifdef FRODKERNELS_HAVE_CUDA
  info += "; cuda=" FRODKERNELS_CUDA_VERSION "; cuda_targets=" FRODKERNELS_CUDA_TARGETS;
#else
  info += "; cuda=none";
#endif
  return info;
}

Tensor scale_rows_elsewhere(const Tensor& z, const Tensor& lam) {
#ifdef FRODKERNELS_HAVE_CUDA
  STD_TORCH_CHECK(false, "native_scale_rows runs on CUDA tensors; move z and lam to a GPU");
#else
  STD_TORCH_CHECK(false, "native_scale_rows: this library was built without CUDA; build again with nvcc on PATH");
#endif
  return z;
}

}  // namespace
}  // namespace frodkernels::ops

STABLE_TORCH_LIBRARY_FRAGMENT(frodkernels, m) {
  m.def("native_build_info() -> str");
  m.def("native_scale_rows(Tensor z, Tensor lam) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(frodkernels, CompositeExplicitAutograd, m) {
  m.impl("native_build_info", TORCH_BOX(&frodkernels::ops::build_info));
  m.impl("native_scale_rows", TORCH_BOX(&frodkernels::ops::scale_rows_elsewhere));
}
