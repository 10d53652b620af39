// SPDX-License-Identifier: Apache-2.0
//
// The Python face of the executor. One object file serves all modules: each is imported by its own name.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "simt/block.h"
#include "simt/planted/planted.h"

namespace py = pybind11;

namespace {

simt::Order order_of(const std::string& name) {
  if (name == "forward") return simt::Order::kForward;
  if (name == "reverse") return simt::Order::kReverse;
  if (name == "random") return simt::Order::kRandom;
  throw py::value_error("order must be forward, reverse or random, got " + name);
}

void configure(const std::string& order, uint64_t seed, int threads, bool lazy_copies, int yield_permille, int sms,
               int shared_per_block, int capability, const std::map<std::string, uint64_t>& sample) {
  if (threads < 1) throw py::value_error("threads must be at least 1");
  if (threads > 1 && simt::checker.access)
    throw py::value_error("the checker runs on one OS thread: threads must be 1");
  if (yield_permille < 0 || yield_permille > 1000) throw py::value_error("yield_permille must be between 0 and 1000");
  for (const auto& [kernel, every] : sample)
    if (every < 1) throw py::value_error("sample[" + kernel + "] must be at least 1");
  simt::config = {order_of(order),  seed,       threads, lazy_copies, yield_permille, sms,
                  shared_per_block, capability, sample};
}

void reset() {
  if (simt::checker.reset) simt::checker.reset();
  simt::take_reports();
  simt::forget_counts();
}

void track(uintptr_t pointer, size_t bytes, const std::string& name, bool writable, bool initialised) {
  simt::track(reinterpret_cast<const void*>(pointer), bytes, name.c_str(), writable, initialised);
}

void run_planted(const std::string& kernel, const std::vector<uintptr_t>& pointers, const std::vector<int64_t>& sizes,
                 int bug) {
  simt::planted::Call call{bug, {}, sizes};
  for (uintptr_t p : pointers) call.pointers.push_back(reinterpret_cast<void*>(p));
  simt::planted::run(kernel, call);
}

py::list sites() {
  py::list all;
  if (!simt::checker.sites) return all;
  for (const simt::Site& s : simt::checker.sites()) {
    py::dict d;
    d["kernel"] = s.kernel;
    d["file"] = s.file;
    d["line"] = s.line;
    d["space"] = s.shared ? "shared" : "global";
    d["write"] = s.write;
    d["bytes"] = s.bytes;
    d["requests"] = s.requests;
    d["lanes"] = s.lanes;
    d["sectors"] = s.sectors;
    d["sectors_least"] = s.sectors_least;
    d["wavefronts"] = s.wavefronts;
    d["wavefronts_least"] = s.wavefronts_least;
    all.append(d);
  }
  return all;
}

py::dict as_dict(const simt::Counts& c) {
  py::dict d;
  d["launches"] = c.launches;
  d["blocks"] = c.blocks;
  d["threads"] = c.threads;
  d["barriers"] = c.barriers;
  d["collectives"] = c.collectives;
  d["mma"] = c.mma;
  d["ldmatrix"] = c.ldmatrix;
  d["cp_async"] = c.cp_async;
  d["grid"] = c.grid;
  d["block_threads"] = c.block_threads;
  d["shared_bytes"] = c.shared_bytes;
  return d;
}

py::dict launches() {
  py::dict d;
  for (const auto& [kernel, c] : simt::kernel_counts()) d[py::str(kernel)] = c.launches;
  return d;
}

py::dict kernels() {
  py::dict d;
  for (const auto& [kernel, c] : simt::kernel_counts()) d[py::str(kernel)] = as_dict(c);
  return d;
}

py::dict stats() {
  simt::Counts all;
  for (const auto& [kernel, c] : simt::kernel_counts()) all += c;
  return as_dict(all);
}

void bind(py::module_& m) {
  const simt::Config standard;
  m.attr("checked") = simt::checker.access != nullptr;
  m.def("configure", &configure,
        "How kernels run, and the device they see; what is not named goes back to its default. `sample` maps kernels "
        "(names without template arguments) to k: only the first and every k-th block of their launches run. What such "
        "a launch leaves behind is incomplete: it is for counting, where grid / blocks scales the counts of what ran.",
        py::kw_only(), py::arg("order") = "forward", py::arg("seed") = standard.seed,
        py::arg("threads") = standard.threads, py::arg("lazy_copies") = standard.lazy_copies,
        py::arg("yield_permille") = standard.yield_permille, py::arg("sms") = standard.sms,
        py::arg("shared_per_block") = standard.shared_per_block, py::arg("capability") = standard.capability,
        py::arg("sample") = standard.sample);
  m.def("reset", &reset, "Untracks all buffers and drops reports and counters.");
  m.def("track", &track, "Tells the checker of a buffer.", py::arg("ptr"), py::arg("bytes"), py::arg("name"),
        py::arg("writable"), py::arg("initialised"));
  m.def("reports", &simt::take_reports, "The faults so far that stopped no kernel; cleared.");
  m.def("sites", &sites, "Memory requests by source line, since reset(). Checker only.");
  m.def("launches", &launches, "Launches by kernel, since reset().");
  m.def("launches_ever", &simt::launches_ever, "Launches by kernel, since the import.");
  m.def("kernels", &kernels, "All counters by kernel, since reset().");
  m.def("planted", &run_planted, "Runs a kernel of csrc/simt/planted.", py::arg("kernel"), py::arg("pointers"),
        py::arg("sizes"), py::arg("bug") = 0);
  m.def("stats", &stats, "The sum of all counters, since reset().");
}

}  // namespace

PYBIND11_MODULE(_simt, m) { bind(m); }
PYBIND11_MODULE(_simt_check, m) { bind(m); }
PYBIND11_MODULE(_simt_asan, m) { bind(m); }
