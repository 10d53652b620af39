# SPDX-License-Identifier: Apache-2.0
"""Sampled products and scatters on a device, every backend: right by the derived bar, repeatable; and their layers."""

import pytest
import torch
import torch.nn.functional as F

import frodkernels as fk
from frodkernels.ops import sampled as ops
from frodkernels.reference import sampled as reference
from tests.sampled.cases import SAMPLED_DTYPES, make_sampling
from tests.support import FLOATS, KINDS, LAYOUTS, assert_no_worse_than_torch, names

OPS = ("sampled_product", "scatter_values_", "sparse_core", "sparse_core_backward")
WAYS = pytest.mark.parametrize("tiled", [False, True], ids=["entries", "blocks"])


def on(device, arguments):
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments]


def check(place, *cases, tiled):
    got = [ops.sampled_product(*on(place.device, case.by_columns), tiled).cpu() for case in cases]
    plain = [reference.sampled_product(*case.by_columns) for case in cases]
    assert_no_worse_than_torch(torch.cat(got), torch.cat([case.exact() for case in cases]), torch.cat(plain))


@pytest.mark.parametrize("kind", ["native", "triton"])
def test_every_backend_serves_cuda(place, kind):
    """On a GPU both must be there: everything else in this file would skip what is missing."""
    kind = "native" if place.type == "cpu" else kind
    assert place.has(kind, OPS) is None, place.has(kind, OPS)


@WAYS
@pytest.mark.parametrize("features, dtype", SAMPLED_DTYPES, ids=[names(*pair) for pair in SAMPLED_DTYPES])
@pytest.mark.parametrize("m, n, T", [(19, 23, 1), (70, 66, 5), (130, 70, 257), (257, 300, 520)])
def test_against_float64(place, backend, m, n, T, features, dtype, tiled):
    check(place, *(make_sampling(m, n, T, "random", features, dtype, seed) for seed in range(3)), tiled=tiled)


@WAYS
@pytest.mark.parametrize("kind", KINDS)
def test_every_pattern(place, backend, kind, tiled):
    seeds = 24 if kind in ("one", "gaps") else 3
    check(place, *(make_sampling(33, 40, 37, kind, torch.bfloat16, seed=seed) for seed in range(seeds)), tiled=tiled)


@WAYS
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "expanded" not in name])
def test_every_layout(place, backend, layout, tiled):
    case = make_sampling(33, 40, 70, "random", torch.bfloat16)
    a, b = (LAYOUTS[layout](x.to(place.device)) for x in (case.a, case.b))
    got = ops.sampled_product(a, b, *on(place.device, case.pattern.csc), case.dtype, tiled)
    assert_no_worse_than_torch(got.cpu(), case.exact(), reference.sampled_product(*case.by_columns))


@WAYS
def test_the_same_bits_again(place, backend, tiled):
    case = make_sampling(150, 170, 600, "random", torch.bfloat16)
    arguments = on(place.device, case.by_columns)
    first = ops.sampled_product(*arguments, tiled)
    assert all(torch.equal(ops.sampled_product(*arguments, tiled), first) for _ in range(3))


@pytest.mark.parametrize("values_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scatters_and_the_way_back(place, backend, dtype, values_dtype):
    case = make_sampling(40, 60, 1)
    weight = torch.randn(40, 60, dtype=torch.float64).to(dtype)
    values = torch.randn(case.pattern.nnz, dtype=torch.float64).to(values_dtype)
    plain = weight.clone()
    reference.scatter_values_(plain, values, *case.pattern.csr, 0.5, True, None)
    got = weight.to(place.device)
    old = got.new_empty(case.pattern.nnz)
    fk.scatter_values_(got, values.to(place.device), case.pattern, scale=0.5, old=old)
    torch.testing.assert_close(got.cpu(), plain)
    fk.scatter_values_(got, old, case.pattern, accumulate=False)
    assert torch.equal(got.cpu(), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shira_and_paca_layers_train(place, backend, dtype):
    linear = torch.nn.Linear(40, 24, dtype=dtype)
    x, g = (torch.randn(9, k).to(place.device, dtype) for k in (40, 24))
    shira = fk.nn.SparseDeltaLinear.from_linear(linear, 3).to(place.device)
    with torch.no_grad():
        shira.values.normal_()
    paca = fk.nn.PaCALinear.from_linear(torch.nn.Linear(40, 24, dtype=dtype), 4).to(place.device)
    changed = linear.weight.double().index_put(
        tuple(i.to(place.device) for i in shira.pattern.coo()), shira.values.double(), accumulate=True
    )
    tolerance = dict(rtol=0.05, atol=0.1) if dtype == torch.bfloat16 else dict(rtol=1e-4, atol=1e-4)
    for layer, weight, trained in ((shira, changed, shira.values), (paca, paca.weight.double(), paca.column_weight)):
        bias = shira.base.bias if layer is shira else paca.bias
        y = layer(x)
        want = F.linear(x.double(), weight, bias.double())
        torch.testing.assert_close(y.double(), want, **tolerance)
        (grad,) = torch.autograd.grad(y, trained, g)
        dense = g.double().t() @ x.double()
        exact = dense[shira.pattern.to(place.device).coo()] if layer is shira else dense[:, paca.columns]
        torch.testing.assert_close(grad.double(), exact, **tolerance)
    before = shira.base.weight.detach().clone()
    shira.merge_()
    torch.testing.assert_close(shira(x).double(), F.linear(x.double(), changed, shira.base.bias.double()), **tolerance)
    assert torch.equal(shira.unmerge_().base.weight, before)
