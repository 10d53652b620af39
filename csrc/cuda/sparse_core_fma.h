// SPDX-License-Identifier: Apache-2.0
//
// Launchers of the sparse core's plain kernels beside those that sparse_core.h declares.
#pragma once
#include "cuda/sparse_core.h"

namespace frodkernels::cuda {

// Bytes of scratch with which product_fma can keep features in shared memory; 0 where it would not use any.
int64_t product_fma_scratch(const Product& a);
// As product_fma(a, stream), which is this without scratch. `scratch` is null or holds product_fma_scratch(a) bytes,
// aligned to 32. Whether there is scratch decides the kernel, and so the order of the sums.
const char* product_fma(const Product& a, void* scratch, CUstream_st* stream);

}  // namespace frodkernels::cuda
