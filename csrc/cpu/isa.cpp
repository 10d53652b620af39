// SPDX-License-Identifier: Apache-2.0
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <unistd.h>
#endif

#include "householder.h"
#include "isa.h"
#include "reflections.h"
#include "sampled.h"
#include "sparse_core.h"

namespace frodkernels::cpu {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
  }
  return "unknown";
}

bool isa_supported(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return true;
    case Isa::kAvx2:
#if defined(FRODKERNELS_HAVE_AVX2)
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
      return false;
#endif
    case Isa::kAvx512:
#if defined(FRODKERNELS_HAVE_AVX512)
      return isa_supported(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
      return false;
#endif
  }
  return false;
}

static Isa best_isa() {
  for (Isa isa : {Isa::kAvx512, Isa::kAvx2}) {
    if (isa_supported(isa)) return isa;
  }
  return Isa::kPortable;
}

Isa chosen_isa() {
  static const Isa best = best_isa();
  const char* wanted = std::getenv("FRODKERNELS_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (std::string(wanted) != isa_name(isa)) continue;
    if (isa_supported(isa)) return isa;
    throw std::runtime_error(std::string("FRODKERNELS_CPU_ISA=") + wanted + " is not supported by this CPU or build");
  }
  throw std::runtime_error(std::string("FRODKERNELS_CPU_ISA must be portable, avx2 or avx512, got ") + wanted);
}

// The entries of a table of kernels, by level. A level that was not built is never chosen.
#if defined(FRODKERNELS_HAVE_AVX2) && defined(FRODKERNELS_HAVE_AVX512)
#define FRODKERNELS_LEVELS(table) {&portable::table, &avx2::table, &avx512::table}
#else
#define FRODKERNELS_LEVELS(table) {&portable::table}
#endif

static bool multiplies_bf16(Isa isa) {
#if defined(FRODKERNELS_HAVE_AVX512BF16)
  return isa == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

const Kernels& kernels(Isa isa, Scalar type) {
  static constexpr const Kernels* levels[] = FRODKERNELS_LEVELS(kKernels);
#if defined(FRODKERNELS_HAVE_AVX512BF16)
  if (type == Scalar::kBF16 && multiplies_bf16(isa)) return avx512bf16::kKernels;
#endif
  return *levels[int(isa)];
}

const HouseholderKernels& householder_kernels(Isa isa) {
  static constexpr const HouseholderKernels* levels[] = FRODKERNELS_LEVELS(kHouseholderKernels);
  return *levels[int(isa)];
}

const ReflectionKernels& reflection_kernels(Isa isa) {
  static constexpr const ReflectionKernels* levels[] = FRODKERNELS_LEVELS(kReflectionKernels);
  return *levels[int(isa)];
}

const SampledKernels& sampled_kernels(Isa isa) {
  static constexpr const SampledKernels* levels[] = FRODKERNELS_LEVELS(kSampledKernels);
  return *levels[int(isa)];
}

const SampledKernels* sampled_bf16_kernels(Isa isa) {
#if defined(FRODKERNELS_HAVE_AVX512BF16)
  if (multiplies_bf16(isa)) return &avx512bf16::kSampledKernels;
#endif
  return nullptr;
}

const HouseholderKernels* householder_bf16_kernels(Isa isa) {
#if defined(FRODKERNELS_HAVE_AVX512BF16)
  if (multiplies_bf16(isa)) return &avx512bf16::kHouseholderKernels;
#endif
  return nullptr;
}

int64_t l2_bytes() {
#if defined(__linux__) && defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (size > 0) return size;
#endif
  return int64_t(1) << 20;
}

}  // namespace frodkernels::cpu
