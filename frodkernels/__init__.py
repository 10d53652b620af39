# SPDX-License-Identifier: Apache-2.0
"""Kernels for structured sparse adapters: FRoD's activation path, HRA's chained reflections, sparse weight updates.

Everything a user needs is named here; ``python -m frodkernels`` says what is installed and which backend serves what.
"""

from frodkernels import _native, nn, ops, peft
from frodkernels._backends import backend, backends
from frodkernels.functional.frod import frod_linear, frod_weight
from frodkernels.functional.householder import householder, orthogonality_penalty
from frodkernels.functional.hra import hra_linear
from frodkernels.functional.hra_conv import hra_conv2d
from frodkernels.functional.paca import paca_linear
from frodkernels.functional.sampled import sampled_product, scatter_values_
from frodkernels.functional.sparse_core import sparse_core
from frodkernels.functional.sparse_delta import sparse_delta_linear
from frodkernels.pattern import SparsePattern

__version__ = "0.1.0"

__all__ = [
    "SparsePattern",
    "__version__",
    "backend",
    "backends",
    "frod_linear",
    "frod_weight",
    "householder",
    "hra_conv2d",
    "hra_linear",
    "nn",
    "ops",
    "orthogonality_penalty",
    "paca_linear",
    "peft",
    "sampled_product",
    "scatter_values_",
    "sparse_core",
    "sparse_delta_linear",
]

_native.load()
