// SPDX-License-Identifier: Apache-2.0
#include "cuda/householder_fma.cuh"
#include "cuda/householder_fma_gradient.cuh"
#include "cuda/householder_plan.h"
#include "cuda/reduce.h"

namespace frodkernels::cuda {
namespace {

using namespace householder;

template <typename acc>
void launch_pads(const Pad& first, const Pad& second, cudaStream_t stream) {
  const int64_t blocks = ceil_div(first.count + second.count, kPadThreads);
  SIMT_LAUNCH((householder_pad_kernel<acc>), static_cast<unsigned>(blocks), kPadThreads, 0, stream, first, second);
}

// Scratch: left, then right^T.
template <typename scalar_t>
struct MapPlan {
  int64_t ranks, left, right;  // numbers of the padded factors

  explicit MapPlan(const Householder& a) : ranks(rank_groups(a.r) * kGroupRanks) {
    constexpr int64_t kFeatures = kFmaFeatures<scalar_t>;
    left = ceil_div(a.n, kFeatures) * kFeatures * ranks;
    right = a.right == nullptr ? 0 : ceil_div(a.m, kFeatures) * kFeatures * ranks;
  }
  int64_t left_bytes() const { return aligned_bytes(left * int64_t(sizeof(acc_t<scalar_t>))); }
  int64_t bytes() const { return left_bytes() + right * int64_t(sizeof(acc_t<scalar_t>)); }
};

template <typename scalar_t>
const char* launch_map(const Householder& a, void* scratch, cudaStream_t stream) {
  using acc = acc_t<scalar_t>;
  const MapPlan<scalar_t> plan(a);
  char* const packed = static_cast<char*>(scratch);
  const Pad left{a.left, packed, a.r, 1, a.n, a.r, plan.left, plan.ranks};
  const Pad right{
      a.right, packed + plan.left_bytes(), 1, a.r, a.r, a.m, plan.right, std::max<int64_t>(plan.right / plan.ranks, 1)};
  launch_pads<acc>(left, right, stream);

  FmaArgs<scalar_t> args;
  args.x = rows_of<scalar_t>(a.x, a.x_stride);
  args.base = a.base == nullptr ? args.x : rows_of<scalar_t>(a.base, a.base_stride);
  args.out = rows_of<scalar_t>(a.out, a.out_stride);
  args.left = static_cast<const acc*>(left.to);
  args.right = static_cast<const acc*>(right.to);
  args.coefficients = static_cast<acc*>(a.coefficients);
  args.T = a.T, args.n = a.n, args.m = a.m;
  args.r = static_cast<int>(a.r);
  args.groups = rank_groups(a.r);
  const int64_t fixed = fma_coefficient_bytes<acc>(args.groups) + kFmaExchange<acc>;
  // Half an SM's shared memory: two blocks keep more loads and sums in flight.
  const int64_t room = std::max<int64_t>(gpu::device().shared_per_block / 2 - 1024, fixed + 2 * kFmaSlot) - fixed;
  args.steps = plan_steps(a, kFmaFeatures<scalar_t>, kFmaSlot, room);
  const int64_t shared = fixed + args.steps.slots * kFmaSlot;
  gpu::allow_shared(householder_fma_kernel<scalar_t>, shared);
  SIMT_LAUNCH((householder_fma_kernel<scalar_t>), static_cast<unsigned>(ceil_div(a.T, kFmaTokens)), kThreads, shared,
              stream, args);
  return gpu::launch_error();
}

// Scratch: the padded q of each pair, then the partial sums.
template <typename scalar_t>
struct GradientPlan {
  int groups;
  int64_t features, pieces, q, splits;

  explicit GradientPlan(const HouseholderGradient& a) : groups(rank_groups(a.r)) {
    features = fma_gradient_features<scalar_t>(groups);
    pieces = ceil_div(a.T, kFmaPieceTokens);
    q = pieces * kFmaPieceTokens * groups * kGroupRanks;
    splits = plan_splits(a, features, pieces, kFmaPieceTokens, sizeof(acc_t<scalar_t>));
  }
  int64_t q_bytes() const { return aligned_bytes(q * int64_t(sizeof(acc_t<scalar_t>))); }
};

template <typename scalar_t>
int64_t gradient_bytes(const HouseholderGradient& a) {
  const GradientPlan<scalar_t> plan(a);
  return a.count * plan.q_bytes() + plan.splits * a.n * a.r * int64_t(sizeof(acc_t<scalar_t>));
}

template <typename scalar_t>
const char* launch_gradient(const HouseholderGradient& a, void* scratch, cudaStream_t stream) {
  using acc = acc_t<scalar_t>;
  const GradientPlan<scalar_t> plan(a);
  char* packed = static_cast<char*>(scratch);
  FmaGradientArgs<scalar_t> args{};
  Pad pads[2] = {};
  for (int k = 0; k < a.count; ++k, packed += plan.q_bytes()) {
    args.x[k] = rows_of<scalar_t>(a.pairs[k].x, a.pairs[k].x_stride);
    args.q[k] = reinterpret_cast<const acc*>(packed);
    pads[k] = {a.pairs[k].q, packed, a.r, 1, a.T, a.r, plan.q, plan.groups * kGroupRanks};
  }
  launch_pads<acc>(pads[0], pads[1], stream);

  args.partial = reinterpret_cast<acc*>(packed);
  args.T = a.T, args.n = a.n;
  args.pairs = a.count;
  args.r = static_cast<int>(a.r);
  args.groups = plan.groups;
  args.pieces = plan.pieces;
  const int slot = fma_gradient_slot<scalar_t>(plan.groups);
  args.slots = std::min(kRing, std::max(2, (gpu::device().shared_per_block / 2 - 1024) / slot));
  gpu::allow_shared(householder_gradient_fma_kernel<scalar_t>, args.slots * slot);
  const dim3 grid(static_cast<unsigned>(ceil_div(a.n, plan.features)), static_cast<unsigned>(plan.splits));
  SIMT_LAUNCH((householder_gradient_fma_kernel<scalar_t>), grid, kThreads, args.slots * slot, stream, args);
  if (const char* error = gpu::launch_error()) return error;
  return reduce_gradient(a, args.partial, plan.splits, sizeof(acc) == 8, stream);
}

}  // namespace

int64_t householder_fma_scratch(const Householder& a) {
  switch (a.type) {
    case Scalar::kF32:
      return MapPlan<float>(a).bytes();
    case Scalar::kF64:
      return MapPlan<double>(a).bytes();
    case Scalar::kBF16:
      return MapPlan<__nv_bfloat16>(a).bytes();
    case Scalar::kF16:
      return MapPlan<__half>(a).bytes();
  }
  return 0;
}

const char* householder_fma(const Householder& a, void* scratch, CUstream_st* stream) {
  switch (a.type) {
    case Scalar::kF32:
      return launch_map<float>(a, scratch, stream);
    case Scalar::kF64:
      return launch_map<double>(a, scratch, stream);
    case Scalar::kBF16:
      return launch_map<__nv_bfloat16>(a, scratch, stream);
    case Scalar::kF16:
      return launch_map<__half>(a, scratch, stream);
  }
  return nullptr;
}

int64_t householder_gradient_fma_scratch(const HouseholderGradient& a) {
  switch (a.type) {
    case Scalar::kF32:
      return gradient_bytes<float>(a);
    case Scalar::kF64:
      return gradient_bytes<double>(a);
    case Scalar::kBF16:
      return gradient_bytes<__nv_bfloat16>(a);
    case Scalar::kF16:
      return gradient_bytes<__half>(a);
  }
  return 0;
}

const char* householder_gradient_fma(const HouseholderGradient& a, void* scratch, CUstream_st* stream) {
  switch (a.type) {
    case Scalar::kF32:
      return launch_gradient<float>(a, scratch, stream);
    case Scalar::kF64:
      return launch_gradient<double>(a, scratch, stream);
    case Scalar::kBF16:
      return launch_gradient<__nv_bfloat16>(a, scratch, stream);
    case Scalar::kF16:
      return launch_gradient<__half>(a, scratch, stream);
  }
  return nullptr;
}

}  // namespace frodkernels::cuda
