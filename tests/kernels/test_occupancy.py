# SPDX-License-Identifier: Apache-2.0
"""The occupancy rule against NVIDIA's own header, compiled here with the limits of each architecture."""

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import triton

from bench.kernels.architectures import LIMITS, occupancy

HERE = Path(__file__).parent
FACTORS = {1: "warps", 2: "registers", 4: "shared", 8: "blocks"}


@pytest.fixture(scope="module")
def nvidia(tmp_path_factory):
    """[(major, minor, ...)] -> [(blocks, limiters)], by cuda_occupancy.h, which Triton's package has."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} was not found")
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    program = tmp_path_factory.mktemp("occupancy") / "occupancy"
    subprocess.run(
        [compiler, "-O1", "-w", "-isystem", headers, HERE / "occupancy.cpp", "-o", program], check=True, text=True
    )

    def ask(lines):
        text = "\n".join(" ".join(map(str, line)) for line in lines)
        done = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
        answers = [line.split() for line in done.stdout.splitlines()]
        assert len(answers) == len(lines) and all(a[0] != "error" for a in answers), done.stdout[:200]
        return [(int(b), {name for bit, name in FACTORS.items() if int(mask) & bit}) for b, mask in answers]

    return ask


@pytest.mark.parametrize("arch", LIMITS)
def test_rule(nvidia, arch):
    limits = LIMITS[arch]
    registers = (16, 24, 32, 40, 64, 80, 96, 120, 128, 168, 255)
    shared = (0, 100, 1024, 12288, 39424, 49152, 60000, 99328, limits.shared_per_block)
    threads = (32, 64, 96, 128, 256, 384, 512, 1024)
    cases = [c for c in itertools.product(registers, shared, threads) if c[0] * c[2] <= 65536]
    lines = [
        (arch // 10, arch % 10, limits.threads, limits.shared, limits.shared_per_block, r, 0, s, t) for r, s, t in cases
    ]
    for (r, s, t), (blocks, why) in zip(cases, nvidia(lines), strict=True):
        got = occupancy(arch, r, s, t)
        assert got.blocks == blocks, (arch, r, s, t, got, blocks, why)
        assert got.share == blocks * -(-t // 32) * 32 / limits.threads
        if blocks:
            assert set(got.limiter.split("+")) == why, (arch, r, s, t, got)


def test_what_does_not_fit():
    assert occupancy(86, 32, 101377, 128).blocks == 0
    assert occupancy(80, 256, 0, 32).blocks == 0
    assert occupancy(80, 255, 0, 512) == (0, 0.0, "registers")
