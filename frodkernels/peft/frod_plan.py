# SPDX-License-Identifier: Apache-2.0
"""From the index buffers of a PEFT FRoD layer to a checked SparsePattern, made once per module category."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from frodkernels.functional._views import prepare
from frodkernels.nn.eval_cache import version
from frodkernels.peft.file_keys import check_floats
from frodkernels.peft.plan import Plan, check_indices, integers

# index buffer -> (its version, its pattern): all layers of a category hold the same buffer, so they share the plan
_PLANS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def check_size(size: Tensor, n: int, where: str) -> None:
    """``size`` [2] says n x n."""
    if not integers(size) or size.dim() != 1 or size.numel() != 2:
        raise ValueError(f"{where} must hold two integers, got {list(size.shape)} of {size.dtype}")
    got = tuple(size.tolist())
    if got != (n, n):
        raise ValueError(f"{where} says S is {got[0]} x {got[1]}, but V is {n} x {n}")


def plan_adapter(layer: Any, adapter: str, name: str, earlier: Plan | None = None) -> Plan:
    """Check every tensor of ``adapter`` in PEFT's FRoD ``layer`` and plan its pattern. Changes nothing.

    Args:
        layer: a ``peft.tuners.frod.layer.Linear``.
        adapter: one of its adapters.
        name: the layer's path, for messages.
        earlier: the plan there was before the model was moved, perhaps.

    Raises:
        ValueError: a tensor is missing, misshapen, of a wrong dtype, or holds bad indices; names tensor and layer.
    """

    def where(tensor: str) -> str:
        return f"{tensor} of layer '{name}', adapter '{adapter}'"

    for attribute in ("frod_V", "frod_s_indices", "frod_s_size", "frod_U", "frod_lambda_l"):
        store = getattr(layer, attribute)
        if store is None or adapter not in store:
            raise ValueError(f"{where(attribute)} is missing")
    n, m = layer.in_features, layer.out_features
    check_floats(layer.frod_V[adapter], (n, n), where("frod_V"))
    check_floats(layer.frod_U[adapter], (m, n), where("frod_U"))
    check_floats(layer.frod_lambda_l[adapter], (n,), where("frod_lambda_l"))
    check_size(layer.frod_s_size[adapter], n, where("frod_s_size"))
    indices = layer.frod_s_indices[adapter]
    known = _PLANS.get(indices)
    if known is not None and known[0] == version(indices) and known[1].shape == (n, n):
        pattern = known[1]
    else:  # the first layer of its category
        if not bool(torch.isfinite(layer.frod_V[adapter]).all()):
            raise ValueError(f"{where('frod_V')} holds entries that are not finite")
        if earlier is not None and earlier.pattern.shape == (n, n) and earlier.describes(indices):
            pattern = earlier.pattern.to(indices.device)
        else:
            pattern = check_indices(indices, (n, n), where("frod_s_indices"))
        prepare(pattern)
        _PLANS[indices] = (version(indices), pattern)
    check_floats(layer.frod_lambda_s_values[adapter], (pattern.nnz,), where("frod_lambda_s_values"))
    return Plan(indices, version(indices), pattern)
