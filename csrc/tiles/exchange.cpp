// SPDX-License-Identifier: Apache-2.0
//
// Exchanges of rows between two groups. What a cell costs follows from how many features it has, d, and how many
// entries its fullest row, r: 4 octets for each step that they need, or as many wavefronts as the largest bank class
// has features, about d / 8 and a little. Steps make that a staircase: cells just above one of its treads are worth
// emptying and cells below are worth filling.
#include <array>

#include "matrix.h"

namespace frodkernels::tiles {
namespace {

constexpr int64_t kPartners = 60;                 // groups that each group is compared with
constexpr int64_t kLeastWork = int64_t(1) << 29;  // operations that every pattern may take
constexpr int64_t kWorkPerEntry = 128;            // and those that large ones may take
constexpr int64_t kWavefront = 64;                // the price of one
constexpr int64_t kFeature = 6;                   // of a feature: rows that share some are worth keeping together
constexpr int64_t kExcess = 96;                   // by which the largest class exceeds d / 8, in 64ths of a wavefront

class Exchange {
 public:
  Exchange(const Matrix& m, std::vector<int32_t>& row_order) : m_(m), order_(row_order), blocks_(m.blocks) {
    for (int64_t d = 0; d <= m.per_block; ++d) {
      const int64_t steps = kWavefront * kOctets * least_steps(d, 0);
      by_features_.push_back(int32_t(std::max(steps, d == 0 ? 0 : d * kWavefront / kClasses + kExcess)));
    }
    for (int64_t r = 0; r <= m.per_block + 1; ++r) {
      by_row_.push_back(int32_t(kWavefront * kOctets * least_steps(0, r)));
    }
    for (Side& side : sides_) {
      side.count.assign(m.columns, 0);
      side.features.assign(blocks_, 0);
      for (auto* table : {&side.alone, &side.added, &side.entries, &side.others}) table->assign(kRows * blocks_, 0);
    }
  }

  void run() {
    const int64_t groups = m_.groups();
    if (groups < 2 || m_.entries() == 0) return;
    const int64_t work = 6 * kRows * (m_.entries() / m_.rows + 1) + 2 * kRows * kRows * blocks_;
    const int64_t budget = std::max(kLeastWork, kWorkPerEntry * m_.entries());
    const int64_t rounds = std::min(kPartners, budget / (work * groups) + 1);
    Random random(20240229);
    for (int64_t round = 0; round < rounds; ++round) {
      for (int64_t a = 0; a < groups; ++a) {
        const int64_t b = random.below(groups);
        if (a != b) compare(a, b);
      }
    }
  }

 private:
  // What is known of one of the two groups.
  struct Side {
    int64_t group = 0;
    std::vector<uint8_t> count;     // [columns]: rows of the group with the feature
    std::vector<int32_t> features;  // [blocks]: features of the group
    std::vector<int32_t> alone;     // [8, blocks]: features that only this row of the group has
    std::vector<int32_t> added;     // [8, blocks]: features that this row of the other group would bring
    std::vector<int32_t> entries;   // [8, blocks]: of this row of the group
    std::vector<int32_t> others;    // [8, blocks]: the most entries of a row of the group other than this one
  };

  int32_t row(const Side& side, int n) const { return order_[side.group * kRows + n]; }

  template <typename Visit>
  void each_feature(int32_t row, Visit visit) const {
    if (row < 0) return;
    for (int64_t p = m_.ptr[row]; p < m_.ptr[row + 1]; ++p) visit(m_.features[p]);
  }

  void load(Side& side, int64_t group) {
    side.group = group;
    std::fill(side.features.begin(), side.features.end(), 0);
    for (int n = 0; n < kRows; ++n) {
      each_feature(row(side, n), [&](uint16_t f) { side.features[m_.home[f]] += side.count[f]++ == 0; });
    }
  }

  void unload(Side& side) {
    for (int n = 0; n < kRows; ++n) each_feature(row(side, n), [&](uint16_t f) { side.count[f] = 0; });
  }

  void describe(Side& side, Side& other) {
    for (auto* table : {&side.alone, &side.entries, &other.added}) std::fill(table->begin(), table->end(), 0);
    for (int n = 0; n < kRows; ++n) {
      each_feature(row(side, n), [&](uint16_t f) {
        const int64_t at = n * blocks_ + m_.home[f];
        ++side.entries[at];
        side.alone[at] += side.count[f] == 1;
        other.added[at] += other.count[f] == 0;
      });
    }
    for (int64_t b = 0; b < blocks_; ++b) {
      int32_t first = 0, second = 0;
      for (int n = 0; n < kRows; ++n) {
        const int32_t e = side.entries[n * blocks_ + b];
        second = e > first ? first : std::max(second, e);
        first = std::max(first, e);
      }
      for (int n = 0; n < kRows; ++n) {
        side.others[n * blocks_ + b] = side.entries[n * blocks_ + b] == first ? second : first;
      }
    }
  }

  int64_t cost(int64_t features, int64_t entries) const {
    const int64_t d = std::clamp<int64_t>(features, 0, m_.per_block);
    return std::max(by_features_[d], by_row_[entries]) + kFeature * d;
  }

  int64_t cost(const Side& side) const {
    int64_t sum = 0;
    for (int64_t b = 0; b < blocks_; ++b) {
      sum += cost(side.features[b], std::max(side.others[b], side.entries[b]));
    }
    return sum;
  }

  // The group with its row x replaced by row y of the other one. Features that x and y share are counted wrong here.
  int64_t cost_after(const Side& side, int x, const Side& other, int y) const {
    int64_t sum = 0;
    for (int64_t b = 0; b < blocks_; ++b) {
      const int64_t i = x * blocks_ + b, j = y * blocks_ + b;
      sum += cost(side.features[b] - side.alone[i] + side.added[j], std::max(side.others[i], other.entries[j]));
    }
    return sum;
  }

  void swap_rows(int x, int y) { std::swap(order_[sides_[0].group * kRows + x], order_[sides_[1].group * kRows + y]); }

  void compare(int64_t a, int64_t b) {
    auto& [left, right] = sides_;
    load(left, a);
    load(right, b);
    describe(left, right);
    describe(right, left);
    const int64_t before = cost(left) + cost(right);
    int64_t best = before;
    int x = -1, y = -1;
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kRows; ++j) {
        const int64_t after = cost_after(left, i, right, j) + cost_after(right, j, left, i);
        if (after < best) best = after, x = i, y = j;
      }
    }
    unload(left);
    unload(right);
    if (x < 0) return;
    swap_rows(x, y);
    load(left, a);
    load(right, b);
    describe(left, right);
    describe(right, left);
    const bool worse = cost(left) + cost(right) >= before;
    unload(left);
    unload(right);
    if (worse) swap_rows(x, y);
  }

  const Matrix& m_;
  std::vector<int32_t>& order_;
  const int64_t blocks_;
  std::vector<int32_t> by_features_, by_row_;
  std::array<Side, 2> sides_;
};

}  // namespace

void exchange_rows(const Matrix& m, std::vector<int32_t>& row_order) { Exchange(m, row_order).run(); }

}  // namespace frodkernels::tiles
