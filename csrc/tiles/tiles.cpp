// SPDX-License-Identifier: Apache-2.0
#include "tiles.h"

#include <limits>
#include <stdexcept>
#include <string>

#include "cell.h"
#include "matrix.h"

namespace frodkernels::tiles {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

template <typename Index>
void read_features(const View& view, Matrix& m) {
  const Index* indices = static_cast<const Index*>(view.indices);
  m.ptr.reserve(view.rows + 1);
  m.features.reserve(view.nnz + (view.diagonal ? view.rows : 0));
  m.ptr.push_back(0);
  for (int64_t i = 0; i < view.rows; ++i) {
    int64_t before = -1;
    for (int64_t p = view.indptr[i]; p < view.indptr[i + 1]; ++p) {
      const int64_t feature = indices[p];
      if (feature < 0 || feature >= view.columns) {
        refuse("indices[" + std::to_string(p) + "] = " + std::to_string(feature) +
               " is out of range for columns = " + std::to_string(view.columns));
      }
      if (feature <= before) refuse("indices must ascend within row " + std::to_string(i));
      before = feature;
      m.features.push_back(uint16_t(feature));
    }
    if (view.diagonal) m.features.push_back(uint16_t(i));
    m.ptr.push_back(int64_t(m.features.size()));
  }
}

void transpose(Matrix& m) {
  m.feature_ptr.assign(m.columns + 1, 0);
  for (const uint16_t f : m.features) ++m.feature_ptr[f + 1];
  for (int64_t f = 0; f < m.columns; ++f) m.feature_ptr[f + 1] += m.feature_ptr[f];
  m.feature_rows.resize(m.features.size());
  std::vector<int64_t> next(m.feature_ptr.begin(), m.feature_ptr.end() - 1);
  for (int64_t i = 0; i < m.rows; ++i) {
    for (int64_t p = m.ptr[i]; p < m.ptr[i + 1]; ++p) m.feature_rows[next[m.features[p]]++] = int32_t(i);
  }
}

Matrix read(const View& view, int64_t block) {
  if (view.rows < 0 || view.columns < 0 || view.nnz < 0) refuse("rows, columns and nnz must not be negative");
  if (view.columns > kMaxColumns) refuse("columns must be at most " + std::to_string(kMaxColumns));
  if (block <= 0 || block > kMaxBlock || block % kBlockUnit != 0) {
    refuse("block must be a multiple of " + std::to_string(kBlockUnit) + ", at most " + std::to_string(kMaxBlock));
  }
  if (view.diagonal && view.rows != view.columns) refuse("diagonal needs as many columns as rows");
  if (view.nnz + view.rows > std::numeric_limits<int32_t>::max()) refuse("indices: nnz + rows must be below 2^31");
  if ((view.rows + kRows - 1) / kRows * ((view.columns + block - 1) / block) > kMaxCells) {
    refuse("block must leave at most 2^24 cells of 8 rows and one block");
  }
  if (view.indptr[0] != 0 || view.indptr[view.rows] != view.nnz) refuse("indptr must rise from 0 to nnz");
  for (int64_t i = 0; i < view.rows; ++i) {
    if (view.indptr[i] > view.indptr[i + 1]) refuse("indptr must rise from 0 to nnz");
  }
  for (int64_t p = 0; p < view.nnz; ++p) {
    if (view.perm[p] < 0 || view.perm[p] >= view.nnz) refuse("perm[" + std::to_string(p) + "] is out of range");
  }
  Matrix m;
  m.rows = view.rows;
  m.columns = view.columns;
  m.block = block;
  m.blocks = (view.columns + block - 1) / block;
  m.per_block = m.blocks == 0 ? 1 : (view.columns + m.blocks - 1) / m.blocks;
  if (view.narrow) {
    read_features<uint16_t>(view, m);
  } else {
    read_features<int32_t>(view, m);
  }
  for (int64_t f = 0; f < m.columns; ++f) m.home.push_back(uint16_t(m.block_of(f)));
  transpose(m);
  return m;
}

// Gathers the items of cells, a block after the other: each row's features ascend, so a cursor a row is enough.
class Gather {
 public:
  Gather(const View& view, const Matrix& m, const std::vector<uint16_t>& positions)
      : view_(view), m_(m), positions_(positions), cursor_(m.ptr.begin(), m.ptr.end() - 1), item_of_(m.per_block, -1) {}

  // The cell of block b and the group with these rows; each cell once, blocks ascending.
  const std::vector<Item>& run(int64_t b, const int32_t* rows) {
    for (const Item& item : items_) item_of_[feature_of_[&item - items_.data()] % m_.per_block] = -1;
    items_.clear();
    feature_of_.clear();
    for (int n = 0; n < kRows; ++n) {
      const int64_t i = rows[n];
      if (i < 0) continue;
      const int64_t end = m_.ptr[i + 1] - (view_.diagonal ? 1 : 0);
      int64_t& at = cursor_[i];
      for (; at < end && m_.features[at] < m_.end_of(b); ++at) {
        add(n, m_.features[at], view_.perm[view_.indptr[i] + (at - m_.ptr[i])]);
      }
      if (view_.diagonal && m_.home[i] == b) add(n, i, int32_t(view_.nnz + i));
    }
    return items_;
  }

 private:
  void add(int n, int64_t feature, int32_t source) {
    int32_t& known = item_of_[feature % m_.per_block];
    if (known < 0 || (items_[known].rows >> n & 1)) {  // (i, i) twice in a row: gathered twice
      known = int32_t(items_.size());
      items_.emplace_back().position = positions_[feature];
      feature_of_.push_back(feature);
    }
    items_[known].rows |= uint8_t(1u << n);
    items_[known].source[n] = source;
  }

  const View& view_;
  const Matrix& m_;
  const std::vector<uint16_t>& positions_;
  std::vector<int64_t> cursor_;
  std::vector<int32_t> item_of_;  // by feature of the block, -1: not in the cell
  std::vector<int64_t> feature_of_;
  std::vector<Item> items_;
};

void emit(const Step& step, const std::vector<Item>& items, Tiles& tiles) {
  uint16_t meta[kLanes];
  int32_t source[kLanes][2];
  int32_t any = -1;
  for (const auto& octet : step.item) {
    for (const int32_t index : octet) any = index >= 0 && any < 0 ? index : any;
  }
  for (auto& pair : source) pair[0] = pair[1] = -1;
  for (int j = 0; j < kOctets; ++j) {
    int32_t filler = any;
    for (int k = kSlots - 1; k >= 0; --k) filler = step.item[j][k] >= 0 ? step.item[j][k] : filler;
    for (int k = 0; k < kSlots; ++k) {
      const int32_t index = step.item[j][k];
      meta[j * kSlots + k] = items[index >= 0 ? index : filler].position;
    }
  }
  for (int j = 0; j < kOctets; ++j) {
    for (int k = 0; k < kSlots; ++k) {
      if (step.item[j][k] < 0) continue;
      const Item& item = items[step.item[j][k]];
      for (int n = 0; n < kRows; ++n) {
        if (!(item.rows >> n & 1)) continue;
        const int lane = 4 * n + k / 2, half = k % 2;
        if (source[lane][half] >= 0) throw std::logic_error("tiles: two entries for one place");
        source[lane][half] = item.source[n];
        meta[lane] = uint16_t(meta[lane] | j << (12 + 2 * half));
      }
    }
  }
  tiles.meta.insert(tiles.meta.end(), meta, meta + kLanes);
  tiles.source.insert(tiles.source.end(), source[0], source[0] + 2 * kLanes);
  ++tiles.steps;
}

std::vector<uint16_t> feature_order(const Matrix& m, const std::vector<uint16_t>& positions) {
  std::vector<uint16_t> order(m.blocks * m.block, kNoFeature);
  for (int64_t f = 0; f < m.columns; ++f) {
    const int64_t position = positions[f];
    order[m.block_of(f) * m.block + position] = uint16_t(f);
  }
  return order;
}

}  // namespace

Tiles build(const View& view, int64_t block) {
  const Matrix m = read(view, block);
  Tiles tiles;
  tiles.groups = m.groups();
  tiles.blocks = m.blocks;
  tiles.block = block;
  std::vector<int32_t> grouped = group_rows(m);
  exchange_rows(m, grouped);
  const Placement placement = place_features(m, grouped);
  tiles.row_order = order_groups(m, grouped, placement.wavefronts);
  tiles.feature_order = feature_order(m, placement.positions);

  Gather gather(view, m, placement.positions);
  Layout layout;
  tiles.step_ptr.reserve(tiles.blocks * (tiles.groups + 1));
  for (int64_t b = 0; b < tiles.blocks; ++b) {
    for (int64_t g = 0; g < tiles.groups; ++g) {
      tiles.step_ptr.push_back(int32_t(tiles.steps));
      const std::vector<Item>& items = gather.run(b, &tiles.row_order[g * kRows]);
      for (const Step& step : layout.run(items)) emit(step, items, tiles);
      if (tiles.steps > std::numeric_limits<int32_t>::max()) refuse("indices: too many steps for 32 bits");
    }
    tiles.step_ptr.push_back(int32_t(tiles.steps));
  }
  return tiles;
}

}  // namespace frodkernels::tiles
