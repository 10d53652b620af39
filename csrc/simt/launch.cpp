// SPDX-License-Identifier: Apache-2.0
//
// A launch: checks what the driver would check, spreads the blocks over OS threads, counts.
#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "simt/block.h"

namespace simt {

Config config;
Checker checker;

namespace {

std::mutex counts_mutex;
std::map<std::string, Counts> counts;
std::map<std::string, uint64_t> ever;  // launches since the module was loaded

struct Launch {
  std::string kernel;  // without the brackets that protect a comma
  const void* function;
  dim3 grid, size;
  size_t shared_bytes;
  Body body;
  const void* arguments;
  size_t argument_bytes;

  uint64_t every = 1;  // of its blocks run the first, and every so many

  uint64_t blocks() const { return uint64_t{grid.x} * grid.y * grid.z; }
  int threads() const { return static_cast<int>(size.x * size.y * size.z); }
};

void check(const Launch& l) {
  auto text = [](dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  const dim3 s = l.size, g = l.grid;
  const bool block_fits = s.x <= 1024 && s.y <= 1024 && s.z <= 64 && uint64_t{s.x} * s.y * s.z <= 1024;
  if (!block_fits || !s.x || !s.y || !s.z)
    throw std::runtime_error("invalid block " + text(s) + " [kernel " + l.kernel + "]");
  const bool grid_fits = g.x <= 2147483647u && g.y <= 65535 && g.z <= 65535;
  if (!grid_fits || !l.blocks()) throw std::runtime_error("invalid grid " + text(g) + " [kernel " + l.kernel + "]");
  check_shared_limit(l.function, l.shared_bytes, 0);
}

void prepare(Block& b, const Launch& l) {
  b.kernel = l.kernel.c_str();
  b.function = l.function;
  b.body = l.body;
  b.arguments = l.arguments;
  b.argument_bytes = l.argument_bytes;
  b.grid = l.grid;
  b.size = l.size;
  b.count = l.threads();
  b.random = config.seed * 0x9E3779B97F4A7C15ull | 1;
  b.counts = Counts{};
  while (b.threads.size() < static_cast<size_t>(b.count)) b.threads.emplace_back();
  b.warps.resize(static_cast<size_t>((b.count + kWarp - 1) / kWarp));
}

// The block that runs as the i-th. At random: steps of a fixed size around the grid, which meet each block once.
uint64_t nth_block(uint64_t i, uint64_t blocks) {
  if (config.order == Order::kForward) return i;
  if (config.order == Order::kReverse) return blocks - 1 - i;
  uint64_t step = (config.seed * 0x9E3779B97F4A7C15ull >> 33) % blocks;
  while (std::gcd(step, blocks) != 1) ++step;
  return static_cast<uint64_t>((static_cast<unsigned __int128>(step) * i + config.seed) % blocks);
}

// Blocks in the configured order until there are none, or one has failed.
void run_blocks(const Launch& l, std::atomic<uint64_t>& next, std::atomic<bool>& failed) {
  thread_local std::unique_ptr<Block> mine;
  if (!mine) mine = std::make_unique<Block>();
  Block& b = *mine;
  struct Running {
    explicit Running(Block& b) { block = &b; }
    ~Running() {
      if (block->alive > 0) {
        for (Thread& t : block->threads) t.fiber.forget();
        block->alive = 0;
      }
      block->current = nullptr;
      block->error = nullptr;
      block = nullptr;
    }
  } running(b);
  prepare(b, l);
  if (checker.launch_begin) checker.launch_begin(b);
  begin_shared(b, l.shared_bytes);
  const uint64_t blocks = (l.blocks() - 1) / l.every + 1;
  for (uint64_t i; !failed && (i = next++) < blocks;) {
    const uint64_t j = nth_block(i, blocks) * l.every;
    b.index = {static_cast<unsigned>(j % l.grid.x), static_cast<unsigned>(j / l.grid.x % l.grid.y),
               static_cast<unsigned>(j / (uint64_t{l.grid.x} * l.grid.y))};
    run_block(b);
  }
  const std::lock_guard<std::mutex> lock(counts_mutex);
  counts[l.kernel] += b.counts;
}

std::string without_brackets(std::string name) {
  if (name.size() > 1 && name.front() == '(' && name.back() == ')') return name.substr(1, name.size() - 2);
  return name;
}

// How many blocks there are to one that runs.
uint64_t sampled_every(const std::string& kernel) {
  const auto found = config.sample.find(kernel.substr(0, kernel.find('<')));
  return found == config.sample.end() ? 1 : found->second;
}

}  // namespace

void Counts::operator+=(const Counts& other) {
  launches += other.launches;
  blocks += other.blocks;
  threads += other.threads;
  barriers += other.barriers;
  collectives += other.collectives;
  mma += other.mma;
  ldmatrix += other.ldmatrix;
  cp_async += other.cp_async;
  grid += other.grid;
  block_threads = std::max(block_threads, other.block_threads);
  shared_bytes = std::max(shared_bytes, other.shared_bytes);
}

std::map<std::string, Counts> kernel_counts() {
  const std::lock_guard<std::mutex> lock(counts_mutex);
  return counts;
}

std::map<std::string, uint64_t> launches_ever() {
  const std::lock_guard<std::mutex> lock(counts_mutex);
  return ever;
}

void forget_counts() {
  const std::lock_guard<std::mutex> lock(counts_mutex);
  counts.clear();
}

void launch(const char* kernel, const void* function, dim3 grid, dim3 size, size_t shared_bytes, Body body,
            const void* arguments, size_t argument_bytes) {
  if (block) fail("a kernel cannot launch a kernel here");
  Launch l{without_brackets(kernel), function, grid, size, shared_bytes, body, arguments, argument_bytes};
  check(l);
  l.every = sampled_every(l.kernel);
  {
    const std::lock_guard<std::mutex> lock(counts_mutex);
    Counts launched;
    launched.launches = 1;
    launched.grid = l.blocks();
    launched.block_threads = static_cast<uint64_t>(l.threads());
    launched.shared_bytes = shared_bytes;
    counts[l.kernel] += launched;
    ++ever[l.kernel];
  }
  std::atomic<uint64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  auto work = [&] {
    try {
      run_blocks(l, next, failed);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  };
  const uint64_t threads = std::min<uint64_t>(static_cast<uint64_t>(std::max(1, config.threads)), l.blocks());
  if (threads == 1) {
    work();
  } else {
    std::vector<std::thread> crew;
    for (uint64_t i = 0; i < threads; ++i) crew.emplace_back(work);
    for (std::thread& t : crew) t.join();
  }
  if (checker.launch_end) checker.launch_end();
  if (!error) return;
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& e) {
    throw std::runtime_error(resolve(e.what()));
  }
}

void track(const void* p, size_t bytes, const char* name, bool writable, bool initialised) {
  if (checker.track && bytes) checker.track(p, bytes, name, writable, initialised);
}

}  // namespace simt
