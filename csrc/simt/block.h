// SPDX-License-Identifier: Apache-2.0
//
// The executor's own state: threads, warps, the block that runs on an OS thread, and the checker's entry points.
#pragma once
#include <atomic>
#include <cstdint>
#include <deque>
#include <exception>
#include <map>
#include <string>
#include <vector>

#include "simt/fiber.h"
#include "simt/runtime.h"

namespace simt {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kSharedWithoutAsking = 48 * 1024;
constexpr int kSharedCapacity = 320 * 1024;  // dynamic and static variables of one block, with gaps
constexpr int kSharedAlign = 128;            // all banks once

struct Copy {  // one cp.async
  void* to;
  const void* from;
  int bytes, source_bytes;
  void* pc;
};

enum class State { kReady, kAtBarrier, kInCollective };

struct Warp;

struct Thread {
  uint3 index{};
  int linear = 0, lane = 0;
  Warp* warp = nullptr;
  State state = State::kReady;
  bool done = false;
  Place waits_at{};
  int barrier_result = 0;
  std::vector<Copy> copies;    // issued and not landed, oldest first
  std::vector<size_t> groups;  // sizes of the committed groups, oldest first; the rest of `copies` is open
  Fiber fiber;
};

// What a collective does once all its lanes have come: `lanes[i]` is lane i's argument. Returns nothing, may fail().
using Combine = void (*)(void** lanes, uint32_t arrived, Warp& warp);

struct Collective {
  uint32_t mask = 0, arrived = 0;
  Combine combine = nullptr;
  Place place{};
  void* lanes[kWarp];
};

struct Warp {
  int number = 0;
  uint32_t ready = 0, alive = 0, all = 0;
  uint32_t synced_at = 0;  // the block's clock at the last __syncwarp of the whole warp
  Collective collectives[8];
};

struct Counts {
  uint64_t launches = 0, blocks = 0, threads = 0, barriers = 0, collectives = 0, mma = 0, ldmatrix = 0, cp_async = 0;
  uint64_t grid = 0;                             // blocks of the launches, whether run or not (Config::sample)
  uint64_t block_threads = 0, shared_bytes = 0;  // of a block: the most of all launches; shared: dynamic
  void operator+=(const Counts& other);
};

struct SharedVariable {
  const void* key;
  char* start;
  size_t bytes;
};

// The block that an OS thread is running; reused from block to block and launch to launch.
struct Block {
  std::deque<Thread> threads;
  std::vector<Warp> warps;
  dim3 grid, size;
  uint3 index{};
  int count = 0, alive = 0;

  int at_barrier = 0;
  int exited_before_barrier = 0;
  Barrier barrier_kind{};
  Place barrier_place{};
  int barrier_value = 0;

  // Logical time: one tick at each release of a barrier and each __syncwarp of a whole warp.
  uint32_t clock = 0, barrier_at = 0;

  const char* kernel = "";
  const void* function = nullptr;
  Body body = nullptr;
  const void* arguments = nullptr;
  size_t argument_bytes = 0;

  char* shared = nullptr;
  size_t dynamic_bytes = 0, static_bytes = 0, shared_used = 0;
  std::vector<SharedVariable> variables;

  Fiber scheduler;
  Thread* current = nullptr;
  std::exception_ptr error;
  uint64_t random = 1;
  Counts counts;

  Block();
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  uint64_t next_random();
};

// Set while a fiber runs or the scheduler works on the block; initial-exec because every access looks at it.
extern thread_local __attribute__((tls_model("initial-exec"))) Block* block;

void run_block(Block& b);
void suspend(Block& b, State state, Place place);  // back when the scheduler picks the thread again
void maybe_yield(Block& b);
void thread_exits(Block& b, Thread& t);

// --- shared memory (shared.cpp) ---
void begin_shared(Block& b, size_t dynamic_bytes);  // once a launch
void poison_shared(Block& b);                       // once a block
void exit_with_copies(Block& b, Thread& t);
void check_shared_limit(const void* function, size_t dynamic_bytes, size_t static_bytes);

// Runs `combine` once all live lanes of `mask` have called with the same arguments. `whole_warp`: .aligned
// instructions.
void collective(uint32_t mask, void* lane_argument, Combine combine, bool whole_warp, bool same_place, Place place);

// --- reports (report.cpp) ---
// A fault that does not stop the kernel. `key` tells repetitions apart; program counters are written by pc_text.
void report(const std::string& key, const std::string& text);
std::vector<std::string> take_reports();
std::string pc_text(const void* pc);  // a mark that resolve() replaces by file:line
std::string resolve(const std::string& text);
std::vector<std::pair<std::string, int>> source_lines(const std::vector<const void*>& pcs);
std::string place_text(Place place);
std::string here_text();  // " [kernel k, block (x, y, z), thread (x, y, z)]" of the running thread

// --- accounting (launch.cpp) ---
std::map<std::string, Counts> kernel_counts();
std::map<std::string, uint64_t> launches_ever();
void forget_counts();

// --- the checker, where it is linked in ---
enum Access : unsigned {
  kRead = 0,
  kWrite = 1,
  kAtomic = 2,   // ordered with other atomics; not counted as a request
  kPending = 4,  // write of a cp.async that has been issued
  kLanding = 8,  // the same write, landing: shadow only
  kShadow = 16,  // a further reader of an access that has been counted
};

struct Site {
  std::string kernel, file;
  int line = 0, bytes = 0;
  bool shared = false, write = false;
  uint64_t requests = 0, lanes = 0, sectors = 0, sectors_least = 0, wavefronts = 0, wavefronts_least = 0;
};

struct Checker {
  void (*launch_begin)(Block& b) = nullptr;
  void (*launch_end)() = nullptr;
  void (*block_begin)(Block& b) = nullptr;
  void (*block_end)() = nullptr;
  void (*shared_variable)(const SharedVariable& v, bool dynamic) = nullptr;
  void (*converged)(int warp) = nullptr;  // all live lanes of a warp stand at one point; -1: of every warp
  void (*access)(const void* p, int bytes, unsigned access, const void* pc, const Thread& as) = nullptr;
  void (*track)(const void* p, size_t bytes, const char* name, bool writable, bool initialised) = nullptr;
  void (*reset)() = nullptr;
  std::vector<Site> (*sites)() = nullptr;
};
extern Checker checker;

inline void checked_access(const void* p, int bytes, unsigned access, const void* pc, const Thread& as) {
  if (checker.access) checker.access(p, bytes, access, pc, as);
}

}  // namespace simt
