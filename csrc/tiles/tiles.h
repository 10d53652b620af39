// SPDX-License-Identifier: Apache-2.0
//
// The plan of the tensor-core sparse core: one compressed view of a pattern, plus the diagonal, cut into tiles.
//
//   out[i] = lam[i] in[i] + sum over the entries (i, f) of row i of v in[f]       rows i, features f
//
// A thread block of the kernel keeps a tile of tokens of one FEATURE BLOCK in shared memory; its warps own GROUPS of 8
// output rows. For each CELL (block b, group g) a warp runs STEPS. A step gathers 32 features: 4 octets (j = 0..3) of 8
// slots (k = 0..7). An octet is one 8 x 8 matrix of ldmatrix: it takes as many wavefronts as the largest number of
// different features in it that share a bank class (class = position in the block & 7).
//
// Lane l = 4 n + q holds the B fragment of row n: for each octet the entries at k = 2 q and k = 2 q + 1. It stores two
// values a step: `lo` goes to octet p1 at k = 2 q and `hi` to octet p2 at k = 2 q + 1; the other octets get zeros.
// Hence the rule of every step: for each slot number k and each row n, at most one of the 4 octets has an entry (k, n).
// A gathered feature may serve several rows of its group.
//
// With G = ceil(rows / 8) groups and B = ceil(columns / block) feature blocks:
//
//   row_order      [G, 8]        output row of (group, n); -1: none
//   feature_order  [B, block]    the feature at each position; 65535: none. Feature f is in block f / per_block,
//                                per_block = ceil(columns / B)
//   step_ptr       [B, G + 1]    cell (b, g) has the steps step_ptr[b][g] .. step_ptr[b][g + 1] - 1;
//                                step_ptr[b][G] == step_ptr[b + 1][0]
//   meta           [steps, 32]   lane l: bits 0..11 the position (in the block) of the feature of octet j = l >> 3,
//   slot
//                                k = l & 7; bits 12..13 p1 of lane l; bits 14..15 p2 of lane l.
//                                An unused slot repeats the position of a used one of its octet (a broadcast, free); an
//                                unused octet names one used position of its step eight times
//   source         [steps, 32, 2]  lane l = 4 n + q: the place in COO order of the entry at (octet p1, k = 2 q, row n),
//                                then of the one at (octet p2, k = 2 q + 1, row n). nnz + i: the diagonal entry lam[i]
//                                of output row i. -1: no entry (then p1 / p2 is 0)
//
// Every entry of the view, and every diagonal entry where `diagonal` is set, stands in exactly one place.
//
// What is chosen (rows of a group, positions, slots) minimises wavefronts and steps by a search of bounded effort: it
// depends on the pattern alone, never on time, threads or machine. Integers only.
// Memory     about 12 bytes an entry beyond the result while it is built, and 8 bytes a cell.
// Needs      columns <= 65535, block a multiple of 128 and <= 4096, nnz + rows < 2^31, G B <= 2^24.
#pragma once
#include <cstdint>
#include <vector>

namespace frodkernels::tiles {

constexpr int kRows = 8;     // rows of a group
constexpr int kOctets = 4;   // octets of a step
constexpr int kSlots = 8;    // slots of an octet
constexpr int kClasses = 8;  // bank classes
constexpr int kLanes = 32;
constexpr uint16_t kNoFeature = 65535;
constexpr int64_t kMaxColumns = 65535, kMaxBlock = 4096, kBlockUnit = 128, kMaxCells = int64_t(1) << 24;

// One compressed view (CSR, or CSC with the roles swapped): see frodkernels/pattern.py.
struct View {
  const int32_t* indptr = nullptr;  // [rows + 1]
  const void* indices = nullptr;    // [nnz] uint16 (narrow) or int32, ascending within a row
  const int32_t* perm = nullptr;    // [nnz]: the entry's place in COO order
  bool narrow = false;
  bool diagonal = false;  // add lam: needs rows == columns
  int64_t rows = 0, columns = 0, nnz = 0;
};

struct Tiles {
  int64_t groups = 0, blocks = 0, block = 0, steps = 0;
  std::vector<int32_t> row_order;
  std::vector<uint16_t> feature_order;
  std::vector<int32_t> step_ptr;
  std::vector<uint16_t> meta;
  std::vector<int32_t> source;
};

// Throws std::invalid_argument, naming the argument, for a view that is not one or a block size that cannot be served.
Tiles build(const View& view, int64_t block);

}  // namespace frodkernels::tiles
