# SPDX-License-Identifier: Apache-2.0
"""Every group there is: op family x mode x shape x dtype. Operands are made only when a group's turn comes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType

import torch

from bench import frod, householder, hra, hra_conv, paca, sampled, sparse_core, sparse_delta, switching
from bench._interleave import Group
from bench._timing import Clock
from bench.shapes import Shape

FAMILIES: dict[str, ModuleType] = {
    module.OP: module
    for module in (frod, sparse_core, hra, hra_conv, householder, sparse_delta, paca, sampled, switching)
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# measured with what is trained in x's dtype, and with that in float32
WIDE_PARAMETERS = (hra.OP, hra_conv.OP, householder.OP, sparse_delta.OP, paca.OP)


@dataclass(frozen=True)
class Spec:
    """A group to be measured. ``dtype`` is one of DTYPES, or two joined by "+": of x and the layer, of parameters."""

    op: str
    mode: str
    shape: Shape
    dtype: str

    @property
    def id(self) -> str:
        return f"{self.op}/{self.mode}/{self.shape}/{self.dtype}"

    def build(self, clock: Clock, device: torch.device, compile: bool = True) -> Group:
        dtype, *parameters = (DTYPES[name] for name in self.dtype.split("+"))
        return FAMILIES[self.op].group(self.shape, self.mode, dtype, clock, device, compile, *parameters)


def _variants(op: str, dtypes: Iterable[str]) -> list[str]:
    """The dtypes, and for the families of WIDE_PARAMETERS the 16-bit ones beside float32 parameters too."""
    wide = "+float32"
    return [
        dtype + u
        for dtype in dtypes
        for u in ("", *([wide] if op in WIDE_PARAMETERS and DTYPES[dtype].itemsize == 2 else []))
    ]


def specs(size: str = "default", dtypes: Iterable[str] = ("float32", "bfloat16"), pattern: str = "") -> list[Spec]:
    """The groups of a size whose id matches the regular expression ``pattern``."""
    wanted = re.compile(pattern, re.IGNORECASE)
    named = list(dtypes)
    every = [
        Spec(op, mode, shape, dtype)
        for op, family in FAMILIES.items()
        for shape in family.shapes(size)
        for dtype in _variants(op, named)
        for mode in family.MODES
    ]
    return [spec for spec in every if wanted.search(spec.id)]
