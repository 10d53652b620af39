# SPDX-License-Identifier: Apache-2.0
"""`python -m frodkernels` answers what a bug report needs."""

import os
import re
import sys

import pytest
import torch

import frodkernels
from frodkernels.__main__ import VARIABLES


def doctor(command, cwd, *arguments, **variables):
    environment = {**os.environ, "FRODKERNELS_CPU_ISA": "", **variables}
    return command([sys.executable, "-m", "frodkernels", *arguments], cwd=cwd, env=environment).stdout


def test_report(command, tmp_path):
    said = doctor(command, tmp_path)
    assert said.startswith(f"frodkernels {frodkernels.__version__} in ")
    assert f"torch         {torch.__version__}" in said
    for heading in ("Versions", "Loaded libraries", "Variables", "Backends"):
        assert f"\n{heading}\n" in said
    assert re.search(r"native +\S+_C\.abi3\.so, .*(CUDA \d+\.\d+ kernels for|no CUDA kernels)", said)
    assert re.search(r"native kernels use \w+", said)
    assert "libtorch_cpu.so" in said
    for op, devices in frodkernels.backends().items():
        for device, row in devices.items():
            assert f"{op} on {device}: {row['chosen']}" in said
            assert set(row) == {"native", "triton", "reference", "chosen"}


def test_without_the_library(command, tmp_path):
    said = doctor(command, tmp_path, FRODKERNELS_DISABLE_NATIVE="1")
    assert "not loaded: FRODKERNELS_DISABLE_NATIVE=1" in said
    assert "sparse_core on cpu: reference" in said


def test_a_level_that_does_not_exist_is_said(command, tmp_path):
    assert "native kernels do not run: " in doctor(command, tmp_path, FRODKERNELS_CPU_ISA="mmx")


def test_a_misspelt_variable_is_pointed_out(command, tmp_path):
    assert re.search(r"FRODKERNELS_CPU_ISO +avx2 +UNKNOWN", doctor(command, tmp_path, FRODKERNELS_CPU_ISO="avx2"))


def test_build_line(command, tmp_path):
    assert re.fullmatch(r"native library: .+\n", doctor(command, tmp_path, "--build"))


def read_somewhere(root):
    """Every FRODKERNELS_ variable that our sources take from the environment."""
    patterns = {
        ".py": r"""["'](FRODKERNELS_\w+)["']""",
        ".cpp": r'getenv\("(FRODKERNELS_\w+)',
        ".cmake": r"ENV{(FRODKERNELS_\w+)",
    }
    folders = ("frodkernels", "triton_kernels", "csrc", "cmake", "build_backend")
    files = [path for folder in folders for path in (root / folder).rglob("*") if path.suffix in patterns]
    texts = [(path.suffix, path.read_text()) for path in files if path.name != "__main__.py"]
    return {name for suffix, text in texts for name in re.findall(patterns[suffix], text)}


def test_every_variable_is_explained(root):
    assert read_somewhere(root) == set(VARIABLES)


@pytest.mark.parametrize("name", VARIABLES)
def test_every_variable_is_documented(root, name):
    document = "docs/build.md" if VARIABLES[name].startswith("build:") else "README.md"
    assert f"| `{name}` |" in (root / document).read_text()
