// SPDX-License-Identifier: Apache-2.0
//
// The sparse core's kernels for bf16 features on CPUs that multiply pairs of them: the inner products of the backward
// take one instruction where widening takes four. Sums stay float32.
#include "sparse_core_kernels.h"

namespace frodkernels::cpu::FRODKERNELS_ISA {

static void forward(const Product& a, int64_t begin, int64_t end) { forward_as<BF16>(a, begin, end); }

static void backward(const Product& a, int64_t begin, int64_t end) { backward_as<BF16>(a, begin, end); }

extern const Kernels kKernels;
const Kernels kKernels = {forward, backward};

}  // namespace frodkernels::cpu::FRODKERNELS_ISA
