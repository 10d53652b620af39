// SPDX-License-Identifier: Apache-2.0
#include "simt/shadow.h"

#include <algorithm>
#include <cstdlib>
#include <new>

namespace simt {

Buffer::~Buffer() { std::free(cells); }

// Zero pages are not touched before the kernel touches what they stand for: large buffers cost nothing here.
void Buffer::allocate() {
  static_assert(sizeof(Cell) == 36, "three stamps");
  cells = static_cast<Cell*>(std::calloc((bytes >> shift) + 1, sizeof(Cell)));
  if (!cells) throw std::bad_alloc();
}

void Buffer::refine(int to_shift) {
  const size_t coarse = (bytes >> shift) + 1;
  const int ratio = 1 << (shift - to_shift);
  Cell* old = cells;
  shift = to_shift;
  allocate();
  const size_t fine = (bytes >> shift) + 1;
  for (size_t i = 0; i < coarse; ++i) {
    const Cell& c = old[i];
    if (!c.write.block && !c.reads[0].block) continue;  // untouched: leave the new pages untouched too
    for (size_t j = i * ratio; j < std::min(fine, (i + 1) * ratio); ++j) cells[j] = c;
  }
  std::free(old);
}

Buffer* Buffers::find(uintptr_t a) {
  auto it = by_start_.upper_bound(a);
  if (it == by_start_.begin()) return nullptr;
  Buffer* b = std::prev(it)->second.get();
  return b->holds(a) ? b : nullptr;
}

const Buffer* Buffers::before(uintptr_t a) const {
  auto it = by_start_.upper_bound(a);
  return it == by_start_.begin() ? nullptr : std::prev(it)->second.get();
}

Buffer& Buffers::add(uintptr_t start, size_t bytes) {
  auto b = std::make_unique<Buffer>();
  b->start = start;
  b->bytes = bytes;
  b->allocate();
  return *(by_start_[start] = std::move(b));
}

void Buffers::drop_shared() {
  std::erase_if(by_start_, [](const auto& entry) { return entry.second->shared; });
}

void Buffers::clear() { by_start_.clear(); }

void Buffers::drop_overlapping(uintptr_t start, size_t bytes) {
  std::erase_if(by_start_, [=](const auto& entry) {
    const Buffer& b = *entry.second;
    return b.start < start + bytes && start < b.start + b.bytes;
  });
}

void Buffers::widen_by_views(uintptr_t& start, uintptr_t& end, uint64_t launch, std::string& name) const {
  uintptr_t low = start, high = end;
  for (const auto& [at, b] : by_start_) {
    if (b->launch != launch || b->writable || at >= end || start >= at + b->bytes) continue;
    low = std::min(low, at);
    high = std::max(high, at + b->bytes);
    if (b->name != name) name = b->name + "/" + name;
  }
  start = low;
  end = high;
}

}  // namespace simt
