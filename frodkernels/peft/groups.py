# SPDX-License-Identifier: Apache-2.0
"""Optimiser groups: FRoD's recipes train the diagonal, the sparse entries and the rest at different rates."""

from __future__ import annotations

from typing import Any

from torch import nn

from frodkernels.peft._require import has_method, require_module, require_peft

_KIND = {"frod_lambda_l": "frod_lambda", "frod_lambda_s_values": "frod_values"}


def param_groups(
    model: nn.Module, lr: float, *, lambda_lr: float | None = None, values_lr: float | None = None
) -> list[dict[str, Any]]:
    """The trainable parameters of ``model`` as optimiser groups "frod_lambda", "frod_values" and "other".

    Args:
        model: any module; accelerated or not. HRA's directions and SHiRA's entries are in "other".
        lr: learning rate of everything without a rate of its own.
        lambda_lr: of FRoD's diagonals; ``lr`` when None.
        values_lr: of the entries of FRoD's S; ``lr`` when None.

    Returns:
        ``[{"params": [...], "lr": ..., "name": ...}, ...]`` without empty groups; every parameter once.
    """
    require_peft()
    require_module(model)
    kinds = _kinds(model) if has_method("frod") else {}
    rates = {
        "frod_lambda": lr if lambda_lr is None else lambda_lr,
        "frod_values": lr if values_lr is None else values_lr,
        "other": lr,
    }
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for parameter in model.parameters():  # each shared parameter once
        if parameter.requires_grad:
            groups[kinds.get(id(parameter), "other")].append(parameter)
    return [{"params": groups[name], "lr": rates[name], "name": name} for name in rates if groups[name]]


def _kinds(model: nn.Module) -> dict[int, str]:
    """id of a parameter -> its group, for FRoD's."""
    from peft.tuners.frod.layer import FrodLayer

    kinds: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, FrodLayer):
            for attribute, kind in _KIND.items():
                kinds.update((id(p), kind) for p in getattr(module, attribute).parameters())
    return kinds
