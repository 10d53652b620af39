// SPDX-License-Identifier: Apache-2.0
//
// Instruction sets of the CPU kernels: which there are, and which one runs.
#pragma once
#include <cstdint>

namespace frodkernels::cpu {

enum class Isa { kPortable, kAvx2, kAvx512 };

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);
// The best level this CPU has, or the one FRODKERNELS_CPU_ISA names. Throws std::runtime_error when that is unknown
// or unsupported; read at every call, so a test can force each level.
Isa chosen_isa();

// The L2 cache of a core in bytes (1 MiB where the system does not say).
int64_t l2_bytes();

}  // namespace frodkernels::cpu
