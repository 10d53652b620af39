# SPDX-License-Identifier: Apache-2.0
"""Run PEFT's FRoD, HRA and SHiRA adapters on this package's kernels; models, files and behaviour stay PEFT's.

PEFT is optional: importing this module does not import it, calling a function without it raises ImportError.
"""

from frodkernels.peft.enable import disable, enable, enabled
from frodkernels.peft.groups import param_groups
from frodkernels.peft.report import LayerReport, SwapReport
from frodkernels.peft.swap import accelerate, invalidate, restore
from frodkernels.peft.switch import switch

__all__ = [
    "LayerReport",
    "SwapReport",
    "accelerate",
    "disable",
    "enable",
    "enabled",
    "invalidate",
    "param_groups",
    "restore",
    "switch",
]
