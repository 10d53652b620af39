// SPDX-License-Identifier: Apache-2.0
//
// What the CUDA bindings of ops on sparse patterns share: features and a pattern's view as kernels want them, with the
// checks that need no device memory; scratch; the check of a launch.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <iterator>
#include <vector>

#include "../sparse_core.h"
#include "cuda/sparse_core.h"
#include "ops/cuda/device.h"

namespace frodkernels::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline constexpr int64_t kMmaTokens = 32;  // one tile of the tensor-core kernels

inline void check_device(const Tensor& t, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(on_device(t) && t.get_device_index() == like.get_device_index(), name,
                  " must be on the features' device");
}

inline void check_features(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, name, " must be [features, T]");
  STD_TORCH_CHECK(on_device(t), name, " must be on this kernel's device");
}

// Rows of contiguous tokens: as they are where the layout allows, else a copy.
inline Tensor rows_of(const Tensor& t) {
  const bool fits = t.size(1) <= 1 || (t.stride(1) == 1 && t.stride(0) >= t.size(1));
  return fits ? t : torch::stable::contiguous(t);
}

// From row to row; a single row, or rows of one token, may carry any stride.
inline int64_t row_stride(const Tensor& t) { return t.size(1) > 1 ? t.stride(0) : t.size(0) > 1 ? t.stride(0) : 1; }

// The first T tokens of each row; `rows` itself where it has no more.
inline Tensor first_tokens(Tensor& rows, int64_t T) {
  return rows.size(1) == T ? rows : torch::stable::narrow(rows, 1, 0, T);
}

constexpr int64_t whole_eights(int64_t T) { return (T + 7) / 8 * 8; }

inline bool starts_on_16_bytes(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// As the tensor-core kernels need them: `t` itself where its rows start on 16 bytes, else one copy.
inline Tensor pitched(const Tensor& t) {
  if (starts_on_16_bytes(t.const_data_ptr()) && row_stride(t) % 8 == 0) return t;
  Tensor copy = torch::stable::new_empty(t, {t.size(0), whole_eights(t.size(1))});
  Tensor tokens = first_tokens(copy, t.size(1));
  return torch::stable::copy_(tokens, t);
}

// The plan's tensors. What they hold was checked when the pattern was made: reading it here would wait for the device.
struct View {
  Tensor indptr, indices, perm;
  std::vector<Tensor> tiles;
  cuda::Compressed compressed;
  cuda::Tiles tiled;

  View(const Tensor& ptr, const Tensor& index, const Tensor& order, const OptionalTensors& parts,
       const Tensor& features)
      : indptr(torch::stable::contiguous(ptr)),
        indices(torch::stable::contiguous(index)),
        perm(torch::stable::contiguous(order)),
        tiles(parts.value_or(std::vector<Tensor>())) {
    check_device(ptr, "indptr", features);
    check_device(index, "indices", features);
    check_device(order, "perm", features);
    STD_TORCH_CHECK(ptr.scalar_type() == ScalarType::Int && ptr.dim() == 1 && ptr.numel() >= 1,
                    "indptr must be a non-empty int32 vector");
    STD_TORCH_CHECK(index.scalar_type() == ScalarType::UInt16 || index.scalar_type() == ScalarType::Int,
                    "indices must be uint16 or int32");
    STD_TORCH_CHECK(order.scalar_type() == ScalarType::Int, "perm must be int32");
    check_vector(index, "indices", index.numel());
    check_vector(order, "perm", index.numel());
    compressed.indptr = static_cast<const int32_t*>(indptr.const_data_ptr());
    compressed.indices = indices.const_data_ptr();
    compressed.perm = static_cast<const int32_t*>(perm.const_data_ptr());
    compressed.narrow = index.scalar_type() == ScalarType::UInt16;
    compressed.nnz = index.numel();
    compressed.rows = ptr.numel() - 1;
    compressed.columns = features.size(0);
    STD_TORCH_CHECK(compressed.nnz < (int64_t(1) << 31), "indices must have fewer than 2^31 entries");
    observe(indptr, "indptr", Access::kRead);
    observe(indices, "indices", Access::kRead);
    observe(perm, "perm", Access::kRead);
    if (!tiles.empty()) read_tiles(features);
  }

  void read_tiles(const Tensor& features) {
    struct Part {
      const char* name;
      ScalarType type;
      int64_t dim;
    };
    static constexpr Part kParts[] = {{"row_order", ScalarType::Int, 2}, {"feature_order", ScalarType::UInt16, 2},
                                      {"step_ptr", ScalarType::Int, 2},  {"words", ScalarType::Int, 2},
                                      {"source", ScalarType::Int, 3},    {"jobs", ScalarType::Int, 2},
                                      {"job_ptr", ScalarType::Int, 1}};
    STD_TORCH_CHECK(tiles.size() == std::size(kParts), "tiles must be 7 tensors, got ", tiles.size());
    for (size_t i = 0; i < tiles.size(); ++i) {
      const auto& [name, type, dim] = kParts[i];
      check_device(tiles[i], name, features);
      STD_TORCH_CHECK(tiles[i].scalar_type() == type && tiles[i].dim() == dim && tiles[i].is_contiguous(),
                      "tiles: ", name, " has the wrong dtype or layout");
      observe(tiles[i], name, Access::kRead);
    }
    tiled.groups = tiles[0].size(0);
    tiled.blocks = tiles[1].size(0);
    tiled.block = tiles[1].size(1);
    tiled.steps = tiles[4].size(0);
    tiled.job_count = tiles[5].size(0);
    STD_TORCH_CHECK(tiled.groups == (compressed.rows + 7) / 8 && tiles[0].size(1) == 8 &&
                        tiles[2].size(0) == tiled.blocks && tiles[2].size(1) == tiled.groups + 1 &&
                        tiles[3].size(0) == tiled.steps && tiles[3].size(1) == 32 && tiles[4].size(1) == 32 &&
                        tiles[4].size(2) == 2 && tiles[5].size(1) == 4 && tiles[6].size(0) == tiled.blocks + 1 &&
                        tiled.blocks * tiled.block >= compressed.columns && tiled.block % 128 == 0 &&
                        tiled.steps < (int64_t(1) << 25),
                    "tiles do not fit the plan");
    tiled.row_order = static_cast<const int32_t*>(tiles[0].const_data_ptr());
    tiled.feature_order = static_cast<const uint16_t*>(tiles[1].const_data_ptr());
    tiled.step_ptr = static_cast<const int32_t*>(tiles[2].const_data_ptr());
    tiled.words = static_cast<const uint32_t*>(tiles[3].const_data_ptr());
    tiled.source = static_cast<const int32_t*>(tiles[4].const_data_ptr());
    tiled.jobs = static_cast<const int32_t*>(tiles[5].const_data_ptr());
    tiled.job_ptr = static_cast<const int32_t*>(tiles[6].const_data_ptr());
  }

  bool on_tensor_cores(const Tensor& features) const {
    const ScalarType type = features.scalar_type();
    return tiled.steps > 0 && features.size(1) >= kMmaTokens &&
           (type == ScalarType::Half || type == ScalarType::BFloat16) && tiled.block <= cuda::mma_block_limit();
  }
};

inline cuda::Vector vector_of(const Tensor& t, const char* name) {
  return {const_cast<void*>(t.const_data_ptr()), scalar_of<cuda::Scalar>(t, name)};
}

inline void check_launch(const char* error, const char* op) {
  STD_TORCH_CHECK(error == nullptr, op, ": the launch failed: ", error == nullptr ? "" : error);
}

inline Tensor scratch(const Tensor& like, int64_t bytes) {
  Tensor out = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  observe(out, "scratch", Access::kWrite);
  return out;
}

}  // namespace frodkernels::ops
