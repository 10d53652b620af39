// SPDX-License-Identifier: Apache-2.0
#include "matrix.h"

namespace frodkernels::tiles {

std::vector<uint16_t> place_features(const Matrix& m, const std::vector<int32_t>& row_order) {
  std::vector<uint16_t> positions(m.columns);
  for (int64_t f = 0; f < m.columns; ++f) positions[f] = uint16_t(f % m.per_block);
  return positions;
}

}  // namespace frodkernels::tiles
