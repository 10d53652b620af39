// SPDX-License-Identifier: Apache-2.0
//
// Executor: what compiled kernels call. A CUDA thread is a fiber; the blocks of a launch run one after another (or over
// several OS threads), the fibers of a block take turns. Nothing here is a template: a kernel's translation unit may be
// instrumented for the checker, the executor itself never is.
#pragma once
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace simt {

// Where in the kernel's source a barrier or a warp collective stands; two of them match only at the same place.
struct Place {
  const char* file;
  int line;
  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

enum class Order { kForward, kReverse, kRandom };

struct Config {
  Order order = Order::kForward;  // in which warps, lanes and blocks take their turns
  uint64_t seed = 1;              // of the random order and of yields
  int threads = 1;                // OS threads, each runs blocks of its own
  bool lazy_copies = true;        // cp.async lands when it is waited for (the latest legal time); false: when issued
  int yield_permille = 0;         // chance that a thread gives way at an atomic and, under the checker, at any access
  int sms = 108;
  int shared_per_block = 166912;  // bytes a block may have after gpu::allow_shared
  int capability = 80;
  std::map<std::string, uint64_t> sample;  // of these kernels (names without template arguments) run every k-th block
};
extern Config config;

// None of these changes during a call of a kernel, so the compiler may keep them: hence const.
[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] dim3 block_size();
[[gnu::const]] dim3 grid_size();
[[gnu::const]] int lane();

enum class Barrier { kSync, kCount, kAnd, kOr };
int barrier(Barrier kind, bool predicate, Place place);

enum class Vote { kBallot, kAdd, kMin, kMax, kMinUnsigned, kMaxUnsigned, kAnd, kOr, kXor, kMatch };
uint32_t vote(Vote kind, uint32_t mask, uint64_t value, Place place);
enum class Shuffle { kIndex, kUp, kDown, kXor };
void shuffle(Shuffle kind, uint32_t mask, void* value, int bytes, int source_lane, Place place);  // replaces `value`
void sync_warp(uint32_t mask, Place place);
uint32_t active_mask();

// Shared memory: one variable per key and block; poisoned with 0xFF before each block.
void* shared_variable(const void* key, size_t bytes);
void* dynamic_shared();
void allow_shared(const void* kernel, int64_t bytes);

// One access of `bytes`, attributed to the caller's source line.
void load(void* value, const void* from, int bytes);
void store(void* to, const void* value, int bytes);

// An atomic is atomic_begin, atomic_read and then atomic_swap until it succeeds.
void atomic_begin(void* p, int bytes);
void atomic_read(const void* p, int bytes, void* value);
bool atomic_swap(void* p, int bytes, void* expected, const void* desired);

enum class Element { kHalf, kBFloat16 };
void mma_m16n8k16(Element element, float* d, const uint32_t* a, const uint32_t* b, Place place);
void ldmatrix(uint32_t* fragments, int matrices, bool transposed, const void* row, Place place);
void cp_async(void* shared, const void* global, int bytes, int source_bytes);
void cp_async_commit();
void cp_async_wait(int groups_in_flight);

using Body = void (*)(const void* arguments);
void launch(const char* kernel, const void* function, dim3 grid, dim3 block, size_t shared_bytes, Body body,
            const void* arguments, size_t argument_bytes);

// Tells the checker of a buffer; nothing in the other modules.
void track(const void* p, size_t bytes, const char* name, bool writable, bool initialised);

// Ends the calling thread's launch with an exception at the launch; from the host it throws at once.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

}  // namespace simt
