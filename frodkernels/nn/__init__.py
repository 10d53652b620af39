# SPDX-License-Identifier: Apache-2.0
"""Thin modules: an adapter layer of each family, without PEFT."""

from frodkernels.functional.frod_init import joint_basis
from frodkernels.nn.frod import FrodLinear
from frodkernels.nn.hra import HRAConv2d, HRALinear
from frodkernels.nn.paca import PaCALinear
from frodkernels.nn.sparse_delta import SparseDeltaLinear

__all__ = ["FrodLinear", "HRAConv2d", "HRALinear", "PaCALinear", "SparseDeltaLinear", "joint_basis"]
