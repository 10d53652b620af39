# SPDX-License-Identifier: Apache-2.0
"""SHiRA against float64: at most 1.5 times PEFT's error plus half a unit of rounding, and PEFT's dtypes everywhere."""

import copy
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn

import frodkernels as fk
from tests.peft.models import IN, Tiny, x
from tests.peft.shira_models import config, layers, shake, shira

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def trio_of(model):
    """(swapped layer, PEFT's, the same numbers in float64)."""
    plain = copy.deepcopy(model)
    fk.peft.accelerate(model)
    return tuple(layers(m)[0] for m in (model, plain, copy.deepcopy(plain).double()))


def case(base, values, make=Tiny, **kwargs):
    model = shira(make().to(base), **kwargs)
    for layer in layers(model):
        layer.shira_weight["default"] = nn.Parameter(layer.shira_weight["default"].detach().to(values))
    return trio_of(model)


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(256, 320)


def step(layer, inputs, g):
    layer.zero_grad()
    inputs = inputs.clone().requires_grad_()
    y = layer(inputs)
    y.backward(g.to(y.dtype))
    return y.detach(), inputs.grad, layer.shira_weight["default"].grad


def assert_no_worse(got, peft, exact, rounded=None):
    assert got.dtype == peft.dtype and got.shape == peft.shape and torch.isfinite(got).all()
    if rounded is not None:
        got, peft = got.to(rounded), peft.to(rounded)
    error, peft_error = (got.double() - exact).norm(), (peft.double() - exact).norm()
    floor = 0.5 * torch.finfo(got.dtype).eps * exact.norm()
    assert error <= 1.5 * peft_error + floor, f"{error=:.2e} {peft_error=:.2e} {floor=:.2e}"


@pytest.mark.parametrize("scale", [1.0, -0.3])
@pytest.mark.parametrize("values", [FP32, "base"], ids=str)
@pytest.mark.parametrize("dtype", [FP32, FP64, BF16, FP16], ids=str)
def test_one_step(dtype, values, scale):
    """float32 values over a 16-bit base are PEFT's default."""
    trio = case(dtype, dtype if values == "base" else values, Wide, target_modules=["up"], r=12)
    for layer in trio:
        layer.set_scale("default", scale)
    for T in (1, 8, 300):
        inputs, g = x(T, 256, dtype=dtype), x(T, 320, dtype=dtype, seed=6)
        results = [step(layer, given, g) for layer, given in zip(trio, (inputs, inputs, inputs.double()), strict=True)]
        for got, peft, want in zip(*results, strict=True):
            if dtype == FP64:  # PEFT rounds scale * value to the values' dtype; here it is rounded to the sum's
                rtol = 1e-11 if got.dtype == FP64 else torch.finfo(got.dtype).eps  # float32 values: their gradient
                torch.testing.assert_close(got, want.to(got.dtype), rtol=rtol, atol=1e-11)
                if values == "base":
                    torch.testing.assert_close(got, peft, rtol=1e-11, atol=1e-11)
            else:
                assert_no_worse(got, peft, want)
        with torch.no_grad():
            got, peft = (layer.eval()(inputs) for layer in trio[:2])
            if dtype != FP64:
                assert_no_worse(got, peft, results[2][0])
        for layer in trio:
            layer.train()


@pytest.mark.parametrize("base", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("given", [FP32, BF16], ids=str)
@pytest.mark.parametrize("values", [FP32, BF16], ids=str)
@pytest.mark.parametrize("train", [True, False])
def test_autocast(base, given, values, train):
    trio = tuple(layer.train(train) for layer in case(base, values))
    inputs, g = x(64, IN, dtype=given), x(64, 40, seed=6)
    want = step(trio[2], inputs.double(), g)
    with torch.autocast("cpu", dtype=BF16):
        got, peft = (step(layer, inputs, g) for layer in trio[:2])
        with torch.no_grad():
            evaluated = [layer(inputs) for layer in trio[:2]]
    for a, b, c in zip(got, peft, want, strict=True):
        assert_no_worse(a, b, c, BF16)  # autocast rounds inside
    assert_no_worse(*evaluated, want[0])


def test_autocast_off_inside():
    """A region without autocast inside one with it, and a backward pass outside of the region it was made in."""
    layer, plain, _ = case(BF16, FP32)
    inputs = x(8, IN, dtype=BF16).requires_grad_()
    with torch.autocast("cpu", dtype=FP16), torch.autocast("cpu", enabled=False):
        got, want = layer(inputs), plain(inputs)
    assert got.dtype == want.dtype == BF16
    with torch.autocast("cpu", dtype=BF16):
        got.sum().backward()
    assert layer.shira_weight["default"].grad.dtype == FP32


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_autocast_adapter_dtype(autocast_adapter_dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Tiny().bfloat16(), config(), autocast_adapter_dtype=autocast_adapter_dtype)
    shake(model)
    trio = trio_of(model)
    assert trio[0].shira_weight["default"].dtype == (FP32 if autocast_adapter_dtype else BF16)
    inputs, g = x(64, IN, dtype=BF16), x(64, 40, seed=6)
    results = [step(layer, given, g) for layer, given in zip(trio, (inputs, inputs, inputs.double()), strict=True)]
    for got, peft, want in zip(*results, strict=True):
        assert_no_worse(got, peft, want)


@pytest.mark.parametrize("first, second", [(FP32, BF16), (BF16, FP32), (FP32, FP64)], ids=str)
@pytest.mark.parametrize("train", [True, False])
def test_adapters_of_several_dtypes(first, second, train):
    model = shira(Tiny().bfloat16())
    model.add_adapter("other", config(r=3, random_seed=5))
    shake(model, 2)
    for layer in layers(model):
        for name, dtype in (("default", first), ("other", second)):
            layer.shira_weight[name] = nn.Parameter(layer.shira_weight[name].detach().to(dtype))
    plain = copy.deepcopy(model)
    fk.peft.accelerate(model)
    exact = copy.deepcopy(plain).double()
    for m in (model, plain, exact):
        m.base_model.set_adapter(["default", "other"])
        m.train(train)
    layer, other, reference = (layers(m)[0] for m in (model, plain, exact))
    inputs = x(64, IN, dtype=BF16)
    with torch.set_grad_enabled(train):
        got = layer(inputs)
    assert_no_worse(got, other(inputs), reference(inputs.double()))
    if train:
        got.sum().backward()
        assert layer.shira_weight["default"].grad.dtype == first and layer.shira_weight["other"].grad.dtype == second


@pytest.mark.parametrize("given, base", [(FP32, BF16), (BF16, FP32), (FP64, FP32), (FP16, BF16)], ids=str)
@pytest.mark.parametrize("train", [True, False])
def test_inputs_of_another_dtype_are_refused_as_in_peft(given, base, train):
    ours, plain, _ = case(base, FP32)
    for layer in (ours.train(train), plain.train(train)):
        with pytest.raises(RuntimeError, match="same dtype"), torch.no_grad():
            layer(x(dtype=given))
    ours.merge()
    with pytest.raises(RuntimeError, match="same dtype"):
        ours(x(dtype=given))


def test_a_bias_of_another_dtype_is_refused_as_in_peft():
    for layer in case(BF16, FP32)[:2]:
        layer.base_layer.bias = nn.Parameter(layer.base_layer.bias.detach().float())
        with pytest.raises(RuntimeError, match="same dtype"):
            layer(x(dtype=BF16))
