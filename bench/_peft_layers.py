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
from bench._delta_case import DeltaCase
from bench._hra_case import HRACase
from bench._interleave import Unavailable
from bench._truth import Answers, Truth
from bench.shapes import ConvShape

NAME = "default"
AnyCase = Case | DeltaCase | HRACase


def _base(case: AnyCase) -> nn.Module:
    weight, bias = case.weight, case.bias
    m, n = weight.shape
    base: nn.Linear | nn.Conv2d
    if isinstance(case.shape, ConvShape):
        kernel = case.shape.kernel
        weight = weight.view(m, -1, kernel, kernel)
        base = nn.Conv2d(weight.shape[1], m, kernel, padding=kernel // 2, bias=bias is not None, device="meta")
    else:
        base = nn.Linear(n, m, bias=bias is not None, device="meta")
    base.weight = nn.Parameter(weight.to(case.device, case.dtype), requires_grad=False)
    if bias is not None:
        base.bias = nn.Parameter(bias, requires_grad=False)
    return base


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


def hra(case: HRACase, *, accelerated: bool = False, eval_cache: bool = False) -> nn.Module:
    """PEFT's ``HRALinear`` or ``HRAConv2d`` for ``case``; swapped in by ``fk.peft.accelerate`` when ``accelerated``."""
    try:
        from peft import HRAConfig
        from peft.tuners.hra.layer import HRAConv2d, HRALinear
    except ImportError as reason:
        raise Unavailable(f"peft {reason}") from None
    kind = HRAConv2d if isinstance(case.shape, ConvShape) else HRALinear
    layer = kind(_base(case), NAME, HRAConfig(r=case.shape.rank, init_weights=False), r=case.shape.rank)
    layer.hra_u[NAME] = nn.Parameter(case.u.clone())
    if accelerated:
        report = fk.peft.accelerate(layer, eval_cache=eval_cache)
        if not report.layers or report.layers[0].status != "swapped":
            raise RuntimeError(f"the layer was not swapped: {report}")
    return layer


def hra_parameter(layer: nn.Module) -> Tensor:
    return layer.hra_u[NAME]


def shira(case: DeltaCase, *, accelerated: bool = False, eval_cache: bool = False) -> nn.Module:
    """``peft.tuners.shira.layer.Linear`` for ``case``; swapped in by ``fk.peft.accelerate`` when ``accelerated``."""
    try:
        from peft import ShiraConfig
        from peft.tuners.shira.layer import Linear
    except ImportError as reason:
        raise Unavailable(f"peft {reason}") from None
    rank, (m, n) = case.shape.rank, case.weight.shape
    mask = torch.zeros(m, n, device=case.device)
    mask[case.rows, case.cols] = 1
    layer = Linear(_base(case), mask, NAME, ShiraConfig(r=rank), r=rank)
    layer.shira_weight[NAME] = nn.Parameter(case.values.clone())
    if accelerated:
        report = fk.peft.accelerate(layer, eval_cache=eval_cache)
        if not report.layers or report.layers[0].status != "swapped":
            raise RuntimeError(f"the layer was not swapped: {report}")
    return layer


def shira_parameter(layer: nn.Module) -> Tensor:
    return layer.shira_weight[NAME]


def lora(case: AnyCase, rank: int = 8, parameters: torch.dtype = torch.float32) -> nn.Module:
    """``peft.tuners.lora.layer.Linear`` around the same base, B not zero; PEFT keeps float32 beside any base."""
    try:
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear
    except ImportError as reason:
        raise Unavailable(f"peft {reason}") from None
    layer = Linear(_base(case), NAME, LoraConfig(r=rank, lora_alpha=2 * rank), r=rank, lora_alpha=2 * rank)
    generator = torch.Generator().manual_seed(1)
    for half in (layer.lora_A[NAME], layer.lora_B[NAME]):
        data = torch.randn(half.weight.shape, generator=generator) * half.weight.shape[1] ** -0.5
        half.weight = nn.Parameter(data.to(case.device, parameters))
    return layer


def lora_parameters(layer: nn.Module) -> dict[str, Tensor]:
    return {"dA": layer.lora_A[NAME].weight, "dB": layer.lora_B[NAME].weight}


def lora_truth(layer: nn.Module, case: AnyCase, mode: str) -> Truth:
    """LoRA is another map than the others: y = x W^T + bias + s (x A^T) B^T."""
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
