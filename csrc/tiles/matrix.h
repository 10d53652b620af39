// SPDX-License-Identifier: Apache-2.0
//
// The search behind tiles.h: its checked input, its model of a cell's cost and its three choices. Effort is counted in
// operations and grows with the number of entries, so that a pattern takes about 2 us an entry and no pattern much
// more.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "tiles.h"

namespace frodkernels::tiles {

// Row i holds features[ptr[i]] .. features[ptr[i + 1] - 1]: the view's, ascending, then i itself where the diagonal
// belongs. (i, i) may be there twice: an entry of the view and lam[i] are two entries.
struct Matrix {
  int64_t rows = 0, columns = 0, blocks = 0, block = 0, per_block = 1;
  std::vector<int64_t> ptr;
  std::vector<uint16_t> features;
  std::vector<uint16_t> home;  // the block of each feature
  // The same by feature: its rows, ascending.
  std::vector<int64_t> feature_ptr;
  std::vector<int32_t> feature_rows;

  int64_t groups() const { return (rows + kRows - 1) / kRows; }
  int64_t entries() const { return int64_t(features.size()); }
  int64_t block_of(int64_t feature) const { return feature / per_block; }
  int64_t begin_of(int64_t b) const { return b * per_block; }
  int64_t end_of(int64_t b) const { return std::min(columns, (b + 1) * per_block); }
  int64_t degree(int64_t row) const { return ptr[row + 1] - ptr[row]; }
};

// A small generator of our own: the same numbers with every standard library.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint32_t next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state_ >> 32);
  }
  // Below `limit`, which is positive and below 2^32.
  int64_t below(int64_t limit) { return int64_t((uint64_t(next()) * uint64_t(limit)) >> 32); }

 private:
  uint64_t state_;
};

// Steps that a cell cannot do without: `features` different ones, `row` entries in one row at the most.
inline int64_t least_steps(int64_t features, int64_t row) {
  return std::max((features + kLanes - 1) / kLanes, (row + kSlots - 1) / kSlots);
}

// Rows in groups of 8 that share many features, [groups * 8], -1 where there is none; every row once.
std::vector<int32_t> group_rows(const Matrix& m);

// Exchanges rows between groups while that lowers the cost that the cells' sizes let expect.
void exchange_rows(const Matrix& m, std::vector<int32_t>& row_order);

struct Placement {
  std::vector<uint16_t> positions;  // [columns]: of each feature in its block
  std::vector<int32_t> wavefronts;  // [blocks, groups]: the least that each cell takes then
};

// Positions such that the features of a cell are spread over the bank classes.
Placement place_features(const Matrix& m, const std::vector<int32_t>& row_order);

// The same groups in an order in which any run of them carries about equal work in every block.
std::vector<int32_t> order_groups(const Matrix& m, const std::vector<int32_t>& row_order,
                                  const std::vector<int32_t>& wavefronts);

}  // namespace frodkernels::tiles
