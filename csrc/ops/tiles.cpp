// SPDX-License-Identifier: Apache-2.0
//
// frodkernels::native_tiles on CPU tensors: check one compressed view, build its tiles (csrc/tiles/tiles.h), hand them
// over as tensors.
#include "../tiles/tiles.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <stdexcept>
#include <vector>

#include "../tiles/jobs.h"
#include "../tiles/words.h"

namespace frodkernels::ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor checked(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.device().is_cpu(), name, " must be a CPU tensor");
  STD_TORCH_CHECK(t.dim() == 1, name, " must be a vector");
  return torch::stable::contiguous(t);
}

// The vector as a tensor of this shape; the vector's memory is given back.
template <typename T>
Tensor tensor_of(std::vector<T>& data, const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  Tensor out = torch::stable::new_empty(like, shape, type);
  STD_TORCH_CHECK(out.numel() == int64_t(data.size()), "tiles: a part has the wrong size");
  if (!data.empty()) std::memcpy(out.mutable_data_ptr(), data.data(), data.size() * sizeof(T));
  std::vector<T>().swap(data);
  return out;
}

// What the kernels read of a step, one 32-bit word a lane: see csrc/tiles/words.h.
std::vector<int32_t> words_of(const std::vector<uint16_t>& meta, int64_t steps) {
  std::vector<int32_t> out(size_t(steps) * tiles::kLanes);
  for (int64_t s = 0; s < steps; ++s)
    tiles::lane_words(meta.data() + s * tiles::kLanes, out.data() + s * tiles::kLanes);
  return out;
}

// [row_order, feature_order, step_ptr, words, source, jobs, job_ptr]: see csrc/tiles/tiles.h, words.h, jobs.h.
std::vector<Tensor> native_tiles(const Tensor& indptr, const Tensor& indices, const Tensor& perm, int64_t columns,
                                 bool diagonal, int64_t block) {
  const Tensor ptr = checked(indptr, "indptr"), index = checked(indices, "indices"), order = checked(perm, "perm");
  STD_TORCH_CHECK(ptr.scalar_type() == ScalarType::Int && ptr.numel() > 0, "indptr must be a non-empty int32 vector");
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::UInt16 || index.scalar_type() == ScalarType::Int,
                  "indices must be uint16 or int32");
  STD_TORCH_CHECK(order.scalar_type() == ScalarType::Int, "perm must be int32");
  STD_TORCH_CHECK(order.numel() == index.numel(), "perm must have one entry per index");
  tiles::View view;
  view.indptr = static_cast<const int32_t*>(ptr.const_data_ptr());
  view.indices = index.const_data_ptr();
  view.perm = static_cast<const int32_t*>(order.const_data_ptr());
  view.narrow = index.scalar_type() == ScalarType::UInt16;
  view.diagonal = diagonal;
  view.rows = ptr.numel() - 1;
  view.columns = columns;
  view.nnz = index.numel();
  tiles::Tiles made;
  try {
    made = tiles::build(view, block);
  } catch (const std::exception& error) {
    STD_TORCH_CHECK(false, error.what());
  }
  const int64_t groups = made.groups, blocks = made.blocks, steps = made.steps;
  tiles::Jobs jobs = tiles::build_jobs(made.step_ptr.data(), groups, blocks);
  const int64_t count = int64_t(jobs.jobs.size()) / 4;
  std::vector<int32_t> words = words_of(made.meta, steps);
  return {tensor_of(made.row_order, ptr, {groups, tiles::kRows}, ScalarType::Int),
          tensor_of(made.feature_order, ptr, {blocks, block}, ScalarType::UInt16),
          tensor_of(made.step_ptr, ptr, {blocks, groups + 1}, ScalarType::Int),
          tensor_of(words, ptr, {steps, tiles::kLanes}, ScalarType::Int),
          tensor_of(made.source, ptr, {steps, tiles::kLanes, 2}, ScalarType::Int),
          tensor_of(jobs.jobs, ptr, {count, 4}, ScalarType::Int),
          tensor_of(jobs.job_ptr, ptr, {blocks + 1}, ScalarType::Int)};
}

}  // namespace
}  // namespace frodkernels::ops

STABLE_TORCH_LIBRARY_FRAGMENT(frodkernels, m) {
  m.def("native_tiles(Tensor indptr, Tensor indices, Tensor perm, int columns, bool diagonal, int block) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(frodkernels, CPU, m) { m.impl("native_tiles", TORCH_BOX(&frodkernels::ops::native_tiles)); }
