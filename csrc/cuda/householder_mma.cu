// SPDX-License-Identifier: Apache-2.0
#include "cuda/householder_mma.cuh"
#include "cuda/householder_mma_gradient.cuh"
#include "cuda/householder_plan.h"

namespace frodkernels::cuda {
namespace {

using namespace householder;

constexpr int kLeastCapability = 80;  // cp.async, mma of bfloat16

bool is_16_bit(Scalar type) { return type == Scalar::kBF16 || type == Scalar::kF16; }

bool is_aligned(const void* rows, int64_t stride) {
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && stride % 8 == 0;
}

int64_t unit_bytes(Scalar type) { return type == Scalar::kF16 ? kUnitBytes<__half> : kUnitBytes<__nv_bfloat16>; }

int rank_units(int64_t r) { return static_cast<int>(ceil_div(r, 16)); }

template <typename scalar_t, bool kRight>
void launch_packs(const Pack& first, const Pack& second, cudaStream_t stream) {
  const int64_t blocks = ceil_div(first.units + second.units, kPackThreads / 32);
  SIMT_LAUNCH((householder_pack_kernel<scalar_t, kRight>), static_cast<unsigned>(blocks), kPackThreads, 0, stream,
              first, second);
}

int64_t chunks_of(int64_t features) { return ceil_div(features, kMmaFeatures); }

int64_t left_bytes(const Householder& a) {
  return aligned_bytes(chunks_of(a.n) * 8 * rank_units(a.r) * unit_bytes(a.type));
}

// The map with blocks of 16 * tiles tokens.
struct MapPlan {
  int tiles = 0;  // 0: no block fits
  int64_t shared = 0;
  Steps steps{};
};

// Of the device's kind, roughly: bytes of L2, and how much faster L2 is than the memory behind it.
struct Memory {
  double cache, ratio;
};

Memory memory_of(int capability) {
  constexpr double kMiB = 1048576;
  switch (capability) {
    case 80:
      return {40 * kMiB, 2.5};
    case 90:
      return {50 * kMiB, 2};
    case 100:
      return {126 * kMiB, 1};
    case 86:
      return {6 * kMiB, 3};
    default:
      return {72 * kMiB, 6};
  }
}

// More tokens a block read the factors less often from L2; fewer spread over more multiprocessors, and find more of the
// rows that they read again still in L2. The slower of the two memories decides; all in bytes of L2 that one
// multiprocessor reads.
MapPlan plan_map(const Householder& a) {
  const gpu::Device device = gpu::device();
  const Memory memory = memory_of(device.capability);
  const int units = rank_units(a.r);
  const int64_t m = a.right == nullptr ? 0 : a.m;
  const double factors = double(units) * (double(a.n) * double(unit_bytes(a.type)) + double(m) * kRightUnitBytes) / 16;
  constexpr double kStart = 131072;  // bytes in the time that a block takes to begin and to end
  const double sms = std::max(device.sms, 1);
  MapPlan best;
  double best_cost = 1e300;
  for (int tiles = 1; tiles <= kMostTiles; ++tiles) {
    const int64_t tokens = 16 * tiles, slot = tokens * kMmaPitch, blocks = ceil_div(a.T, tokens);
    const int64_t fixed = 2 * tokens * coefficient_pitch(units) + kMmaExchange;
    MapPlan plan;
    plan.tiles = tiles;
    plan.steps = plan_steps(a, kMmaFeatures, slot, device.shared_per_block - fixed);
    if (plan.steps.slots < 2) break;
    plan.shared = fixed + plan.steps.slots * slot;
    const double rounds = std::ceil(double(blocks) / sms);
    // Of each block: rows that are read a second time, and those of them that no cache holds by then. Walking back, a
    // round of blocks finds what is among the last half of a cache that it has read; it writes as much.
    const double again =
        !plan.steps.same ? 0 : 2.0 * double(tokens * std::max(plan.steps.first - plan.steps.slots, 0)) * kMmaFeatures;
    const double missed = std::max(again - memory.cache / 2 / std::min(double(blocks), sms), 0.0);
    const double rows = 2.0 * double(tokens * (plan.steps.same ? a.n : a.n + m));
    const double written = 2.0 * double(tokens * m);
    const double of_cache = rounds * (rows + again + factors + kStart);
    const double of_memory = double(blocks) / sms * (rows + missed + written) * memory.ratio;
    const double cost = std::max(of_cache, of_memory);
    if (cost < best_cost) {
      best = plan;
      best_cost = cost;
    }
  }
  return best;
}

template <typename scalar_t, int kTiles>
void launch_tiles(const MmaArgs<scalar_t>& args, const MapPlan& plan, cudaStream_t stream) {
  gpu::allow_shared(householder_mma_kernel<scalar_t, kTiles>, plan.shared);
  const unsigned grid = static_cast<unsigned>(ceil_div(args.T, 16 * kTiles));
  SIMT_LAUNCH((householder_mma_kernel<scalar_t, kTiles>), grid, kThreads, plan.shared, stream, args);
}

template <typename scalar_t>
const char* launch_map(const Householder& a, void* scratch, cudaStream_t stream) {
  const MapPlan plan = plan_map(a);
  const int units = rank_units(a.r);
  Pack left{}, right{};
  left.from = static_cast<const float*>(a.left);
  left.to = static_cast<char*>(scratch);
  left.k_step = a.r, left.c_step = 1;
  left.depth = a.n, left.columns = a.r;
  left.c_units = left.k_place = units;
  left.c_place = 1;
  left.units = chunks_of(a.n) * 8 * units;
  if (a.right != nullptr) {
    right.from = static_cast<const float*>(a.right);
    right.to = left.to + left_bytes(a);
    right.k_step = 1, right.c_step = a.r;
    right.depth = a.r, right.columns = a.m;
    right.c_units = chunks_of(a.m) * 8;
    right.k_place = 1, right.c_place = units;
    right.units = right.c_units * units;
  }
  launch_packs<scalar_t, true>(left, right, stream);

  MmaArgs<scalar_t> args;
  args.x = rows_of<scalar_t>(a.x, a.x_stride);
  args.base = a.base == nullptr ? args.x : rows_of<scalar_t>(a.base, a.base_stride);
  args.out = rows_of<scalar_t>(a.out, a.out_stride);
  args.left = left.to;
  args.right = right.to;
  args.coefficients = static_cast<float*>(a.coefficients);
  args.T = a.T, args.n = a.n, args.m = a.m;
  args.r = static_cast<int>(a.r);
  args.groups = rank_groups(a.r);
  args.units = units;
  args.steps = plan.steps;
  switch (plan.tiles) {
    case 1:
      launch_tiles<scalar_t, 1>(args, plan, stream);
      break;
    case 2:
      launch_tiles<scalar_t, 2>(args, plan, stream);
      break;
    case 3:
      launch_tiles<scalar_t, 3>(args, plan, stream);
      break;
    case 4:
      launch_tiles<scalar_t, 4>(args, plan, stream);
      break;
    default:
      launch_tiles<scalar_t, kMostTiles>(args, plan, stream);
  }
  return gpu::launch_error();
}

// Scratch: the packed q of each pair, then the partial sums.
struct GradientPlan {
  int units, groups;
  int64_t features, pieces, q_bytes, splits;

  explicit GradientPlan(const HouseholderGradient& a)
      : units(rank_units(a.r)), groups(units > kGradientUnits ? 2 : 1), features(mma_gradient_features(groups)) {
    pieces = ceil_div(a.T, kMmaPieceTokens);
    q_bytes = aligned_bytes(pieces * 2 * units * unit_bytes(a.type));
    splits = plan_splits(a, features, pieces, kMmaPieceTokens, sizeof(float));
  }
};

template <typename scalar_t>
const char* launch_gradient(const HouseholderGradient& a, void* scratch, cudaStream_t stream) {
  const GradientPlan plan(a);
  char* packed = static_cast<char*>(scratch);
  MmaGradientArgs<scalar_t> args{};
  Pack packs[2] = {};
  for (int k = 0; k < a.count; ++k, packed += plan.q_bytes) {
    Pack& pack = packs[k];
    pack.from = static_cast<const float*>(a.pairs[k].q);
    pack.to = packed;
    pack.k_step = a.r, pack.c_step = 1;
    pack.depth = a.T, pack.columns = a.r;
    pack.c_units = pack.k_place = plan.units;
    pack.c_place = 1;
    pack.units = plan.pieces * 2 * plan.units;
    args.x[k] = rows_of<scalar_t>(a.pairs[k].x, a.pairs[k].x_stride);
    args.q[k] = packed;
  }
  launch_packs<scalar_t, false>(packs[0], packs[1], stream);

  args.partial = reinterpret_cast<float*>(packed);
  args.T = a.T, args.n = a.n;
  args.pairs = a.count;
  args.r = static_cast<int>(a.r);
  args.groups = plan.groups;
  args.units = plan.units;
  args.pieces = plan.pieces;
  const int slot = mma_gradient_slot<scalar_t>(plan.groups, plan.units);
  args.slots = std::min(kRing, std::max(2, (gpu::device().shared_per_block / 2 - 1024) / slot));
  gpu::allow_shared(householder_gradient_mma_kernel<scalar_t>, args.slots * slot);
  const dim3 grid(static_cast<unsigned>(ceil_div(a.n, plan.features)), static_cast<unsigned>(plan.splits));
  SIMT_LAUNCH((householder_gradient_mma_kernel<scalar_t>), grid, kThreads, args.slots * slot, stream, args);
  if (const char* error = gpu::launch_error()) return error;
  return reduce_gradient(a, args.partial, plan.splits, false, stream);
}

}  // namespace

bool householder_on_tensor_cores(const Householder& a) {
  return is_16_bit(a.type) && gpu::device().capability >= kLeastCapability && is_aligned(a.x, a.x_stride) &&
         (a.base == nullptr || is_aligned(a.base, a.base_stride)) && plan_map(a).tiles > 0;
}

int64_t householder_mma_scratch(const Householder& a) {
  const int64_t right = a.right == nullptr ? 0 : chunks_of(a.m) * 8 * rank_units(a.r) * kRightUnitBytes;
  return left_bytes(a) + right;
}

const char* householder_mma(const Householder& a, void* scratch, CUstream_st* stream) {
  return a.type == Scalar::kF16 ? launch_map<__half>(a, scratch, stream)
                                : launch_map<__nv_bfloat16>(a, scratch, stream);
}

bool householder_on_tensor_cores(const HouseholderGradient& a) {
  bool aligned = true;
  for (int k = 0; k < a.count; ++k) aligned = aligned && is_aligned(a.pairs[k].x, a.pairs[k].x_stride);
  return is_16_bit(a.type) && gpu::device().capability >= kLeastCapability && aligned;
}

int64_t householder_gradient_mma_scratch(const HouseholderGradient& a) {
  const GradientPlan plan(a);
  return a.count * plan.q_bytes + plan.splits * a.n * a.r * int64_t(sizeof(float));
}

const char* householder_gradient_mma(const HouseholderGradient& a, void* scratch, CUstream_st* stream) {
  return a.type == Scalar::kF16 ? launch_gradient<__half>(a, scratch, stream)
                                : launch_gradient<__nv_bfloat16>(a, scratch, stream);
}

}  // namespace frodkernels::cuda
