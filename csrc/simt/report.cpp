// SPDX-License-Identifier: Apache-2.0
//
// Reports, and program counters turned into source lines (by addr2line of the binutils, once for each).
#include <dlfcn.h>

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "simt/block.h"

namespace simt {
namespace {

struct Report {
  std::string text;
  uint64_t times = 0;
};
std::mutex mutex;
std::map<std::string, Report> reports;

using Line = std::pair<std::string, int>;
std::unordered_map<const void*, Line> lines;

constexpr char kMark[] = "@pc{";

// The executor's own headers and the toolkit's are inlined into kernels: the first frame outside them is the kernel's.
bool kernel_source(const std::string& path) {
  const bool project = path.find("csrc/") != std::string::npos;
  const bool executor = path.find("csrc/simt/") != std::string::npos;
  return project && (!executor || path.find("csrc/simt/planted/") != std::string::npos);
}

std::string base_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

// "path:line" or "path:line (discriminator 3)"
Line parse(const std::string& text) {
  const size_t colon = text.rfind(':', text.find(" ("));
  if (colon == std::string::npos || text.rfind("??", 0) == 0) return {"", 0};
  return {text.substr(0, colon), std::atoi(text.c_str() + colon + 1)};
}

void look_up(const std::vector<const void*>& pcs) {
  Dl_info info{};
  if (pcs.empty() || !dladdr(pcs.front(), &info) || !info.dli_fname) return;
  const auto base = reinterpret_cast<uintptr_t>(info.dli_fbase);
  // -a prints each address before its frames, innermost first. A return address is one past the call.
  std::string command = "addr2line -a -i -e '" + std::string(info.dli_fname) + "'";
  std::unordered_map<uintptr_t, const void*> by_offset;
  for (const void* pc : pcs) {
    const uintptr_t offset = reinterpret_cast<uintptr_t>(pc) - base - 1;
    by_offset[offset] = pc;
    char text[32];
    std::snprintf(text, sizeof text, " 0x%" PRIxPTR, offset);
    command += text;
  }
  FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r");
  if (!pipe) return;
  char text[4096];
  const void* pc = nullptr;
  while (std::fgets(text, sizeof text, pipe)) {
    text[std::strcspn(text, "\n")] = 0;
    if (std::strncmp(text, "0x", 2) == 0) {
      pc = by_offset[static_cast<uintptr_t>(std::strtoull(text, nullptr, 16))];
      continue;
    }
    const Line line = parse(text);
    if (!pc || line.first.empty()) continue;
    const auto found = lines.find(pc);
    if (found == lines.end() || (!kernel_source(found->second.first) && kernel_source(line.first))) lines[pc] = line;
  }
  pclose(pipe);
}

}  // namespace

void report(const std::string& key, const std::string& text) {
  const std::lock_guard<std::mutex> lock(mutex);
  Report& r = reports[key];
  if (r.times++ == 0) r.text = text;
}

std::vector<Line> source_lines(const std::vector<const void*>& pcs) {
  const std::lock_guard<std::mutex> lock(mutex);
  std::vector<const void*> unknown;
  for (const void* pc : pcs) {
    if (!lines.count(pc)) unknown.push_back(pc);
  }
  constexpr size_t kBatch = 1000;  // a command line has an end
  for (size_t i = 0; i < unknown.size(); i += kBatch) {
    look_up({unknown.begin() + static_cast<std::ptrdiff_t>(i),
             unknown.begin() + static_cast<std::ptrdiff_t>(std::min(unknown.size(), i + kBatch))});
  }
  std::vector<Line> found;
  for (const void* pc : pcs) {
    const auto line = lines.find(pc);
    found.push_back(line == lines.end() ? Line{"", 0} : Line{base_name(line->second.first), line->second.second});
  }
  return found;
}

std::string pc_text(const void* pc) {
  char text[40];
  std::snprintf(text, sizeof text, "%s%" PRIxPTR "}", kMark, reinterpret_cast<uintptr_t>(pc));
  return text;
}

std::string resolve(const std::string& text) {
  std::vector<const void*> pcs;
  const size_t skip = std::strlen(kMark);
  for (size_t at = 0; (at = text.find(kMark, at)) != std::string::npos; at += skip) {
    pcs.push_back(reinterpret_cast<const void*>(std::strtoull(text.c_str() + at + skip, nullptr, 16)));
  }
  const std::vector<Line> found = source_lines(pcs);
  std::string out;
  size_t from = 0;
  for (const Line& line : found) {
    const size_t at = text.find(kMark, from), end = text.find('}', at);
    const bool known = !line.first.empty();
    out += text.substr(from, at - from) + (known ? line.first + ":" + std::to_string(line.second) : "an unknown line");
    from = end + 1;
  }
  return out + text.substr(from);
}

std::vector<std::string> take_reports() {
  std::map<std::string, Report> taken;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    taken.swap(reports);
  }
  std::string all;  // resolved together: one run of addr2line
  for (auto& [key, r] : taken) all += r.text + (r.times > 1 ? " (" + std::to_string(r.times) + " times)\n" : "\n");
  all = resolve(all);
  std::vector<std::string> texts;
  for (size_t from = 0, end; (end = all.find('\n', from)) != std::string::npos; from = end + 1) {
    texts.push_back(all.substr(from, end - from));
  }
  return texts;
}

std::string place_text(Place place) {
  return base_name(place.file ? place.file : "?") + ":" + std::to_string(place.line);
}

}  // namespace simt
