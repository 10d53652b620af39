# SPDX-License-Identifier: Apache-2.0
"""Runs the kernels of csrc/simt/planted on tensors."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from torch import Tensor


@dataclass
class Outcome:
    error: str | None  # the fault that stopped the kernel
    reports: list[str]  # the others

    @property
    def clean(self) -> bool:
        return self.error is None and not self.reports

    def says(self, *words: str) -> bool:
        """Whether one fault's text has all these words."""
        return any(all(word in text for word in words) for text in [*self.reports, self.error or ""])


def track(module: ModuleType, name: str, tensor: Tensor, access: str) -> None:
    """Access r: an input; w: fresh memory, to be written before it is read; rw: both at will."""
    module.track(tensor.data_ptr(), tensor.nbytes, name, writable="w" in access, initialised="r" in access)


def run(
    module: ModuleType, kernel: str, *buffers: tuple[Tensor, str], sizes=(), bug: int = 0, tracked: bool = True
) -> Outcome:
    """Launch a kernel on (tensor, access) pairs, called p0, p1, ... in reports."""
    if tracked:
        for i, (tensor, access) in enumerate(buffers):
            track(module, f"p{i}", tensor, access)
    error = None
    try:
        module.planted(kernel, [tensor.data_ptr() for tensor, _ in buffers], list(sizes), bug)
    except RuntimeError as fault:
        error = str(fault)
    return Outcome(error, module.reports())
