# SPDX-License-Identifier: Apache-2.0
"""side="auto": the cost model counts the products of each side, and the choice follows it."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import frodkernels as fk
from frodkernels.functional import hra as functional
from frodkernels.functional import hra_side
from frodkernels.functional.hra_side import NOMINAL_TOKENS, PRECISE_SHARE, PRECISE_WORK, SIDES, choose, costs, estimates
from frodkernels.ops import householder as ops
from tests.householder.cases import make_layer

sizes = st.integers(1, 10_000)
ranks = st.integers(1, 128)
NEEDS = list(itertools.product([False, True], repeat=2))


def counted(layer, side, monkeypatch):
    """Multiply-adds of the tall-skinny products that a forward and a backward of the layer really ask for.

    Those of the layer's tensors alone: products of one thin matrix with another do not depend on T.
    """
    r = layer.u.shape[1]
    total = []

    def forward(x, left, right, *rest):
        T, n = x.shape
        if n != r:
            total.append(T * n * r + (0 if right is None else T * right.shape[0] * r))
        return real["householder"](x, left, right, *rest)

    def backward(g, x, c, left, right, base, needs, *rest):
        (T, n), m = x.shape, left.shape[0]
        total.append(T * m * r + needs[0] * T * n * r + needs[1] * T * (n + m) * r)
        return real["householder_backward"](g, x, c, left, right, base, needs, *rest)

    def gradient(x, q):
        if x.shape[1] != r:
            total.append(x.shape[0] * x.shape[1] * r)
        return real["householder_gradient"](x, q)

    real = {name: getattr(ops, name) for name in ("householder", "householder_backward", "householder_gradient")}
    for name, spy in zip(real, (forward, backward, gradient), strict=True):
        monkeypatch.setattr(ops, name, spy)
    with fk.backend("reference"):  # natively the input side's products are one call
        y = layer(side=side)
        if y.requires_grad:
            y.sum().backward()
    monkeypatch.undo()
    return sum(total)


@pytest.mark.parametrize("needs_x, needs_u", NEEDS)
@pytest.mark.parametrize("m, n, r, T", [(24, 40, 3, 17), (40, 24, 5, 9), (16, 16, 2, 300)])
@pytest.mark.parametrize("side", SIDES)
def test_costs_are_the_products_of_each_side(m, n, r, T, needs_x, needs_u, side, monkeypatch):
    layer = make_layer(m, n, r, T)
    names = [name for name, need in (("x", needs_x), ("u", needs_u)) if need]
    if names:
        layer.leaves(*names)
    assert costs(T, m, n, r, needs_x, needs_u)[side] == counted(layer, side, monkeypatch)


@given(sizes, sizes, sizes, ranks)
def test_costs_rise_with_what_is_needed(T, m, n, r):
    none, x, u, both = (costs(T, m, n, r, *needs) for needs in NEEDS[:1] + NEEDS[2:3] + NEEDS[1:2] + NEEDS[3:])
    for side in SIDES:
        assert 0 < none[side] <= min(x[side], u[side]) <= max(x[side], u[side]) <= both[side]


def test_the_choice_is_the_cheapest():
    for T, m, n in itertools.product([1, 64, 1024, 65536], [64, 1024], [64, 1024]):
        for needs_x, needs_u in NEEDS:
            x = torch.empty(T, n, device="meta", requires_grad=needs_x)
            u = torch.empty(n, 8, device="meta", requires_grad=needs_u)
            cost = estimates(T, m, n, 8, needs_x, needs_u)
            assert cost[choose(x, m, u)] == min(cost.values())
            with torch.no_grad():
                cost = estimates(T, m, n, 8, False, False)
                assert cost[choose(x, m, u)] == min(cost.values())


def test_few_outputs_and_many_tokens_go_out_few_inputs_go_in():
    u = {n: torch.empty(n, 8, device="meta", requires_grad=True) for n in (256, 4096)}
    assert choose(torch.empty(10**5, 4096, device="meta"), 256, u[4096]) == "output"
    assert choose(torch.empty(10**5, 256, device="meta"), 4096, u[256]) == "input"
    assert choose(torch.empty(1, 4096, device="meta"), 256, u[4096]) == "input"  # W q is paid once per call


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@given(T=sizes, m=sizes, n=sizes, r=ranks)
def test_precise_gradients_where_they_cost_little(dtype, T, m, n, r):
    """16-bit x beside float32 u: the output side, unless the two products with W would weigh."""
    x = torch.empty(T, n, device="meta", dtype=dtype)
    u = torch.empty(n, r, device="meta", requires_grad=True)
    light = PRECISE_SHARE * T >= m or m * n * r <= PRECISE_WORK
    cost = estimates(T, m, n, r, False, True)
    assert choose(x, m, u) == ("output" if light else min(SIDES, key=cost.__getitem__))
    cheapest = min(SIDES, key=estimates(T, m, n, r, False, False).__getitem__)
    assert choose(x, m, u.detach()) == cheapest  # no gradient, no matter
    assert choose(x, m, u.to(dtype)) == choose(x.float(), m, u) == min(SIDES, key=cost.__getitem__)


@pytest.mark.parametrize("side", SIDES)
def test_auto_takes_the_chosen_side(side, monkeypatch):
    layer = make_layer(6, 8, 2, 5)
    called = []
    for name, label in (("HRAInput", "input"), ("HRAOutput", "output")):
        function = getattr(functional, name)

        def apply(*args, _function=function, _label=label):
            called.append(_label)
            return _function.apply(*args)

        monkeypatch.setattr(functional, name, type("Spy", (), {"apply": staticmethod(apply)}))
    monkeypatch.setattr(functional, "choose", lambda *args: side)
    layer()
    assert called == [side]
    layer(side="input"), layer(side="output")
    assert called == [side, "input", "output"]


def test_the_choice_is_static_while_compiling(monkeypatch):
    """A branch on the number of tokens would compile again as it changes."""
    seen = []
    monkeypatch.setattr(hra_side, "costs", lambda T, *a, **k: seen.append(T) or costs(T, *a, **k))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for T in (1, 100, 10**6):
        choose(torch.empty(T, 64, device="meta"), 64, torch.empty(64, 4, device="meta"))
    assert seen == [NOMINAL_TOKENS] * 3
