# SPDX-License-Identifier: Apache-2.0
"""The householder ops on a device, every backend: right by the derived bar, repeatable, on the current stream."""

import pytest
import torch

from frodkernels.ops import householder as ops
from frodkernels.reference import householder as reference
from tests.device.places import HOUSEHOLDER_OPS
from tests.householder.cases import F64, make_operands
from tests.support import LAYOUTS, assert_no_worse_than_torch

OPS = HOUSEHOLDER_OPS
BOTH = [True, True]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TYPES = [(dtype, acc) for dtype in (F32, BF16, F16) for acc in (F32, F64)] + [(F64, F64)]
dtypes = pytest.mark.parametrize("dtype, acc", TYPES, ids=lambda d: str(d).removeprefix("torch."))


def outputs(case, module=ops):
    """(out, coefficients, projection, dx, q, sum_x, sum_g, gradient)"""
    out, c = module.householder(*case.forward)
    alone = module.householder(case.x, case.left, None)[1]
    return (
        out,
        c,
        alone,
        *module.householder_backward(*case.backward, BOTH),
        module.householder_gradient(*case.gradient),
    )


def exact(case):
    out, c = case.exact_forward()
    return out, c, c, *case.exact_backward(), case.x.double().t() @ case.coefficients.double()


def check(place, *cases):
    """No worse than plain torch on the CPU; the errors of all cases make the norm."""
    got = [outputs(case.to(place.device)) for case in cases]
    torchs, right = [outputs(case, reference) for case in cases], [exact(case) for case in cases]
    for each in zip(zip(*got, strict=True), zip(*right, strict=True), zip(*torchs, strict=True), strict=True):
        assert all(t.device.type == place.type for t in each[0])
        assert [t.shape for t in each[0]] == [t.shape for t in each[1]]
        ours, correct, others = (torch.cat([t.flatten().cpu() for t in ts]) for ts in each)
        if others.dtype == F64:  # the yardstick's own precision
            torch.testing.assert_close(ours, correct, rtol=1e-11, atol=1e-11)
        else:
            assert_no_worse_than_torch(ours, correct, others)


@pytest.mark.parametrize("kind", ["native", "triton"])
def test_every_backend_serves_cuda(place, kind):
    """On a GPU both must be there: everything else in this file would skip what is missing."""
    if place.type == "cpu":
        assert place.has("native", OPS) is None, place.has("native", OPS)
    else:
        assert place.has(kind, OPS) is None, place.has(kind, OPS)


@dtypes
@pytest.mark.parametrize("m", [None, 48])
@pytest.mark.parametrize("T, n, r", [(1, 40, 3), (33, 72, 8), (65, 129, 17), (257, 96, 32)])
def test_against_float64(place, backend, T, n, r, m, dtype, acc):
    check(place, *(make_operands(T, n, r, m, dtype, acc, seed) for seed in range(3)))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("r", [1, 2, 7, 8, 16, 31, 33, 64, 65, 100, 127, 128, 129, 200])
def test_every_rank(place, backend, r, dtype):
    """Beyond 128 a GPU's products are plain."""
    check(place, make_operands(70, 80, r, None, dtype), make_operands(70, 80, r, 56, dtype))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("T, n, r, m", [(1024, 768, 8, None), (1024, 768, 32, 384), (777, 512, 16, 1000)])
def test_sizes_of_layers(place, backend, T, n, r, m, dtype):
    check(place, make_operands(T, n, r, m, dtype))


@pytest.mark.parametrize("T, n, r, m", [(0, 9, 4, None), (0, 9, 4, 7), (5, 0, 4, None), (5, 0, 4, 3), (5, 3, 4, 0)])
def test_nothing_to_do(place, backend, T, n, r, m):
    """A sum of nothing is zero and is written."""
    check(place, make_operands(T, n, r, m, F32))
    check(place, make_operands(5, 9, 0, 7, F32))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(place, backend, layout, dtype):
    for m, r in ((None, 9), (40, 9), (None, 3), (40, 40)):
        case = make_operands(37, 33, r, m, dtype)
        moved = case.to(place.device)
        for name in ("x", "g", "base_in", "base_out"):
            if getattr(case, name) is not None:
                for each in (case, moved):
                    setattr(each, name, LAYOUTS[layout](getattr(each, name).t()).t())
        got = outputs(moved)
        assert all(t.is_contiguous() for t in got)
        for ours, right, others in zip(got, exact(case), outputs(case, reference), strict=True):
            if "expanded" in layout:  # few numbers, summed with themselves: luck decides the norm
                torch.testing.assert_close(ours.cpu(), others, rtol=0.02 if dtype != F32 else 1e-4, atol=1e-3)
            else:
                assert_no_worse_than_torch(ours.cpu(), right, others)


@pytest.mark.parametrize("needs", [[a, b] for a in (False, True) for b in (False, True)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("m", [None, 40])
def test_what_is_not_needed_is_empty(place, backend, needs, dtype, m):
    case = make_operands(70, 33, 9, m, dtype).to(place.device)
    whole = ops.householder_backward(*case.backward, BOTH)
    parts = ops.householder_backward(*case.backward, needs)
    for part, same, need in zip(parts, whole, (needs[0], True, needs[1], needs[1]), strict=True):
        assert part.dtype == same.dtype
        if need:
            torch.testing.assert_close(part, same, rtol=1e-4 if part.dtype == F32 else 0.02, atol=1e-3)
        else:
            assert part.numel() == 0


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("token", [0, 17, 64, 69])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_token_spoils_no_other(place, backend, bad, token, dtype):
    """Padding of a tile must not bring 0 x NaN into a neighbour either."""
    for m in (None, 40):
        case = make_operands(70, 33, 9, m, dtype)
        case.x[token, 5] = case.g[token, 3] = bad
        others = torch.arange(70) != token
        got = [t.cpu() for t in outputs(case.to(place.device))]
        want = outputs(case, reference)
        for index in (0, 1, 2, 3, 4):  # one row per token
            assert not got[index][token].isfinite().all() and got[index][others].isfinite().all()
            torch.testing.assert_close(
                got[index][others], want[index][others], rtol=0.02 if dtype != F32 else 1e-4, atol=1e-3
            )


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("T, n, r", [(5, 65, 8), (300, 130, 17), (1500, 96, 32)])
def test_repeats_bit_for_bit(place, backend, T, n, r, dtype):
    for m in (None, 72):
        case = make_operands(T, n, r, m, dtype).to(place.device)
        first = outputs(case)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, outputs(case), strict=True))


def test_a_call_leaves_nothing_to_the_next(place, backend):
    for dtype in (F32, BF16):
        bad = make_operands(300, 70, 16, 80, dtype).to(place.device)
        for tensor in bad.tensors().values():
            tensor.fill_(float("nan"))
        outputs(bad)
        check(place, *(make_operands(19, 33, 5, 40, dtype, seed=seed) for seed in range(3)))


def test_runs_on_the_current_stream(place, backend):
    """Operands written late on a side stream: a kernel on any other stream would read what was there before."""
    case = make_operands(place.tokens, 72, 9, 56, F32).to(place.device)
    want = outputs(case)
    late = case.to(place.device)
    late.x, late.g = torch.zeros_like(late.x), torch.zeros_like(late.g)
    place.wait()
    with place.side_stream():
        place.delay()
        late.x.copy_(case.x), late.g.copy_(case.g)
        got = outputs(late)
    place.wait()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_runs_on_the_tensors_device(place, backend):
    """Not on the current one."""
    others = place.others()
    if not others:
        pytest.skip("one CUDA device")
    case = make_operands(50, 40, 9, 56, F32)
    want = outputs(case.to(place.device))
    for device in others:
        moved = case.to(device)
        for part, same in zip(outputs(moved), want, strict=True):
            assert part.device == moved.x.device
            assert torch.equal(part.cpu(), same.cpu())


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_can_be_captured_and_replayed(place, backend, dtype):
    case = make_operands(place.tokens, 72, 9, 56, dtype).to(place.device)
    replay, kept = place.capture(lambda: outputs(case))
    for _ in range(2):
        case.x.copy_(torch.randn(case.x.shape)), case.left.copy_(torch.randn(case.left.shape))
        replay()
        place.wait()
        assert all(torch.equal(a, b) for a, b in zip(kept, outputs(case), strict=True))


def test_never_waits_for_the_device(place, backend):
    for dtype in (F32, BF16):
        case = make_operands(place.tokens, 72, 9, 56, dtype).to(place.device)
        outputs(case)
        with place.no_sync():
            outputs(case)
