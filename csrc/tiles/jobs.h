// SPDX-License-Identifier: Apache-2.0
//
// Jobs: how the tensor-core gradient (csrc/cuda/sparse_core_mma_gradient.cuh) cuts the steps of a plan. A warp keeps
// the sums of a job in registers for all tokens, so jobs are small, equal and of one cell each.
//
//   jobs     [count, 4] int32   first step, number of steps (1 .. job_steps), group, feature block; ordered by block
//   job_ptr  [blocks + 1] int32 the jobs of block b are job_ptr[b] .. job_ptr[b + 1] - 1
#pragma once
#include <cstdint>
#include <vector>

namespace frodkernels::tiles {

// The most steps of a job: 3 or 4, whichever leaves fewer places empty when every cell has the average number of steps.
inline int job_steps(int64_t steps, int64_t cells) {
  if (cells == 0) return 3;
  const int64_t average = (10 * steps + 5 * cells) / (10 * cells);  // rounded
  const int64_t threes = (average + 2) / 3 * 3, fours = (average + 3) / 4 * 4;
  return fours < threes ? 4 : 3;
}

struct Jobs {
  std::vector<int32_t> jobs, job_ptr;
};

// From step_ptr [blocks, groups + 1] of tiles.h.
Jobs build_jobs(const int32_t* step_ptr, int64_t groups, int64_t blocks);

}  // namespace frodkernels::tiles
