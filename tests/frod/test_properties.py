# SPDX-License-Identifier: Apache-2.0
"""Algebra of the whole layer, for any sizes, pattern and layout."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import frodkernels as fk
from tests.frod.cases import PATHS, make_layer
from tests.support import KINDS, LAYOUTS

few = settings(max_examples=40)


@st.composite
def layers(draw):
    m, n, T = draw(st.integers(1, 24)), draw(st.integers(1, 24)), draw(st.integers(0, 40))
    kind, layout = draw(st.sampled_from(KINDS)), draw(st.sampled_from(sorted(LAYOUTS)))
    layer = make_layer(m, n, T, dtype=torch.float64, kind=kind, bias=draw(st.booleans()), seed=draw(st.integers(0, 99)))
    layer.x = LAYOUTS[layout](layer.x.t()).t()
    return layer


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@few
@given(layers())
def test_the_paths_are_one_map(layer):
    leaves = layer.leaves()
    want = layer.exact()
    grads = torch.autograd.grad(want.square().sum(), leaves)
    for path in ("auto", *PATHS):
        y = layer(path=path)
        close(y, want)
        for got, right in zip(torch.autograd.grad(y.square().sum(), leaves), grads, strict=True):
            close(got, right)


@few
@given(layers(), st.sampled_from(PATHS), st.floats(-2, 2))
def test_linear_in_x(layer, path, a):
    layer.bias = None
    other = torch.randn(layer.x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    close(layer(a * layer.x + other, path=path), a * layer(path=path) + layer(other, path=path))


@few
@given(layers(), st.sampled_from(PATHS))
def test_linear_in_lam_and_values(layer, path):
    layer.bias = None
    y = layer(path=path)
    layer.lam, layer.values = 3 * layer.lam, 3 * layer.values
    close(layer(path=path), 3 * y)


@few
@given(layers(), st.sampled_from(PATHS), st.randoms(use_true_random=False))
def test_permuted_tokens_are_permuted_outputs(layer, path, random):
    order = list(range(layer.x.shape[0]))
    random.shuffle(order)
    close(layer(layer.x[order], path=path), layer(path=path)[order])


@few
@given(layers(), st.sampled_from(PATHS))
def test_zero_entries_leave_the_diagonal(layer, path):
    layer.values = torch.zeros_like(layer.values)
    want = layer.x @ layer.V @ torch.diag(layer.lam) @ layer.U.t()
    close(layer(path=path), want if layer.bias is None else want + layer.bias)


@few
@given(layers(), st.sampled_from(PATHS))
def test_merge_is_forward(layer, path):
    W = fk.frod_weight(layer.U, layer.V, layer.lam, layer.values, layer.pattern)
    close(layer(path=path), torch.nn.functional.linear(layer.x, W, layer.bias))
