// SPDX-License-Identifier: Apache-2.0
//
// Fibers: a stack and the place to go on. One that never comes back is simply dropped: device code has no destructors.
#pragma once
#include <cstddef>

#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT 1  // slower: it saves the signal mask by a system call at each switch
#endif
#if defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace simt {

struct Fiber {
  char* stack = nullptr;  // null: the stack of the OS thread
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
#if defined(SIMT_UCONTEXT)
  ucontext_t context;
#else
  void* sp = nullptr;
#endif

  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void prepare(void (*entry)());  // the next switch starts `entry`, which must never return
  void forget();                  // for AddressSanitizer: the frames of a fiber that was dropped are no more
  bool holds(const void* p) const { return static_cast<size_t>(static_cast<const char*>(p) - stack) < bytes; }
};

// `leaves_for_good`: `from` will not be resumed.
void switch_fiber(Fiber& from, Fiber& to, bool leaves_for_good = false);
void entered_fiber(Fiber& self, Fiber& from);  // first thing on a new fiber

// AddressSanitizer, where the process runs under it; else nothing.
void poison_memory(const void* p, size_t bytes);
void unpoison_memory(const void* p, size_t bytes);

}  // namespace simt
