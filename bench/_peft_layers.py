# SPDX-License-Identifier: Apache-2.0
"""PEFT's own layers around a benchmark case, in the dtypes that ``get_peft_model`` leaves them in.

U, V and the pattern are put in place directly: the joint decomposition that PEFT starts with takes minutes at these
sizes and has no part in a step.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

import frodkernels as fk
from bench._case import Case
from bench._interleave import Unavailable
from bench._truth import Answers, Truth

NAME = "default"


def _base(case: Case) -> nn.Linear:
    m, n = case.shape.m, case.shape.n
    base = nn.Linear(n, m, bias=case.bias is not None, device="meta").to_empty(device=case.device).to(case.dtype)
    with torch.no_grad():
        base.weight.copy_(case.weight)
        if case.bias is not None:
            base.bias.copy_(case.bias)
    return base.requires_grad_(False)


def frod(case: Case, *, accelerated: bool = False, eval_cache: bool = False) -> nn.Module:
    """``peft.tuners.frod.layer.Linear`` for ``case``; swapped in by ``fk.peft.accelerate`` when ``accelerated``."""
    try:
        from peft import FrodConfig
        from peft.tuners._buffer_dict import BufferDict
        from peft.tuners.frod.layer import Linear
    except ImportError as reason:
        raise Unavailable(f"peft {reason}") from None

    class Given(Linear):
        """Factors as given, instead of one float64 solve per layer."""

        def _calculate_frod_u_and_lambda(self, V: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
            return case.U.float().cpu(), case.lam.float().cpu()

    n = case.shape.n
    V = BufferDict({NAME: case.V}, persistent=False)
    indices = BufferDict({NAME: torch.stack([case.rows, case.cols])}, persistent=False)
    size = BufferDict({NAME: torch.tensor([n, n], device=case.device)}, persistent=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = Given(_base(case), V, indices, size, NAME, FrodConfig(progressbar=False))
    layer.__class__ = Linear
    layer.frod_U[NAME] = case.U
    for store, data in ((layer.frod_lambda_l, case.lam), (layer.frod_lambda_s_values, case.values)):
        store[NAME] = nn.Parameter(torch.zeros_like(data))
    with torch.no_grad():  # S stays 0 until the swap has seen that U, lam and V belong to W
        layer.frod_lambda_l[NAME].copy_(case.lam)
        if accelerated:
            report = fk.peft.accelerate(layer, eval_cache=eval_cache)
            if not report.layers or report.layers[0].status != "swapped":
                raise RuntimeError(f"the layer was not swapped: {report}")
        layer.frod_lambda_s_values[NAME].copy_(case.values)
    return layer


def frod_parameters(layer: nn.Module) -> dict[str, Tensor]:
    return {"dlam": layer.frod_lambda_l[NAME], "dvalues": layer.frod_lambda_s_values[NAME]}


def lora(case: Case, rank: int = 8) -> nn.Module:
    """``peft.tuners.lora.layer.Linear`` around the same base layer, B not zero."""
    try:
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear
    except ImportError as reason:
        raise Unavailable(f"peft {reason}") from None
    layer = Linear(_base(case), NAME, LoraConfig(r=rank, lora_alpha=2 * rank), r=rank, lora_alpha=2 * rank)
    generator = torch.Generator().manual_seed(1)
    for half in (layer.lora_A[NAME], layer.lora_B[NAME]):
        data = torch.randn(half.weight.shape, generator=generator) * half.weight.shape[1] ** -0.5
        half.weight = nn.Parameter(data.to(case.device))  # float32 beside any base, as PEFT casts it
    return layer


def lora_parameters(layer: nn.Module) -> dict[str, Tensor]:
    return {"dA": layer.lora_A[NAME].weight, "dB": layer.lora_B[NAME].weight}


def lora_truth(layer: nn.Module, case: Case, mode: str) -> Truth:
    """LoRA is another map than FRoD: y = x W^T + bias + s (x A^T) B^T."""
    scale = layer.scaling[NAME]

    def answers(dtype: torch.dtype) -> Answers:
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        x, W, g = case.x.to(dtype), layer.get_base_layer().weight.to(dtype), case.g.to(dtype)
        A, B = (p.detach().to(dtype) for p in lora_parameters(layer).values())
        h = x @ A.t()
        y = x @ W.t() + scale * (h @ B.t())
        out = {"y": y if case.bias is None else y + case.bias.to(dtype)}
        if mode == "step":
            dh = scale * (g @ B)
            out |= {"dx": g @ W + dh @ A, "dA": (dh.t() @ x).to(kept), "dB": (scale * (g.t() @ h)).to(kept)}
        return out

    return answers
