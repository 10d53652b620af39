// SPDX-License-Identifier: Apache-2.0
//
// What the library says of itself.
//
//   frodkernels::native_build_info() -> str   "key=value" separated by "; ": what this library was built with
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include <string>

namespace frodkernels::ops {
namespace {

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

}  // namespace
}  // namespace frodkernels::ops

STABLE_TORCH_LIBRARY_FRAGMENT(frodkernels, m) { m.def("native_build_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(frodkernels, CompositeExplicitAutograd, m) {
  m.impl("native_build_info", TORCH_BOX(&frodkernels::ops::build_info));
}
