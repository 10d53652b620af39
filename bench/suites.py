# SPDX-License-Identifier: Apache-2.0
"""Every group there is: op family x mode x shape x dtype. Operands are made only when a group's turn comes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType

import torch

from bench import frod, sparse_core
from bench._interleave import Group
from bench._timing import Clock
from bench.shapes import SIZES, Shape

FAMILIES: dict[str, ModuleType] = {module.OP: module for module in (frod, sparse_core)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Spec:
    """A group to be measured."""

    op: str
    mode: str
    shape: Shape
    dtype: str

    @property
    def id(self) -> str:
        return f"{self.op}/{self.mode}/{self.shape}/{self.dtype}"

    def build(self, clock: Clock, device: torch.device, compile: bool = True) -> Group:
        family = FAMILIES[self.op]
        return family.group(self.shape, self.mode, DTYPES[self.dtype], clock, device, compile)


def _distinct(op: str, shapes: Iterable[Shape]) -> list[Shape]:
    """The core does not know m: one shape for each (n, T)."""
    if op != sparse_core.OP:
        return list(shapes)
    return list({(shape.n, shape.T): shape for shape in reversed(list(shapes))}.values())[::-1]


def specs(size: str = "default", dtypes: Iterable[str] = ("float32", "bfloat16"), pattern: str = "") -> list[Spec]:
    """The groups of a size whose id matches the regular expression ``pattern``."""
    wanted = re.compile(pattern, re.IGNORECASE)
    every = [
        Spec(op, mode, shape, dtype)
        for op, family in FAMILIES.items()
        for shape in _distinct(op, SIZES[size])
        for dtype in dtypes
        for mode in family.MODES
    ]
    return [spec for spec in every if wanted.search(spec.id)]
