# SPDX-License-Identifier: Apache-2.0
"""HRA against float64: not worse than PEFT where all is of one dtype, 1.5 times where PEFT computes in a wider one."""

import copy

import pytest
import torch
from torch import nn

import frodkernels as fk
from tests.peft.hra_models import Images, config, hra, images, layers, shake
from tests.peft.models import IN, Tiny, x

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def with_dtype(model, dtype):
    for layer in layers(model):
        for name, u in layer.hra_u.items():
            layer.hra_u[name] = nn.Parameter(u.detach().to(dtype))


def case(make, base, u, **kwargs):
    """(swapped layer, PEFT's, the same numbers in float64)."""
    model = hra(make().to(base), **kwargs)
    with_dtype(model, u)
    plain = copy.deepcopy(model)
    fk.peft.accelerate(model)
    return tuple(layers(m)[0] for m in (model, plain, copy.deepcopy(plain).double()))


def wide(features, seed=0):
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(seed)
            self.up = nn.Linear(features, features + 16)

    return One


def step(layer, inputs, g):
    layer.zero_grad()
    inputs = inputs.clone().requires_grad_()
    y = layer(inputs)
    y.backward(g.to(y.dtype))
    return y.detach(), inputs.grad, layer.hra_u["default"].grad


def assert_no_worse(got, peft, exact, factor, ulps):
    assert got.dtype == peft.dtype and got.shape == peft.shape and torch.isfinite(got).all()
    error, peft_error = (got.double() - exact).norm(), (peft.double() - exact).norm()
    floor = ulps * torch.finfo(got.dtype).eps * exact.norm()
    assert error <= factor * peft_error + floor, f"{error=:.2e} {peft_error=:.2e} {floor=:.2e}"


@pytest.mark.parametrize("gram_schmidt", [False, True])
@pytest.mark.parametrize("n, r", [(128, 8), (256, 32)])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_one_dtype(dtype, n, r, gram_schmidt):
    trio = case(wide(n), dtype, dtype, target_modules=["up"], r=r, apply_GS=gram_schmidt, init_weights=False)
    for T in (8, 300):  # both sides of the weight
        inputs, g = x(T, n, dtype=dtype), x(T, n + 16, dtype=dtype, seed=6)
        layer, plain, exact = trio
        got, peft, want = step(layer, inputs, g), step(plain, inputs, g), step(exact, inputs.double(), g)
        for a, b, c in zip(got[:2], peft, want, strict=False):
            assert_no_worse(a, b, c, 1.0, 0.0)
        # sums over the tokens: in float32 their order, which is the backend's, decides
        assert_no_worse(got[2], peft[2], want[2], 1.0, 1.0 if dtype == FP32 else 0.0)


@pytest.mark.parametrize("r", [4, 32])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_float32_directions_over_16_bits(dtype, r):
    """PEFT's default. Its product is one of float32 there, ours of 16 bits."""
    layer, plain, exact = case(wide(128), dtype, FP32, target_modules=["up"], r=r)
    for T in (8, 400):
        inputs, g = x(T, 128, dtype=dtype), x(T, 144, dtype=dtype, seed=6)
        got, peft, want = step(layer, inputs, g), step(plain, inputs, g), step(exact, inputs.double(), g)
        for a, b, c in zip(got[:2], peft, want, strict=False):
            assert_no_worse(a, b, c, 1.5, 0.5)
        assert_no_worse(got[2].to(dtype), peft[2].to(dtype), want[2], 1.5, 0.5)
        with torch.no_grad():
            assert_no_worse(layer.eval()(inputs), plain(inputs), want[0], 1.5, 0.5)


@pytest.mark.parametrize("u", [FP32, "base"], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_convolutions(dtype, u):
    layer, plain, exact = case(Images, dtype, dtype if u == "base" else u)
    inputs, g = images(dtype), torch.randn(2, 6, 8, 8).to(dtype)
    got, peft, want = step(layer, inputs, g), step(plain, inputs, g), step(exact, inputs.double(), g)
    for a, b, c in zip(got, peft, want, strict=True):
        b, a = (t.to(dtype) for t in (b, a))
        assert_no_worse(a, b, c, 1.5, 0.5)


MIXED = [(given, base, u) for given in (FP32, BF16) for base in (FP32, BF16, FP16) for u in (FP32, FP64)]


@pytest.mark.parametrize("given, base, u", MIXED, ids=str)
@pytest.mark.parametrize(
    "make, inputs", [(Tiny, lambda d: x(64, IN, dtype=d)), (Images, images)], ids=["linear", "conv"]
)
def test_other_mixtures(given, base, u, make, inputs):
    """The result has the input's dtype, and is as good as that dtype allows."""
    layer, plain, exact = case(make, base, u)
    got, peft, want = layer(inputs(given)), plain(inputs(given)), exact(inputs(given).double())
    assert_no_worse(got, peft, want, 1.5, 0.5)


def test_wider_bias():
    """Added after the product, as PEFT adds it to its float32 one."""
    for make, inputs in ((Tiny, x(64, IN, dtype=BF16)), (Images, images(BF16))):
        layer, plain, exact = case(make, BF16, FP32)
        for which in (layer, plain):
            which.base_layer.bias = nn.Parameter(1000 + which.base_layer.bias.detach().float())
        exact.base_layer.bias.data += 1000
        assert_no_worse(layer(inputs), plain(inputs), exact(inputs.double()), 1.0, 0.0)


@pytest.mark.parametrize("base", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("given", [FP32, BF16, FP64], ids=str)
@pytest.mark.parametrize("u", [FP32, BF16], ids=str)
@pytest.mark.parametrize(
    "make, inputs", [(Tiny, lambda d: x(64, IN, dtype=d)), (Images, images)], ids=["linear", "conv"]
)
def test_autocast(base, given, u, make, inputs):
    layer, plain, exact = case(make, base, u)
    inputs = inputs(given)
    g = torch.randn(exact(inputs.double()).shape)
    want = step(exact, inputs.double(), g)
    with torch.autocast("cpu", dtype=BF16):
        got, peft = step(layer, inputs, g), step(plain, inputs, g)
    for a, b, c in zip(got, peft, want, strict=True):
        assert a.dtype == b.dtype
        assert_no_worse(a.to(BF16), b.to(BF16), c, 1.5, 0.5)  # autocast rounds inside


def test_autocast_off_inside():
    """A region without autocast inside one with it, and a backward pass outside of the region it was made in."""
    layer, plain, _ = case(Tiny, BF16, FP32)
    inputs = x(8, IN, dtype=BF16).requires_grad_()
    with torch.autocast("cpu", dtype=FP16), torch.autocast("cpu", enabled=False):
        got, want = layer(inputs), plain(inputs)
    assert got.dtype == want.dtype == BF16
    with torch.autocast("cpu", dtype=BF16):
        got.sum().backward()
    assert layer.hra_u["default"].grad.dtype == FP32


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_autocast_adapter_dtype(autocast_adapter_dtype):
    import warnings

    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Tiny().bfloat16(), config(), autocast_adapter_dtype=autocast_adapter_dtype)
    shake(model)
    plain = copy.deepcopy(model)
    fk.peft.accelerate(model)
    exact = copy.deepcopy(plain).double()
    layer, other, reference = (layers(m)[0] for m in (model, plain, exact))
    assert layer.hra_u["default"].dtype == (FP32 if autocast_adapter_dtype else BF16)
    inputs, g = x(64, IN, dtype=BF16), x(64, 40, seed=6)
    factor, ulps = (1.5, 0.5) if autocast_adapter_dtype else (1.0, 0.0)
    trio = step(layer, inputs, g), step(other, inputs, g), step(reference, inputs.double(), g)
    for a, b, c in zip(*trio, strict=True):
        assert a.dtype == b.dtype
        assert_no_worse(a.to(BF16), b.to(BF16), c, factor, ulps)


@pytest.mark.parametrize("first, second", [(FP32, BF16), (BF16, FP32), (FP32, FP64)], ids=str)
def test_adapters_of_several_dtypes(first, second):
    model = hra(Tiny().bfloat16())
    model.add_adapter("other", config(r=3, apply_GS=True, init_weights=False))
    shake(model, 2)
    for layer in layers(model):
        for name, dtype in (("default", first), ("other", second)):
            layer.hra_u[name] = nn.Parameter(layer.hra_u[name].detach().to(dtype))
    plain = copy.deepcopy(model)
    fk.peft.accelerate(model)
    exact = copy.deepcopy(plain).double()
    for m in (model, plain, exact):
        m.base_model.set_adapter(["default", "other"])
    layer, other, reference = (layers(m)[0] for m in (model, plain, exact))
    inputs = x(64, IN, dtype=BF16)
    got = layer(inputs)
    assert_no_worse(got, other(inputs), reference(inputs.double()), 1.5, 0.5)
    got.sum().backward()
    assert layer.hra_u["default"].grad.dtype == first and layer.hra_u["other"].grad.dtype == second


def test_float64():
    for make, inputs in ((Tiny, x), (Images, images)):
        model = hra(make().double())
        plain = copy.deepcopy(model)
        fk.peft.accelerate(model)
        inputs = inputs(dtype=FP64)
        torch.testing.assert_close(model(inputs), plain(inputs), rtol=1e-12, atol=1e-12)
