# SPDX-License-Identifier: Apache-2.0
"""Scattering values to a pattern's positions: arithmetic, bits, layouts, and the way back."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import frodkernels as fk
from frodkernels.reference import sampled as reference
from tests.support import FLOATS, KINDS, LAYOUTS, coo

native = torch.ops.frodkernels.native_scatter_values_
PAIRS = list(itertools.product(FLOATS, FLOATS))
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x):
    return x.contiguous().view(BITS[x.element_size()])


def make(kind, m, n, dtype=torch.float32, values_dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows, cols = coo(kind, m, n, seed)
    weight = torch.randn(m, n, generator=g, dtype=torch.float64).to(dtype)
    values = torch.randn(rows.numel(), generator=g, dtype=torch.float64).to(values_dtype)
    return weight, values, fk.SparsePattern(rows, cols, (m, n)), rows, cols


@pytest.mark.parametrize("dtype, values_dtype", PAIRS, ids=str)
@pytest.mark.parametrize("scale", [1.0, -1.0, 0.37, 0.0])
@pytest.mark.parametrize("accumulate", [True, False])
def test_rounded_once_from_the_wider_type(dtype, values_dtype, scale, accumulate):
    weight, values, pattern, rows, cols = make("random", 40, 60, dtype, values_dtype)
    acc = torch.float64 if torch.float64 in (dtype, values_dtype) else torch.float32
    got, old = weight.clone(), weight.new_empty(pattern.nnz)
    native(got, values, *pattern.csr, scale, accumulate, old)
    change = torch.tensor(scale, dtype=acc) * values.to(acc)
    exact = weight[rows, cols].double() + scale * values.double() if accumulate else scale * values.double()
    touched = got[rows, cols]
    # one rounding of sums in acc: half a unit in the last place, and acc's own
    eps = torch.finfo(dtype).eps / 2 + 2 * torch.finfo(acc).eps
    room = eps * (exact.abs() + weight[rows, cols].double().abs() + change.double().abs()) + torch.finfo(dtype).tiny
    assert ((touched.double() - exact).abs() <= room).all()
    assert torch.equal(old, weight[rows, cols])
    rest = torch.ones(weight.shape, dtype=torch.bool).index_put((rows, cols), torch.tensor(False))
    assert torch.equal(bits(got[rest]), bits(weight[rest]))
    plain, plain_old = weight.clone(), weight.new_empty(pattern.nnz)
    reference.scatter_values_(plain, values, *pattern.csr, scale, accumulate, plain_old)
    torch.testing.assert_close(got, plain, rtol=2 * eps, atol=torch.finfo(dtype).tiny)
    assert torch.equal(old, plain_old)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_way_back_is_exact(dtype, kind):
    """Bit for bit, whatever the weight holds: zeros of both signs, subnormal numbers, infinities, NaN payloads."""
    weight, values, pattern, *_ = make(kind, 24, 31, dtype)
    high, low = (torch.randint(-(2**15), 2**15, weight.shape).to(BITS[weight.element_size()]) for _ in range(2))
    weight = ((high << (8 * weight.element_size() - 16)) | (low & 0x7FFF if dtype.itemsize > 2 else 0)).view(dtype)
    special = 0x7F81 if dtype == torch.bfloat16 else 0x7C01  # a NaN that arithmetic makes quiet
    weight.view(-1)[::3] = torch.tensor(special, dtype=torch.int16).view(dtype) if dtype.itemsize == 2 else float("inf")
    bits(weight).view(-1)[::5] += 1  # infinities become NaN that arithmetic makes quiet
    before = weight.clone()
    old = weight.new_empty(pattern.nnz)
    fk.scatter_values_(weight, values, pattern, scale=0.5, old=old)
    assert pattern.nnz < 10 or not torch.equal(bits(weight), bits(before))  # one huge entry may stay what it is
    assert fk.scatter_values_(weight, old, pattern, accumulate=False) is weight
    assert torch.equal(bits(weight), bits(before))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "expanded" not in name])
def test_every_layout(layout, dtype):
    weight, values, pattern, *_ = make("random", 20, 33, dtype, dtype)
    got = LAYOUTS[layout](weight.clone())
    fk.scatter_values_(got, torch.stack([values, values], 1)[:, 1], pattern, scale=2.0)
    assert torch.equal(got.contiguous(), fk.scatter_values_(weight, values, pattern, scale=2.0))


def test_values_and_entries_change_places():
    weight, values, pattern, rows, cols = make("random", 20, 33)
    before, given = weight.clone(), values.clone()
    fk.scatter_values_(weight, values, pattern, accumulate=False, old=values)
    assert torch.equal(weight[rows, cols], given) and torch.equal(values, before[rows, cols])
    fk.scatter_values_(weight, values, pattern, accumulate=False, old=values)
    assert torch.equal(weight, before) and torch.equal(values, given)
    inside = weight.view(-1)[: pattern.nnz]  # values that are part of the weight
    want = weight.index_put((rows, cols), inside.clone())
    assert torch.equal(fk.scatter_values_(weight, inside, pattern, accumulate=False), want)


def test_it_compiles():
    weight, values, pattern, *_ = make("random", 20, 33)
    old = weight.new_empty(pattern.nnz)
    compiled = torch.compile(fk.scatter_values_, fullgraph=True, backend="aot_eager")
    want_old = weight.new_empty(pattern.nnz)
    want = fk.scatter_values_(weight.clone(), values, pattern, scale=0.5, old=want_old)
    assert torch.equal(compiled(weight, values, pattern, scale=0.5, old=old), want)
    assert torch.equal(weight, want) and torch.equal(old, want_old)


@pytest.mark.parametrize("m, n", [(0, 0), (0, 5), (5, 0), (5, 7)])
def test_nothing_to_scatter(m, n):
    weight, values, pattern, *_ = make("empty", m, n)
    assert torch.equal(fk.scatter_values_(weight.clone(), values, pattern, old=weight.new_empty(0)), weight)


@pytest.mark.parametrize("shape", [(3, 70_001), (70_001, 3), (1, 2**20)])
def test_wide_matrices_and_any_number_of_threads(shape):
    m, n = shape
    flat = torch.randperm(m * n)[: m * n // 3]
    pattern = fk.SparsePattern(flat // n, flat % n, shape)
    values, weight = torch.randn(pattern.nnz), torch.randn(shape)
    want = weight.clone().view(-1).index_add_(0, flat, values).view(shape)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(fk.scatter_values_(weight.clone(), values, pattern), want)


@settings(max_examples=60)
@given(st.data())
def test_switching_through_many_adapters_comes_back(data):
    """Any stack of scatters is undone by putting the old entries back in reverse order."""
    m, n = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    dtype = data.draw(st.sampled_from(FLOATS))
    weight = torch.randn(m, n).to(dtype)
    start, stack = weight.clone(), []
    for seed in range(data.draw(st.integers(1, 4))):
        _, values, pattern, *_ = make(data.draw(st.sampled_from(KINDS)), m, n, dtype, torch.float32, seed)
        old = weight.new_empty(pattern.nnz)
        fk.scatter_values_(weight, values, pattern, scale=data.draw(st.floats(-2, 2)), old=old)
        stack.append((old, pattern))
    for old, pattern in reversed(stack):
        fk.scatter_values_(weight, old, pattern, accumulate=False)
    assert torch.equal(bits(weight), bits(start))


# ---- misuse ----------------------------------------------------------------------------------------------------------


def bad_calls():
    weight, values, pattern, *_ = make("random", 6, 8)
    good = dict(weight=weight, values=values, pattern=pattern, scale=1.0, old=None)
    yield "weight", dict(good, weight=weight.tolist())
    yield "weight", dict(good, weight=weight.int())
    yield "weight", dict(good, weight=weight[:5])
    yield "weight", dict(good, weight=weight[0])
    yield "weight", dict(good, weight=weight[:1].expand(6, 8))
    yield "weight", dict(good, weight=weight.to_sparse())
    yield "values", dict(good, values=values[:-1])
    yield "values", dict(good, values=values.long())
    yield "values", dict(good, values=values.to("meta"))
    yield "values", dict(good, values=None)
    yield "pattern", dict(good, pattern=pattern.coo())
    yield "scale", dict(good, scale="1")
    yield "scale", dict(good, scale=True)
    yield "scale", dict(good, scale=torch.tensor(1.0))
    yield "old", dict(good, old=values[:-1])
    yield "old", dict(good, old=values.double())
    yield "old", dict(good, old=torch.stack([values, values], 1)[:, 0])
    yield "old", dict(good, old=weight.view(-1)[: pattern.nnz])
    yield "weight", dict(good, weight=torch.zeros(99).as_strided((6, 8), (1, 1)))
    yield "weight", dict(good, weight=torch.zeros(99).as_strided((6, 8), (8, 2)))


@pytest.mark.parametrize("name, arguments", list(bad_calls()), ids=lambda x: x if isinstance(x, str) else "")
def test_bad_arguments_are_named_and_change_nothing(name, arguments):
    weight = arguments["weight"]
    before = weight.clone() if isinstance(weight, torch.Tensor) else None
    with pytest.raises(ValueError, match=f"^{name} "):
        fk.scatter_values_(**arguments)
    if before is not None and before.layout == torch.strided:
        assert torch.equal(weight, before)


@pytest.mark.parametrize("which", ["weight", "values"])
def test_gradients_are_refused_not_lost(which):
    weight, values, pattern, *_ = make("random", 6, 8)
    {"weight": weight, "values": values}[which].requires_grad_()
    with pytest.raises(RuntimeError, match="no_grad"):
        fk.scatter_values_(weight, values, pattern)
    with torch.no_grad():
        fk.scatter_values_(weight, values, pattern)


def test_autograd_notices_that_the_weight_changed():
    weight, values, pattern, *_ = make("random", 6, 8)
    x = torch.randn(2, 8, requires_grad=True)
    y = x @ weight.t()
    fk.scatter_values_(weight, values, pattern)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
