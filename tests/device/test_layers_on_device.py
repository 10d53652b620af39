# SPDX-License-Identifier: Apache-2.0
"""FRoD layers on a device: values and gradients, tracing, memory, no waiting for the device, the PEFT swap."""

import copy

import pytest
import torch

import frodkernels as fk
from frodkernels.reference import frod as reference
from tests.device.places import layer_on
from tests.frod.cases import PATHS, make_layer
from tests.support import DTYPE_IDS, DTYPES, assert_no_worse_than_torch


def plain(layer):
    return reference.frod_linear(layer.x, layer.U, layer.V, layer.lam, layer.values, layer.pattern, layer.bias)


@pytest.mark.parametrize("path", ["auto", *PATHS])
@pytest.mark.parametrize("dtype, param_dtype", DTYPES, ids=DTYPE_IDS)
def test_values_and_gradients(place, backend, path, dtype, param_dtype):
    """No worse than plain torch on the same device: its GEMMs are the device's own."""
    for m, n, T in ((24, 40, 33), (40, 24, 50)):
        original = make_layer(m, n, T, dtype=dtype, param_dtype=param_dtype)
        g = torch.randn(T, m, dtype=torch.float64).to(dtype)
        layer, g_here = layer_on(original, place.device), g.to(place.device)
        leaves = layer.leaves()
        y, same = layer(path=path), plain(layer)
        got = y, *torch.autograd.grad(y, leaves, g_here)
        torchs = same, *torch.autograd.grad(same, leaves, g_here)
        wide = original.doubled()
        wide_leaves, exact = wide.leaves(), wide.exact()
        exact = wide.exact()
        right = exact.detach(), *torch.autograd.grad(exact, wide_leaves, g.double())
        assert [t.dtype for t in got] == [dtype, dtype, param_dtype, param_dtype, dtype]
        assert all(t.device.type == place.type for t in got)
        for ours, correct, others in zip(got, right, torchs, strict=True):
            if dtype == param_dtype == torch.float64:
                torch.testing.assert_close(ours.cpu(), correct, rtol=1e-12, atol=1e-12)
            else:
                assert_no_worse_than_torch(ours.detach().cpu(), correct, others.detach().cpu())


@pytest.mark.parametrize("path", PATHS)
def test_gradcheck(place, backend, path):
    layer = layer_on(make_layer(5, 6, 2, 3, dtype=torch.float64), place.device)

    def f(x, lam, values, bias):
        return fk.frod_linear(x, layer.U, layer.V, lam, values, layer.pattern, bias, path=path)

    assert torch.autograd.gradcheck(f, layer.leaves())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(place, backend, dtype):
    """float32 tensors under autocast give what 16-bit tensors give."""
    layer = layer_on(make_layer(24, 40, 33), place.device)
    with torch.autocast(place.type, dtype=dtype):
        y = layer(path="activation")
    low = {name: getattr(layer, name).to(dtype) for name in ("x", "U", "V", "bias")}
    same = fk.frod_linear(
        low["x"], low["U"], low["V"], layer.lam, layer.values, layer.pattern, low["bias"], path="activation"
    )
    assert y.dtype == dtype and torch.equal(y, same)


class Adapter(torch.nn.Module):
    """As a user would write one."""

    def __init__(self, layer):
        super().__init__()
        self.lam, self.values = torch.nn.Parameter(layer.lam), torch.nn.Parameter(layer.values)
        self.register_buffer("U", layer.U)
        self.register_buffer("V", layer.V)
        self.pattern = layer.pattern

    def forward(self, x):
        return fk.frod_linear(x, self.U, self.V, self.lam, self.values, self.pattern)


def step(run, module, x):
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.square().mean().backward()
    return y.detach(), x.grad, *(p.grad.clone() for p in module.parameters())


def test_one_graph_for_every_number_of_tokens(place):
    """No graph break, and no second compilation while T changes."""
    import torch._dynamo as dynamo

    module = Adapter(layer_on(make_layer(24, 40, 1), place.device))
    dynamo.reset()
    try:
        with dynamo.config.patch(error_on_recompile=True):
            compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=place.compiler)
            for T in (17, 33, 130, 8):
                x = torch.randn(T, 40, device=place.device)
                for got, want in zip(step(compiled, module, x), step(module, module, x), strict=True):
                    torch.testing.assert_close(got, want)
    finally:
        dynamo.reset()


def test_a_training_step_can_be_captured_and_replayed(place, backend):
    layer = layer_on(make_layer(24, 40, place.tokens), place.device)
    leaves = layer.leaves()

    def run():
        y = layer(path="activation")
        return y.detach(), *torch.autograd.grad(y.square().sum(), leaves)

    replay, kept = place.capture(run)
    with torch.no_grad():
        layer.x.copy_(torch.randn(layer.x.shape))
        layer.values.copy_(torch.randn(layer.values.shape))
    replay()
    place.wait()
    for got, want in zip(kept, run(), strict=True):
        torch.testing.assert_close(got, want)


def test_nothing_square_is_allocated(place, backend):
    """The activation path holds a handful of [T, n] and [T, m] matrices and the entries' gradients; never [n, n]."""
    if backend == "reference":
        pytest.skip("the definition gathers every entry's tokens: it is right, not thrifty")
    n = 512 if place.type == "cpu" else 4096
    T, m, nnz = 16, n // 4, n * n // 100
    generator = torch.Generator().manual_seed(0)
    flat = torch.randperm(n * n, generator=generator)[:nnz]
    pattern = fk.SparsePattern(flat // n, flat % n, (n, n)).to(place.device)
    x, U, V = (torch.randn(*size, device=place.device) for size in ((T, n), (m, n), (n, n)))
    lam, values = torch.ones(n, device=place.device), torch.randn(nnz, device=place.device)
    leaves = [t.requires_grad_() for t in (x, lam, values)]

    def run():
        y = fk.frod_linear(x, U, V, lam, values, pattern, path="activation")
        return torch.autograd.grad(y.sum(), leaves)

    run()  # whatever is done once has been done
    square = 4 * n * n
    assert place.peak_bytes(run) < square / 2


def test_never_waits_for_the_device(place, backend):
    if backend == "reference" and place.type == "cuda":
        pytest.skip("the definition may wait: it is for tests")
    layer = layer_on(make_layer(24, 40, place.tokens), place.device)
    leaves = layer.leaves()
    g = torch.ones(place.tokens, 24, device=place.device)
    for path in PATHS:
        torch.autograd.grad(layer(path=path), leaves, g)
        with place.no_sync():
            torch.autograd.grad(layer(path=path), leaves, g)


def test_frozen_factors_and_wrong_devices_are_named(place):
    layer = layer_on(make_layer(6, 8, 4), place.device)
    layer.U.requires_grad_()
    with pytest.raises(NotImplementedError, match="U requires grad"):
        layer()
    layer.U.requires_grad_(False)
    layer.lam = layer.lam.to("meta")
    with pytest.raises(ValueError, match=f"lam is on meta but x is on {place.type}"):
        layer()


def test_a_module_moves_and_its_evaluation_cache_is_never_stale(place):
    linear = torch.nn.Linear(20, 12)
    layer = fk.nn.FrodLinear.from_linear(linear, sparse_rate=0.05).to(place.device).eval()
    x = torch.randn(5, 20, device=place.device)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(first, layer(x))
        layer.lam.mul_(1.5)
        changed = layer(x)
    assert not torch.allclose(first, changed)
    want = fk.frod_linear(x, layer.U, layer.V, layer.lam, layer.values, layer.pattern, layer.bias)
    torch.testing.assert_close(changed, want, rtol=1e-4, atol=1e-4)


def test_peft_models_train_alike(place):
    """PEFT's FRoD and the accelerated one: the same losses and parameters over some steps."""
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    from tests.peft.models import frod

    slow = frod().to(place.device)
    fast = copy.deepcopy(slow)
    report = fk.peft.accelerate(fast)
    assert report.swapped and not report.skipped
    losses = []
    for model in (slow, fast):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        generator = torch.Generator().manual_seed(3)
        curve = []
        for _ in range(5):
            x = torch.randn(4, 7, 24, generator=generator).to(place.device)
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(float(loss))
        losses.append(curve)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
