# SPDX-License-Identifier: Apache-2.0
"""hra_linear under autocast: the dtypes of torch.nn.functional.linear, the directions left as they are."""

import pytest
import torch
import torch.nn.functional as F

import frodkernels as fk
from tests.householder.cases import F64, SIDES, close, gradient_like, make_layer
from tests.support import assert_no_worse_than_torch

every_side = pytest.mark.parametrize("side", ["auto", *SIDES])


def autocast(dtype=torch.bfloat16, enabled=True):
    return torch.autocast("cpu", dtype, enabled=enabled)


@every_side
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_float32_layers_run_in_the_autocast_dtype(low, side):
    layer = make_layer(48, 60, 8, 70, dtype=torch.float32)
    leaves = x, u, weight, bias = layer.leaves()
    with autocast(low):
        y = layer(side=side)
    assert y.dtype == low
    same = fk.hra_linear(x.to(low), weight.to(low), u, bias.to(low), side=side)  # u stays float32
    assert torch.equal(y, same)
    g = gradient_like(y)
    got = torch.autograd.grad(y, leaves, g)
    assert [t.dtype for t in got] == [torch.float32] * 4
    low_layer = type(layer)(x.to(low), u, weight.to(low), bias.to(low))
    plain = torch.autograd.grad(low_layer.plain(), leaves, g)
    wide = low_layer.to(F64)
    wide_leaves = wide.leaves()
    exact = torch.autograd.grad(wide.exact(), wide_leaves, g.double())
    for ours, right, others in zip(got, exact, plain, strict=True):
        assert_no_worse_than_torch(ours, right, others)


@every_side
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64], ids=str)
def test_the_output_dtype_is_that_of_a_linear_layer(dtype, side):
    layer = make_layer(6, 8, 3, 5, dtype=dtype, param_dtype=torch.float32)
    with autocast():
        assert layer(side=side).dtype == F.linear(layer.x, layer.weight).dtype
        with autocast(enabled=False):
            assert layer(side=side).dtype == dtype


@every_side
def test_float64_is_left_exact(side):
    layer = make_layer(6, 8, 3, 5)
    leaves = layer.leaves()
    with autocast():
        y = layer(side=side)
        close(y, layer.exact())
        got = torch.autograd.grad(y.sum(), leaves)
    close(got, torch.autograd.grad(layer.exact().sum(), leaves))


def losses(layer, side, forward_in):
    """(gradients, the same from a backward inside autocast)"""
    leaves = layer.leaves()

    def loss():
        with autocast(enabled=forward_in):
            return layer(side=side).float().square().sum()

    want = torch.autograd.grad(loss(), leaves)
    inside = loss()
    with autocast():
        return want, torch.autograd.grad(inside, leaves)


@pytest.mark.parametrize("side, forward_in", [("output", False), ("output", True), ("input", True)])
def test_a_backward_inside_autocast_is_the_backward_outside(side, forward_in):
    """Where backward is called must not matter: only the forward decides the dtypes."""
    want, got = losses(make_layer(24, 40, 7, 50, dtype=torch.float32), side, forward_in)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_input_side_leaves_the_layers_own_product_to_torch():
    """Which casts it, in a backward inside autocast, even for a forward outside; nothing else may be lost there."""
    want, got = losses(make_layer(24, 40, 7, 50, dtype=torch.float32), "input", False)
    assert [t.dtype for t in got] == [torch.float32] * 4
    for ours, right in zip(got, want, strict=True):
        assert (ours - right).norm() <= torch.finfo(torch.bfloat16).eps * right.norm()
