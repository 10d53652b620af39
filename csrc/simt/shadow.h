// SPDX-License-Identifier: Apache-2.0
//
// The checker's memory: what is known of each tracked buffer, cell by cell. A cell covers 4 bytes until a narrower
// access comes; then the buffer's cells are split, so that neighbours are never taken for one another.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "simt/block.h"

namespace simt {

// Who touched a cell, and when. Blocks are numbered across launches, so nothing is cleared between launches or blocks.
struct Stamp {
  uint32_t block = 0;  // 0: never
  uint32_t clock = 0;  // of the block
  uint32_t thread : 10, atomic : 1, pending : 1, site : 20;
  Stamp() : thread(0), atomic(0), pending(0), site(0) {}
};

struct Cell {
  Stamp write;
  Stamp reads[2];  // the last reader, and the last one of another warp if there is one, else another thread
};

struct Buffer {
  uintptr_t start = 0;
  size_t bytes = 0;
  std::string name;
  bool writable = false, initialised = false, shared = false;
  uint64_t launch = 0;  // how many launches there had been when it was tracked
  int shift = 2;        // a cell covers 1 << shift bytes
  Cell* cells = nullptr;

  Buffer() = default;
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  bool holds(uintptr_t a) const { return a - start < bytes; }
  void allocate();
  void refine(int to_shift);
};

// Buffers by address, without overlap.
class Buffers {
 public:
  Buffer* find(uintptr_t a);
  // The buffer that ends last at or before `a`, for messages.
  const Buffer* before(uintptr_t a) const;
  Buffer& add(uintptr_t start, size_t bytes);
  void drop_shared();
  void clear();
  void drop_overlapping(uintptr_t start, size_t bytes);
  // The union of [start, end) and the read-only buffers tracked since the last launch that overlap it: views of one
  // storage.
  void widen_by_views(uintptr_t& start, uintptr_t& end, uint64_t launch, std::string& name) const;

 private:
  std::map<uintptr_t, std::unique_ptr<Buffer>> by_start_;
};

}  // namespace simt
