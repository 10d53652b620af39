// SPDX-License-Identifier: Apache-2.0
#include "simt/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

// Weak: present only where libasan is loaded into the process.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom_old, size_t* size_old);
__attribute__((weak)) void __asan_poison_memory_region(void const volatile* p, size_t size);
__attribute__((weak)) void __asan_unpoison_memory_region(void const volatile* p, size_t size);
}

namespace simt {
namespace {
constexpr size_t kPage = 4096;
constexpr size_t kStack = 256 << 10;  // reserved, not used: pages come when they are touched
}  // namespace

#if !defined(SIMT_UCONTEXT)
extern "C" void simt_switch_stack(void** save, void* load);
asm(R"(.text
.globl simt_switch_stack
.hidden simt_switch_stack
.type simt_switch_stack,@function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stack,.-simt_switch_stack
)");
#endif

Fiber::~Fiber() {
  if (stack) munmap(stack - kPage, kStack + kPage);
}

void Fiber::prepare(void (*entry)()) {
  if (!stack) {
    void* p = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    mprotect(p, kPage, PROT_NONE);  // a stack overflow is a SIGSEGV, not silent damage
    stack = static_cast<char*>(p) + kPage;
    bottom = stack;
    bytes = kStack;
  }
  fake_stack = nullptr;
#if !defined(SIMT_UCONTEXT)
  void** s = reinterpret_cast<void**>(stack + bytes);
  *--s = nullptr;  // alignment: at the entry, rsp % 16 == 8
  *--s = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--s = nullptr;
  sp = s;
#else
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
#endif
}

void Fiber::forget() {
  if (stack) unpoison_memory(stack, bytes);
}

void switch_fiber(Fiber& from, Fiber& to, bool leaves_for_good) {
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(leaves_for_good ? nullptr : &from.fake_stack, to.bottom, to.bytes);
  }
#if !defined(SIMT_UCONTEXT)
  simt_switch_stack(&from.sp, to.sp);
#else
  swapcontext(&from.context, &to.context);
#endif
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

void entered_fiber(Fiber& self, Fiber& from) {
  // The OS thread's stack bounds are known only to the sanitizer; going back needs them.
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(self.fake_stack, &from.bottom, &from.bytes);
}

void poison_memory(const void* p, size_t bytes) {
  if (__asan_poison_memory_region && bytes) __asan_poison_memory_region(p, bytes);
}
void unpoison_memory(const void* p, size_t bytes) {
  if (__asan_unpoison_memory_region && bytes) __asan_unpoison_memory_region(p, bytes);
}

}  // namespace simt
