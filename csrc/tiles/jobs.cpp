// SPDX-License-Identifier: Apache-2.0
#include "tiles/jobs.h"

#include <algorithm>

namespace frodkernels::tiles {

Jobs build_jobs(const int32_t* step_ptr, int64_t groups, int64_t blocks) {
  Jobs out;
  out.job_ptr.push_back(0);
  const int64_t steps = blocks == 0 ? 0 : step_ptr[blocks * (groups + 1) - 1];
  const int most = job_steps(steps, groups * blocks);
  for (int64_t b = 0; b < blocks; ++b) {
    const int32_t* ptr = step_ptr + b * (groups + 1);
    for (int64_t g = 0; g < groups; ++g) {
      for (int32_t s = ptr[g]; s < ptr[g + 1]; s += most) {
        const int32_t job[] = {s, std::min(most, ptr[g + 1] - s), int32_t(g), int32_t(b)};
        out.jobs.insert(out.jobs.end(), job, job + 4);
      }
    }
    out.job_ptr.push_back(int32_t(out.jobs.size() / 4));
  }
  return out;
}

}  // namespace frodkernels::tiles
