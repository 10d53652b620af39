// SPDX-License-Identifier: Apache-2.0
//
// Kernels that test the executor: each right, and with planted bugs. Compiled only into the executor's modules.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace simt::planted {

struct Call {
  int bug;  // 0: the right twin
  std::vector<void*> pointers;
  std::vector<int64_t> sizes;

  template <class T>
  T* pointer(size_t i) const {
    return static_cast<T*>(pointers.at(i));
  }
  int size(size_t i) const { return static_cast<int>(sizes.at(i)); }
};

void run(const std::string& kernel, const Call& call);  // std::out_of_range: no such kernel

}  // namespace simt::planted
