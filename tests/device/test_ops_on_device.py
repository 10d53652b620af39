# SPDX-License-Identifier: Apache-2.0
"""The sparse core on a device, every backend: right by the derived bar, repeatable, on the current stream."""

import pytest
import torch

import frodkernels as fk
from frodkernels.functional import _views
from frodkernels.ops import sparse_core as ops
from frodkernels.reference import sparse_core as reference
from tests.device.places import case_on
from tests.support import DTYPE_IDS, DTYPES, KINDS, LAYOUTS, assert_no_worse_than_torch, make_case

ALL = [True, True, True]
dtypes = pytest.mark.parametrize("dtype, param_dtype", DTYPES, ids=DTYPE_IDS)
SIXTEEN = [torch.bfloat16, torch.float16]


def outputs(case, token_major=False, tiled=True):
    """(w, S^T u, dz, dlam, dvalues), with the plan of the tensor-core kernels where the library has one for them."""
    views = _views.both_views(case.pattern, case.z)
    rows, columns = _views.rows_view(views), _views.columns_view(views)
    row_tiles, column_tiles = (list(view[3:]) or None if tiled else None for view in (rows, columns))
    w = ops.sparse_core(*case.forward, token_major, row_tiles)
    v = ops.sparse_core(*case.transpose, token_major, column_tiles)
    return w, v, *ops.sparse_core_backward(*case.backward, ALL, token_major, column_tiles)


def plain(case):
    """The reference itself, whichever backend is forced."""
    w, v = reference.sparse_core(*case.forward), reference.sparse_core(*case.transpose)
    return w, v, *reference.sparse_core_backward(*case.backward, ALL)


def check(place, *cases, token_major=False, tiled=True):
    """No worse than plain torch on the CPU; the errors of all cases make the norm (see tests/sparse_core)."""
    got = [outputs(case_on(case, place.device), token_major, tiled) for case in cases]
    torchs = [plain(case) for case in cases]
    exact = [(case.exact_forward(), case.exact_transpose(), *case.exact_backward()) for case in cases]
    for ours, right, others in zip(
        zip(*got, strict=True), zip(*exact, strict=True), zip(*torchs, strict=True), strict=True
    ):
        assert all(t.device.type == place.type for t in ours)
        assert [t.shape for t in ours] == [t.shape for t in right]
        assert_no_worse_than_torch(*(torch.cat([t.flatten().cpu() for t in ts]) for ts in (ours, right, others)))


@pytest.mark.parametrize("kind", ["native", "triton"])
def test_every_backend_serves_cuda(place, kind):
    """On a GPU both must be there: everything else in this folder would skip what is missing."""
    if place.type == "cpu":
        assert place.has("native") is None, place.has("native")
    else:
        assert place.has(kind) is None, place.has(kind)


@dtypes
@pytest.mark.parametrize("n, T", [(19, 1), (70, 5), (19, 33), (70, 257)])
def test_against_float64(place, backend, n, T, dtype, param_dtype):
    for token_major in (False, True):
        cases = [make_case(n, n, T, "random", dtype, param_dtype, seed=seed) for seed in range(3)]
        check(place, *cases, token_major=token_major)
        if place.type == "cuda" and dtype in SIXTEEN:
            check(place, *cases, token_major=token_major, tiled=False)


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
@pytest.mark.parametrize("n, T, nnz", [(600, 513, 3600), (512, 1024, 2621)])
def test_sparse_as_adapters_are(place, backend, n, T, nnz, dtype):
    """One per cent, several token tiles and feature blocks: what the tensor-core kernels are for."""
    case = make_case(n, n, T, "empty", dtype)
    generator = torch.Generator().manual_seed(7)
    flat = torch.randperm(n * n, generator=generator)[:nnz]
    case.rows, case.cols = flat // n, flat % n
    case.values = torch.randn(nnz, generator=generator)
    case.pattern = fk.SparsePattern(case.rows, case.cols, (n, n))
    check(place, case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *SIXTEEN], ids=str)
def test_every_pattern(place, backend, kind, dtype):
    few = kind in ("one", "gaps")
    for m, n in ((33, 33), (35, 20), (20, 35)):
        check(place, *(make_case(m, n, 37, kind, dtype, dtype, seed=seed) for seed in range(24 if few else 3)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
def test_every_layout(place, backend, layout, dtype):
    seeds = 12 if layout == "expanded" else 2
    cases = [make_case(33, 33, 70, "random", dtype, seed=seed) for seed in range(seeds)]
    right = [case.laid_out(layout) for case in cases]
    for case, same in zip(cases, right, strict=True):
        moved = case_on(case, place.device).laid_out(layout)
        assert moved.z.stride() == same.z.stride()
        for ours, exact, torchs in zip(
            outputs(moved),
            (same.exact_forward(), same.exact_transpose(), *same.exact_backward()),
            plain(same),
            strict=True,
        ):
            if seeds == 2:
                assert_no_worse_than_torch(ours.cpu(), exact, torchs)
            else:  # one number, summed with itself: luck decides the norm
                torch.testing.assert_close(ours.cpu(), torchs)


@pytest.mark.parametrize("n, T", [(0, 5), (6, 0), (0, 0)])
def test_nothing_to_do(place, backend, n, T):
    case = case_on(make_case(n, n, T, "dense"), place.device)
    w, v, dz, dlam, dvalues = outputs(case)
    assert w.shape == v.shape == dz.shape == (n, T)
    assert not dlam.any() and not dvalues.any()


@pytest.mark.parametrize("needs", [[bool(k & 4), bool(k & 2), bool(k & 1)] for k in range(8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_needed_is_empty(place, backend, needs, dtype):
    case = case_on(make_case(40, 40, 70, "random", dtype), place.device)
    whole = ops.sparse_core_backward(*case.backward, ALL)
    parts = ops.sparse_core_backward(*case.backward, needs)
    for part, same, need in zip(parts, whole, needs, strict=True):
        assert part.dtype == same.dtype
        if need and part is not parts[1]:
            assert torch.equal(part, same)
        elif need:  # the diagonal's gradient alone may be split into other sums
            torch.testing.assert_close(part, same, rtol=1e-4, atol=1e-4)
        else:
            assert part.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
def test_nan_travels_along_entries_only(place, backend, dtype):
    plain_case = make_case(33, 33, 70, "gaps", dtype)
    plain_case.z[4, 7], plain_case.z[5, 39], plain_case.u[3, 0] = float("nan"), float("inf"), -float("inf")
    for ours, same in zip(outputs(case_on(plain_case, place.device)), plain(plain_case), strict=True):
        assert torch.equal(ours.cpu().isnan(), same.isnan())
        assert torch.equal(ours.cpu().isinf(), same.isinf())


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
@pytest.mark.parametrize("T", [5, 300, 1500])
def test_repeats_bit_for_bit(place, backend, T, dtype):
    case = case_on(make_case(65, 65, T, "random", dtype), place.device)
    first = outputs(case)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, outputs(case), strict=True))


def test_a_call_leaves_nothing_to_the_next(place, backend):
    for dtype in (torch.float32, torch.bfloat16):
        bad = case_on(make_case(70, 70, 300, "dense", dtype), place.device)
        bad.z.fill_(float("nan")), bad.u.fill_(float("nan"))
        outputs(bad)
        check(place, *(make_case(19, 19, 5, "random", dtype, seed=seed) for seed in range(3)))


def test_runs_on_the_current_stream(place, backend):
    """Operands written late on a side stream: a kernel on any other stream would read what was there before."""
    case = make_case(40, 40, place.tokens, "random")
    want = outputs(case_on(case, place.device))
    late = case_on(case, place.device)
    late.z, late.u = torch.zeros_like(late.z), torch.zeros_like(late.u)
    place.wait()
    with place.side_stream():
        place.delay()
        late.z.copy_(case.z.to(place.device)), late.u.copy_(case.u.to(place.device))
        got = outputs(late)
    place.wait()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_runs_on_the_tensors_device(place, backend):
    """Not on the current one."""
    others = place.others()
    if not others:
        pytest.skip("one CUDA device")
    case = make_case(40, 40, 50, "random")
    want = outputs(case_on(case, place.device))
    for device in others:
        moved = case_on(case, device)
        for part, same in zip(outputs(moved), want, strict=True):
            assert part.device == moved.z.device
            assert torch.equal(part.cpu(), same.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_can_be_captured_and_replayed(place, backend, dtype):
    case = case_on(make_case(40, 40, place.tokens, "random", dtype), place.device)
    replay, kept = place.capture(lambda: outputs(case))
    for _ in range(2):
        case.z.copy_(torch.randn(case.z.shape)), case.values.copy_(torch.randn(case.values.shape))
        replay()
        place.wait()
        assert all(torch.equal(a, b) for a, b in zip(kept, outputs(case), strict=True))


def test_bad_arguments_are_named(place, backend):
    case = case_on(make_case(6, 6, 4), place.device)
    u, z, lam, values, *plan = case.backward
    for elsewhere in {"meta", "cpu"} - {place.type}:
        with pytest.raises(ValueError, match=f"lam must be on {place.type}.*got {elsewhere}"):
            fk.sparse_core(z.t(), lam.to(elsewhere), values, case.pattern)
    for call, name in (
        (lambda: fk.sparse_core(z.t(), lam[1:], values, case.pattern), "lam"),
        (lambda: fk.sparse_core(z.t(), lam, values[1:], case.pattern), "values"),
        (lambda: fk.sparse_core(z, lam, values, case.pattern), "pattern"),
        (lambda: fk.sparse_core(z.t().int(), lam, values, case.pattern), "z"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            call()
    if backend != "reference":  # which leaves the guarding of memory to torch
        with pytest.raises((ValueError, RuntimeError), match="values"):
            ops.sparse_core_backward(u, z, lam, values[1:], *plan, ALL)
