# SPDX-License-Identifier: Apache-2.0
"""Thin modules: an adapter layer of each family, without PEFT."""

from frodkernels.functional.frod_init import joint_basis
from frodkernels.nn.frod import FrodLinear

__all__ = ["FrodLinear", "joint_basis"]
