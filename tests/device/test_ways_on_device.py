# SPDX-License-Identifier: Apache-2.0
"""Every way of the native backend on a device: tensor cores, multiply-adds, dense; forced, and proved by the profiler.

The dtypes of a test are those that the way serves, see tests/device/conftest.py.
"""

import pytest
import torch

import frodkernels as fk
from frodkernels.functional import _views
from frodkernels.ops import sparse_core as ops
from frodkernels.reference import frod as frod_reference
from frodkernels.reference import sparse_core as reference
from tests.device.places import case_on, layer_on
from tests.device.ways import BF16, DENSE, F32, call_of, tiles_of
from tests.frod.cases import make_layer
from tests.support import LAYOUTS, assert_no_worse_than_torch, make_case

ALL = [True, True, True]


def right_answers(case):
    """(exact, plain torch's) of w, S^T u, dz, dlam, dvalues."""
    torchs = reference.sparse_core(*case.forward), reference.sparse_core(*case.transpose)
    exact = case.exact_forward(), case.exact_transpose(), *case.exact_backward()
    return exact, (*torchs, *reference.sparse_core_backward(*case.backward, ALL))


def assert_right(place, got, case):
    for ours, exact, torchs in zip(got, *right_answers(case), strict=True):
        assert ours.device.type == place.type
        assert_no_worse_than_torch(ours.cpu(), exact, torchs)


def assert_same(way, got, want):
    """Bit for bit, where the way promises it."""
    for a, b in zip(got, want, strict=True):
        if way.exact:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(b.abs().max()))


@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize("n, T", [(70, 40), (70, 257), (300, 33), (600, 512)])
def test_against_float64(place, way, n, T, token_major, dtype, param_dtype):
    case = make_case(n, n, T, "random", dtype, param_dtype)
    call = call_of(case_on(case, place.device), token_major)
    with way.watch():
        got = call()
    assert_right(place, got, case)


@pytest.mark.parametrize("kind", ["empty", "one", "full_row", "full_column", "random"])
@pytest.mark.parametrize("m, n", [(65, 65), (150, 65), (65, 150)])
def test_every_pattern(place, way, m, n, kind):
    """Those that are sparse enough for tiles."""
    case = make_case(m, n, 64, kind, BF16, F32)
    got = call_of(case_on(case, place.device))()
    if kind == "one" and m != n:  # a single row: the norm of its rounding is luck
        for ours, torchs in zip(got, right_answers(case)[1], strict=True):
            torch.testing.assert_close(ours.cpu(), torchs, rtol=0.02, atol=0.02)
        return
    assert_right(place, got, case)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_every_layout(place, way, layout, dtype):
    case = make_case(65, 65, 71, "random", dtype, F32).laid_out(layout)
    moved = case_on(make_case(65, 65, 71, "random", dtype, F32), place.device).laid_out(layout)
    assert moved.z.stride() == case.z.stride()
    assert_right(place, call_of(moved)(), case)


@pytest.mark.parametrize("needs", [[bool(k & 4), bool(k & 2), bool(k & 1)] for k in range(8)], ids=str)
def test_what_is_not_needed_is_empty(place, way, needs, dtype):
    case = case_on(make_case(65, 65, 70, "random", dtype, F32), place.device)
    columns = tiles_of(case)[1]
    whole = ops.sparse_core_backward(*case.backward, ALL, False, columns)
    with way.watch(product=needs[0], gradient=needs[1] or needs[2]):
        parts = ops.sparse_core_backward(*case.backward, needs, False, columns)
    for part, same, need in zip(parts, whole, needs, strict=True):
        assert part.dtype == same.dtype
        if need:  # fewer sums may be split otherwise
            torch.testing.assert_close(part, same, rtol=1e-4 if part.dtype == F32 else 0.02, atol=1e-3)
        else:
            assert part.numel() == 0


@pytest.mark.parametrize("token", [3, 12, 21, 30, 69])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(place, way, bad, token, dtype):
    """Along entries only; densely, to every output of their token and to no other one."""
    case = make_case(67, 67, 70, "random", dtype, F32)
    case.z[4, token] = case.u[11, token] = bad
    got = [t.cpu() for t in call_of(case_on(case, place.device))()]
    w, v, dz, *gradients = right_answers(case)[1]
    for ours, torchs in zip(got, (w, v, dz, *gradients), strict=True):
        assert not torchs.isfinite().all()
        if way.name == DENSE and torchs.shape == w.shape:
            others = torch.arange(70) != token
            assert not ours[:, token].isfinite().any() and ours[:, others].isfinite().all()
        else:
            assert torch.equal(ours.isnan(), torchs.isnan()) and torch.equal(ours.isinf(), torchs.isinf())


@pytest.mark.parametrize("T", [33, 300, 1500])
def test_repeats_bit_for_bit(place, way, T, dtype):
    """Densely too: the GEMM library promises it within one stream."""
    call = call_of(case_on(make_case(130, 130, T, "random", dtype, F32), place.device))
    with way.watch():
        first = call()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))


def test_runs_on_the_current_stream(place, way, dtype):
    case = make_case(130, 130, place.tokens, "random", dtype, F32)
    want = call_of(case_on(case, place.device))()
    late = case_on(case, place.device)
    late.z, late.u = torch.zeros_like(late.z), torch.zeros_like(late.u)
    call = call_of(late)
    place.wait()
    with way.watch(), place.side_stream():
        place.delay()
        late.z.copy_(case.z.to(place.device)), late.u.copy_(case.u.to(place.device))
        got = call()
    place.wait()
    assert_same(way, got, want)


def test_runs_on_the_tensors_device(place, way, dtype):
    others = place.others()
    if not others:
        pytest.skip("one CUDA device")
    case = make_case(130, 130, 50, "random", dtype, F32)
    want = call_of(case_on(case, place.device))()
    for device in others:
        call = call_of(case_on(case, device))
        with way.watch():
            got = call()
        assert all(part.device == device for part in got)
        assert_same(way, [part.cpu() for part in got], [part.cpu() for part in want])


def test_can_be_captured_and_replayed(place, way, dtype):
    case = case_on(make_case(130, 130, place.tokens, "random", dtype, F32), place.device)
    call = call_of(case)
    replay, kept = place.capture(call)
    for _ in range(2):
        case.z.copy_(torch.randn(case.z.shape)), case.values.copy_(torch.randn(case.values.shape))
        with way.watch():
            replay()
        assert_same(way, kept, call())


def test_never_waits_for_the_device(place, way, dtype):
    call = call_of(case_on(make_case(130, 130, place.tokens, "random", dtype, F32), place.device))
    call()
    with place.no_sync():
        call()


def test_a_layers_values_and_gradients(place, way, dtype, param_dtype):
    original = make_layer(40, 70, 65, dtype=dtype, param_dtype=param_dtype)
    g = torch.randn(65, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    layer, g_here = layer_on(original, place.device), g.to(place.device)
    leaves = layer.leaves()
    _views.prepare(layer.pattern)
    with way.watch():
        y = layer(path="activation")
        got = y, *torch.autograd.grad(y, leaves, g_here)
    same = frod_reference.frod_linear(layer.x, layer.U, layer.V, layer.lam, layer.values, layer.pattern, layer.bias)
    torchs = same, *torch.autograd.grad(same, leaves, g_here)
    wide = original.doubled()
    wide_leaves = wide.leaves()
    exact = wide.exact()
    right = exact.detach(), *torch.autograd.grad(exact, wide_leaves, g.double())
    for ours, correct, others in zip(got, right, torchs, strict=True):
        assert_no_worse_than_torch(ours.detach().cpu(), correct, others.detach().cpu())


class Adapter(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.lam, self.values = torch.nn.Parameter(layer.lam), torch.nn.Parameter(layer.values)
        self.register_buffer("U", layer.U)
        self.register_buffer("V", layer.V)
        self.pattern = layer.pattern

    def forward(self, x):
        return fk.frod_linear(x, self.U, self.V, self.lam, self.values, self.pattern, path="activation")


def step(run, module, x):
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.float().square().sum().backward()
    return y.detach(), x.grad, *(p.grad.clone() for p in module.parameters())


def test_compiled(place, way, dtype):
    """The traced calls take the way too, and give what the eager ones give."""
    import torch._dynamo as dynamo

    module = Adapter(layer_on(make_layer(40, 70, 1, dtype=dtype, param_dtype=F32), place.device))
    _views.prepare(module.pattern)
    dynamo.reset()
    try:
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=place.compiler)
        for T in (65, 130):
            x = torch.randn(T, 70, generator=torch.Generator().manual_seed(T)).to(place.device, dtype)
            step(compiled, module, x)  # compiles
            with way.watch():
                got = step(compiled, module, x)
            for ours, want in zip(got, step(module, module, x), strict=True):
                error, size = ((t.double().norm()) for t in (ours.double() - want.double(), want))
                assert error <= 0.02 * size
    finally:
        dynamo.reset()
