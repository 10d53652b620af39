// SPDX-License-Identifier: Apache-2.0
//
// The checker's counts: which source lines make memory requests, and what they cost.
//
// A request is what the lanes of a warp ask for at one place at one time. The executor runs lanes one after another, so
// the k-th access of each lane at a place, counted from the last point where the warp's lanes stood together, is taken
// for one request. It is exact where lanes run the same trips of a loop between such points.
#pragma once
#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <unordered_map>
#include <vector>

#include "simt/block.h"
#include "simt/shadow.h"

namespace simt {

struct Request {
  uint32_t lanes = 0;
  uintptr_t address[kWarp];
};

// What a warp has asked for at a place since its lanes last stood together.
struct OpenRequests {
  std::array<uint32_t, kWarp> made{};  // by each lane
  std::vector<Request> requests;
};

struct SiteCounts {
  uint32_t number = 0;
  const void* pc = nullptr;
  uint32_t kernel = 0;
  bool shared = false, write = false;
  int bytes = 0;
  uint64_t requests = 0, lanes = 0, sectors = 0, sectors_least = 0, wavefronts = 0, wavefronts_least = 0;
  Buffer* buffer = nullptr;  // the one it touched last, while `buffers_version` holds
  uint64_t buffers_version = 0;
  std::array<std::unique_ptr<OpenRequests>, 1024 / kWarp> open;
};

class Sites {
 public:
  void begin_kernel(const char* name);
  SiteCounts& at(const void* pc, bool shared, bool write, int bytes);
  const SiteCounts& by_number(uint32_t number) const { return sites_[number]; }
  void count(SiteCounts& site, const Thread& t, uintptr_t address);
  void close(int warp);  // -1: of all warps
  std::vector<Site> summary() const;
  void clear();

 private:
  void finish(SiteCounts& site, const Request& r);

  struct Slot {
    const void* pc = nullptr;
    uint64_t rest = 0;
    SiteCounts* site = nullptr;
  };
  static constexpr size_t kSlots = 4096;
  std::array<Slot, kSlots> slots_{};
  struct Hash {
    size_t operator()(const std::pair<const void*, uint64_t>& k) const {
      return std::hash<const void*>()(k.first) * 31 + k.second;
    }
  };
  std::unordered_map<std::pair<const void*, uint64_t>, SiteCounts*, Hash> by_key_;
  std::deque<SiteCounts> sites_;
  std::vector<std::string> kernels_;
  uint32_t kernel_ = 0;
  std::array<std::vector<SiteCounts*>, 1024 / kWarp> open_;  // sites with open requests, by warp
};

}  // namespace simt
