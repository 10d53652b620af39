// SPDX-License-Identifier: Apache-2.0
//
// Barriers of a block and collectives of a warp. Lanes leave their argument and wait; the last to come does the work.
#include <algorithm>
#include <cstring>

#include "simt/block.h"

namespace simt {
namespace {

void release_barrier(Block& b) {
  ++b.counts.barriers;
  b.barrier_at = ++b.clock;
  if (b.exited_before_barrier) {
    report("exit before barrier" + place_text(b.barrier_place),
           "exit before a barrier: " + std::to_string(b.exited_before_barrier) +
               " threads had exited when the others passed "
               "__syncthreads at " +
               place_text(b.barrier_place) + " [kernel " + b.kernel + "]");
  }
  for (int i = 0; i < b.count; ++i) {
    Thread& t = b.threads[static_cast<size_t>(i)];
    if (t.done || t.state != State::kAtBarrier) continue;
    t.state = State::kReady;
    t.barrier_result = b.barrier_value;
    t.warp->ready |= 1u << t.lane;
  }
  b.at_barrier = 0;
  if (checker.converged) checker.converged(-1);
}

bool same(Place a, Place b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

void finish(Block& b, Warp& w, Collective& c) {
  ++b.counts.collectives;
  const uint32_t arrived = c.arrived;
  c.combine(c.lanes, arrived, w);
  for (int i = 0; i < kWarp; ++i) {
    if (!(arrived >> i & 1)) continue;
    Thread& t = b.threads[static_cast<size_t>(w.number * kWarp + i)];
    if (t.state == State::kInCollective) t.state = State::kReady, w.ready |= 1u << i;
  }
  c.arrived = c.mask = 0;
  if (arrived == w.alive && checker.converged) checker.converged(w.number);
}

void check_match(const Collective& c, Combine combine, bool same_place, Place place) {
  if (c.combine == combine && (!same_place || same(c.place, place))) return;
  fail("divergent warp collective: %s, while lanes 0x%08x wait in another one at %s", place_text(place).c_str(),
       c.arrived, place_text(c.place).c_str());
}

void sync_lanes(void**, uint32_t arrived, Warp& w) {
  // Part of a warp orders nothing for the checker: it keeps one clock for the whole of it.
  if (arrived == w.alive) w.synced_at = ++block->clock;
}

struct ShuffleLane {
  Shuffle kind;
  void* value;
  int bytes, source;
  Place place;
  uint64_t given;
};

void shuffle_lanes(void** lanes, uint32_t arrived, Warp&) {
  for (int i = 0; i < kWarp; ++i) {
    if (!(arrived >> i & 1)) continue;
    auto& lane = *static_cast<ShuffleLane*>(lanes[i]);
    if (lane.kind != static_cast<ShuffleLane*>(lanes[__builtin_ctz(arrived)])->kind) {
      fail("divergent warp collective: lanes shuffle in different ways at %s", place_text(lane.place).c_str());
    }
    lane.given = 0;
    std::memcpy(&lane.given, lane.value, static_cast<size_t>(lane.bytes));
  }
  for (int i = 0; i < kWarp; ++i) {
    if (!(arrived >> i & 1)) continue;
    auto& lane = *static_cast<ShuffleLane*>(lanes[i]);
    uint64_t taken = ~uint64_t{0};  // undefined on a device; NaN here
    if (arrived >> lane.source & 1) {
      taken = static_cast<ShuffleLane*>(lanes[lane.source])->given;
    } else {
      report("shuffle" + place_text(lane.place),
             "shuffle from an absent lane: lane " + std::to_string(i) + " reads lane " + std::to_string(lane.source) +
                 ", which is outside the mask or has exited, at " + place_text(lane.place) + here_text());
    }
    std::memcpy(lane.value, &taken, static_cast<size_t>(lane.bytes));
  }
}

struct VoteLane {
  Vote kind;
  uint64_t value;
  uint32_t result;
};

uint32_t fold(Vote kind, uint32_t a, uint32_t b) {
  switch (kind) {
    case Vote::kAdd:
      return a + b;
    case Vote::kMin:
      return static_cast<uint32_t>(std::min(static_cast<int32_t>(a), static_cast<int32_t>(b)));
    case Vote::kMax:
      return static_cast<uint32_t>(std::max(static_cast<int32_t>(a), static_cast<int32_t>(b)));
    case Vote::kMinUnsigned:
      return std::min(a, b);
    case Vote::kMaxUnsigned:
      return std::max(a, b);
    case Vote::kAnd:
      return a & b;
    case Vote::kXor:
      return a ^ b;
    default:
      return a | b;
  }
}

void vote_lanes(void** lanes, uint32_t arrived, Warp&) {
  auto at = [&](int i) -> VoteLane& { return *static_cast<VoteLane*>(lanes[i]); };
  const int first = __builtin_ctz(arrived);
  const Vote kind = at(first).kind;
  uint32_t all = 0;
  for (int i = first; i < kWarp; ++i) {
    if (!(arrived >> i & 1)) continue;
    if (at(i).kind != kind) fail("divergent warp collective: lanes vote in different ways");
    const uint32_t v = static_cast<uint32_t>(at(i).value);
    all = kind == Vote::kBallot ? all | (v ? 1u << i : 0) : i == first ? v : fold(kind, all, v);
  }
  for (int i = first; i < kWarp; ++i) {
    if (!(arrived >> i & 1)) continue;
    at(i).result = all;
    if (kind != Vote::kMatch) continue;
    at(i).result = 0;
    for (int j = first; j < kWarp; ++j) at(i).result |= (arrived >> j & 1) && at(j).value == at(i).value ? 1u << j : 0;
  }
}

}  // namespace

int barrier(Barrier kind, bool predicate, Place place) {
  Block& b = *block;
  if (b.at_barrier == 0) {
    b.barrier_place = place;
    b.barrier_kind = kind;
    b.barrier_value = kind == Barrier::kAnd;
  } else if (!same(b.barrier_place, place) || b.barrier_kind != kind) {
    fail("divergent barrier: __syncthreads at %s, while %d threads wait at %s", place_text(place).c_str(), b.at_barrier,
         place_text(b.barrier_place).c_str());
  }
  if (kind == Barrier::kCount) b.barrier_value += predicate;
  if (kind == Barrier::kAnd) b.barrier_value &= predicate;
  if (kind == Barrier::kOr) b.barrier_value |= predicate;
  Thread& t = *b.current;
  t.state = State::kAtBarrier;
  if (++b.at_barrier == b.alive) {
    release_barrier(b);
    // In a random order the last to come has no head start.
    if (config.order == Order::kRandom) switch_fiber(t.fiber, b.scheduler);
  } else {
    suspend(b, State::kAtBarrier, place);
  }
  return t.barrier_result;
}

void collective(uint32_t mask, void* lane_argument, Combine combine, bool whole_warp, bool same_place, Place place) {
  Block& b = *block;
  Thread& t = *b.current;
  Warp& w = *t.warp;
  if (!(mask >> t.lane & 1)) {
    fail("lane %d is not in the mask 0x%08x of its own collective at %s", t.lane, mask, place_text(place).c_str());
  }
  if (whole_warp && w.alive != kAllLanes) {
    fail("mma or ldmatrix at %s needs 32 lanes; only lanes 0x%08x are there", place_text(place).c_str(), w.alive);
  }
  // Collectives of different masks are different ones: lanes may wait in a wide one while others of its mask meet in a
  // narrow one first. Masks that cannot both be met end as a deadlock.
  Collective* found = nullptr;
  for (Collective& c : w.collectives) {
    if (c.arrived && c.mask == mask) found = &c;
  }
  if (found) {
    check_match(*found, combine, same_place, place);
  } else {
    for (Collective& c : w.collectives) {
      if (!c.arrived) found = &c;
    }
    if (!found) fail("too many collectives of one warp at a time, at %s", place_text(place).c_str());
    found->mask = mask;
    found->combine = combine;
    found->place = place;
  }
  found->lanes[t.lane] = lane_argument;
  found->arrived |= 1u << t.lane;
  if (found->arrived == (mask & w.alive)) {
    finish(b, w, *found);
  } else {
    suspend(b, State::kInCollective, place);
  }
}

void thread_exits(Block& b, Thread& t) {
  Warp& w = *t.warp;
  t.done = true;
  --b.alive;
  ++b.exited_before_barrier;
  w.ready &= ~(1u << t.lane);
  w.alive &= ~(1u << t.lane);
  for (Collective& c : w.collectives) {
    if (c.arrived && c.arrived == (c.mask & w.alive)) finish(b, w, c);
  }
  if (b.alive && b.at_barrier == b.alive) release_barrier(b);
}

void sync_warp(uint32_t mask, Place place) { collective(mask, nullptr, sync_lanes, false, false, place); }

void shuffle(Shuffle kind, uint32_t mask, void* value, int bytes, int source_lane, Place place) {
  ShuffleLane lane{kind, value, bytes, source_lane, place, 0};
  collective(mask, &lane, shuffle_lanes, false, true, place);
}

uint32_t vote(Vote kind, uint32_t mask, uint64_t value, Place place) {
  VoteLane lane{kind, value, 0};
  collective(mask, &lane, vote_lanes, false, true, place);
  return lane.result;
}

}  // namespace simt
