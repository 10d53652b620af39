// SPDX-License-Identifier: Apache-2.0
//
// Greedy grouping: a group starts with the heaviest row left and takes the row that shares the most features with it,
// seven times. A shared feature is gathered once for all its rows; and rows of like weight fill the steps that the
// heaviest of them needs anyway.
#include <numeric>

#include "matrix.h"

namespace frodkernels::tiles {
namespace {

constexpr int64_t kScan = int64_t(1) << 26;  // looks at candidates, for all rows together
constexpr int64_t kCount = 128;              // entries counted for each entry of a row that joins a group

class Grouping {
 public:
  explicit Grouping(const Matrix& m)
      : m_(m), window_(std::clamp(kScan / std::max<int64_t>(m.rows, 1), int64_t(64), int64_t(1) << 14)) {
    heaviest_.resize(m.rows);
    std::iota(heaviest_.begin(), heaviest_.end(), 0);
    std::stable_sort(heaviest_.begin(), heaviest_.end(),
                     [&](int32_t a, int32_t b) { return m.degree(a) > m.degree(b); });
    taken_.assign(m.rows, false);
    counted_.assign(m.columns, false);
    shared_.assign(m.rows, 0);
  }

  std::vector<int32_t> run() {
    std::vector<int32_t> order;
    order.reserve(m_.groups() * kRows);
    while (int64_t(order.size()) < m_.rows) {
      find_candidates();
      int32_t row = candidates_.front();
      for (int n = 0; n < kRows && row >= 0; ++n) {
        order.push_back(row);
        taken_[row] = true;
        count_shared(row);
        row = best();
      }
      forget();
    }
    order.resize(m_.groups() * kRows, -1);
    return order;
  }

 private:
  // The heaviest rows that are left, in order.
  void find_candidates() {
    std::erase_if(candidates_, [&](int32_t row) { return taken_[row]; });
    for (; int64_t(candidates_.size()) < window_ && next_ < heaviest_.size(); ++next_) {
      candidates_.push_back(heaviest_[next_]);
    }
  }

  void count_shared(int32_t row) {
    int64_t work = 0;
    for (int64_t p = m_.ptr[row]; p < m_.ptr[row + 1]; ++p) work += length(m_.features[p]);
    // Where columns are long, a sample of them tells enough.
    const int64_t stride = std::max<int64_t>(1, work / std::max<int64_t>(kCount * m_.degree(row), 1));
    for (int64_t p = m_.ptr[row]; p < m_.ptr[row + 1]; p += stride) {
      const int64_t f = m_.features[p];
      if (counted_[f]) continue;
      counted_[f] = true;
      known_.push_back(int32_t(f));
      counts_ += length(f);
      for (int64_t q = m_.feature_ptr[f]; q < m_.feature_ptr[f + 1]; ++q) ++shared_[m_.feature_rows[q]];
    }
  }

  int32_t best() const {
    int32_t row = -1, most = -1;
    for (const int32_t candidate : candidates_) {
      if (shared_[candidate] > most && !taken_[candidate]) row = candidate, most = shared_[candidate];
    }
    return row;
  }

  void forget() {
    if (counts_ > m_.rows) std::fill(shared_.begin(), shared_.end(), 0);
    for (const int32_t f : known_) {
      counted_[f] = false;
      for (int64_t q = m_.feature_ptr[f]; q < m_.feature_ptr[f + 1] && counts_ <= m_.rows; ++q) {
        shared_[m_.feature_rows[q]] = 0;
      }
    }
    known_.clear();
    counts_ = 0;
  }

  int64_t length(int64_t f) const { return m_.feature_ptr[f + 1] - m_.feature_ptr[f]; }

  const Matrix& m_;
  const int64_t window_;
  size_t next_ = 0;     // of heaviest_, the first that was no candidate yet
  int64_t counts_ = 0;  // made for the group at hand
  std::vector<int32_t> heaviest_, candidates_, known_, shared_;
  std::vector<bool> taken_, counted_;
};

}  // namespace

std::vector<int32_t> group_rows(const Matrix& m) { return Grouping(m).run(); }

}  // namespace frodkernels::tiles
