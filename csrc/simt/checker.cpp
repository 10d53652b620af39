// SPDX-License-Identifier: Apache-2.0
//
// The checker: bounds, alignment, uninitialised reads, writes to inputs, races, cp.async in flight. Linked only into
// the module whose kernels are instrumented. One OS thread.
//
// Two accesses of a block are ordered if they are of one thread, or a barrier of the block lies between, or a
// __syncwarp of their whole warp. Accesses of two blocks of a launch are never ordered; launches are.
#include <link.h>

#include <cstdio>
#include <utility>

#include "simt/sites.h"

namespace simt {
namespace {

Buffers buffers;
uint64_t version = 1;  // of `buffers`: a site's shortcut to its buffer ends with it
Sites sites;
uint64_t launches = 0;

uint32_t first_block = 1;  // number of the launch's first block
uint32_t this_block = 1;
uint64_t grid_blocks = 0;
std::vector<std::pair<uintptr_t, uintptr_t>> loaded;  // constants of the program are no buffers and may be read

std::string who(const Stamp& s) {
  return "thread " + std::to_string(s.thread) + " of block " + std::to_string(s.block - first_block) + " at " +
         pc_text(sites.by_number(s.site).pc);
}

std::string place_in(const Buffer& b, uintptr_t a) { return b.name + " byte " + std::to_string(a - b.start); }

std::string key_of(const char* kind, const SiteCounts& a, uint32_t other = 0) {
  return std::string(kind) + std::to_string(a.number) + "/" + std::to_string(other);
}

bool is_constant(uintptr_t a) {
  for (auto& [from, to] : loaded) {
    if (a >= from && a < to) return true;
  }
  return false;
}

void list_loaded() {
  loaded.clear();
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& segment = info->dlpi_phdr[i];
          const uintptr_t from = info->dlpi_addr + segment.p_vaddr;
          if (segment.p_type == PT_LOAD) loaded.push_back({from, from + segment.p_memsz});
        }
        return 0;
      },
      nullptr);
}

bool ordered(const Stamp& s, const Stamp& now, const Block& b, const Warp& w, const Buffer& buffer) {
  // Each block has shared memory of its own, though it lies at one address here.
  if (s.block != now.block) return buffer.shared || s.block < first_block;
  if (s.thread == now.thread || s.clock < b.barrier_at) return true;
  return s.thread / kWarp == now.thread / kWarp && s.clock < w.synced_at;
}

void out_of_bounds(uintptr_t a, int bytes, bool write, const void* pc) {
  const Buffer* b = buffers.find(a);
  if (!b) b = buffers.before(a);
  std::string where = "in no buffer";
  if (b) {
    const uintptr_t past = a + static_cast<uintptr_t>(bytes) - b->start - b->bytes;
    where = "ending " + std::to_string(past) + " bytes past the end of " + b->name + " (" + std::to_string(b->bytes) +
            " bytes)";
  }
  fail("out of bounds: %s of %d bytes %s, at %s", write ? "write" : "read", bytes, where.c_str(), pc_text(pc).c_str());
}

void uninitialised(const SiteCounts& site, const Buffer& b, uintptr_t a, const Stamp& now) {
  report(key_of("uninitialised", site),
         "read of uninitialised memory: " + place_in(b, a) + ", " + who(now) + here_text());
}

void race(const char* kind, const SiteCounts& site, const Buffer& b, uintptr_t a, const Stamp& then, const Stamp& now) {
  report(key_of(kind, site, then.site), std::string("race (") + kind + "): " + place_in(b, a) + ", " + who(then) +
                                            ", then " + who(now) + " with no barrier between" + here_text());
}

// Reads of one clock by two threads are enough to show every race with a later write; keep them of two warps if
// possible.
void remember_read(Cell& c, const Stamp& now) {
  Stamp& last = c.reads[0];
  if (last.block == now.block && last.thread == now.thread) {
    last = now;
    return;
  }
  const bool other_warp = last.block != now.block || last.thread / kWarp != now.thread / kWarp;
  const Stamp& older = c.reads[1];
  const bool older_is_other_warp =
      older.block == now.block && older.clock == now.clock && older.thread / kWarp != now.thread / kWarp;
  if (other_warp || !older_is_other_warp) c.reads[1] = last;
  last = now;
}

void read_cell(Cell& c, const Stamp& now, const Block& b, const Warp& w, const SiteCounts& site, Buffer& buffer,
               uintptr_t a) {
  const bool written = buffer.shared ? c.write.block == now.block : c.write.block != 0 || buffer.initialised;
  if (!written) {
    uninitialised(site, buffer, a, now);
  } else if (c.write.block) {
    if (c.write.pending && c.write.block == now.block) {
      report(key_of("pending", site, c.write.site), "cp.async not waited for: " + place_in(buffer, a) + ", copied by " +
                                                        who(c.write) + ", read by " + who(now) + here_text());
    } else if (!(c.write.atomic && now.atomic) && !ordered(c.write, now, b, w, buffer)) {
      race("write, read", site, buffer, a, c.write, now);
    }
  }
  if (!now.atomic) remember_read(c, now);
}

void write_cell(Cell& c, const Stamp& now, const Block& b, const Warp& w, const SiteCounts& site, const Buffer& buffer,
                uintptr_t a, bool landing) {
  if (c.write.pending && c.write.block == now.block && !landing) {
    report(key_of("pending write", site, c.write.site), "cp.async not waited for: " + place_in(buffer, a) +
                                                            ", copied by " + who(c.write) + ", written by " + who(now) +
                                                            here_text());
  }
  if (c.write.block && !(c.write.atomic && now.atomic) && !ordered(c.write, now, b, w, buffer)) {
    race("write, write", site, buffer, a, c.write, now);
  }
  for (const Stamp& r : c.reads) {
    if (!r.block || ordered(r, now, b, w, buffer)) continue;
    race("read, write", site, buffer, a, r, now);
    break;
  }
  c.write = now;
}

void access(const void* p, int bytes, unsigned kind, const void* pc, const Thread& t) {
  const auto a = reinterpret_cast<uintptr_t>(p);
  const Block& b = *block;
  const bool write = kind & kWrite, atomic = kind & kAtomic;
  const bool shared = a - reinterpret_cast<uintptr_t>(b.shared) < kSharedCapacity;
  SiteCounts& site = sites.at(pc, shared, write, bytes);
  Buffer* buffer = site.buffer;
  if (site.buffers_version != version || !buffer->holds(a)) {
    buffer = buffers.find(a);
    if (buffer) {
      site.buffer = buffer;
      site.buffers_version = version;
    } else {
      const auto arguments = reinterpret_cast<uintptr_t>(b.arguments);
      if (a - arguments < b.argument_bytes || (!write && is_constant(a))) return;
      out_of_bounds(a, bytes, write, pc);
    }
  }
  if (a + static_cast<uintptr_t>(bytes) > buffer->start + buffer->bytes) out_of_bounds(a, bytes, write, pc);
  const bool one_access = (bytes & (bytes - 1)) == 0 && bytes <= 16;  // else part of a cp.async, or a struct
  if (one_access && a % static_cast<unsigned>(bytes)) {
    fail("misaligned %s: %d bytes at %s, at %s", write ? "write" : "read", bytes, place_in(*buffer, a).c_str(),
         pc_text(pc).c_str());
  }
  Stamp now;
  now.block = this_block;
  now.clock = b.clock;
  now.thread = static_cast<unsigned>(t.linear);
  now.atomic = atomic;
  now.pending = (kind & kPending) != 0;
  now.site = site.number;
  if (write && !buffer->writable) {
    report(key_of("input", site), "write to an input: " + place_in(*buffer, a) + ", " + who(now) + here_text());
  }
  if (!(kind & (kAtomic | kLanding | kShadow))) sites.count(site, t, a);

  const int needed = __builtin_ctz(static_cast<unsigned>((a - buffer->start) | static_cast<unsigned>(bytes) | 4));
  if (needed < buffer->shift) buffer->refine(needed);
  const size_t first = (a - buffer->start) >> buffer->shift;
  const size_t last = (a - buffer->start + static_cast<size_t>(bytes) - 1) >> buffer->shift;
  for (size_t i = first; i <= last; ++i) {
    Cell& c = buffer->cells[i];
    const uintptr_t at = buffer->start + (i << buffer->shift);
    if (!write || atomic) read_cell(c, now, b, *t.warp, site, *buffer, at);
    if (write) write_cell(c, now, b, *t.warp, site, *buffer, at, kind & kLanding);
  }
}

void launch_begin(Block& b) {
  if (config.threads != 1) fail("the checker runs on one OS thread: configure(threads=1)");
  sites.begin_kernel(b.kernel);
  ++launches;
  first_block += static_cast<uint32_t>(grid_blocks);
  grid_blocks = uint64_t{b.grid.x} * b.grid.y * b.grid.z;
  list_loaded();
}

void launch_end() {
  sites.close(-1);
  buffers.drop_shared();
  ++version;
}

void block_begin(Block& b) { this_block = first_block + b.index.x + b.grid.x * (b.index.y + b.grid.y * b.index.z); }
void block_end() { sites.close(-1); }

void shared_variable(const SharedVariable& v, bool dynamic) {
  Buffer& b = buffers.add(reinterpret_cast<uintptr_t>(v.start), v.bytes);
  b.name = dynamic ? "dynamic shared memory" : "a shared variable";
  b.shared = b.writable = true;
  ++version;
}

void track_buffer(const void* p, size_t bytes, const char* name, bool writable, bool initialised) {
  uintptr_t start = reinterpret_cast<uintptr_t>(p), end = start + bytes;
  std::string full = name;
  if (!writable) buffers.widen_by_views(start, end, launches, full);
  buffers.drop_overlapping(start, end - start);
  Buffer& b = buffers.add(start, end - start);
  b.name = full;
  b.writable = writable;
  b.initialised = initialised;
  b.launch = launches;
  ++version;
}

void reset() {
  buffers.clear();
  sites.clear();
  ++version;
}

std::vector<Site> summary() { return sites.summary(); }

struct Install {
  Install() {
    checker = {launch_begin, launch_end,   block_begin, block_end, shared_variable, [](int warp) { sites.close(warp); },
               access,       track_buffer, reset,       summary};
  }
} install;

}  // namespace
}  // namespace simt

// --- what -fsanitize=thread calls: the compiler's instrumentation, answered here instead of by libtsan
// -----------------
namespace {

inline void instrumented(const void* p, int bytes, unsigned kind, const void* pc) {
  using namespace simt;
  Block* b = block;
  if (!b || !b->current || b->current->fiber.holds(p)) return;  // the host's part of a launch; a thread's own stack
  if (config.yield_permille) maybe_yield(*b);
  access(p, bytes, kind, pc, *b->current);
}

}  // namespace

#define SIMT_TSAN(name, bytes, kind) \
  void __tsan_##name(void* p) { instrumented(p, bytes, kind, __builtin_return_address(0)); }
#define SIMT_TSAN_SIZE(bytes)                            \
  SIMT_TSAN(read##bytes, bytes, simt::kRead)             \
  SIMT_TSAN(write##bytes, bytes, simt::kWrite)           \
  SIMT_TSAN(unaligned_read##bytes, bytes, simt::kRead)   \
  SIMT_TSAN(unaligned_write##bytes, bytes, simt::kWrite) \
  SIMT_TSAN(volatile_read##bytes, bytes, simt::kRead)    \
  SIMT_TSAN(volatile_write##bytes, bytes, simt::kWrite)

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
SIMT_TSAN_SIZE(1)
SIMT_TSAN_SIZE(2)
SIMT_TSAN_SIZE(4)
SIMT_TSAN_SIZE(8)
SIMT_TSAN_SIZE(16)
void __tsan_read_range(void* p, unsigned long bytes) {
  instrumented(p, static_cast<int>(bytes), simt::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* p, unsigned long bytes) {
  instrumented(p, static_cast<int>(bytes), simt::kWrite, __builtin_return_address(0));
}
}
