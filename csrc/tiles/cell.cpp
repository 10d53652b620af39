// SPDX-License-Identifier: Apache-2.0
#include "cell.h"

#include <algorithm>
#include <bit>

#include "matrix.h"

namespace frodkernels::tiles {
namespace {

constexpr int64_t kFewOctets = 64;
constexpr int kDepth = 2;

int spread(const Step& step, int octet) {
  return *std::max_element(step.count[octet].begin(), step.count[octet].end());
}

// Wavefronts beyond one for each octet: as many octets take two features of a class, and what the classes have beyond
// one for each of the others has to fit into their slots. (With more than two, the largest class decides.)
int64_t wavefronts_beyond(const std::array<int64_t, kClasses>& in_class, int64_t octets) {
  const int64_t least = std::max<int64_t>(*std::max_element(in_class.begin(), in_class.end()) - octets, 0);
  for (int64_t twos = least; twos < octets; ++twos) {
    int64_t beyond = 0;
    for (const int64_t features : in_class) beyond += std::max<int64_t>(features - (octets - twos), 0);
    if (beyond <= kSlots * twos) return twos;
  }
  return least;
}

}  // namespace

Step::Step() {
  for (auto& octet : item) octet.fill(-1);
  for (auto& octet : count) octet.fill(0);
  taken.fill(0);
}

const std::vector<Step>& Layout::run(const std::vector<Item>& items) {
  items_ = &items;
  steps_.clear();
  waiting_.clear();
  if (items.empty()) return steps_;
  share_out();
  number_slots();
  for (size_t w = 0; w < waiting_.size(); ++w) place_anywhere(waiting_[w]);
  return steps_;
}

// Deals the items to octets: 8 to an octet, 8 entries of a row to a step, and of each class as many to an octet as make
// the sum of the octets' largest multiplicities no larger than the largest class (or the number of octets).
void Layout::share_out() {
  const std::vector<Item>& items = *items_;
  std::array<int64_t, kClasses> in_class{};
  std::array<int64_t, kRows> in_row{};
  for (const Item& item : items) {
    ++in_class[item.bank()];
    for (int n = 0; n < kRows; ++n) in_row[n] += (item.rows >> n) & 1;
  }
  const int64_t steps = least_steps(int64_t(items.size()), *std::max_element(in_row.begin(), in_row.end()));
  const int64_t octets = kOctets * steps;
  extra_ = wavefronts_beyond(in_class, octets);
  steps_.assign(steps, Step());
  octets_.resize(std::max<size_t>(octets_.size(), octets));
  for (int64_t o = 0; o < octets; ++o) octets_[o].clear();

  // The hardest first: of the largest class, serving the most rows, in the fullest rows.
  order_.resize(items.size());
  std::vector<int64_t> rank(items.size());
  for (size_t i = 0; i < items.size(); ++i) {
    int64_t fullest = 0;
    for (int n = 0; n < kRows; ++n) {
      if (items[i].rows >> n & 1) fullest = std::max(fullest, in_row[n]);
    }
    order_[i] = int32_t(i);
    rank[i] = (in_class[items[i].bank()] << 32) + (int64_t(std::popcount(items[i].rows)) << 24) + fullest;
  }
  std::stable_sort(order_.begin(), order_.end(), [&](int32_t a, int32_t b) { return rank[a] > rank[b]; });

  load_.assign(steps, {});
  for (const int32_t index : order_) {
    int64_t best = -1, best_cost = INT64_MAX;
    for (int64_t o = 0; o < octets; ++o) {
      if (!has_room(o, index)) continue;
      int64_t fullest = 0;
      for (int n = 0; n < kRows; ++n) {
        if (items[index].rows >> n & 1) fullest = std::max<int64_t>(fullest, load_[o / kOctets][n]);
      }
      const int64_t cost = int64_t(octets_[o].size()) + 4 * fullest;
      if (cost < best_cost) best = o, best_cost = cost;
    }
    if (best >= 0) {
      deal(best, index);
    } else if (!make_room(octets, index, kDepth)) {
      waiting_.push_back(index);
    }
  }
}

bool Layout::has_room(int64_t octet, int32_t index) const {
  const Item& item = (*items_)[index];
  const int64_t octets = kOctets * int64_t(load_.size());
  const int64_t most = 1 + extra_ / octets + (octet < extra_ % octets ? 1 : 0);
  if (octets_[octet].size() >= kSlots || steps_[octet / kOctets].count[octet % kOctets][item.bank()] >= most)
    return false;
  for (int n = 0; n < kRows; ++n) {
    if ((item.rows >> n & 1) && load_[octet / kOctets][n] >= kSlots) return false;
  }
  return true;
}

void Layout::deal(int64_t octet, int32_t index, size_t at) {
  const Item& item = (*items_)[index];
  octets_[octet].insert(octets_[octet].begin() + int64_t(std::min(at, octets_[octet].size())), index);
  ++steps_[octet / kOctets].count[octet % kOctets][item.bank()];
  for (int n = 0; n < kRows; ++n) load_[octet / kOctets][n] += (item.rows >> n) & 1;
}

void Layout::take_back(int64_t octet, size_t at) {
  const Item& item = (*items_)[octets_[octet][at]];
  octets_[octet].erase(octets_[octet].begin() + int64_t(at));
  --steps_[octet / kOctets].count[octet % kOctets][item.bank()];
  for (int n = 0; n < kRows; ++n) load_[octet / kOctets][n] -= (item.rows >> n) & 1;
}

// Deals an item that no octet has room for where another makes room by going to a third place, or to a fourth and so
// on.
bool Layout::make_room(int64_t octets, int32_t index, int depth) {
  if (octets > kFewOctets) return false;  // in large cells a step more is nothing
  for (int64_t o = 0; o < octets; ++o) {
    for (size_t at = 0; at < octets_[o].size(); ++at) {
      const int32_t moved = octets_[o][at];
      take_back(o, at);
      if (has_room(o, index)) {
        deal(o, index);
        for (int64_t to = 0; to < octets; ++to) {
          if (to == o || !has_room(to, moved)) continue;
          deal(to, moved);
          return true;
        }
        if (depth > 1 && make_room(octets, moved, depth - 1)) return true;
        take_back(o, octets_[o].size() - 1);
      }
      deal(o, moved, at);
    }
  }
  return false;
}

// Gives the items of each octet their slot numbers. With one row an item this is the edge colouring of a bipartite
// graph (octets and rows) of degree 8, which always exists and which exchanges along paths find.
void Layout::number_slots() {
  const std::vector<Item>& items = *items_;
  for (size_t s = 0; s < steps_.size(); ++s) {
    steps_[s].count = {};
    for (int many = kRows; many > 0; --many) {  // items of several rows first: they have the least choice
      for (int j = 0; j < kOctets; ++j) {
        for (const int32_t index : octets_[s * kOctets + j]) {
          if (std::popcount(items[index].rows) == many && !place_in(int(s), j, index)) waiting_.push_back(index);
        }
      }
    }
  }
}

void Layout::place(int step, int octet, int k, int32_t index) {
  const Item& item = (*items_)[index];
  Step& at = steps_[step];
  at.item[octet][k] = index;
  at.taken[k] |= item.rows;
  ++at.count[octet][item.bank()];
}

bool Layout::place_in(int step, int octet, int32_t index) {
  const uint8_t rows = (*items_)[index].rows;
  Step& at = steps_[step];
  for (int k = 0; k < kSlots; ++k) {
    if (!at.fits(octet, k, rows)) continue;
    place(step, octet, k, index);
    return true;
  }
  for (int k = 0; k < kSlots; ++k) {
    if (at.item[octet][k] >= 0) continue;
    for (int other = 0; other < kSlots; ++other) {
      if (other == k || !exchange(at, octet, rows, k, other)) continue;
      place(step, octet, k, index);
      return true;
    }
  }
  return false;
}

// Makes slot number `free`, which the octet has free, free in `rows` too: the items there that are in the way swap
// numbers with what holds number `other`, and so on along the items of these two numbers that share an octet or a row.
bool Layout::exchange(Step& step, int octet, uint8_t rows, int free, int other) {
  const int number[2] = {free, other};
  const auto rows_of = [&](int node) -> uint8_t {  // node = 2 * octet + side; 0 where there is no item
    const int32_t index = step.item[node / 2][number[node % 2]];
    return index < 0 ? 0 : (*items_)[index].rows;
  };
  unsigned moving = 0;
  for (int j = 0; j < kOctets; ++j) {
    if (rows_of(2 * j) & rows) moving |= 1u << (2 * j);
  }
  for (unsigned before = 0; before != moving;) {
    before = moving;
    for (int a = 0; a < 2 * kOctets; ++a) {
      if (!(before >> a & 1)) continue;
      for (int b = 0; b < 2 * kOctets; ++b) {
        if (a % 2 != b % 2 && rows_of(b) != 0 && (a / 2 == b / 2 || (rows_of(a) & rows_of(b)))) moving |= 1u << b;
      }
    }
  }
  if (moving >> (2 * octet + 1) & 1) return false;  // it would take the octet's free slot
  uint8_t taken[2] = {0, 0};
  for (int a = 0; a < 2 * kOctets; ++a) taken[(a % 2) ^ (moving >> a & 1)] |= rows_of(a);
  if (taken[0] & rows) return false;
  for (int j = 0; j < kOctets; ++j) {
    // A whole component moves, so an octet's two items move together, or the one that there is finds its place empty.
    if (moving >> (2 * j) & 3) std::swap(step.item[j][free], step.item[j][other]);
  }
  step.taken[free] = taken[0];
  step.taken[other] = taken[1];
  return true;
}

// Any free place, where it adds the fewest wavefronts; a new step when there is none.
void Layout::place_anywhere(int32_t index) {
  const Item& item = (*items_)[index];
  int best[3] = {-1, 0, 0}, best_cost = 1 << 30;
  for (size_t s = 0; s < steps_.size(); ++s) {
    for (int j = 0; j < kOctets; ++j) {
      const int have = steps_[s].count[j][item.bank()], most = spread(steps_[s], j);
      const int cost = have < most ? 0 : most > 0 ? 1 : 0;
      if (cost >= best_cost) continue;
      for (int k = 0; k < kSlots; ++k) {
        if (!steps_[s].fits(j, k, item.rows)) continue;
        best[0] = int(s), best[1] = j, best[2] = k, best_cost = cost;
        break;
      }
    }
  }
  if (best[0] < 0) {
    best[0] = int(steps_.size());
    steps_.emplace_back();
  }
  place(best[0], best[1], best[2], index);
}

}  // namespace frodkernels::tiles
