# SPDX-License-Identifier: Apache-2.0
"""16-bit models: no worse than PEFT against float64, and PEFT's dtypes everywhere."""

import copy

import pytest
import torch

import frodkernels as fk
from tests.peft.models import IN, Tiny, frod, layers, shake, x

HALF = [torch.bfloat16, torch.float16]


def layer_case(dtype, autocast_adapter_dtype=True):
    """(swapped layer, PEFT's, the same numbers in float64)."""
    model = frod(Tiny().to(dtype))
    if autocast_adapter_dtype:
        assert layers(model)[0].frod_lambda_l["default"].dtype == torch.float32
    else:
        for layer in layers(model):
            layer.frod_lambda_l.to(dtype), layer.frod_lambda_s_values.to(dtype)
    plain = copy.deepcopy(model)
    fk.peft.accelerate(model)
    exact = copy.deepcopy(plain).double()
    return layers(model)[0], layers(plain)[0], layers(exact)[0]


def assert_no_worse(got, peft, exact):
    """Error within 1.5 times PEFT's own, plus half a unit of rounding."""
    error, peft_error = (got.double() - exact).norm(), (peft.double() - exact).norm()
    floor = 0.5 * torch.finfo(got.dtype).eps * exact.norm()
    assert torch.isfinite(got).all()
    assert error <= 1.5 * peft_error + floor, f"{error=:.2e} {peft_error=:.2e} {floor=:.2e}"


def step(layer, inputs, g):
    layer.zero_grad()
    inputs = inputs.clone().requires_grad_()
    y = layer(inputs)
    y.backward(g.to(y.dtype))
    return y, inputs.grad, layer.frod_lambda_l["default"].grad, layer.frod_lambda_s_values["default"].grad


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("same", [False, True], ids=["fp32 adapter", "16-bit adapter"])
def test_half_precision_step(dtype, same):
    layer, plain, exact = layer_case(dtype, not same)
    inputs, g = x(64, IN, dtype=dtype), x(64, 40, dtype=dtype, seed=6)
    got, peft, want = step(layer, inputs, g), step(plain, inputs, g), step(exact, inputs.double(), g)
    for a, b, c in zip(got, peft, want, strict=True):
        assert a.dtype == b.dtype
        assert_no_worse(a, b, c)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_evaluation(dtype):
    layer, plain, exact = (layer.eval() for layer in layer_case(dtype))
    with torch.no_grad():
        for T in (1, 1, 64):
            inputs = x(T, IN, dtype=dtype)
            got, peft, want = layer(inputs), plain(inputs), exact(inputs.double())
            assert got.dtype == peft.dtype
            assert_no_worse(got, peft, want)
    assert layer._fast.budget.used


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("train", [True, False])
def test_autocast_keeps_pefts_dtypes(dtype, x_dtype, train):
    layer, plain, exact = (layer.train(train) for layer in layer_case(dtype))
    inputs, g = x(64, IN, dtype=x_dtype), x(64, 40, seed=6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, peft = step(layer, inputs, g), step(plain, inputs, g)
    want = step(exact, inputs.double(), g)
    for a, b, c in zip(got, peft, want, strict=True):
        assert a.dtype == b.dtype
        # autocast rounds to bfloat16 inside, whatever the dtype of the result
        a, b = (t.to(torch.bfloat16) for t in (a, b))
        assert_no_worse(a, b, c)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        for _ in range(2):
            a, b = layer.eval()(inputs), plain.eval()(inputs)
            assert a.dtype == b.dtype
            assert_no_worse(a.to(torch.bfloat16), b.to(torch.bfloat16), want[0])


def test_float64():
    model = frod(Tiny().double())
    plain = copy.deepcopy(model)
    fk.peft.accelerate(model)
    inputs = x(9, IN, dtype=torch.float64)
    torch.testing.assert_close(model(inputs), plain(inputs), rtol=1e-12, atol=1e-12)


def test_wider_input_than_model():
    """PEFT casts the adapter to the input's dtype; so do we."""
    layer, plain, _ = layer_case(torch.bfloat16)
    plain.frod_dropout = layer.frod_dropout
    base = layer.get_base_layer()
    base.bias = plain.get_base_layer().bias = None
    got, want = layer(x(8, IN)), plain(x(8, IN))
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_several_adapters_in_half_precision():
    model = frod(Tiny().to(torch.bfloat16), frod_dropout=0.3)
    from tests.peft.models import config

    model.add_adapter("other", config(frod_dropout=0.3))
    shake(model, 2)
    plain = copy.deepcopy(model)
    fk.peft.accelerate(model)
    exact = copy.deepcopy(plain).double()
    for m in (model, plain, exact):
        m.base_model.set_adapter(["default", "other"])
        m.eval()
    inputs = x(64, IN, dtype=torch.bfloat16)
    got, peft, want = (layers(m)[0](i) for m, i in ((model, inputs), (plain, inputs), (exact, inputs.double())))
    assert_no_worse(got, peft, want)


WIDER = [
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float64),
    (torch.float16, torch.float32),
    (torch.float32, torch.float64),
]


@pytest.mark.parametrize("storage, wide", WIDER, ids=str)
def test_cached_weight_is_as_good_as_the_inputs_dtype(storage, wide):
    """A wider input than the storage: rounding W to the storage dtype would show."""
    layer, _, exact = layer_case(storage) if storage != torch.float32 else _fp32_case()
    inputs = x(64, IN, dtype=wide)
    want = exact.eval()(inputs.double())
    with torch.no_grad():
        uncached = layer.train()(inputs)
        cached = layer.eval()(inputs)
    assert layer._fast.caches["default"].nbytes and cached.dtype == uncached.dtype == wide
    error, floor = (uncached.double() - want).norm(), torch.finfo(wide).eps * want.norm()
    assert (cached.double() - want).norm() <= 1.5 * error + 4 * floor


def _fp32_case():
    model = frod()
    plain = copy.deepcopy(model)
    fk.peft.accelerate(model)
    return layers(model)[0], layers(plain)[0], layers(plain.double())[0]


def test_cached_weight_of_half_storage_under_bfloat16_autocast():
    layer, _, exact = (layer.eval() for layer in layer_case(torch.float16))
    inputs = x(64, IN, dtype=torch.float16)
    want = exact(inputs.double())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cached = layer(inputs)
        uncached = layer.train()(inputs)
    assert_no_worse(cached, uncached, want)
