# SPDX-License-Identifier: Apache-2.0
"""Errors against float64 beside those of PEFT's layers: not above them in one dtype, near them in two."""

import pytest
import torch

import frodkernels as fk
from tests.householder.cases import F64, SIDES, gradient_like, make_conv, make_layer

pytest.importorskip("peft")
from peft import HRAConfig
from peft.tuners.hra.layer import HRAConv2d, HRALinear

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
UNIFORM = [F32, BF16, F16]
MIXED = [(BF16, F32), (F16, F32)]


def peft_layer(case):
    """PEFT's layer with the case's numbers."""
    m, n, *kernel = case.weight.shape
    r, bias = case.u.shape[1], case.bias is not None
    if kernel:
        base = torch.nn.Conv2d(n, m, kernel[0], bias=bias, dtype=case.weight.dtype, **case.options)
    else:
        base = torch.nn.Linear(n, m, bias=bias, dtype=case.weight.dtype)
    base.weight.data, base.bias.data = case.weight.detach().clone(), case.bias.detach().clone()
    layer = (HRAConv2d if kernel else HRALinear)(base, "default", HRAConfig(r=r), r=r)
    layer.hra_u["default"] = torch.nn.Parameter(case.u.detach().clone())
    return layer


def error(got, exact):
    return float((got.detach().double() - exact).norm() / exact.norm())


def errors(case, **options):
    """[(ours, PEFT's)] of the output, of x's gradient and of u's."""
    leaves = case.leaves("x", "u")
    y = case(**options)
    g = gradient_like(y)
    ours = y, *torch.autograd.grad(y, leaves, g)
    layer = peft_layer(case)
    theirs = layer(case.x)
    theirs = theirs, *torch.autograd.grad(theirs, (case.x, layer.hra_u["default"]), g)
    wide = case.to(F64)
    wide_leaves = wide.leaves("x", "u")
    exact = wide.exact()
    right = exact.detach(), *torch.autograd.grad(exact, wide_leaves, g.double())
    return [(error(a, c), error(b, c)) for a, b, c in zip(ours, theirs, right, strict=True)]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", UNIFORM, ids=str)
@pytest.mark.parametrize("m, n, r", [(256, 256, 8), (256, 256, 16), (192, 384, 24), (384, 192, 8)])
def test_one_dtype(m, n, r, dtype, side):
    """The reference sums over the tokens as torch does, which u's gradient shows; the kernels do better."""
    kernels = fk.backends()["householder"]["cpu"]["chosen"] == "native"
    y, dx, du = errors(make_layer(m, n, r, 200, dtype=dtype), side=side)
    for (ours, theirs), factor in ((y, 1), (dx, 1), (du, 1 if kernels else 1.5)):
        assert ours <= factor * theirs


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype, param_dtype", MIXED, ids=str)
@pytest.mark.parametrize("m, n, r", [(256, 256, 8), (192, 384, 24), (384, 192, 8)])
def test_float32_directions_beside_sixteen_bits(m, n, r, dtype, param_dtype, side):
    """PEFT runs a float32 GEMM there and rounds once. Ours rounds twice: the layer's product stays in 16 bits.

    Only the output side never sums rounded products into u's gradient; for the input side plain torch is the bar, see
    test_hra_linear.py.
    """
    y, dx, du = errors(make_layer(m, n, r, 200, dtype=dtype, param_dtype=param_dtype), side=side)
    for ours, theirs in (y, dx, *([du] if side == "output" else [])):
        assert ours <= 1.5 * theirs


@pytest.mark.parametrize("dtype", UNIFORM, ids=str)
def test_convolutions_of_one_dtype(dtype):
    """PEFT's layer serves square kernels without dilation."""
    case = make_conv(48, 64, (3, 3), 8, (4, 12, 12), dtype=dtype, stride=2, padding=1)
    for ours, theirs in errors(case):
        assert ours <= theirs


@pytest.mark.parametrize("dtype, param_dtype", MIXED, ids=str)
def test_convolutions_with_float32_directions(dtype, param_dtype):
    """The correction is as precise as u; the layer's own result is rounded before it, where PEFT rounds once.

    Of dx the two parts are rounded and so is their sum.
    """
    case = make_conv(48, 64, (3, 3), 8, (4, 12, 12), dtype=dtype, param_dtype=param_dtype, stride=2, padding=1)
    for (ours, theirs), bar in zip(errors(case), (1.5, 2.0, 1.5), strict=True):
        assert ours <= bar * theirs
