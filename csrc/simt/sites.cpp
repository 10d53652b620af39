// SPDX-License-Identifier: Apache-2.0
#include "simt/sites.h"

#include <algorithm>
#include <tuple>

namespace simt {
namespace {

constexpr uintptr_t kSector = 32;  // bytes, of global memory
constexpr int kBanks = 32;         // of 4 bytes, of shared memory

// Sorts and drops repetitions; addresses mostly come in order, so look first.
int unique(uintptr_t* values, int count) {
  if (!std::is_sorted(values, values + count)) std::sort(values, values + count);
  return static_cast<int>(std::unique(values, values + count) - values);
}

void count_sectors(SiteCounts& site, const Request& r) {
  uintptr_t addresses[kWarp], sectors[2 * kWarp];
  int count = 0, touched = 0;
  for (int i = 0; i < kWarp; ++i) {
    if (!(r.lanes >> i & 1)) continue;
    addresses[count++] = r.address[i];
    sectors[touched++] = r.address[i] / kSector;
    sectors[touched++] = (r.address[i] + static_cast<uintptr_t>(site.bytes) - 1) / kSector;
  }
  site.sectors += static_cast<uint64_t>(unique(sectors, touched));
  // Lanes of one request have one size and are aligned to it: different addresses are disjoint bytes.
  const uint64_t bytes = static_cast<uint64_t>(unique(addresses, count)) * static_cast<uint64_t>(site.bytes);
  site.sectors_least += (bytes + kSector - 1) / kSector;
}

// A wavefront serves 128 bytes, one word of each bank; lanes that name the same word share it. Accesses of 8 bytes are
// served by half warps, of 16 bytes by quarters (ldmatrix: by matrices of 8 rows), each alone.
void count_wavefronts(SiteCounts& site, const Request& r) {
  const int group = site.bytes >= 16 ? 8 : site.bytes == 8 ? 16 : 32;
  const int words_each = std::max(1, site.bytes / 4);
  for (int first = 0; first < kWarp; first += group) {
    uintptr_t words[kWarp];
    int count = 0;
    for (int i = first; i < first + group; ++i) {
      if (!(r.lanes >> i & 1)) continue;
      for (int w = 0; w < words_each; ++w) words[count++] = r.address[i] / 4 + static_cast<uintptr_t>(w);
    }
    if (!count) continue;
    count = unique(words, count);
    int in_bank[kBanks] = {}, most = 0;
    for (int i = 0; i < count; ++i) most = std::max(most, ++in_bank[words[i] % kBanks]);
    site.wavefronts += static_cast<uint64_t>(most);
    site.wavefronts_least += 1;
  }
}

}  // namespace

void Sites::begin_kernel(const char* name) {
  const auto found = std::find(kernels_.begin(), kernels_.end(), name);
  kernel_ = static_cast<uint32_t>(found - kernels_.begin());
  if (found == kernels_.end()) kernels_.push_back(name);
}

SiteCounts& Sites::look_up(const void* pc, uint64_t rest, Slot& slot) {
  SiteCounts*& site = by_key_[{pc, rest}];
  if (!site) {
    site = &sites_.emplace_back();
    site->number = static_cast<uint32_t>(sites_.size() - 1);
    site->pc = pc;
    site->kernel = kernel_;
    site->shared = rest >> 1 & 1;
    site->write = rest & 1;
    site->bytes = static_cast<int>(static_cast<uint32_t>(rest) >> 2);
  }
  slot = {pc, rest, site};
  return *site;
}

OpenRequests* Sites::begin_requests(SiteCounts& site, int warp) {
  auto& open = site.open[static_cast<size_t>(warp)];
  if (!open) open = std::make_unique<OpenRequests>();
  open_[static_cast<size_t>(warp)].push_back(&site);
  return open.get();
}

void Sites::finish(SiteCounts& site, const Request& r) {
  ++site.requests;
  site.lanes += static_cast<uint64_t>(__builtin_popcount(r.lanes));
  if (site.shared) {
    count_wavefronts(site, r);
  } else {
    count_sectors(site, r);
  }
}

void Sites::close(int warp) {
  const size_t from = warp < 0 ? 0 : static_cast<size_t>(warp), to = warp < 0 ? open_.size() : from + 1;
  for (size_t w = from; w < to; ++w) {
    for (SiteCounts* site : open_[w]) {
      OpenRequests& open = *site->open[w];
      for (const Request& r : open.requests) finish(*site, r);
      open.requests.clear();
      open.made.fill(0);
    }
    open_[w].clear();
  }
}

std::vector<Site> Sites::summary() const {
  std::vector<const void*> pcs;
  for (const SiteCounts& s : sites_) pcs.push_back(s.pc);
  const auto lines = source_lines(pcs);
  // A line may have been compiled to several instructions (unrolled loops): they are one site to the reader.
  using Key = std::tuple<uint32_t, std::string, int, bool, bool, int>;
  std::map<Key, Site> merged;
  for (size_t i = 0; i < sites_.size(); ++i) {
    const SiteCounts& s = sites_[i];
    if (!s.requests) continue;
    Site& m = merged[Key{s.kernel, lines[i].first, lines[i].second, s.shared, s.write, s.bytes}];
    m.kernel = kernels_[s.kernel];
    m.file = lines[i].first;
    m.line = lines[i].second;
    m.bytes = s.bytes;
    m.shared = s.shared;
    m.write = s.write;
    m.requests += s.requests;
    m.lanes += s.lanes;
    m.sectors += s.sectors;
    m.sectors_least += s.sectors_least;
    m.wavefronts += s.wavefronts;
    m.wavefronts_least += s.wavefronts_least;
  }
  std::vector<Site> all;
  for (auto& [key, site] : merged) all.push_back(std::move(site));
  return all;
}

void Sites::clear() {
  slots_.fill({});
  by_key_.clear();
  sites_.clear();
  kernels_.clear();
  for (auto& warp : open_) warp.clear();
}

}  // namespace simt
