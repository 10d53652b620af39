// SPDX-License-Identifier: Apache-2.0
//
// Memory that a thread keeps between calls. Compiled once per ISA level, like simd.h.
#pragma once
#include <cstdlib>
#include <memory>
#include <new>

namespace frodkernels::cpu::FRODKERNELS_ISA {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// This thread's scratch, page-aligned, grown on demand and kept: fresh pages would cost more than filling them.
inline char* scratch(int which, size_t bytes) {
  thread_local std::unique_ptr<char, Free> buffer[2];
  thread_local size_t capacity[2] = {0, 0};
  if (capacity[which] < bytes) {
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    buffer[which].reset(static_cast<char*>(std::aligned_alloc(4096, rounded)));
    capacity[which] = buffer[which] ? rounded : 0;
    if (!buffer[which]) throw std::bad_alloc();
  }
  return buffer[which].get();
}

}  // namespace frodkernels::cpu::FRODKERNELS_ISA
