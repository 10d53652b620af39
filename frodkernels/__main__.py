# SPDX-License-Identifier: Apache-2.0
"""The doctor, ``python -m frodkernels``: what is installed, what was loaded, and which backend serves which op and why.

``--build`` prints the line about the native library alone.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

import frodkernels
from frodkernels import _native

# Every variable we read, and where. The README has the same table.
VARIABLES = {
    "FRODKERNELS_DISABLE_NATIVE": "1: do not load the native library",
    "FRODKERNELS_CPU_ISA": "portable, avx2 or avx512: the code the native CPU kernels use (default: best available)",
    "FRODKERNELS_CUDA": "build: 0 leaves CUDA out, 1 fails without a CUDA toolkit (default: use one if found)",
    "FRODKERNELS_NO_NATIVE": "build: 1 installs without compiled code",
    "FRODKERNELS_TORCH_DIR": "build: folder of the torch package to compile against",
    "FRODKERNELS_BUILD_TORCH": "build: the torch an isolated build asks for where it finds none",
}
# Libraries whose identity explains a wrong or slow run: which torch, which thread pool, which CUDA.
TELLING = (
    "_C.abi3",
    "libtorch_cpu",
    "libtorch_cuda",
    "libgomp",
    "libiomp",
    "libomp",
    "libmkl",
    "libcudart",
    "libcuda.",
)


def version_of(package: str) -> str:
    """The installed version, without importing the package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def native_build() -> dict[str, str]:
    """What the loaded native library says it was built with; empty when none is loaded."""
    if not _native.load():
        return {}
    info: str = torch.ops.frodkernels.native_build_info()
    return dict(item.split("=", 1) for item in info.split("; "))


def native_line() -> str:
    build = native_build()
    if not build:
        return f"not loaded: {_native.why_not()}"
    cuda = "no CUDA kernels (no CUDA toolkit when it was built)"
    if build["cuda"] != "none":
        cuda = f"CUDA {build['cuda']} kernels for {build['cuda_targets']}"
    return f"{_native.library_path()}, {build['compiler']}, headers of torch {build['torch_headers']}, {cuda}"


def driver() -> str:
    """The NVIDIA driver and the newest CUDA it runs. cuDriverGetVersion needs no cuInit and creates no context."""
    try:
        supported = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(supported))
    except OSError:
        return "none"
    try:
        release = Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        release = "of unknown version"
    cuda = f"{supported.value // 1000}.{supported.value % 1000 // 10}"
    built = native_build().get("cuda", "none")
    line = f"{release}, runs CUDA up to {cuda}"
    if built != "none" and int(built.split(".")[0]) > supported.value // 1000:
        line += f"; TOO OLD for the native library's CUDA {built}: update the driver"
    return line


def cpu() -> str:
    """The CPU and the ISA level of the native kernels, chosen when they first run."""
    chosen = "no native library"
    if _native.load():
        try:
            chosen = f"native kernels use {torch.ops.frodkernels.native_cpu_isa()}"
        except (AttributeError, RuntimeError) as error:  # e.g. FRODKERNELS_CPU_ISA names a level this CPU lacks
            chosen = f"native kernels do not run: {error}"
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()} for torch; {chosen}"


def loaded_libraries() -> list[str]:
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:  # not Linux
        return []
    paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if line.count(" ") >= 5 and "/" in line}
    return sorted(path for path in paths if any(name in Path(path).name for name in TELLING))


def report() -> str:
    cuda = torch.version.cuda or (f"ROCm {torch.version.hip}" if torch.version.hip else "none")
    lines = [f"frodkernels {frodkernels.__version__} in {Path(frodkernels.__file__).parent}", "", "Versions"]
    lines += [
        f"  python        {platform.python_version()} ({sys.executable})",
        f"  torch         {torch.__version__}, its CUDA: {cuda}, {torch.get_num_threads()} threads",
        *(f"  {package:13} {version_of(package)}" for package in ("triton", "peft", "transformers")),
        f"  native        {native_line()}",
        f"  cpu           {cpu()}",
        f"  NVIDIA driver {driver()}",
    ]
    lines += ["", "Loaded libraries", *(f"  {path}" for path in loaded_libraries())]
    lines += ["", "Variables"]
    width = max(map(len, VARIABLES))
    for name, meaning in VARIABLES.items():
        lines.append(f"  {name:{width}}  {os.environ.get(name, '(not set)'):12} {meaning}")
    for name in sorted(set(os.environ) - set(VARIABLES)):
        if name.startswith("FRODKERNELS_"):
            lines.append(f"  {name:{width}}  {os.environ[name]:12} UNKNOWN: nothing reads this; misspelt?")
    lines += ["", "Backends"]
    for op, devices in frodkernels.backends().items():
        for device, row in devices.items():
            lines.append(f"  {op} on {device}: {row['chosen']}")
            lines += [f"    {name:10} {state}" for name, state in row.items() if name != "chosen"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m frodkernels", description="What is installed and what serves it.")
    parser.add_argument("--build", action="store_true", help="only the line about the native library")
    print(f"native library: {native_line()}" if parser.parse_args().build else report())


if __name__ == "__main__":
    main()
