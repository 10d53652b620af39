# SPDX-License-Identifier: Apache-2.0
"""HRA's layers on a device: values and gradients, tracing, memory, no waiting for the device, modules."""

import pytest
import torch

import frodkernels as fk
from tests.device.places import HOUSEHOLDER_OPS
from tests.householder.cases import F64, SIDES, gradient_like, make_chain, make_conv, make_layer
from tests.support import DTYPE_IDS, DTYPES, assert_no_worse_than_torch

OPS = HOUSEHOLDER_OPS
sides = pytest.mark.parametrize("side", ["auto", *SIDES])
either = pytest.mark.parametrize("orthogonalize", [False, True])


def check(place, original, factor=1.5, **options):
    """No worse than plain torch on the same device: its GEMMs are the device's own."""
    definition = {k: v for k, v in options.items() if k != "side"}
    case = original.to(place.device)
    leaves = case.leaves()
    y, same = case(**options), case.plain(**definition)
    g = gradient_like(y)
    got = y, *torch.autograd.grad(y, leaves, g.to(place.device))
    torchs = same, *torch.autograd.grad(same, leaves, g.to(place.device))
    wide = original.to(F64)
    wide_leaves = wide.leaves()
    exact = wide.exact(**definition)
    right = exact.detach(), *torch.autograd.grad(exact, wide_leaves, g.double())
    assert [t.dtype for t in got] == [case.x.dtype, *(leaf.dtype for leaf in leaves)]
    assert all(t.device.type == place.type for t in got)
    for ours, correct, others in zip(got, right, torchs, strict=True):
        if all(leaf.dtype == F64 for leaf in leaves):
            torch.testing.assert_close(ours.cpu(), correct, rtol=1e-10, atol=1e-10)
        else:
            assert_no_worse_than_torch(ours.detach().cpu(), correct, others.detach().cpu(), factor)


@either
@pytest.mark.parametrize("dtype, param_dtype", DTYPES, ids=DTYPE_IDS)
def test_chains(place, backend, dtype, param_dtype, orthogonalize):
    for n, r, T in ((96, 8, 130), (40, 13, 65)):
        original = make_chain(n, r, T, dtype=dtype, param_dtype=param_dtype)
        check(place, original, transpose=True, orthogonalize=orthogonalize)


@sides
@either
@pytest.mark.parametrize("dtype, param_dtype", DTYPES, ids=DTYPE_IDS)
def test_layers(place, backend, side, dtype, param_dtype, orthogonalize):
    for m, n, r, T in ((64, 96, 8, 130), (96, 40, 13, 65)):
        original = make_layer(m, n, r, T, dtype=dtype, param_dtype=param_dtype)
        check(place, original, side=side, orthogonalize=orthogonalize)


@either
@pytest.mark.parametrize("dtype, param_dtype", DTYPES, ids=DTYPE_IDS)
def test_convolutions(place, backend, dtype, param_dtype, orthogonalize):
    """Products are rounded where plain torch rounds the weight: see tests/hra/test_hra_conv.py."""
    original = make_conv(16, 8, (3, 3), 6, (3, 10, 11), dtype=dtype, param_dtype=param_dtype, padding=1)
    check(place, original, factor=2.0, orthogonalize=orthogonalize)


@pytest.mark.parametrize("side", SIDES)
def test_gradcheck(place, backend, side):
    case = make_layer(4, 5, 3, 2, 3).to(place.device)

    def f(x, u, weight, bias):
        return fk.hra_linear(x, weight, u, bias, side=side)

    assert torch.autograd.gradcheck(f, case.leaves())


@sides
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(place, backend, dtype, side):
    """float32 tensors under autocast give what 16-bit tensors beside float32 directions give."""
    case = make_layer(24, 40, 6, 33, dtype=torch.float32).to(place.device)
    with torch.autocast(place.type, dtype=dtype):
        y = case(side=side)
    same = fk.hra_linear(case.x.to(dtype), case.weight.to(dtype), case.u, case.bias.to(dtype), side=side)
    assert y.dtype == dtype and torch.equal(y, same)


def test_a_zero_column_makes_everything_nan(place, backend):
    for orthogonalize in (False, True):
        case = make_layer(9, 40, 5, 7, dtype=torch.float32).to(place.device)
        case.u[:, 2] = 0
        for side in SIDES:
            assert case(side=side, orthogonalize=orthogonalize).isnan().all()


class Adapter(torch.nn.Module):
    """As a user would write one."""

    def __init__(self, case, side):
        super().__init__()
        self.u, self.side = torch.nn.Parameter(case.u), side
        self.register_buffer("weight", case.weight)

    def forward(self, x):
        return fk.hra_linear(x, self.weight, self.u, side=self.side)


def step(run, module, x):
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.square().mean().backward()
    return y.detach(), x.grad, module.u.grad.clone()


@sides
def test_one_graph_for_every_number_of_tokens(place, side):
    """No graph break, and no second compilation while T changes."""
    import torch._dynamo as dynamo

    module = Adapter(make_layer(24, 40, 6, 1, dtype=torch.float32).to(place.device), side)
    dynamo.reset()
    try:
        with dynamo.config.patch(error_on_recompile=True):
            compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=place.compiler)
            for T in (17, 33, 130, 8):
                x = torch.randn(T, 40, device=place.device)
                for got, want in zip(step(compiled, module, x), step(module, module, x), strict=True):
                    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    finally:
        dynamo.reset()


@pytest.mark.parametrize("side", SIDES)
def test_a_training_step_can_be_captured_and_replayed(place, backend, side):
    case = make_layer(24, 40, 6, place.tokens, dtype=torch.float32).to(place.device)
    leaves = case.leaves()

    def run():
        y = case(side=side)
        return y.detach(), *torch.autograd.grad(y.square().sum(), leaves)

    replay, kept = place.capture(run)
    with torch.no_grad():
        case.x.copy_(torch.randn(case.x.shape))
        case.u.copy_(torch.randn(case.u.shape))
    replay()
    place.wait()
    for got, want in zip(kept, run(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("side", SIDES)
def test_nothing_square_is_allocated(place, backend, side):
    """PEFT's layer builds [n, n] matrices, r of them to be differentiated; a call here holds thin ones."""
    n = 512 if place.type == "cpu" else 4096
    case = make_layer(n, n, 8, 16, dtype=torch.float32).to(place.device)
    leaves = case.leaves("x", "u")
    torch.autograd.grad(case(side=side).sum(), leaves)  # whatever is done once has been done
    peak = place.peak_bytes(lambda: torch.autograd.grad(case(side=side).sum(), leaves))
    assert peak < 4 * n * n / 2


@sides
def test_never_waits_for_the_device(place, backend, side):
    case = make_layer(24, 40, 6, place.tokens, dtype=torch.float32).to(place.device)
    leaves = case.leaves()
    g = torch.ones(place.tokens, 24, device=place.device)
    torch.autograd.grad(case(side=side), leaves, g)
    with place.no_sync():
        torch.autograd.grad(case(side=side), leaves, g)


def test_wrong_devices_are_named(place):
    case = make_layer(6, 8, 3, 4, dtype=torch.float32).to(place.device)
    case.u = case.u.to("meta")
    with pytest.raises(ValueError, match=f"u is on meta but x is on {place.type}"):
        case()


def test_modules_are_made_where_their_layer_is_and_move(place):
    base = torch.nn.Linear(40, 24, device=place.device)
    layer = fk.nn.HRALinear.from_linear(base, 8)
    assert layer.u.device.type == place.type
    x = torch.randn(5, 40, device=place.device)
    torch.testing.assert_close(layer(x), base(x), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        layer.u.normal_()
    here = layer.merge()
    torch.testing.assert_close(here(x), layer(x), rtol=1e-4, atol=1e-4)
    want = layer(x).cpu()
    torch.testing.assert_close(layer.cpu()(x.cpu()), want, rtol=1e-4, atol=1e-4)
    conv = fk.nn.HRAConv2d.from_conv2d(torch.nn.Conv2d(3, 5, 3, device=place.device), 3)
    image = torch.randn(2, 3, 8, 8, device=place.device)
    torch.testing.assert_close(conv.merge()(image), conv(image), rtol=1e-4, atol=1e-4)
