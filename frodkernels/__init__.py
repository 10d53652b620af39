# SPDX-License-Identifier: Apache-2.0
"""Kernels for structured sparse adapters: FRoD's activation path today, its whole family next.

Everything a user needs is named here; ``python -m frodkernels`` says what is installed and which backend serves what.
"""

from frodkernels import _native, nn, ops, peft
from frodkernels._backends import backend, backends
from frodkernels.functional.frod import frod_linear, frod_weight
from frodkernels.functional.sparse_core import sparse_core
from frodkernels.pattern import SparsePattern

__version__ = "0.1.0"

__all__ = [
    "SparsePattern",
    "__version__",
    "backend",
    "backends",
    "frod_linear",
    "frod_weight",
    "nn",
    "ops",
    "peft",
    "sparse_core",
]

_native.load()
