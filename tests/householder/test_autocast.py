# SPDX-License-Identifier: Apache-2.0
"""Autocast: x is cast as a linear layer would cast it, the directions are not, and nothing is recast inside."""

import pytest
import torch
import torch.nn.functional as F

import frodkernels as fk
from tests.householder.cases import F64, Chain, close, gradient_like, make_chain
from tests.support import assert_no_worse_than_torch

either = pytest.mark.parametrize("orthogonalize", [False, True])


def autocast(dtype=torch.bfloat16, enabled=True):
    return torch.autocast("cpu", dtype, enabled=enabled)


@either
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_float32_runs_in_the_autocast_dtype(low, orthogonalize):
    chain = make_chain(60, 8, 70, dtype=torch.float32)
    x, u = chain.leaves()
    with autocast(low):
        y = chain(orthogonalize=orthogonalize)
    assert y.dtype == low
    same = Chain(x.to(low), u)  # u stays float32
    assert torch.equal(y, same(orthogonalize=orthogonalize))
    g = gradient_like(y)
    got = torch.autograd.grad(y, (x, u), g)
    assert [t.dtype for t in got] == [torch.float32] * 2
    plain = torch.autograd.grad(same.plain(orthogonalize=orthogonalize), (x, u), g)
    wide = Chain(x.to(low), u).to(F64)
    leaves = wide.leaves()
    exact = torch.autograd.grad(wide.exact(orthogonalize=orthogonalize), leaves, g.double())
    for ours, right, others in zip(got, exact, plain, strict=True):
        assert_no_worse_than_torch(ours, right, others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64], ids=str)
def test_the_output_dtype_is_that_of_a_linear_layer(dtype):
    chain = make_chain(8, 3, 5, dtype=dtype, param_dtype=torch.float32)
    with autocast():
        assert chain().dtype == F.linear(chain.x, torch.zeros(4, 8, dtype=dtype)).dtype
        with autocast(enabled=False):
            assert chain().dtype == dtype


def test_float64_is_left_exact():
    chain = make_chain(8, 3, 5)
    leaves = chain.leaves()
    with autocast():
        y = chain()
        got = torch.autograd.grad(y.sum(), leaves)
    close(y, chain.exact())
    close(got, torch.autograd.grad(chain.exact().sum(), leaves))


@either
@pytest.mark.parametrize("forward_in", [False, True])
def test_a_backward_inside_autocast_is_the_backward_outside(forward_in, orthogonalize):
    """Where backward is called must not matter: only the forward decides the dtypes."""
    chain = make_chain(40, 7, 50, dtype=torch.float32)
    leaves = chain.leaves()

    def loss():
        with autocast(enabled=forward_in):
            return chain(orthogonalize=orthogonalize).float().square().mul(torch.linspace(0, 1, 40)).sum()

    want = torch.autograd.grad(loss(), leaves)
    inside = loss()
    with autocast():
        got = torch.autograd.grad(inside, leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_penalty_is_the_same_inside_and_outside():
    chain = make_chain(40, 7, 1, dtype=torch.float32)
    (u,) = chain.leaves("u")
    want = fk.orthogonality_penalty(u)
    with autocast():
        got = fk.orthogonality_penalty(u)
    assert torch.equal(got, want)
    assert torch.equal(torch.autograd.grad(got, u)[0], torch.autograd.grad(want, u)[0])
