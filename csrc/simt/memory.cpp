// SPDX-License-Identifier: Apache-2.0
//
// Shared memory, asynchronous copies, single accesses and atomics.
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "simt/block.h"

#define SIMT_CALLER __builtin_return_address(0)

namespace simt {
namespace {

std::mutex allowance_mutex;
std::unordered_map<const void*, int64_t> allowances;  // kernel -> bytes, by allow_shared

char* carve(Block& b, size_t bytes) {
  // A gap of one line between variables: an overrun meets it and not its neighbour.
  char* start = b.shared + b.shared_used;
  const size_t used = (bytes + kSharedAlign - 1) / kSharedAlign * kSharedAlign + kSharedAlign;
  if (b.shared_used + used > kSharedCapacity) fail("shared memory: more than the executor has room for");
  b.shared_used += used;
  unpoison_memory(start, bytes);
  std::memset(start, 0xff, bytes);
  return start;
}

}  // namespace

void allow_shared(const void* kernel, int64_t bytes) {
  if (bytes > config.shared_per_block) {
    fail("gpu::allow_shared: %lld bytes asked for, a block of this device has %d", static_cast<long long>(bytes),
         config.shared_per_block);
  }
  const std::lock_guard<std::mutex> lock(allowance_mutex);
  allowances[kernel] = bytes;
}

void check_shared_limit(const void* function, size_t dynamic_bytes, size_t static_bytes) {
  const size_t total = dynamic_bytes + static_bytes;
  if (static_bytes > kSharedWithoutAsking) {
    fail("shared memory: %zu bytes of static variables; the limit is %d", static_bytes, kSharedWithoutAsking);
  }
  if (total > static_cast<size_t>(config.shared_per_block)) {
    fail("shared memory: the block asks for %zu bytes and this device has %d", total, config.shared_per_block);
  }
  int64_t allowed = kSharedWithoutAsking - static_cast<int64_t>(static_bytes);
  {
    const std::lock_guard<std::mutex> lock(allowance_mutex);
    const auto found = allowances.find(function);
    if (found != allowances.end() && found->second > allowed) allowed = found->second;
  }
  if (static_cast<int64_t>(dynamic_bytes) > allowed) {
    fail("shared memory: %zu bytes of dynamic shared memory with %zu static ones; gpu::allow_shared permits %lld",
         dynamic_bytes, static_bytes, static_cast<long long>(allowed));
  }
}

void begin_shared(Block& b, size_t dynamic_bytes) {
  b.variables.clear();
  b.shared_used = b.static_bytes = 0;
  b.dynamic_bytes = dynamic_bytes;
  poison_memory(b.shared, kSharedCapacity);
  if (!dynamic_bytes) return;
  b.variables.push_back({nullptr, carve(b, dynamic_bytes), dynamic_bytes});
  if (checker.shared_variable) checker.shared_variable(b.variables.back(), true);
}

void poison_shared(Block& b) {
  for (const SharedVariable& v : b.variables) std::memset(v.start, 0xff, v.bytes);
}

void* shared_variable(const void* key, size_t bytes) {
  Block& b = *block;
  for (const SharedVariable& v : b.variables) {
    if (v.key == key) return v.start;
  }
  b.static_bytes += bytes;
  check_shared_limit(b.function, b.dynamic_bytes, b.static_bytes);
  b.variables.push_back({key, carve(b, bytes), bytes});
  if (checker.shared_variable) checker.shared_variable(b.variables.back(), false);
  return b.variables.back().start;
}

void* dynamic_shared() {
  if (!block->dynamic_bytes) fail("SIMT_DYN_SHARED in a launch without dynamic shared memory");
  return block->variables.front().start;
}

// --- asynchronous copies
// -----------------------------------------------------------------------------------------------
namespace {

void move(const Copy& c) {
  std::memcpy(c.to, c.from, static_cast<size_t>(c.source_bytes));
  std::memset(static_cast<char*>(c.to) + c.source_bytes, 0, static_cast<size_t>(c.bytes - c.source_bytes));
}

}  // namespace

void cp_async(void* shared, const void* global, int bytes, int source_bytes) {
  Block& b = *block;
  const Copy c{shared, global, bytes, source_bytes, SIMT_CALLER};
  maybe_yield(b);
  if (reinterpret_cast<uintptr_t>(shared) % static_cast<unsigned>(bytes) ||
      reinterpret_cast<uintptr_t>(global) % static_cast<unsigned>(bytes)) {
    fail("misaligned cp.async: both addresses must be multiples of %d, at %s", bytes, pc_text(c.pc).c_str());
  }
  if (source_bytes < 0 || source_bytes > bytes) fail("cp.async of %d bytes with a source of %d", bytes, source_bytes);
  ++b.counts.cp_async;
  checked_access(shared, bytes, kWrite | kPending, c.pc, *b.current);
  if (source_bytes) checked_access(global, source_bytes, kRead, c.pc, *b.current);
  if (!config.lazy_copies) move(c);
  b.current->copies.push_back(c);
}

void cp_async_commit() {
  Thread& t = *block->current;
  size_t grouped = 0;
  for (size_t n : t.groups) grouped += n;
  t.groups.push_back(t.copies.size() - grouped);
}

void cp_async_wait(int groups_in_flight) {
  Thread& t = *block->current;
  if (t.groups.size() <= static_cast<size_t>(groups_in_flight)) return;
  const size_t landing_groups = t.groups.size() - static_cast<size_t>(groups_in_flight);
  size_t landing = 0;
  for (size_t i = 0; i < landing_groups; ++i) landing += t.groups[i];
  for (size_t i = 0; i < landing; ++i) {
    const Copy& c = t.copies[i];
    if (config.lazy_copies) move(c);
    checked_access(c.to, c.bytes, kWrite | kLanding, c.pc, t);
  }
  t.copies.erase(t.copies.begin(), t.copies.begin() + static_cast<std::ptrdiff_t>(landing));
  t.groups.erase(t.groups.begin(), t.groups.begin() + static_cast<std::ptrdiff_t>(landing_groups));
}

void exit_with_copies(Block&, Thread& t) {
  if (t.copies.empty()) return;
  const std::string line = pc_text(t.copies.front().pc);
  report("exit with copies" + line,
         "cp.async not waited for: a thread exits while its copy of " + line + " is in flight" + here_text());
}

// --- single accesses and atomics
// ---------------------------------------------------------------------------------------
void load(void* value, const void* from, int bytes) {
  Block& b = *block;
  maybe_yield(b);
  checked_access(from, bytes, kRead, SIMT_CALLER, *b.current);
  std::memcpy(value, from, static_cast<size_t>(bytes));
}

void store(void* to, const void* value, int bytes) {
  Block& b = *block;
  maybe_yield(b);
  checked_access(to, bytes, kWrite, SIMT_CALLER, *b.current);
  std::memcpy(to, value, static_cast<size_t>(bytes));
}

void atomic_begin(void* p, int bytes) {
  Block& b = *block;
  maybe_yield(b);
  if (reinterpret_cast<uintptr_t>(p) % static_cast<unsigned>(bytes)) {
    fail("misaligned atomic of %d bytes at %s", bytes, pc_text(SIMT_CALLER).c_str());
  }
  checked_access(p, bytes, kWrite | kAtomic, SIMT_CALLER, *b.current);
}

namespace {

template <class U>
void read_as(const void* p, void* value) {
  const U read = __atomic_load_n(static_cast<const U*>(p), __ATOMIC_SEQ_CST);
  std::memcpy(value, &read, sizeof read);
}

template <class U>
bool swap_as(void* p, void* expected, const void* desired) {
  U e, d;
  std::memcpy(&e, expected, sizeof e);
  std::memcpy(&d, desired, sizeof d);
  const bool done = __atomic_compare_exchange_n(static_cast<U*>(p), &e, d, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  std::memcpy(expected, &e, sizeof e);
  return done;
}

}  // namespace

void atomic_read(const void* p, int bytes, void* value) {
  if (bytes == 8) return read_as<uint64_t>(p, value);
  if (bytes == 4) return read_as<uint32_t>(p, value);
  read_as<uint16_t>(p, value);
}

bool atomic_swap(void* p, int bytes, void* expected, const void* desired) {
  if (bytes == 8) return swap_as<uint64_t>(p, expected, desired);
  if (bytes == 4) return swap_as<uint32_t>(p, expected, desired);
  return swap_as<uint16_t>(p, expected, desired);
}

}  // namespace simt
