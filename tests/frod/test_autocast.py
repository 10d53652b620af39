# SPDX-License-Identifier: Apache-2.0
"""Autocast: the dtypes of torch.nn.functional.linear, and nothing recast inside."""

import pytest
import torch
import torch.nn.functional as F

import frodkernels as fk
from frodkernels.reference import frod as reference
from tests.frod.cases import PATHS, make_layer
from tests.support import assert_no_worse_than_torch


def autocast(dtype=torch.bfloat16, enabled=True):
    return torch.autocast("cpu", dtype, enabled=enabled)


@pytest.mark.parametrize("path", ["auto", *PATHS])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_float32_layers_run_in_the_autocast_dtype(low, path):
    layer = make_layer(24, 40, 50)
    leaves = layer.leaves()
    with autocast(low):
        y = layer(path=path)
    x, U, V, bias = (t.to(low) for t in (layer.x, layer.U, layer.V, layer.bias))  # what a linear layer casts
    same = reference.frod_linear(x, U, V, layer.lam, layer.values, layer.pattern, bias)
    assert y.dtype == low
    g = torch.randn(50, 24).to(low)
    got = torch.autograd.grad(y, leaves, g)
    plain = torch.autograd.grad(same, leaves, g)
    assert [g.dtype for g in got] == [torch.float32] * 4
    wide = layer.doubled()
    wide_leaves = wide.leaves()
    exact = wide.exact()
    right = torch.autograd.grad(exact, wide_leaves, g.double())
    assert_no_worse_than_torch(y, exact, same)
    for ours, correct, others in zip(got, right, plain, strict=True):
        assert_no_worse_than_torch(ours, correct, others)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_output_dtype_is_that_of_a_linear_layer(dtype, path):
    layer = make_layer(6, 8, 5, dtype=dtype, param_dtype=torch.float32)
    with autocast():
        assert layer(path=path).dtype == F.linear(layer.x, layer.U).dtype
        assert fk.frod_weight(layer.U, layer.V, layer.lam, layer.values, layer.pattern).dtype == dtype
        with autocast(enabled=False):
            assert layer(path=path).dtype == dtype


@pytest.mark.parametrize("path", PATHS)
def test_float64_is_left_exact(path):
    layer = make_layer(6, 8, 5, dtype=torch.float64)
    leaves = layer.leaves()
    with autocast():
        y = layer(path=path)
        got = torch.autograd.grad(y.sum(), leaves)
    torch.testing.assert_close(y, layer.exact(), rtol=1e-12, atol=1e-12)
    for ours, right in zip(got, torch.autograd.grad(layer.exact().sum(), leaves), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("forward_in", [False, True])
def test_a_backward_inside_autocast_is_the_backward_outside(path, forward_in):
    """Where backward is called must not matter: only the forward decides the dtypes."""
    layer = make_layer(24, 40, 50)
    leaves = layer.leaves()

    def loss():
        with autocast(enabled=forward_in):
            return layer(path=path).float().square().sum()

    want = torch.autograd.grad(loss(), leaves)
    inside = loss()
    with autocast():
        got = torch.autograd.grad(inside, leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_weight_is_the_same_inside_and_outside():
    """Merging a checkpoint inside an autocast region must not round it."""
    layer = make_layer(24, 40, 5)
    leaves = layer.leaves("lam", "values")

    def weight():
        return fk.frod_weight(layer.U, layer.V, layer.lam, layer.values, layer.pattern)

    want = weight()
    with autocast():
        got = weight()
        inside = torch.autograd.grad(got.square().sum(), leaves)
    assert torch.equal(got, want)
    outside = torch.autograd.grad(want.square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_sparse_core_keeps_its_dtype():
    layer = make_layer(8, 8, 5)
    with autocast():
        assert fk.sparse_core(layer.x, layer.lam, layer.values, layer.pattern).dtype == torch.float32
