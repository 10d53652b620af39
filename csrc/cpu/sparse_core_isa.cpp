// SPDX-License-Identifier: Apache-2.0
//
// The sparse core's kernels for one ISA level and every storage type.
#include "sparse_core_kernels.h"

namespace frodkernels::cpu::FRODKERNELS_ISA {

static void forward(const Product& a, int64_t begin, int64_t end) {
  by_storage(a.type, [&](auto storage) { forward_as<decltype(storage)>(a, begin, end); });
}

static void backward(const Product& a, int64_t begin, int64_t end) {
  by_storage(a.type, [&](auto storage) { backward_as<decltype(storage)>(a, begin, end); });
}

extern const Kernels kKernels;
const Kernels kKernels = {forward, backward};

}  // namespace frodkernels::cpu::FRODKERNELS_ISA
