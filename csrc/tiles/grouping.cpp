// SPDX-License-Identifier: Apache-2.0
#include <numeric>

#include "matrix.h"

namespace frodkernels::tiles {

std::vector<int32_t> group_rows(const Matrix& m) {
  const int64_t groups = (m.rows + kRows - 1) / kRows;
  std::vector<int32_t> order(m.rows);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return m.degree(a) > m.degree(b); });
  order.resize(groups * kRows, -1);
  return order;
}

std::vector<int32_t> order_groups(const Matrix& m, const std::vector<int32_t>& row_order,
                                  const std::vector<uint16_t>& positions) {
  return row_order;
}

}  // namespace frodkernels::tiles
