# SPDX-License-Identifier: Apache-2.0
"""From the indices of a PEFT SHiRA layer to a checked SparsePattern."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from frodkernels.functional._views import prepare
from frodkernels.nn.eval_cache import version
from frodkernels.pattern import SparsePattern
from frodkernels.peft.file_keys import check_floats
from frodkernels.peft.plan import Plan, check_indices, digest, integers

# (m, n, device; shape, dtype and digest of the indices) -> pattern. PEFT's random positions depend on nothing but the
# layer's shape, r and random_seed, so that many layers have the same.
Known = dict[tuple, SparsePattern]


def plan_adapter(layer: Any, adapter: str, name: str, earlier: Plan | None = None, known: Known | None = None) -> Plan:
    """Check both tensors of ``adapter`` in PEFT's SHiRA ``layer`` and plan its pattern. Changes nothing.

    Args:
        layer: a ``peft.tuners.shira.layer.Linear``.
        adapter: one of its adapters.
        name: the layer's path, for messages.
        earlier: the plan there was before the model was moved, perhaps.
        known: the patterns that layers planned in the same go have; grows.

    Raises:
        ValueError: a tensor is missing, misshapen, of a wrong dtype, or holds bad indices; names tensor and layer.
    """

    def where(tensor: str) -> str:
        return f"{tensor} of layer '{name}', adapter '{adapter}'"

    indices, values = layer.shira_indices.get(adapter), layer.shira_weight[adapter]
    if indices is None:
        raise ValueError(f"{where('shira_indices')} is missing")
    shape = (layer.out_features, layer.in_features)
    if isinstance(indices, Tensor) and indices.dim() == 2:  # lengths first: sorting comes after
        check_floats(values, (indices.shape[1],), where("shira_weight"))
    if earlier is not None and earlier.pattern.shape == shape and earlier.describes(indices):
        pattern = earlier.pattern.to(values.device)
    else:
        pattern = _pattern(indices, shape, where("shira_indices"), values, {} if known is None else known)
    prepare(pattern)
    return Plan(indices, version(indices), pattern)


def _pattern(indices: Tensor, shape: tuple[int, int], where: str, values: Tensor, known: Known) -> SparsePattern:
    """Made on the device of the values: PEFT's indices do not follow the model, it moves them when it uses them."""
    if not integers(indices) or indices.is_meta or values.is_meta:
        return check_indices(indices, shape, where)
    key = (*shape, values.device, indices.shape, indices.dtype, digest(indices))
    if key not in known:
        known[key] = check_indices(indices.to(values.device), shape, where)
    return known[key]
