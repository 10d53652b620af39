// SPDX-License-Identifier: Apache-2.0
//
// Groups are dealt out by weight in golden-ratio order, in which any run of places has about every part of the ranking,
// and then exchanged within a short window for that group whose blocks make up best for what the groups so far had too
// much or too little of: warps meet after each block.
#include <numeric>

#include "matrix.h"

namespace frodkernels::tiles {
namespace {

constexpr int64_t kWindow = 32;                 // groups to choose from
constexpr int64_t kUnit = 16;                   // of deviations: a part of a wavefront
constexpr int64_t kFar = int64_t(1) << 22;      // deviations beyond are as bad as this
constexpr uint32_t kGoldenRatio = 2654435769u;  // 2^32 / 1.618...

}  // namespace

std::vector<int32_t> order_groups(const Matrix& m, const std::vector<int32_t>& row_order,
                                  const std::vector<int32_t>& wavefronts) {
  const int64_t groups = m.groups();
  std::vector<int64_t> weight(groups, 0), mean(m.blocks, 0);
  for (int64_t b = 0; b < m.blocks; ++b) {
    for (int64_t g = 0; g < groups; ++g) {
      weight[g] += wavefronts[b * groups + g];
      mean[b] += wavefronts[b * groups + g];
    }
    mean[b] = groups == 0 ? 0 : mean[b] * kUnit / groups;
  }
  std::vector<int32_t> queue(groups), dealt(groups);
  std::iota(queue.begin(), queue.end(), 0);
  std::stable_sort(queue.begin(), queue.end(), [&](int32_t a, int32_t b) { return weight[a] > weight[b]; });
  std::vector<uint32_t> key(groups);
  for (int64_t rank = 0; rank < groups; ++rank) key[queue[rank]] = uint32_t(rank) * kGoldenRatio;
  std::sort(queue.begin(), queue.end(), [&](int32_t a, int32_t b) { return key[a] < key[b]; });

  std::vector<int64_t> deviation(m.blocks, 0);
  const auto after = [&](int64_t b, int32_t g) { return deviation[b] + kUnit * wavefronts[b * groups + g] - mean[b]; };
  std::vector<int64_t> since(groups);  // when each came into the window
  std::vector<int32_t> window;
  size_t next = 0;
  for (int64_t place = 0; place < groups; ++place) {
    while (int64_t(window.size()) < kWindow && next < queue.size()) {
      since[queue[next]] = place;
      window.push_back(queue[next++]);
    }
    size_t best = 0;
    if (place - since[window[0]] < kWindow) {  // the oldest, which stands first, goes when it has waited long enough
      int64_t least = INT64_MAX;
      for (size_t w = 0; w < window.size(); ++w) {
        int64_t far = 0;
        for (int64_t b = 0; b < m.blocks; ++b) {
          const int64_t off = std::clamp(after(b, window[w]), -kFar, kFar);
          far += off * off;
        }
        if (far < least) least = far, best = w;
      }
    }
    const int32_t g = window[best];
    window.erase(window.begin() + int64_t(best));
    for (int64_t b = 0; b < m.blocks; ++b) deviation[b] = after(b, g);
    dealt[place] = g;
  }

  std::vector<int32_t> order;
  order.reserve(row_order.size());
  for (const int32_t g : dealt) order.insert(order.end(), &row_order[g * kRows], &row_order[g * kRows] + kRows);
  return order;
}

}  // namespace frodkernels::tiles
