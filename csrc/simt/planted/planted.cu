// SPDX-License-Identifier: Apache-2.0
#include <map>
#include <stdexcept>

#include "simt/planted/faults.cuh"
#include "simt/planted/planted.h"
#include "simt/planted/probes.cuh"

namespace simt::planted {
namespace {

using Run = void (*)(const Call&);

template <int kBug>
void launch_fault(const std::string& name, const Call& c) {
  auto* x = c.pointers.empty() ? nullptr : c.pointer<float>(0);
  auto* y = c.pointers.size() < 2 ? x : c.pointer<float>(1);
  const int n = c.sizes.empty() ? 0 : c.size(0);
  if (name == "reverse_tiles") {
    SIMT_LAUNCH(reverse_tiles<kBug>, 1, kThreads, 0, nullptr, x, y, n);
  } else if (name == "reverse_copies") {
    SIMT_LAUNCH(reverse_copies<kBug>, 1, kThreads, 0, nullptr, x, y, n);
  } else if (name == "transpose") {
    const dim3 grid((c.size(1) + 15) / 16, (n + 15) / 16);
    SIMT_LAUNCH(transpose<kBug>, grid, dim3(16, 16), 0, nullptr, x, y, n, c.size(1));
  } else if (name == "histogram") {
    const size_t bytes = static_cast<size_t>(c.size(1)) * sizeof(int);
    SIMT_LAUNCH(histogram<kBug>, 4, kThreads, bytes, nullptr, c.pointer<int>(0), c.pointer<int>(1), n, c.size(1));
  } else if (name == "edge_tile") {
    SIMT_LAUNCH(edge_tile<kBug>, 1, kThreads, 0, nullptr, x, y, n);
  } else if (name == "copy") {
    SIMT_LAUNCH(copy<kBug>, n / kThreads + 1, kThreads, 0, nullptr, x, y, n);
  } else if (name == "read_fours") {
    SIMT_LAUNCH(read_fours<kBug>, 1, kThreads, 0, nullptr, x, y, n);
  } else if (name == "barriers") {
    SIMT_LAUNCH(barriers<kBug>, 1, kThreads, 0, nullptr, x);
  } else if (name == "warp_sums") {
    SIMT_LAUNCH(warp_sums<kBug>, 1, kThreads, 0, nullptr, x);
  } else if (name == "swap_neighbours") {
    SIMT_LAUNCH(swap_neighbours<kBug>, 1, kThreads, 0, nullptr, x, y);
  } else if (name == "multiply_ones") {
    SIMT_LAUNCH(multiply_ones<kBug>, 1, n, 0, nullptr, x);
  } else if (name == "copy_rows") {
    SIMT_LAUNCH(copy_rows<kBug>, 1, 32, 0, nullptr, x, y);
  } else if (name == "unsanitary") {
    SIMT_LAUNCH(unsanitary<kBug>, 1, kThreads, 0, nullptr, x, c.pointer<int>(1), n);
  } else {
    throw std::out_of_range("no kernel with planted bugs is called " + name);
  }
}

template <class V>
void launch_patterns(const std::string& name, const Call& c) {
  const int lanes = c.size(0);
  if (name == "load_global") {
    SIMT_LAUNCH((load_global<V>), 1, 32, 0, nullptr, c.pointer<char>(0), c.pointer<int>(1), c.pointer<V>(2), lanes);
  } else if (name == "load_shared") {
    const int bytes = c.size(2);
    SIMT_LAUNCH((load_shared<V>), 1, 32, static_cast<size_t>(bytes), nullptr, c.pointer<char>(0), c.pointer<int>(1),
                c.pointer<V>(2), lanes, bytes);
  } else {
    SIMT_LAUNCH((store_shared<V>), 1, 32, static_cast<size_t>(c.size(2)), nullptr, c.pointer<int>(0), c.pointer<V>(1),
                lanes);
  }
}

void patterns(const std::string& name, const Call& c) {
  switch (c.size(1)) {
    case 4:
      return launch_patterns<float>(name, c);
    case 8:
      return launch_patterns<float2>(name, c);
    case 16:
      return launch_patterns<float4>(name, c);
    default:
      throw std::out_of_range("patterns have 4, 8 or 16 bytes");
  }
}

template <bool kTransposed>
void ldmatrix(const Call& c) {
  const auto* x = c.pointer<const uint32_t>(0);
  auto* r = c.pointer<uint32_t>(1);
  if (c.size(0) == 1) SIMT_LAUNCH((ldmatrix_fragments<1, kTransposed>), 1, 32, 0, nullptr, x, r);
  if (c.size(0) == 2) SIMT_LAUNCH((ldmatrix_fragments<2, kTransposed>), 1, 32, 0, nullptr, x, r);
  if (c.size(0) == 4) SIMT_LAUNCH((ldmatrix_fragments<4, kTransposed>), 1, 32, 0, nullptr, x, r);
}

void copies(const Call& c) {
  const auto* x = c.pointer<const unsigned char>(0);
  auto* y = c.pointer<unsigned char>(2);
  if (c.size(0) == 4) SIMT_LAUNCH(copy_bytes<4>, 1, 32, 0, nullptr, x, c.pointer<int>(1), y);
  if (c.size(0) == 8) SIMT_LAUNCH(copy_bytes<8>, 1, 32, 0, nullptr, x, c.pointer<int>(1), y);
  if (c.size(0) == 16) SIMT_LAUNCH(copy_bytes<16>, 1, 32, 0, nullptr, x, c.pointer<int>(1), y);
}

template <class scalar_t>
void mma(const Call& c) {
  SIMT_LAUNCH(mma_fragments<scalar_t>, 1, 32, 0, nullptr, c.pointer<uint32_t>(0), c.pointer<uint32_t>(1),
              c.pointer<float>(2));
}

const std::map<std::string, Run> kProbes = {
    {"mma_half", mma<__half>},
    {"mma_bfloat16", mma<__nv_bfloat16>},
    {"ldmatrix", ldmatrix<false>},
    {"ldmatrix_trans", ldmatrix<true>},
    {"copy_bytes", copies},
    {"collectives",
     [](const Call& c) { SIMT_LAUNCH(collectives, 1, 32, 0, nullptr, c.pointer<int>(0), c.pointer<int>(1)); }},
    {"counting_barriers",
     [](const Call& c) {
       SIMT_LAUNCH(counting_barriers, 1, c.size(0), 0, nullptr, c.pointer<int>(0), c.pointer<int>(1));
     }},
    {"bit_functions",
     [](const Call& c) {
       SIMT_LAUNCH(bit_functions, 1, 1, 0, nullptr, c.pointer<uint32_t>(0), c.pointer<uint32_t>(1));
     }},
    {"paired_half",
     [](const Call& c) {
       SIMT_LAUNCH(paired_arithmetic<__half2>, 1, 1, 0, nullptr, c.pointer<__half2>(0), c.pointer<__half2>(1));
     }},
    {"paired_bfloat16",
     [](const Call& c) {
       SIMT_LAUNCH(paired_arithmetic<__nv_bfloat162>, 1, 1, 0, nullptr, c.pointer<__nv_bfloat162>(0),
                   c.pointer<__nv_bfloat162>(1));
     }},
    {"load_global", [](const Call& c) { patterns("load_global", c); }},
    {"load_shared", [](const Call& c) { patterns("load_shared", c); }},
    {"store_shared", [](const Call& c) { patterns("store_shared", c); }},
    {"load_rows",
     [](const Call& c) {
       SIMT_LAUNCH(load_rows, 1, 32, static_cast<size_t>(c.size(0)), nullptr, c.pointer<int>(0), c.pointer<uint32_t>(1),
                   c.size(0));
     }},
    {"copy_sixteens",
     [](const Call& c) {
       SIMT_LAUNCH(copy_sixteens, 1, 32, 0, nullptr, c.pointer<char>(0), c.pointer<float>(1), c.size(0));
     }},
    {"uneven_trips",
     [](const Call& c) {
       if (c.size(0)) {
         SIMT_LAUNCH(uneven_trips<true>, 1, 32, 0, nullptr, c.pointer<float>(0), c.pointer<float>(1));
       } else {
         SIMT_LAUNCH(uneven_trips<false>, 1, 32, 0, nullptr, c.pointer<float>(0), c.pointer<float>(1));
       }
     }},
    {"last_block",
     [](const Call& c) { SIMT_LAUNCH(last_block, c.size(0), 32, 0, nullptr, c.pointer<float>(0), c.pointer<int>(1)); }},
    // sizes: bytes of the launch, bytes to allow (0: do not ask)
    {"fill_shared",
     [](const Call& c) {
       if (c.size(1)) gpu::allow_shared(fill_shared, c.size(1));
       SIMT_LAUNCH(fill_shared, 1, 64, static_cast<size_t>(c.size(0)), nullptr, c.pointer<float>(0), c.size(0) / 4);
     }},
#if defined(SIMT_EMU)
    {"too_many_statics", [](const Call& c) { SIMT_LAUNCH(too_many_statics, 1, 64, 0, nullptr, c.pointer<float>(0)); }},
#endif
    // sizes: grid x, y, z, block x, y, z
    {"launch_limits",
     [](const Call& c) {
       const dim3 grid(c.size(0), c.size(1), c.size(2)), block(c.size(3), c.size(4), c.size(5));
       SIMT_LAUNCH(copy<0>, grid, block, 0, nullptr, nullptr, nullptr, 0);
     }},
};

}  // namespace

void run(const std::string& kernel, const Call& call) {
  const auto probe = kProbes.find(kernel);
  if (probe != kProbes.end()) return probe->second(call);
  switch (call.bug) {
    case 0:
      return launch_fault<0>(kernel, call);
    case 1:
      return launch_fault<1>(kernel, call);
    case 2:
      return launch_fault<2>(kernel, call);
    case 3:
      return launch_fault<3>(kernel, call);
    case 4:
      return launch_fault<4>(kernel, call);
    case 5:
      return launch_fault<5>(kernel, call);
    default:
      throw std::out_of_range("bugs are numbered 0 to 5");
  }
}

}  // namespace simt::planted
