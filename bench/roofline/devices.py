# SPDX-License-Identifier: Apache-2.0
"""Devices of the model: rates, and where each number comes from.

Datasheet: SMs, boost clock, size of L2, peak of HBM and of the tensor cores (dense, fp32 accumulation). Assumed, since
no device was at hand: what share of them kernels reach, and the bandwidth between L2 and the SMs. Shared memory moves
128 bytes a clock in every SM on all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.kernels.architectures import LIMITS
from bench.kernels.counts import Target


@dataclass(frozen=True)
class Device:
    """Rates in units a second unless they say otherwise."""

    name: str
    arch: int
    sms: int
    clock: float  # Hz, boost
    hbm_peak: float  # bytes
    hbm_share: float  # of it, that streaming kernels reach
    l2: float  # bytes from L2 to all SMs
    gemm_peak: float  # FLOP/s, bf16, dense, fp32 accumulation
    gemm_share: float  # of it, that a large GEMM of the vendor's library reaches
    mma_flops: float  # FLOP per clock and SM of mma.sync
    fma_lanes: int  # fp32 multiply-adds per clock and SM
    cache: float = 0.0  # bytes of L2

    @property
    def target(self) -> Target:
        return Target(self.sms, LIMITS[self.arch].shared_per_block, self.arch)

    @property
    def hbm(self) -> float:
        return self.hbm_peak * self.hbm_share

    @property
    def gemm(self) -> float:
        return self.gemm_peak * self.gemm_share

    @property
    def shared(self) -> float:
        """Bytes a second of all shared memories."""
        return 128 * self.sms * self.clock


MIB = 2.0**20

DEVICES = (
    # A100: mma.sync runs at the datasheet's peak.
    Device("A100", 80, 108, 1.410e9, 2.039e12, 0.834, 4.5e12, 312e12, 0.775, 2048, 64, 40 * MIB),
    # H100 SXM: the peak is wgmma's; mma.sync reaches about 62 % of it. 1.755 GHz under load, not the 1.98 GHz maximum.
    Device("H100", 90, 132, 1.755e9, 3.35e12, 0.89, 5.7e12, 989.4e12, 0.69, 0.62 * 4096, 128, 50 * MIB),
    # Ada: L2 assumed at 16 bytes a clock and SM. GeForce halves tensor cores with fp32 accumulation.
    Device("L40S", 89, 142, 2.520e9, 0.864e12, 0.89, 5.7e12, 362e12, 0.75, 1024, 128, 96 * MIB),
    Device("RTX 4090", 89, 128, 2.520e9, 1.008e12, 0.89, 5.1e12, 165.2e12, 0.90, 512, 128, 72 * MIB),
    # B200: the peak is tcgen05's; mma.sync assumed at Ampere's rate a clock, L2 at Hopper's.
    Device("B200", 100, 148, 1.850e9, 8.0e12, 0.875, 6.7e12, 2250e12, 0.70, 2048, 128, 126 * MIB),
)
BY_NAME = {device.name: device for device in DEVICES}

LAUNCH_GAP = 2e-6  # seconds from one kernel's end to the next one's work
LATENCY = 0.8e-6  # seconds of a load that nothing hides: at the start of a kernel, L2 or HBM
ALU_LANES = 64  # integer and logic operations a clock and SM, on all of them
SCHEDULERS = 4  # warp instructions a clock and SM
MMA_FLOP = 2 * 16 * 8 * 16  # of one mma.m16n8k16
SECTOR = 32
