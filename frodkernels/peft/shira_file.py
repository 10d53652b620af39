# SPDX-License-Identifier: Apache-2.0
"""Checks of a SHiRA adapter file against the model it is about to be loaded into, before anything is injected.

PEFT copies whatever the file holds into the model: indices that point outside of the weight are read and written there,
those of other positions than the file's are drawn at random where the file has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.shira import ShiraModel
from peft.tuners.shira.model import _get_tuner_layer_class
from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn

from frodkernels.peft.file_keys import (
    PREFIX,
    Passengers,
    adapted_layers,
    base_model,
    check_floats,
    check_keys,
    with_aliases,
)
from frodkernels.peft.plan import check_indices

VALUES, INDICES = ".shira_weight", ".shira_indices"


def check_numbers(config: Mapping[str, Any]) -> None:
    """The numbers of an adapter's config are of their types and in range; ValueError names the key."""
    r = config.get("r", 1)
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"'r' of the adapter's config must be a whole number of at least 1, got {r!r}")
    seed = config.get("random_seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64):
        raise ValueError(f"'random_seed' of the adapter's config must be a 64-bit integer or null, got {seed!r}")


def _shape(path: str, layer: nn.Module) -> tuple[int, int] | None:
    """(m, n) of a layer that PEFT adapts."""
    if _get_tuner_layer_class(layer) is None:
        return None
    n, m = _get_in_out_features(layer)
    return None if n is None or m is None else (int(m), int(n))


def check_shira_file(
    state: Mapping[str, Tensor],
    model: nn.Module,
    config: Any,
    *,
    adapter: str | None = None,
    ignore_mismatched: bool = False,
) -> None:
    """Check the tensors of a SHiRA adapter file (keys as saved, without adapter names). Changes nothing.

    Every key must be one that PEFT writes for this config and that this model has room for, every tensor must fit,
    and no layer's entries or positions may be missing. What the layers are is told by model and config, not by the
    file.

    Args:
        state: the file's tensors.
        model: the base model, or the PeftModel that the adapter is to join.
        config: the adapter's ShiraConfig.
        adapter: its name when ``state`` is on its way into the adapter, with the keys of modules_to_save renamed. It
            may then be a part, and PEFT itself compares the shapes of what is not SHiRA's.
        ignore_mismatched: let tensors that are not SHiRA's have another shape: PEFT was told to leave them out.

    Raises:
        ValueError: names the key, and the entry where there is one.
    """
    check_numbers(vars(config))
    root = base_model(model)
    targets = adapted_layers(root, config, ShiraModel, _shape)
    layers = with_aliases(root, targets)
    ours = {path + suffix for path in layers for suffix in (VALUES, INDICES)}
    check_keys(state, Passengers(root, config, adapter), ours, "SHiRA", adapter is None and not ignore_mismatched)
    for path, (m, n) in layers.items():
        nnz = config.r * (m + n)
        for suffix in (VALUES, INDICES):
            keys = [key for key in (PREFIX + path + suffix, path + suffix) if key in state]
            if not keys and adapter is None and path in targets:
                raise ValueError(f"'{PREFIX}{path}{suffix}' is missing: the adapter's config targets that layer")
            for key in keys:
                if suffix == VALUES:
                    check_floats(state[key], (nnz,), f"'{key}'")
                else:
                    _check_positions(state[key], nnz, (m, n), f"'{key}'")


def _check_positions(indices: Tensor, nnz: int, shape: tuple[int, int], where: str) -> None:
    """Check the positions of a layer's entries in a weight of ``shape``."""
    if indices.shape != (2, nnz):
        raise ValueError(f"{where} must have shape {[2, nnz]}, got {list(indices.shape)}")
    if indices.dtype == torch.float32:  # how PEFT saves them on Windows
        whole = indices.to(torch.int64)
        if not torch.equal(whole.to(torch.float32), indices):
            raise ValueError(f"{where} must hold integers, got fractions or numbers that are not finite")
        indices = whole
    check_indices(indices, shape, where)
