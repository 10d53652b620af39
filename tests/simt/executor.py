# SPDX-License-Identifier: Apache-2.0
"""The executor of CUDA kernels: builds its modules when their sources have changed, and imports them.

``plain()`` runs kernels fast, ``checker()`` checks and counts every memory access of theirs. Both are pybind11 modules
(csrc/simt/module.cpp) and register the CUDA bindings for CPU tensors: ``torch.ops.simt`` and ``torch.ops.simt_check``.
``under_asan`` runs scripts in processes of their own under AddressSanitizer and UBSan, with ``torch.ops.simt_asan``.

By hand: ``python tests/simt/executor.py [_simt ...]`` builds (all modules when none is named).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "simt"
MODULES = ("_simt", "_simt_check", "_simt_asan")


class NoToolkit(Exception):
    """The CUDA toolkit's headers are missing; the message says where they were looked for."""


def tool(name: str, folder: str) -> str:
    """cmake or ninja: of the wheel of that name, else on PATH."""
    places = [os.environ.get("PATH", "")]
    with contextlib.suppress(ImportError, AttributeError):
        places.insert(0, getattr(importlib.import_module(name), folder))
    path = shutil.which(name, path=os.pathsep.join(places))
    if path is None:
        raise FileNotFoundError(f"{name} not found: pip install {name}")
    return path


@contextlib.contextmanager
def locked():
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def run(command: list[str]) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode == 0:
        return
    said = " ".join(done.stdout.split())  # CMake breaks lines where it likes
    if found := re.search(r"the executor needs the CUDA toolkit's headers.*?(?= Call Stack|$)", said):
        raise NoToolkit(found.group())
    raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")


@functools.cache
def build(*modules: str) -> None:
    """Bring the modules up to date, once per process. Raises NoToolkit, or RuntimeError with the compiler's words."""
    import torch

    cmake, ninja = tool("cmake", "CMAKE_BIN_DIR"), tool("ninja", "BIN_DIR")
    with locked():
        settings = {
            "FRODKERNELS_SIMT": "ON",
            "FRODKERNELS_TORCH_DIR": Path(torch.__file__).parent,
            "Python_EXECUTABLE": sys.executable,
            "CMAKE_BUILD_TYPE": "None",
            "CMAKE_MAKE_PROGRAM": ninja,
        }
        # What CMake takes from the environment once and keeps: when that changes it must begin afresh.
        key = str([settings, *(os.environ.get(name) for name in ("CXX", "CXXFLAGS", "CUDA_HOME", "FRODKERNELS_CUDA"))])
        stamp = FOLDER / ".settings"
        if not (FOLDER / "build.ninja").exists() or not stamp.exists() or stamp.read_text() != key:
            stamp.unlink(missing_ok=True)
            defines = [f"-D{name}={value}" for name, value in settings.items()]
            run([cmake, "--fresh", "-S", str(ROOT), "-B", str(FOLDER), "-G", "Ninja", *defines])
            stamp.write_text(key)
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        run([cmake, "--build", str(FOLDER), "--parallel", jobs, "--target", *(modules or ["simt"])])


def module_path(name: str) -> Path:
    return FOLDER / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"


def kept(path: Path) -> Path:
    """A second name of the file that is there now: a build that replaces it leaves this process its own.

    Source lines are looked up in the file long after the import.
    """
    folder = FOLDER / "loaded"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        if time.time() - old.stat().st_ctime > 24 * 3600:
            old.unlink(missing_ok=True)
    found = path.stat()
    link = folder / f"{found.st_ino}-{found.st_mtime_ns}-{path.name}"
    with contextlib.suppress(FileExistsError):
        os.link(path, link)
    return link


def load_built(name: str) -> ModuleType:
    """Import a module as it is."""
    import torch  # noqa: F401  (its libraries must be in the process first)

    with locked():
        path = kept(module_path(name))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def load(name: str) -> ModuleType:
    """Bring a module up to date and import it."""
    build(name)
    return load_built(name)


def plain() -> ModuleType:
    return load("_simt")


def checker() -> ModuleType:
    return load("_simt_check")


class Ended(NamedTuple):
    """How a script under the sanitisers ended."""

    status: int  # 0: it came through; negative: a signal
    output: str  # what it and the sanitisers printed


# Each script runs in a fork of a process that has imported torch and the module once: that import is what takes time.
ASAN_START = """
import json, os, sys, tempfile, traceback
from tests.simt.executor import load_built
simt = load_built("_simt_asan")
import torch
torch.set_num_threads(1)
ends = []
for script in json.load(sys.stdin):
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            try:
                exec(script, {"simt": simt, "torch": torch})
            except BaseException:
                traceback.print_exc()
                sys.stdout.flush(), sys.stderr.flush(), os._exit(1)
            sys.stdout.flush(), sys.stderr.flush(), os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        ends.append((status, output.read()))
json.dump(ends, sys.stdout)
"""


def under_asan(scripts: list[str]) -> list[Ended]:
    """Run each script by itself with AddressSanitizer and UBSan watching the kernels and the tensors' memory.

    A script finds ``torch``, the module as ``simt`` and the ops in ``torch.ops.simt_asan``. A finding of the sanitisers
    ends it with a status other than 0 and a report in the output.
    """
    build("_simt_asan")
    compiler = os.environ.get("CXX", "g++").split()[0]
    preload = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")  # the latter: libasan looks for its exceptions at the start
    ]
    environment = os.environ | {
        "LD_PRELOAD": ":".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own would drown ours
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, "-c", ASAN_START]
    done = subprocess.run(command, input=json.dumps(scripts), capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"the process under AddressSanitizer failed\n{done.stdout}\n{done.stderr}")
    return [Ended(*end) for end in json.loads(done.stdout)]


if __name__ == "__main__":
    try:
        build(*sys.argv[1:])
    except NoToolkit as why:
        print(f"the executor's modules are not built: {why}")
