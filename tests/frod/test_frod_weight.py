# SPDX-License-Identifier: Apache-2.0
"""frod_weight: the dense weight, its gradients, and merging with it."""

import pytest
import torch

import frodkernels as fk
from frodkernels.reference import frod as reference
from tests.frod.cases import PATHS, make_layer
from tests.support import DTYPE_IDS, DTYPES, KINDS, assert_no_worse_than_torch

SHAPES = [(24, 40), (40, 24), (33, 33), (1, 20), (20, 1)]


def factors(layer):
    return layer.U, layer.V, layer.lam, layer.values, layer.pattern


@pytest.mark.parametrize("dtype, param_dtype", DTYPES, ids=DTYPE_IDS)
def test_value_and_gradients(dtype, param_dtype):
    for m, n in SHAPES[:3]:
        layer = make_layer(m, n, 1, dtype=dtype, param_dtype=param_dtype)
        leaves = layer.leaves("lam", "values")
        W, same = fk.frod_weight(*factors(layer)), reference.frod_weight(*factors(layer))
        G = torch.randn(m, n, dtype=torch.float64).to(dtype)
        got, plain = (torch.autograd.grad(t, leaves, G) for t in (W, same))
        wide = layer.doubled()
        wide_leaves = wide.leaves("lam", "values")
        exact = wide.weight()
        right = torch.autograd.grad(exact, wide_leaves, G.double())
        assert W.dtype == dtype and [t.dtype for t in got] == [param_dtype] * 2
        for ours, correct, others in zip((W, *got), (exact, *right), (same, *plain), strict=True):
            if dtype == param_dtype == torch.float64:
                torch.testing.assert_close(ours, correct, rtol=1e-12, atol=1e-12)
            else:
                assert_no_worse_than_torch(ours, correct, others)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, backend):
    layer = make_layer(5, 6, 1, dtype=torch.float64, kind=kind)
    leaves = layer.leaves("lam", "values")
    with fk.backend(backend):
        assert torch.autograd.gradcheck(
            lambda lam, values: fk.frod_weight(layer.U, layer.V, lam, values, layer.pattern), leaves
        )


def test_merging_is_the_forward():
    for m, n in SHAPES:
        layer = make_layer(m, n, 9, dtype=torch.float64)
        merged = torch.nn.functional.linear(layer.x, fk.frod_weight(*factors(layer)), layer.bias)
        for path in PATHS:
            torch.testing.assert_close(layer(path=path), merged, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", [("lam",), ("values",), ("lam", "values"), ()], ids=str)
def test_gradients_only_where_asked(wanted):
    layer = make_layer(7, 9, 1, dtype=torch.float64)
    leaves = layer.leaves(*wanted) if wanted else []
    W = fk.frod_weight(*factors(layer))
    assert W.requires_grad == bool(wanted)
    if wanted:
        got = torch.autograd.grad(W.square().sum(), leaves)
        torch.testing.assert_close(got, torch.autograd.grad(layer.weight().square().sum(), leaves))


def test_an_expanded_gradient():
    layer = make_layer(7, 9, 1, dtype=torch.float64)
    leaves = layer.leaves("lam", "values")
    got = torch.autograd.grad(fk.frod_weight(*factors(layer)).sum(), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(layer.weight().sum(), leaves))


@pytest.mark.parametrize("m, n", [(0, 0), (5, 0), (0, 5)])
def test_no_features(m, n):
    layer = make_layer(m, n, 1)
    leaves = layer.leaves("lam", "values")
    W = fk.frod_weight(*factors(layer))
    assert W.shape == (m, n) and not W.any()
    assert all(not g.any() for g in torch.autograd.grad(W.sum(), leaves))


def test_V_follows_U():
    layer = make_layer(7, 9, 1)
    W = fk.frod_weight(layer.U.bfloat16(), *factors(layer)[1:])
    assert W.dtype == torch.bfloat16


def test_differentiating_twice_is_refused():
    layer = make_layer(7, 9, 1)
    lam, _ = layer.leaves("lam", "values")
    with pytest.raises(RuntimeError, match="differentiable once"):  # grad(inputs=...) of a gradient would return None
        torch.autograd.grad(fk.frod_weight(*factors(layer)).square().sum(), lam, create_graph=True)
