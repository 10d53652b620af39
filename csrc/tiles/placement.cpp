// SPDX-License-Identifier: Apache-2.0
//
// Which features share a bank class. A cell takes as many wavefronts as its largest class has features, but no fewer
// than the octets that it needs, so the classes of its features should reach that number, its goal, and none exceed it.
// A local search swaps the classes of two features of a block: each feature in turn with one of the partners that
// promise the most. It goes by the true cost and a smooth one together. The smooth one is a sum over classes, so that
// what moving a feature costs is a sum of one small vector for each cell with the feature.
#include <algorithm>
#include <array>
#include <utility>

#include "matrix.h"

namespace frodkernels::tiles {
namespace {

constexpr int64_t kLeastSweeps = 8, kMostSweeps = 24;
// Operations that sweeps beyond the least may take: in any pattern, and in large ones.
constexpr int64_t kLeastWork = int64_t(1) << 26, kWorkPerEntry = 1536;
constexpr int64_t kWorkPerVisit = 34;  // of a sweep, for each cell of each feature
constexpr int kPartners = 8;
constexpr int32_t kHope = 200;       // partners that promise to cost up to this are tried
constexpr int32_t kTolerance = 150;  // of costs, at first
constexpr int32_t kWavefront = 50;   // the true price of one
// The smooth price of the feature that brings a class to its goal - 5, - 4, .. and beyond it: doubling up to one
// beyond, by thirds from there.
constexpr std::array<int32_t, 12> kPrices = {1, 2, 4, 8, 16, 32, 64, 83, 108, 141, 183, 238};
constexpr int kPricesBelow = 5;

using ByClass = std::array<int32_t, kClasses>;

int32_t price(int32_t beyond) {
  return beyond < -kPricesBelow ? 0 : kPrices[std::min<int32_t>(beyond + kPricesBelow, kPrices.size() - 1)];
}

struct Cell {
  std::array<int16_t, kClasses> size{}, up{}, down{};  // features of each class; what one more costs, one less saves
  int32_t goal = 0;

  void update(int c) {
    up[c] = int16_t(price(size[c] + 1 - goal));
    down[c] = int16_t(price(size[c] - goal));
  }
  int32_t wavefronts() const { return std::max<int32_t>(goal, *std::max_element(size.begin(), size.end())); }
};

// One feature block. Positions without a feature take part as features of no cell.
class Block {
 public:
  Block(const Matrix& m, const std::vector<int32_t>& group_of, int64_t b)
      : m_(m), cells_(m.groups()), class_(m.block), ptr_(m.block + 1, 0), moves_(m.block) {
    const int64_t begin = m.begin_of(b), features = m.end_of(b) - begin;
    std::vector<int32_t> last(m.groups(), -1);
    for (int64_t f = 0; f < m.block; ++f) {
      class_[f] = uint8_t(f % kClasses);
      for (int64_t q = f < features ? m.feature_ptr[begin + f] : 0,
                   end = f < features ? m.feature_ptr[begin + f + 1] : 0;
           q < end; ++q) {
        const int32_t g = group_of[m.feature_rows[q]];
        if (last[g] == f) continue;
        last[g] = int32_t(f);
        groups_.push_back(g);
      }
      ptr_[f + 1] = int64_t(groups_.size());
    }
    for (int64_t f = 0; f < m.block; ++f) visit(f, [&](Cell& cell) { ++cell.size[class_[f]]; });
  }

  Cell& cell(int64_t g) { return cells_[g]; }

  // Swaps that raise the cost a little are taken at first, by less and less from sweep to sweep and by none in the
  // last.
  void search(int64_t work) {
    for (Cell& cell : cells_) {
      for (int c = 0; c < kClasses; ++c) cell.update(c);
    }
    const int64_t sweep_work = m_.block * m_.block + kWorkPerVisit * int64_t(groups_.size());
    const int64_t sweeps = std::clamp(work / sweep_work, kLeastSweeps, kMostSweeps);
    for (int64_t sweep = sweeps - 1; sweep >= 0; --sweep) {
      const auto tolerance = int32_t(kTolerance * sweep / sweeps);
      for (int64_t f = 0; f < m_.block; ++f) weigh(f);
      bool swapped = false;
      for (int64_t f = 0; f < m_.block; ++f) {
        if (ptr_[f] < ptr_[f + 1] && improve(f, tolerance)) swapped = true;
      }
      if (!swapped) break;
    }
  }

  // Positions of the features: of each class in order.
  void read(uint16_t* positions, int64_t features) const {
    std::array<int32_t, kClasses> next{};
    for (int64_t f = 0; f < features; ++f) positions[f] = uint16_t(class_[f] + kClasses * next[class_[f]]++);
  }

 private:
  template <typename Visit>
  void visit(int64_t f, Visit go) {
    for (int64_t p = ptr_[f]; p < ptr_[f + 1]; ++p) go(cells_[groups_[p]]);
  }

  // moves_[f][c]: the smooth cost of moving f to class c, all else left alone.
  void weigh(int64_t f) {
    ByClass sum{};
    int32_t saved = 0;
    visit(f, [&](const Cell& cell) {
      for (int c = 0; c < kClasses; ++c) sum[c] += cell.up[c];
      saved += cell.down[class_[f]];
    });
    for (int32_t& s : sum) s -= saved;
    moves_[f] = sum;
  }

  // Moves f and returns what the cost changes by, in full.
  int32_t move(int64_t f, int to) {
    const int from = class_[f];
    int32_t change = 0;
    visit(f, [&](Cell& cell) {
      change += cell.up[to] - cell.down[from] - kWavefront * cell.wavefronts();
      --cell.size[from];
      ++cell.size[to];
      cell.update(from);
      cell.update(to);
      change += kWavefront * cell.wavefronts();
    });
    class_[f] = uint8_t(to);
    return change;
  }

  // Swaps f with the first of its most promising partners that changes the cost by less than `tolerance`.
  bool improve(int64_t f, int32_t tolerance) {
    weigh(f);
    const int from = class_[f];
    partners_.clear();
    for (int64_t other = 0; other < m_.block; ++other) {
      const int to = class_[other];
      if (to == from) continue;
      const int32_t promise = moves_[f][to] + moves_[other][from];
      if (promise < kHope) partners_.emplace_back(promise, int32_t(other));
    }
    const size_t tried = std::min<size_t>(kPartners, partners_.size());
    std::partial_sort(partners_.begin(), partners_.begin() + int64_t(tried), partners_.end());
    for (size_t t = 0; t < tried; ++t) {
      const int64_t other = partners_[t].second;
      const int to = class_[other];
      if (move(f, to) + move(other, from) < tolerance) {
        weigh(f);
        weigh(other);
        return true;
      }
      move(other, to);
      move(f, from);
    }
    return false;
  }

  const Matrix& m_;
  std::vector<Cell> cells_;      // [groups]
  std::vector<uint8_t> class_;   // [block]
  std::vector<int64_t> ptr_;     // [block + 1] into groups_
  std::vector<int32_t> groups_;  // the groups with each feature
  std::vector<ByClass> moves_;   // [block]
  std::vector<std::pair<int32_t, int32_t>> partners_;
};

// The octets that each cell needs at least, [blocks, groups].
std::vector<int32_t> goals(const Matrix& m, const std::vector<int32_t>& row_order) {
  const int64_t groups = m.groups();
  std::vector<int32_t> goal(m.blocks * groups), last(m.columns, -1);
  std::vector<int32_t> features(m.blocks), entries(m.blocks), most(m.blocks);
  for (int64_t g = 0; g < groups; ++g) {
    std::fill(features.begin(), features.end(), 0);
    std::fill(most.begin(), most.end(), 0);
    for (int n = 0; n < kRows; ++n) {
      const int64_t i = row_order[g * kRows + n];
      if (i < 0) continue;
      std::fill(entries.begin(), entries.end(), 0);
      for (int64_t p = m.ptr[i]; p < m.ptr[i + 1]; ++p) {
        const int64_t f = m.features[p], b = m.home[f];
        features[b] += last[f] != g;
        last[f] = int32_t(g);
        most[b] = std::max(most[b], ++entries[b]);
      }
    }
    for (int64_t b = 0; b < m.blocks; ++b) {
      goal[b * groups + g] = int32_t(kOctets * least_steps(features[b], most[b]));
    }
  }
  return goal;
}

}  // namespace

Placement place_features(const Matrix& m, const std::vector<int32_t>& row_order) {
  const int64_t groups = m.groups();
  Placement made;
  made.positions.resize(m.columns);
  made.wavefronts = goals(m, row_order);
  std::vector<int32_t> group_of(m.rows);
  for (int64_t at = 0; at < groups * kRows; ++at) {
    if (row_order[at] >= 0) group_of[row_order[at]] = int32_t(at / kRows);
  }
  const int64_t budget = std::max(kLeastWork, kWorkPerEntry * m.entries());
  for (int64_t b = 0; b < m.blocks; ++b) {
    Block block(m, group_of, b);
    int32_t* wavefronts = made.wavefronts.data() + b * groups;
    for (int64_t g = 0; g < groups; ++g) block.cell(g).goal = wavefronts[g];
    block.search(budget / m.blocks);
    for (int64_t g = 0; g < groups; ++g) wavefronts[g] = block.cell(g).wavefronts();
    block.read(made.positions.data() + m.begin_of(b), m.end_of(b) - m.begin_of(b));
  }
  return made;
}

}  // namespace frodkernels::tiles
