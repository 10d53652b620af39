// SPDX-License-Identifier: Apache-2.0
//
// Twins of the wrappers in cuda/ptx.cuh: same names, same parameters, same effect.
#pragma once
#include "simt/language.h"

namespace ptx {

template <class scalar_t>
SIMT_INLINE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              simt::Place at = simt::Place::here()) {
  static_assert(std::is_same_v<scalar_t, __half> || std::is_same_v<scalar_t, __nv_bfloat16>);
  constexpr auto element = std::is_same_v<scalar_t, __half> ? simt::Element::kHalf : simt::Element::kBFloat16;
  simt::mma_m16n8k16(element, d, a, b, at);
}

#define SIMT_LDMATRIX(name, count, transposed)                                                              \
  SIMT_INLINE void name(uint32_t (&r)[count], const void* smem_row, simt::Place at = simt::Place::here()) { \
    simt::ldmatrix(r, count, transposed, smem_row, at);                                                     \
  }
SIMT_LDMATRIX(ldmatrix_x1, 1, false)
SIMT_LDMATRIX(ldmatrix_x2, 2, false)
SIMT_LDMATRIX(ldmatrix_x4, 4, false)
SIMT_LDMATRIX(ldmatrix_x1_trans, 1, true)
SIMT_LDMATRIX(ldmatrix_x2_trans, 2, true)
SIMT_LDMATRIX(ldmatrix_x4_trans, 4, true)
#undef SIMT_LDMATRIX

template <int kBytes>
SIMT_INLINE void cp_async(void* smem, const void* gmem, int src_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  simt::cp_async(smem, gmem, kBytes, src_bytes);
}
SIMT_INLINE void cp_async_commit() { simt::cp_async_commit(); }
template <int kGroups>
SIMT_INLINE void cp_async_wait() {
  simt::cp_async_wait(kGroups);
}

}  // namespace ptx
