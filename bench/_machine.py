# SPDX-License-Identifier: Apache-2.0
"""What a measurement was taken on and with."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Machine:
    """device: "cpu" or "cuda"; name: the processor or the GPU; threads: torch's, on the CPU."""

    device: str
    name: str
    threads: int
    torch: str
    commit: str

    @property
    def slug(self) -> str:
        """A file name for results from this machine."""
        return slug(self.device, self.name, self.threads)


def slug(device: str, name: str, threads: int) -> str:
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return "-".join([device, *words, *([f"{threads}t"] if device == "cpu" else [])])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = found.get("model name") or platform.processor() or platform.machine()
    if found.get("model name") and "family" not in name and "cpu family" in found:
        digits = any(c.isdigit() for c in name)  # a virtual machine may hide the model: "AMD EPYC"
        name = name if digits else f"{name} family {found['cpu family']} model {found.get('model', '?')}"
    return name


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", "frodkernels", "csrc", "triton_kernels")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def find_device(name: str = "auto") -> torch.device:
    """``auto``: a CUDA device where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def describe(device: torch.device) -> Machine:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return Machine(device.type, name, torch.get_num_threads(), torch.__version__, _commit())


def load_warning() -> str | None:
    """A sentence where other processes are using the processors; None on a quiet machine."""
    try:
        load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    except (OSError, AttributeError):
        return None
    if load <= 0.5 * cores:
        return None
    return f"load average {load:.1f} on {cores} processors: others are at work, times and ratios are noisy"
