# SPDX-License-Identifier: Apache-2.0
"""Memory of this process (or of the GPU), in MB of 10^6 bytes."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path


def _status_mb(field: str) -> float | None:
    """A field of /proc/self/status (kB), where there is one."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(values[0]) * 1024 / 1e6 if values else None


def _ru_maxrss_mb() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def reset_peak(device: str) -> None:
    """Let `peak_mb` count from now on: loading a checkpoint holds more for a moment than is kept of it."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    # Linux sets VmHWM back to VmRSS on this write; elsewhere the peak keeps counting from the start.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mb(device: str) -> float:
    """The most memory held since `reset_peak`: resident memory of the process, or allocated memory of the GPU.

    VmHWM comes before ru_maxrss because the latter is inherited from the process that started this one.
    """
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    return _status_mb("VmHWM") or _ru_maxrss_mb()


def current_mb(device: str) -> float:
    """The memory held now; the peak so far where the system does not say."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.memory_allocated() / 1e6
    return _status_mb("VmRSS") or _ru_maxrss_mb()
