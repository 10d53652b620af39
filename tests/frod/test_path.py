# SPDX-License-Identifier: Apache-2.0
"""path="auto": the cost model counts what math.md's table counts, and the choice follows it."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import frodkernels as fk
from frodkernels.functional import frod_path
from frodkernels.functional.frod_path import NOMINAL_TOKENS, PATHS, SPARSE_COST, choose, costs
from tests.frod.cases import make_layer

sizes = st.integers(1, 10_000)


@given(sizes, sizes, sizes, st.integers(0, 10**6))
def test_dense_costs_are_the_gemms_of_each_order(T, m, n, nnz):
    """Multiply-adds: A 2Tmn + 2Tn^2; B that + Tmn; C 3Tmn + 2mn^2. What remains is sparse."""
    forward, backward = SPARSE_COST[torch.float32]
    cost = costs(T, m, n, nnz, torch.float32, needs_x=True, needs_parameters=True)
    s = nnz + n
    assert cost["activation"] == pytest.approx(2 * T * m * n + 2 * T * n * n + (forward + backward) * s * T)
    assert cost["fold"] == pytest.approx(3 * T * m * n + 2 * T * n * n + forward * s * m + backward * s * T)
    assert cost["materialize"] == pytest.approx(3 * T * m * n + 2 * m * n * n + (forward + backward) * s * m)


@given(sizes, sizes, sizes, st.integers(0, 10**6))
def test_a_forward_costs_its_own_products(T, m, n, nnz):
    forward, _ = SPARSE_COST[torch.bfloat16]
    cost = costs(T, m, n, nnz, torch.bfloat16, needs_x=False, needs_parameters=False)
    s = nnz + n
    assert cost["activation"] == pytest.approx(T * m * n + T * n * n + forward * s * T)
    assert cost["fold"] == pytest.approx(T * m * n + T * n * n + forward * s * m)
    assert cost["materialize"] == pytest.approx(T * m * n + m * n * n + forward * s * m)


@given(sizes, sizes, sizes, st.integers(0, 10**6), st.sampled_from(sorted(SPARSE_COST, key=str)))
def test_costs_rise_with_what_is_needed(T, m, n, nnz, dtype):
    none, x, parameters, both = (
        costs(T, m, n, nnz, dtype, needs_x=a, needs_parameters=b)
        for a, b in ((False, False), (True, False), (False, True), (True, True))
    )
    for path in PATHS:
        assert 0 < none[path] <= min(x[path], parameters[path]) <= max(x[path], parameters[path]) <= both[path]


@pytest.mark.parametrize("dtype", sorted(SPARSE_COST, key=str), ids=str)
def test_every_dtype_has_costs(dtype):
    assert all(cost > 0 for cost in SPARSE_COST[dtype])
    assert all(cost > 0 for cost in frod_path.GPU_SPARSE_COST[dtype])
    assert choose(torch.empty(3, 8, dtype=dtype), 4, 9, True) in PATHS


def test_a_device_has_its_own_costs():
    here = dict(needs_x=True, needs_parameters=True)
    cpu, gpu = (costs(1024, 4096, 4096, 167772, torch.bfloat16, **here, device=device) for device in ("cpu", "cuda"))
    assert gpu["activation"] > cpu["activation"]
    assert cpu == costs(1024, 4096, 4096, 167772, torch.bfloat16, **here)
    assert gpu == costs(1024, 4096, 4096, 167772, torch.bfloat16, **here, device="xpu")


def test_the_choice_is_the_cheapest():
    for T, m, n in itertools.product([1, 64, 1024, 65536], [64, 1024], [64, 1024]):
        for grad, train in itertools.product([False, True], repeat=2):
            x = torch.empty(T, n, device="meta", requires_grad=grad)
            cost = costs(T, m, n, n, torch.float32, needs_x=grad, needs_parameters=train)
            assert cost[choose(x, m, n, train)] == min(cost.values())
            with torch.no_grad():
                cost = costs(T, m, n, n, torch.float32, needs_x=False, needs_parameters=False)
                assert cost[choose(x, m, n, train)] == min(cost.values())


def test_many_tokens_and_few_outputs_materialize_and_few_tokens_do_not():
    assert choose(torch.empty(10**6, 1024, device="meta"), 64, 1000, True) == "materialize"
    assert choose(torch.empty(1, 1024, device="meta"), 1024, 1000, True) == "activation"


def test_auto_takes_the_chosen_path(monkeypatch):
    layer = make_layer(6, 8, 5)
    layer.leaves()
    names = {"activation": "FrodActivation", "fold": "FrodFold", "materialize": "FrodMaterialize"}
    for path in PATHS:
        monkeypatch.setattr("frodkernels.functional.frod.choose", lambda *args, _path=path: _path)
        node = layer().grad_fn
        while "Frod" not in node.name():
            node = node.next_functions[0][0]
        assert node.name() == names[path] + "Backward"


def test_the_choice_is_static_while_compiling(monkeypatch):
    """A branch on the number of tokens would compile again as it changes."""
    seen = []
    monkeypatch.setattr(frod_path, "costs", lambda T, *a, **k: seen.append(T) or costs(T, *a, **k))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for T in (1, 100, 10**6):
        choose(torch.empty(T, 64, device="meta"), 64, 9, True)
    assert seen == [NOMINAL_TOKENS] * 3


def test_a_frozen_layer_is_judged_by_its_forward():
    layer = make_layer(6, 8, 5)
    with torch.no_grad():
        torch.testing.assert_close(layer(), layer(path="activation"))
    assert fk.frod_linear(layer.x, *(layer.U, layer.V, layer.lam, layer.values, layer.pattern)).grad_fn is None


def test_float16_training_never_sums_over_all_tokens_in_float16():
    """g^T x over thousands of tokens overflows float16 where the other orders do not."""
    layer = make_layer(32, 32, 4096, dtype=torch.float16, param_dtype=torch.float32)
    layer.leaves()
    layer.x.data.fill_(1)
    lam, values = torch.autograd.grad(
        layer(path="auto"), (layer.lam, layer.values), torch.full((4096, 32), 20.0).half()
    )
    assert lam.isfinite().all() and values.isfinite().all()
