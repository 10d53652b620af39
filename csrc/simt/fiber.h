// SPDX-License-Identifier: Apache-2.0
//
// Fibers: a stack and the place to go on. One that never comes back is simply dropped: device code has no destructors.
#pragma once
#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

struct Fiber {
  char* stack = nullptr;  // null: the stack of the OS thread
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
#if defined(__x86_64__)
  void* sp = nullptr;
#else
  ucontext_t context;
#endif

  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void prepare(void (*entry)());  // the next switch starts `entry`, which must never return
  bool holds(const void* p) const { return static_cast<size_t>(static_cast<const char*>(p) - stack) < bytes; }
};

// `leaves_for_good`: `from` will not be resumed.
void switch_fiber(Fiber& from, Fiber& to, bool leaves_for_good = false);
void entered_fiber(Fiber& self, Fiber& from);  // first thing on a new fiber

// AddressSanitizer, where the process runs under it; else nothing.
void poison_memory(const void* p, size_t bytes);
void unpoison_memory(const void* p, size_t bytes);

}  // namespace simt
