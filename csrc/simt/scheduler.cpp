// SPDX-License-Identifier: Apache-2.0
//
// Runs one block: picks ready threads, warp by warp and lane by lane in the configured order, until all have exited.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <utility>

#include "simt/block.h"

namespace simt {

thread_local __attribute__((tls_model("initial-exec"))) Block* block = nullptr;

Block::Block() : shared(static_cast<char*>(std::aligned_alloc(1024, kSharedCapacity))) {
  if (!shared) throw std::bad_alloc();
}
Block::~Block() {
  unpoison_memory(shared, kSharedCapacity);
  std::free(shared);
}

uint64_t Block::next_random() {
  random ^= random << 13;
  random ^= random >> 7;
  random ^= random << 17;
  return random;
}

uint3 thread_index() { return block->current->index; }
uint3 block_index() { return block->index; }
dim3 block_size() { return block->size; }
dim3 grid_size() { return block->grid; }
int lane() { return block->current->lane; }
uint32_t active_mask() { return block->current->warp->alive; }

std::string here_text() {
  char text[256];
  const Block& b = *block;
  const uint3 t = b.current->index;
  std::snprintf(text, sizeof text, " [kernel %s, block (%u, %u, %u), thread (%u, %u, %u)]", b.kernel, b.index.x,
                b.index.y, b.index.z, t.x, t.y, t.z);
  return text;
}

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (!block || !block->current) throw std::runtime_error(text);
  // An exception cannot leave instrumented code (its calls are declared not to throw): the fiber is dropped instead.
  Block& b = *block;
  b.error = std::make_exception_ptr(std::runtime_error(text + here_text()));
  switch_fiber(b.current->fiber, b.scheduler, true);
  std::abort();
}

namespace {

void fiber_main() {
  Block& b = *block;
  Thread& t = *b.current;
  entered_fiber(t.fiber, b.scheduler);
  try {
    b.body(b.arguments);
  } catch (...) {
    b.error = std::current_exception();
    switch_fiber(t.fiber, b.scheduler, true);
  }
  exit_with_copies(b, t);
  thread_exits(b, t);
  switch_fiber(t.fiber, b.scheduler, true);
  std::abort();
}

void resume(Block& b, Thread& t) {
  b.current = &t;
  switch_fiber(b.scheduler, t.fiber);
  b.current = nullptr;
}

void begin(Block& b) {
  b.alive = b.count;
  b.at_barrier = 0;
  b.exited_before_barrier = 0;
  b.clock = b.barrier_at = 0;
  b.error = nullptr;
  for (size_t i = 0; i < b.warps.size(); ++i) {
    Warp& w = b.warps[i];
    const int lanes = std::min(kWarp, b.count - static_cast<int>(i) * kWarp);
    w.number = static_cast<int>(i);
    w.all = w.alive = w.ready = lanes == kWarp ? kAllLanes : (1u << lanes) - 1;
    w.synced_at = 0;
    for (Collective& c : w.collectives) c.arrived = c.mask = 0;
  }
  const unsigned dx = b.size.x, dy = b.size.y;
  for (int i = 0; i < b.count; ++i) {
    Thread& t = b.threads[static_cast<size_t>(i)];
    const unsigned u = static_cast<unsigned>(i);
    t.index = {u % dx, u / dx % dy, u / (dx * dy)};
    t.linear = i;
    t.lane = i % kWarp;
    t.warp = &b.warps[static_cast<size_t>(i / kWarp)];
    t.state = State::kReady;
    t.done = false;
    t.copies.clear();
    t.groups.clear();
    t.fiber.prepare(fiber_main);
  }
}

[[noreturn]] void deadlock(const Block& b) {
  std::string text = "deadlock: " + std::to_string(b.alive) + " of " + std::to_string(b.count) + " threads wait";
  // One thread for each place is enough to see who is missing.
  std::vector<std::pair<std::string, int>> places;
  for (int i = 0; i < b.count; ++i) {
    const Thread& t = b.threads[static_cast<size_t>(i)];
    if (t.done) continue;
    const char* what = t.state == State::kAtBarrier ? "__syncthreads" : "a warp collective";
    const std::string place = std::string(what) + " at " + place_text(t.waits_at);
    if (std::none_of(places.begin(), places.end(), [&](auto& p) { return p.first == place; }))
      places.push_back({place, i});
  }
  for (auto& [place, thread] : places) text += "; thread " + std::to_string(thread) + " in " + place;
  throw std::runtime_error(text + " [kernel " + b.kernel + "]");
}

int pick_lane(Block& b, uint32_t lanes) {
  if (config.order == Order::kReverse) return 31 - __builtin_clz(lanes);
  if (config.order == Order::kForward) return __builtin_ctz(lanes);
  int lane = static_cast<int>(b.next_random() & 31);
  while (!(lanes >> lane & 1)) lane = (lane + 1) & 31;
  return lane;
}

// Each ready lane once; in random order a warp may be left before all its lanes wait.
void run_warp(Block& b, Warp& w) {
  while (w.ready) {
    uint32_t sweep = w.ready;
    while ((sweep &= w.ready)) {
      const int lane = pick_lane(b, sweep);
      sweep &= ~(1u << lane);
      resume(b, b.threads[static_cast<size_t>(w.number * kWarp + lane)]);
      if (b.error) std::rethrow_exception(b.error);
    }
    if (config.order == Order::kRandom && (b.next_random() & 3) == 0) return;
  }
}

}  // namespace

void run_block(Block& b) {
  begin(b);
  poison_shared(b);
  if (checker.block_begin) checker.block_begin(b);
  ++b.counts.blocks;
  b.counts.threads += static_cast<uint64_t>(b.count);
  std::vector<size_t> order(b.warps.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = config.order == Order::kReverse ? order.size() - 1 - i : i;
  while (b.alive > 0) {
    if (config.order == Order::kRandom) {
      for (size_t i = order.size(); i-- > 1;) std::swap(order[i], order[b.next_random() % (i + 1)]);
    }
    bool progress = false;
    for (size_t i : order) {
      progress |= b.warps[i].ready != 0;
      run_warp(b, b.warps[i]);
    }
    if (!progress) deadlock(b);
  }
  if (checker.block_end) checker.block_end();
}

void suspend(Block& b, State state, Place place) {
  Thread& t = *b.current;
  t.state = state;
  t.waits_at = place;
  t.warp->ready &= ~(1u << t.lane);
  switch_fiber(t.fiber, b.scheduler);
}

void maybe_yield(Block& b) {
  if (config.yield_permille && static_cast<int>(b.next_random() % 1000) < config.yield_permille) {
    switch_fiber(b.current->fiber, b.scheduler);  // stays ready
  }
}

}  // namespace simt
