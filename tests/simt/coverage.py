# SPDX-License-Identifier: Apache-2.0
"""Which kernels the tree has, and which of them tests run."""

from __future__ import annotations

import re
from pathlib import Path

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
BOUNDS = r"__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)\s*"
KERNEL = re.compile(rf"__global__\s+(?:(?:inline|static|{BOUNDS})\s*)*void\s+(?:{BOUNDS})?(\w+)\s*\(")


def kernels_in(source: str) -> set[str]:
    """The names of all ``__global__`` functions. Raises ValueError where one cannot be read."""
    text = COMMENT.sub("", source)
    names = KERNEL.findall(text)
    if len(names) != text.count("__global__"):
        raise ValueError(f"{text.count('__global__')} times __global__, but only {names} could be read")
    return set(names)


def kernels_of(folder: Path) -> dict[str, str]:
    """Every kernel in a folder's CUDA sources: name -> file."""
    files = [path for pattern in ("*.cuh", "*.cu") for path in sorted(folder.glob(pattern))]
    return {name: path.name for path in files for name in kernels_in(path.read_text())}


def base_name(launched: str) -> str:
    """`ns::kernel<float, 4>` -> `kernel`: how a launch is written -> how the kernel is declared."""
    return launched.split("<", 1)[0].strip().split("::")[-1]


def launched_between(before: dict[str, int], after: dict[str, int]) -> set[str]:
    return {base_name(name) for name, count in after.items() if count > before.get(name, 0)}


def uncovered(kernels: dict[str, str], tests: list[tuple[set[str], set[str], bool]]) -> dict[str, str]:
    """Kernels without a test that checks them. A test is (kernels it is marked for, its fixtures, is it skipped)."""
    checked = {name for marked, fixtures, skipped in tests if "checker" in fixtures and not skipped for name in marked}
    return {name: file for name, file in kernels.items() if name not in checked}
