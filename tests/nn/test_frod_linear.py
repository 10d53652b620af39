# SPDX-License-Identifier: Apache-2.0
"""fk.nn.FrodLinear: construction, evaluation cache, merge, moving, saving."""

import copy
import pickle

import pytest
import torch

import frodkernels as fk


def make(n: int = 24, m: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0) -> fk.nn.FrodLinear:
    generator = torch.Generator().manual_seed(seed)
    linear = torch.nn.Linear(n, m, dtype=dtype)
    layer = fk.nn.FrodLinear.from_linear(linear, sparse_rate=0.1, generator=generator)
    with torch.no_grad():
        layer.values.normal_(std=0.1)
    return layer


def fresh(layer: fk.nn.FrodLinear, x: torch.Tensor) -> torch.Tensor:
    """The layer's output without any cache."""
    return fk.frod_linear(x, layer.U, layer.V, layer.lam, layer.values, layer.pattern, layer.bias)


@pytest.mark.parametrize("m, n", [(16, 24), (24, 16), (20, 20), (1, 5)])
def test_from_linear_reproduces_the_layer(m, n):
    linear = torch.nn.Linear(n, m, dtype=torch.float64)
    x = torch.randn(3, 7, n, dtype=torch.float64)
    layer = fk.nn.FrodLinear.from_linear(linear)
    torch.testing.assert_close(layer(x), linear(x))
    assert not layer.values.any() and (layer.pattern.nnz >= 1 or n == 1)


def test_category_shares_one_basis_and_pattern():
    linears = [torch.nn.Linear(24, 16, dtype=torch.float64) for _ in range(3)]
    V = fk.nn.joint_basis([linear.weight for linear in linears])
    pattern = make().pattern
    layers = [fk.nn.FrodLinear.from_linear(linear, V=V, pattern=pattern) for linear in linears]
    x = torch.randn(5, 24, dtype=torch.float64)
    for linear, layer in zip(linears, layers, strict=True):
        assert layer.V.data_ptr() == V.data_ptr() and layer.pattern is pattern
        torch.testing.assert_close(layer(x), linear(x))


def test_joint_basis_matches_peft():
    model = pytest.importorskip("peft.tuners.frod.model")
    for rows in (20, 3):
        weights = [torch.randn(rows, 24) for _ in range(3)]
        torch.testing.assert_close(fk.nn.joint_basis(weights), model._projection_from_weights(weights, 1e-3))


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.4, 0.9, 1.0])
def test_random_pattern_is_off_diagonal_and_of_the_size_asked_for(rate):
    from frodkernels.functional.frod_init import random_pattern

    pattern = random_pattern(30, rate, torch.Generator().manual_seed(1))
    rows, cols = pattern.coo()
    assert (rows != cols).all()
    assert pattern.nnz == min(int(rate * 900), 870)


@pytest.mark.parametrize("tokens", [1, 40])
def test_eval_uses_the_cached_weight_and_sees_every_change(tokens):
    layer = make().eval()
    x = torch.randn(tokens, 24)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(layer(x), fresh(layer, x))
        assert layer._cache.nbytes == 16 * 24 * 4
        for change in (
            lambda: layer.values.data.copy_(torch.randn_like(layer.values)),
            lambda: layer.lam.data.mul_(2),
            lambda: layer.lam.add_(1),
            lambda: setattr(layer, "lam", torch.nn.Parameter(torch.randn(24))),
            lambda: layer.V.mul_(0.5),
            lambda: layer.load_state_dict(make(seed=3).state_dict()),
            lambda: layer.double().float(),
        ):
            change()
            for _ in range(3):
                torch.testing.assert_close(layer(x), fresh(layer, x))


def test_cache_is_left_alone_while_training_and_dropped_by_train():
    layer = make().eval()
    x = torch.randn(30, 24)
    with torch.no_grad():
        layer(x), layer(x)
    assert layer._cache.nbytes
    layer.eval()
    assert layer._cache.nbytes
    layer(x).sum().backward()  # gradients wanted: the cache is not used
    assert layer.lam.grad is not None
    layer.train()
    assert not layer._cache.nbytes
    with torch.no_grad():
        layer(x)
    assert not layer._cache.nbytes


def test_cache_budget_bounds_all_layers_together():
    from frodkernels.nn.eval_cache import CacheBudget

    budget = CacheBudget(16 * 24 * 4)
    first, second = make(), make(seed=1)
    layers = [
        fk.nn.FrodLinear(each.U, each.V, each.lam, each.values, each.pattern, cache_budget=budget).eval()
        for each in (first, second)
    ]
    x = torch.randn(30, 24)
    with torch.no_grad():
        for _ in range(2):
            for layer in layers:
                torch.testing.assert_close(layer(x), fresh(layer, x))
    assert budget.used == 16 * 24 * 4


def test_merge_is_the_forward():
    layer = make(dtype=torch.float64)
    x = torch.randn(5, 24, dtype=torch.float64)
    merged = layer.merge()
    assert type(merged) is torch.nn.Linear
    torch.testing.assert_close(merged(x), layer(x))


def test_copies_and_files():
    layer = make().eval()
    x = torch.randn(5, 24)
    with torch.no_grad():
        layer(x), layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not other._cache.nbytes
        assert torch.equal(other(x), fresh(layer, x))
        with torch.no_grad():
            other.lam.mul_(2)
        assert not torch.equal(other(x), fresh(layer, x))
    assert copy.deepcopy(layer).pattern is layer.pattern
    assert set(layer.state_dict()) == {"U", "V", "lam", "values", "bias", "_extra_state"}


def test_a_saved_layer_brings_its_pattern():
    saved, other = make(seed=1), make(seed=2)
    x = torch.randn(5, 24)
    assert not torch.equal(saved.pattern.coo()[0], other.pattern.coo()[0])
    other.eval()
    with torch.no_grad():
        other(x)
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other(x), fresh(saved, x))
    with torch.no_grad():
        torch.testing.assert_close(other(x), fresh(saved, x))


def test_a_pattern_that_does_not_fit_is_refused():
    layer = make()
    before = layer.pattern
    indices = torch.stack(before.coo())
    for broken in (indices[:, :-1], indices + 24, indices.float(), indices.flip(1)[:, [0] * indices.shape[1]]):
        with pytest.raises(ValueError):
            layer.set_extra_state(broken)
    assert layer.pattern is before


def test_autocast_and_mixed_dtypes():
    layer = make()
    x = torch.randn(5, 24)
    for mode in (layer.train(), layer.eval()):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            for _ in range(3):
                y = mode(x)
                assert y.dtype == torch.bfloat16
                torch.testing.assert_close(y.float(), fresh(layer, x).float(), rtol=0.05, atol=0.05)
    half = make(dtype=torch.bfloat16)
    half.lam.data, half.values.data = half.lam.data.float(), half.values.data.float()
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_trains_lam_values_and_bias_only():
    layer = make()
    layer(torch.randn(5, 24)).square().sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lam", "values", "bias"}


def test_bad_factors_are_named():
    layer = make()
    with pytest.raises(ValueError, match="lam"):
        fk.nn.FrodLinear.from_factors(layer.U, layer.V, layer.lam[:-1], layer.values, layer.pattern)
    with pytest.raises(ValueError, match="linear"):
        fk.nn.FrodLinear.from_linear(torch.nn.Conv1d(3, 3, 1))
    for weights in ([], torch.randn(3, 3)):
        with pytest.raises(ValueError, match="weights"):
            fk.nn.joint_basis(weights)
    with pytest.raises(ValueError, match="U"):
        fk.nn.FrodLinear.from_factors(None, layer.V, layer.lam, layer.values, layer.pattern)
    with pytest.raises(NotImplementedError, match="U"):
        frozen = layer.U.clone().requires_grad_()
        fk.nn.FrodLinear.from_factors(frozen, layer.V, layer.lam, layer.values, layer.pattern)


def test_repr_says_what_it_is():
    assert "in_features=24, out_features=16" in repr(make())
