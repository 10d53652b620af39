# SPDX-License-Identifier: Apache-2.0
"""The other half of gpu.cuh and ptx.cuh: nvcc makes of each wrapper the instruction that it stands for."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.simt.executor import ROOT


@pytest.fixture(scope="module")
def nvcc():
    home = os.environ.get("CUDA_HOME")
    found = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    if not found:
        pytest.skip("no CUDA toolkit: CUDA_HOME is not set and there is no nvcc on PATH")
    return found


@pytest.fixture(scope="module")
def ptx(nvcc, tmp_path_factory):
    """The planted kernels use every wrapper there is: in PTX, which ptxas has accepted for sm_80."""
    folder = tmp_path_factory.mktemp("nvcc")
    source = ROOT / "csrc" / "simt" / "planted" / "planted.cu"
    text, binary = folder / "planted.ptx", folder / "planted.cubin"
    common = [nvcc, "-std=c++17", "-arch=sm_80"]
    for command in (
        [*common, f"-I{ROOT / 'csrc'}", "-Werror=all-warnings", "-ptx", str(source), "-o", str(text)],
        [*common, "-cubin", str(text), "-o", str(binary)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return text.read_text()


@pytest.mark.parametrize(
    "instruction",
    [
        r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32",
        r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32",
        *[rf"ldmatrix\.sync\.aligned\.m8n8\.x{n}{t}\.shared\.b16" for n in (1, 2, 4) for t in ("", r"\.trans")],
        r"cp\.async\.ca\.shared\.global \[%r\d+\], \[%rd\d+\], 4, %r",
        r"cp\.async\.ca\.shared\.global \[%r\d+\], \[%rd\d+\], 8, %r",
        r"cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\], 16, %r",
        r"cp\.async\.commit_group",
        r"cp\.async\.wait_group 0",
        r"cp\.async\.wait_group 1",
        r"ld\.(global|param)?.*v4\.f32",
        r"st\..*v2\.f32",
    ],
)
def test_wrappers_become_their_instruction(ptx, instruction):
    assert re.search(instruction, ptx)
