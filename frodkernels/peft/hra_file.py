# SPDX-License-Identifier: Apache-2.0
"""Checks of HRA's directions: of an adapter file against the model it is about to be loaded into, and of a layer's own.

A zero column of u is no reflection: PEFT divides by its length and the layer, or what it was merged into, is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.hra import HRAModel
from torch import Tensor, nn

from frodkernels.nn.hra import zero_columns
from frodkernels.peft.file_keys import (
    PREFIX,
    Passengers,
    adapted_layers,
    base_model,
    check_floats,
    check_keys,
    with_aliases,
)

U = ".hra_u"


def check_directions(u: Tensor, shape: tuple[int, ...], where: str) -> None:
    """A floating-point tensor of ``shape`` [n, r] whose columns are directions: finite, and none of them zero.

    Raises:
        ValueError: begins with ``where``.
    """
    check_floats(u, shape, where)
    check_columns(u, where)


def check_columns(u: Tensor, where: str) -> None:
    """u [n, r] is finite and has no zero column; ValueError otherwise."""
    bad = zero_columns(u)
    if not bad:
        return
    if not bool(torch.isfinite(u).all()):
        raise ValueError(f"{where} holds entries that are not finite (in columns {bad[:8]})")
    raise ValueError(f"{where} has columns that are zero, which are no reflections: {bad[:8]}")


def check_numbers(config: Mapping[str, Any]) -> None:
    """The numbers of an adapter's config are of their types and in range; ValueError names the key."""
    r = config.get("r", 1)
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"'r' of the adapter's config must be a whole number of at least 1, got {r!r}")
    gram_schmidt = config.get("apply_GS", False)
    if not isinstance(gram_schmidt, bool):
        raise ValueError(f"'apply_GS' of the adapter's config must be true or false, got {gram_schmidt!r}")


def _inputs(path: str, layer: nn.Module) -> int | None:
    """Rows of u, as PEFT makes it."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels * layer.kernel_size[0] * layer.kernel_size[0]
    return None


def check_hra_file(
    state: Mapping[str, Tensor],
    model: nn.Module,
    config: Any,
    *,
    adapter: str | None = None,
    ignore_mismatched: bool = False,
) -> None:
    """Check the tensors of an HRA adapter file (keys as saved, without adapter names). Changes nothing.

    Every key must be one that PEFT writes for this config and that this model has room for, every tensor must fit,
    and no layer's directions may be missing. What the layers are is told by model and config, not by the file.

    Args:
        state: the file's tensors.
        model: the base model, or the PeftModel that the adapter is to join.
        config: the adapter's HRAConfig.
        adapter: its name when ``state`` is on its way into the adapter, with the keys of modules_to_save renamed. It
            may then be a part, and PEFT itself compares the shapes of what is not HRA's.
        ignore_mismatched: let tensors that are not HRA's have another shape: PEFT was told to leave them out.

    Raises:
        ValueError: names the key.
    """
    check_numbers(vars(config))
    root = base_model(model)
    targets = adapted_layers(root, config, HRAModel, _inputs)
    layers = with_aliases(root, targets)
    ours = {path + U for path in layers}
    check_keys(state, Passengers(root, config, adapter), ours, "HRA", adapter is None and not ignore_mismatched)
    for path, n in layers.items():
        keys = [key for key in (PREFIX + path + U, path + U) if key in state]
        if not keys and adapter is None and path in targets:
            raise ValueError(f"'{PREFIX}{path}{U}' is missing: the adapter's config targets that layer")
        for key in keys:
            check_directions(state[key], (n, config.r), f"'{key}'")
