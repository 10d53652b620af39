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
  SiteCounts& at(const void* pc, bool shared, bool write, int bytes) {
    const uint64_t rest = uint64_t{kernel_} << 32 | static_cast<uint64_t>(bytes) << 2 | unsigned{shared} << 1 | write;
    const auto address = reinterpret_cast<uintptr_t>(pc);
    Slot& slot = slots_[(address ^ address >> 12 ^ rest) % kSlots];
    if (slot.pc == pc && slot.rest == rest) return *slot.site;
    return look_up(pc, rest, slot);
  }
  const SiteCounts& by_number(uint32_t number) const { return sites_[number]; }
  void count(SiteCounts& site, const Thread& t, uintptr_t address) {
    OpenRequests* open = site.open[static_cast<size_t>(t.warp->number)].get();
    if (!open || open->requests.empty()) open = begin_requests(site, t.warp->number);
    const size_t lane = static_cast<size_t>(t.lane);
    const uint32_t k = open->made[lane]++;
    if (k >= open->requests.size()) open->requests.emplace_back();
    Request& r = open->requests[k];
    r.lanes |= 1u << lane;
    r.address[lane] = address;
  }
  void close(int warp);  // -1: of all warps
  std::vector<Site> summary() const;
  void clear();

 private:
  struct Slot {  // of a direct-mapped cache in front of by_key_
    const void* pc = nullptr;
    uint64_t rest = 0;
    SiteCounts* site = nullptr;
  };
  SiteCounts& look_up(const void* pc, uint64_t rest, Slot& slot);
  OpenRequests* begin_requests(SiteCounts& site, int warp);
  void finish(SiteCounts& site, const Request& r);

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
