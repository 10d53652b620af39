// SPDX-License-Identifier: Apache-2.0
//
// Launchers of the sparse core's CUDA kernels, for callers that know neither nvcc nor its types. All pointers are
// device pointers; every launcher enqueues on `stream` and returns nullptr, or the CUDA runtime's message when a launch
// failed.
//
//   product     out[i, t] = lam[i] in[i, t] + sum over row i's entries (j, v) of v in[j, t]
//   gradient    dvalues[k] = sum_t in[j_k, t] z[i_k, t];   dlam[i] = sum_t in[i, t] z[i, t]
//
// Rows i are the groups of one compressed view (CSR for the product with S, CSC for its transpose and the gradients),
// columns j index `in`. Features are rows of [features, T] matrices, contiguous, `stride` elements from row to row.
#pragma once
#include <cstdint>

struct CUstream_st;

namespace frodkernels::cuda {

enum class Scalar : int32_t { kF32, kF64, kBF16, kF16 };

// A vector of parameters or of their gradients in its own dtype; data is null where there is none.
struct Vector {
  void* data = nullptr;
  Scalar type = Scalar::kF32;
};

// One compressed view of a pattern: see frodkernels/pattern.py.
struct Compressed {
  const int32_t* indptr = nullptr;  // [rows + 1]
  const void* indices = nullptr;    // [nnz] uint16 (narrow) or int32
  const int32_t* perm = nullptr;    // [nnz]: the slot's place in COO order
  bool narrow = false;
  int64_t nnz = 0, rows = 0, columns = 0;
};

// The same view cut into tiles for the tensor-core kernels: see csrc/tiles/tiles.h.
struct Tiles {
  const int32_t* row_order = nullptr;       // [groups, 8], -1 where a group has fewer rows
  const uint16_t* feature_order = nullptr;  // [blocks, block]
  const int32_t* step_ptr = nullptr;        // [blocks, groups + 1]
  const uint32_t* words = nullptr;          // [steps, 32]: see words.h
  const int32_t* source = nullptr;          // [steps, 32, 2]
  const int32_t* jobs = nullptr;            // [jobs, 4]
  const int32_t* job_ptr = nullptr;         // [blocks + 1]
  int64_t groups = 0, blocks = 0, block = 0, steps = 0, job_count = 0;
};

struct Product {
  Compressed view;
  Vector values, lam;  // [nnz] in COO order, [rows] or null
  Scalar type = Scalar::kF32;
  const void* in = nullptr;  // [columns, T]
  void* out = nullptr;       // [rows, T]
  int64_t T = 0, in_stride = 0, out_stride = 0;
};

struct Gradient {
  Compressed view;
  Vector dvalues, dlam;  // [nnz] in COO order, [rows]; null where not wanted
  Scalar type = Scalar::kF32;
  const void* in = nullptr;  // u [columns, T]
  const void* z = nullptr;   // [rows, T]
  int64_t T = 0, in_stride = 0, z_stride = 0;
};

// Why the current device cannot run these kernels; nullptr: it can.
const char* why_not();

// Fused multiply-add kernels: every dtype, every T, every pattern. float64 is summed in float64, all else in float32.
// `scratch` is null or holds product_fma_scratch(a) bytes, aligned to 32 (0: none would be used); with it, features
// pass through shared memory. Whether there is scratch decides the kernel, and so the order of the sums.
int64_t product_fma_scratch(const Product& a);
const char* product_fma(const Product& a, void* scratch, CUstream_st* stream);
// Bytes of scratch that gradient_fma needs on the current device.
int64_t gradient_fma_scratch(const Gradient& a);
const char* gradient_fma(const Gradient& a, void* scratch, CUstream_st* stream);

// Tensor-core kernels: float16 and bfloat16. `packed` is scratch of packed_bytes(tiles) bytes.
// Both take only plans whose block is at most mma_block_limit() on the current device; tile_block is the best for it.
int64_t mma_block_limit();
int64_t tile_block(int64_t columns);
int64_t packed_bytes(const Tiles& tiles);
const char* product_mma(const Product& a, const Tiles& tiles, void* packed, CUstream_st* stream);
int64_t gradient_mma_scratch(const Gradient& a, const Tiles& tiles);
const char* gradient_mma(const Gradient& a, const Tiles& tiles, void* scratch, CUstream_st* stream);

}  // namespace frodkernels::cuda
