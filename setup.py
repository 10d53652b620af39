# SPDX-License-Identifier: Apache-2.0
"""Drives CMakeLists.txt (the one build definition) through ninja and puts `_C.abi3.so` into the package."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
from frodkernels_build import TESTED_TORCH, BuildError, find_torch, pure_python  # noqa: E402

# What CMake reads once and keeps in its cache: each combination gets a build folder of its own.
TOOLCHAIN = ("CXX", "CXXFLAGS", "CUDAHOSTCXX", "CUDAFLAGS", "LDFLAGS", "CUDA_HOME")


def cxx_compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if shutil.which(name.split()[0]):
            return name
    raise BuildError(
        f"no C++ compiler found (looked for {f'CXX={wanted}' if wanted else 'c++, g++ and clang++ on PATH'}). "
        "Install one (Debian and Ubuntu: apt install g++), or set FRODKERNELS_NO_NATIVE=1 to install without native "
        "code: the PyTorch reference and the Triton kernels then do all the work."
    )


def tool(name: str) -> str:
    """cmake or ninja: of the wheel of that name (what the build asked for), else on PATH."""
    places = [os.environ.get("PATH", "")]
    with contextlib.suppress(ImportError, AttributeError):
        places.insert(0, getattr(importlib.import_module(name), {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}[name]))
    if path := shutil.which(name, path=os.pathsep.join(places)):
        return path
    raise BuildError(f"{name} not found: pip install {name}")


def jobs() -> str:
    count = os.environ.get("MAX_JOBS", "").strip() or str(len(os.sched_getaffinity(0)))
    if not count.isdigit() or int(count) < 1:
        raise BuildError(f"MAX_JOBS must be a positive integer, got {count!r}")
    return count


@contextlib.contextmanager
def locked(folder: Path):
    """One build at a time in a folder: an editable install and a wheel build may run side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        cxx_compiler()
        torch = find_torch()
        if torch is None:
            raise BuildError(
                f"no torch >= 2.10 with headers in this environment: pip install {TESTED_TORCH}, or build with "
                "isolation, or set FRODKERNELS_TORCH_DIR to the folder of a torch package"
            )
        key = hashlib.sha256(repr([os.environ.get(name) for name in TOOLCHAIN]).encode()).hexdigest()[:8]
        folder = ROOT / "build" / f"cmake-{self.plat_name}-{key}"
        cmake, ninja = tool("cmake"), tool("ninja")
        with locked(folder):
            configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
            configure += ["-DCMAKE_BUILD_TYPE=Release", f"-DFRODKERNELS_TORCH_DIR={torch}"]
            self.run_tool(configure)
            self.run_tool([cmake, "--build", str(folder), "--parallel", jobs()])
            target.parent.mkdir(parents=True, exist_ok=True)
            # Replace, never overwrite: a process that has the old library mapped keeps it intact.
            fresh = target.with_name(target.name + ".new")
            shutil.copy2(folder / target.name, fresh)
            os.replace(fresh, target)

    def copy_file(self, infile: str, outfile: str, *args: object, **kwargs: object) -> tuple[str, bool]:
        """setuptools', for a library built in place: replaced, too."""
        fresh = f"{outfile}.new"
        Path(fresh).unlink(missing_ok=True)  # of a build that was killed: it would pass for the newer file
        copied = super().copy_file(infile, fresh, *args, **kwargs)
        os.replace(fresh, outfile)
        return outfile, bool(copied[1])

    def run_tool(self, command: list[str]) -> None:
        print("frodkernels:", " ".join(command), flush=True)
        try:
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        except subprocess.CalledProcessError as error:
            raise BuildError(f"{Path(command[0]).name} failed with status {error.returncode}; see above") from None


def packages() -> list[str]:
    """Every package by its installed name: triton_kernels/ becomes frodkernels.triton_kernels."""
    inner = ["triton_kernels", *(f"triton_kernels.{name}" for name in find_packages(str(ROOT / "triton_kernels")))]
    return [*find_packages(str(ROOT), include=["frodkernels", "frodkernels.*"]), *(f"frodkernels.{n}" for n in inner)]


native = (
    {}
    if pure_python()
    else {
        "ext_modules": [Extension("frodkernels._C", sources=[], py_limited_api=True)],
        "cmdclass": {"build_ext": CMakeBuild},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }
)
try:
    # The top-level import name `triton_kernels` belongs to another project, hence the mapping.
    setup(packages=packages(), package_dir={"frodkernels.triton_kernels": "triton_kernels"}, **native)
except BuildError as error:
    raise SystemExit(f"\nfrodkernels: {error}\n") from None
