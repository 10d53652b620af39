# SPDX-License-Identifier: Apache-2.0
"""``reflect`` and ``reflect_backward``: one call each way, the same bits as the ops they are made of."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import frodkernels as fk
from frodkernels.ops import householder as products
from frodkernels.ops import reflect as ops
from frodkernels.ops import reflections
from tests.support import names

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TYPES = [(F32, F32), (F64, F64), (BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16), (F64, F32), (F16, BF16)]
SIZES = [(1, 1, 1), (7, 3, 5), (13, 31, 8), (49, 70, 17), (100, 257, 33), (150, 130, 130), (0, 5, 3)]
BOTH = [True, True]
native = torch.ops.frodkernels
either = pytest.mark.parametrize("transpose", [False, True])
types = pytest.mark.parametrize("dtype, kind", TYPES, ids=names)


def operands(T: int, n: int, r: int, dtype: torch.dtype, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, g [T, n] and u [n, r]."""
    generator = torch.Generator().manual_seed(T + n + r)
    x, g = torch.randn(2, T, n, generator=generator).to(dtype)
    return x, g, torch.randn(n, r, generator=generator).to(kind)


def composed(x: Tensor, g: Tensor, u: Tensor, transpose: bool) -> list[Tensor]:
    """(out, coefficients, inverse, norms, dx, du) by the ops that ``reflect`` stands for."""
    wide, rounded = x.dtype == F64, ops.rounds(x, u)
    unit, left, inverse, norms = reflections.reflections(u, wide, transpose)
    out, c = products.householder(x, left, unit, None, rounded)
    unit, left = reflections.reflections_again(u, inverse, norms, wide, not transpose)
    dx, q, sums, _ = products.householder_backward(g, x, c, left, unit, None, BOTH, rounded)
    du = reflections.reflections_gradient(u, unit, norms, sums, *((q, c) if transpose else (c, q)))
    return [out, c, inverse, norms, dx, du]


def called(x: Tensor, g: Tensor, u: Tensor, transpose: bool, overwrite: bool = False) -> list[Tensor]:
    out, *kept = ops.reflect(x, u, transpose)
    return [out, *kept, *ops.reflect_backward(g, x, u, kept, transpose, BOTH, overwrite)]


def same(ours: list[Tensor], others: list[Tensor]) -> None:
    """Bit for bit, but for du: dS is summed in another order there."""
    for a, b in zip(ours[:-1], others[:-1], strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
    du, other = ours[-1], others[-1]
    assert du.dtype == other.dtype and du.shape == other.shape
    if du.numel():
        scale = 8 * torch.finfo(F32 if du.dtype == F64 and ours[1].dtype == F32 else du.dtype).eps
        assert (du.double() - other.double()).norm() <= scale * other.double().norm() + 1e-30


@types
@either
@pytest.mark.parametrize("T, n, r", SIZES)
def test_native_calls_are_what_they_stand_for(isa, T, n, r, dtype, kind, transpose):
    x, g, u = operands(T, n, r, dtype, kind)
    want = composed(x, g, u, transpose)
    same(called(x, g, u, transpose), want)
    assert torch.equal(g, operands(T, n, r, dtype, kind)[1])


@types
def test_dx_may_be_written_over_g(isa, dtype, kind):
    for T, n, r in SIZES:
        x, g, u = operands(T, n, r, dtype, kind)
        want = called(x, g, u, True)
        memory = g.data_ptr()
        got = called(x, g, u, True, overwrite=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert got[4].data_ptr() == memory


def test_nobody_elses_gradient_is_overwritten():
    """A function's own gradient is autograd's, and may be needed elsewhere."""
    x, g, u = operands(20, 12, 4, F32, F32)
    before = g.clone()
    leaves = x.requires_grad_(), u.requires_grad_()
    torch.autograd.grad(fk.householder(*leaves), leaves, g)
    torch.autograd.grad(fk.hra_linear(*leaves[:1], torch.eye(12), u, side="input"), leaves, g)
    assert torch.equal(g, before)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@types
def test_registration(backend, dtype, kind):
    x, g, u = operands(9, 12, 5, dtype, kind)
    with fk.backend(backend):
        _, *kept = ops.reflect(x, u, True)
        torch.library.opcheck(native.reflect.default, (x, u, True))
        for needs in itertools.product([False, True], repeat=2):
            torch.library.opcheck(native.reflect_backward.default, (g, x, u, *kept, True, list(needs)))


@either
@pytest.mark.parametrize("dtype, kind", [*TYPES, (F32, F64), (BF16, F64)], ids=names)
def test_reference_and_wider_directions(dtype, kind, transpose):
    """float64 directions beside narrower tokens have no native call, and the ops they are made of serve."""
    x, g, u = operands(40, 33, 6, dtype, kind)
    exact = composed(x.double(), g.double(), u.double(), transpose)
    for backend in ("auto", "reference"):
        with fk.backend(backend):
            got = called(x, g, u, transpose)
        for a, b in zip(got, exact, strict=True):
            eps = torch.finfo(min(a.dtype, x.dtype, key=lambda d: -torch.finfo(d).eps)).eps
            assert (a.double() - b).norm() <= 16 * eps * b.norm()


@pytest.mark.parametrize("dtype, kind", [(F32, F32), (BF16, BF16)], ids=names)
def test_only_what_is_needed(dtype, kind):
    x, g, u = operands(30, 40, 6, dtype, kind)
    _, *kept = ops.reflect(x, u, True)
    dx, du = ops.reflect_backward(g, x, u, kept, True, BOTH)
    only, none = ops.reflect_backward(g, g, u, (g, *kept[1:]), True, [True, False])
    assert torch.equal(only, dx) and none.numel() == 0
    none, only = ops.reflect_backward(g, x, u, kept, True, [False, True])
    assert torch.equal(only, du) and none.numel() == 0


def test_layouts(isa):
    x, g, u = operands(50, 33, 7, BF16, BF16)
    want = called(x, g, u, True)
    wide = torch.full((50, 47), float("nan"), dtype=BF16)
    gapped = wide.clone()
    wide[:, 5:38], gapped[:, 9:42] = x, g
    cases = [
        (wide[:, 5:38], gapped[:, 9:42], u),
        (x.t().contiguous().t(), g.t().contiguous().t(), u.t().contiguous().t()),
    ]
    for case in cases:
        for overwrite in (False, True):  # what is not contiguous is not overwritten
            got = called(*case, True, overwrite)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    row = g[:1].expand(50, 33)
    pairs = zip(called(x, row, u, False, True), called(x, row.contiguous(), u, False), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_bits_do_not_depend_on_the_threads():
    for T, n, r, dtype in ((900, 96, 12, BF16), (300, 700, 40, F32)):
        x, g, u = operands(T, n, r, dtype, dtype)
        found = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(called(x, g, u, True))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_mode_that_watches_sees_the_op():
    """Called past torch's registration only where nobody looks."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    x, g, u = operands(9, 12, 5, F32, F32)
    want = called(x, g, u, True)
    with Watch():
        got = called(x, g, u, True, overwrite=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert {"frodkernels::reflect", "frodkernels::reflect_backward"} <= set(seen)


def test_traces_hold_the_op_that_runs_without_numbers():
    """Also a trace from before dispatch, and also of real tensors: the native op has no shape function."""
    x, _, u = operands(9, 12, 5, F32, F32)
    for mode, before in itertools.product(("real", "fake", "symbolic"), (False, True)):
        traced = make_fx(lambda x, u: fk.householder(x, u), tracing_mode=mode, pre_dispatch=before)(x, u)
        assert torch.ops.frodkernels.reflect.default in {node.target for node in traced.graph.nodes}
        assert traced(x.to("meta"), u.to("meta")).shape == x.shape


def test_the_default_device_is_not_asked():
    x, g, u = operands(9, 12, 5, F32, F32)
    want = called(x, g, u, True)
    with torch.device("meta"):
        got = called(x, g, u, True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_zero_column_is_nan_and_other_numbers_stay():
    x, g, u = operands(9, 12, 5, F32, F32)
    u[:, 2] = 0
    assert called(x, g, u, True)[0].isnan().all()


def test_hostile_calls_are_refused():
    x, g, u = operands(9, 12, 5, F32, F32)
    _, c, inverse, norms = native.native_reflect(x, u, True)
    dx = torch.empty_like(g)
    rest = dx, True, BOTH
    for bad in (
        lambda: native.native_reflect(x[0], u, True),
        lambda: native.native_reflect(x, u[:4], True),
        lambda: native.native_reflect(x, u[:, :0], True),
        lambda: native.native_reflect(x.long(), u, True),
        lambda: native.native_reflect(x, u.long(), True),
        lambda: native.native_reflect(x, u.double(), True),
        lambda: native.native_reflect_backward(g, x[:3], u, c, inverse, norms, *rest),
        lambda: native.native_reflect_backward(g, x.double(), u, c, inverse, norms, *rest),
        lambda: native.native_reflect_backward(g, x, u, c[:3], inverse, norms, *rest),
        lambda: native.native_reflect_backward(g, x, u, c.double(), inverse, norms, *rest),
        lambda: native.native_reflect_backward(g, x, u, c, inverse[:3], norms, *rest),
        lambda: native.native_reflect_backward(g, x, u, c, inverse.float(), norms, *rest),
        lambda: native.native_reflect_backward(g, x, u, c, inverse, norms[:2], *rest),
        lambda: native.native_reflect_backward(g, x, u, c, inverse, norms, dx[:2], *rest[1:]),
        lambda: native.native_reflect_backward(g, x, u, c, inverse, norms, dx.double(), *rest[1:]),
        lambda: native.native_reflect_backward(g, x, u, c, inverse, norms, dx.t().contiguous().t(), *rest[1:]),
        lambda: native.native_reflect_backward(g, x, u, c, inverse, norms, dx[:1].expand(9, 12), *rest[1:]),
        lambda: native.native_reflect_backward(g, x, u, c, inverse, norms, dx, True, [True]),
        lambda: torch.ops.frodkernels.reflect(x, u[:4], True),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            bad()
    with pytest.raises(ValueError, match=r"u must be"):
        native.reflect(x.to("meta"), u[:4].to("meta"), True)
