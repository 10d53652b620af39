# SPDX-License-Identifier: Apache-2.0
"""The native CPU kernels of the sparse core, at every instruction set, against float64 and plain torch."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import frodkernels as fk
from frodkernels.reference import sparse_core as reference
from tests.support import DTYPE_IDS, DTYPES, KINDS, LAYOUTS, Case, assert_no_worse_than_torch, make_case

ALL = [True, True, True]
# Around every boundary of a tile: 8 to 128 tokens a tile, chunks of 2 to 32 tokens.
TOKENS = [0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000]
SHAPES = [(1, 1), (2, 2), (17, 17), (33, 33), (35, 20), (20, 35), (1, 40), (40, 1)]  # rectangular ones have no lam
native = torch.ops.frodkernels


def outputs(ops, case: Case, prefix: str, token_major: bool) -> tuple[Tensor, ...]:
    """(w, S^T u, dz, dlam, dvalues)"""
    forward, backward = getattr(ops, f"{prefix}sparse_core"), getattr(ops, f"{prefix}sparse_core_backward")
    w, v = forward(*case.forward, token_major), forward(*case.transpose, token_major)
    return w, v, *backward(*case.backward, ALL, token_major)


def check(*cases: Case, token_major: bool = False) -> None:
    """Forward, transpose and backward are no worse than plain torch, in the layout asked for.

    The error bar compares norms. Where an output is a handful of numbers, one luckily rounded sum would decide it, so
    such tests hand in several cases, and the errors of all of them make the norm.
    """
    got = [outputs(native, case, "native_", token_major) for case in cases]
    plain = [outputs(reference, case, "", token_major) for case in cases]
    exact = [(case.exact_forward(), case.exact_transpose(), *case.exact_backward()) for case in cases]
    for features in (features for w, v, dz, *_ in got for features in (w, v, dz)):
        assert (features.t() if token_major else features).is_contiguous()
    for ours, torchs, right in zip(
        zip(*got, strict=True), zip(*plain, strict=True), zip(*exact, strict=True), strict=True
    ):
        assert [t.shape for t in ours] == [t.shape for t in right]
        assert_no_worse_than_torch(*(torch.cat([t.flatten() for t in ts]) for ts in (ours, right, torchs)))


@pytest.mark.parametrize("dtype, param_dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("T", TOKENS)
def test_every_token_count(isa, T, dtype, param_dtype):
    check(make_case(19, 19, T, "random", dtype, param_dtype))


@pytest.mark.parametrize("dtype, param_dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(isa, layout, dtype, param_dtype):
    seeds = 12 if layout == "expanded" else 1  # one number, summed with itself
    for n, T in ((33, 70), (18, 9)):
        cases = [make_case(n, n, T, "random", dtype, param_dtype, seed=seed).laid_out(layout) for seed in range(seeds)]
        for token_major in (False, True):
            check(*cases, token_major=token_major)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_pattern(isa, shape, kind, dtype):
    for lam in {shape[0] == shape[1], False}:  # square, and yet without a diagonal
        few = kind in ("one", "gaps") or min(shape) < 3
        check(*(make_case(*shape, 37, kind, dtype, dtype, lam=lam, seed=seed) for seed in range(24 if few else 2)))


def test_two_layouts_at_once(isa):
    """u and z of a backward need not share a layout."""
    for first in LAYOUTS:
        for second in LAYOUTS:
            case = make_case(21, 21, 40, "random", torch.bfloat16)
            case.u, case.z = LAYOUTS[first](case.u), LAYOUTS[second](case.z)
            check(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["feature_major", "token_major"])
def test_tiles_beyond_the_near_caches(isa, layout, dtype):
    """Rows are asked for before their slots come, over the ends of groups and up to that of the pattern."""
    for m, n in ((30, 4000), (4000, 30)):
        case = make_case(m, n, 150, "random", dtype, dtype, lam=False)
        assert case.rows.numel() < m * n / 5
        check(case.laid_out(layout), token_major=layout == "token_major")


@pytest.mark.parametrize("m, n", [(0, 0), (0, 5), (5, 0)])
def test_empty_matrices(isa, m, n):
    case = make_case(m, n, 7)
    assert torch.equal(native.native_sparse_core(*case.forward), torch.zeros(m, 7))
    got = native.native_sparse_core_backward(*case.backward, ALL)
    assert [tuple(t.shape) for t in got] == [(n, 7), (0,), (0,)] and not got[0].any()


@pytest.mark.parametrize("needs", [[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)], ids=str)
@pytest.mark.parametrize("dtype, param_dtype", DTYPES, ids=DTYPE_IDS)
def test_what_is_not_needed_is_empty(isa, needs, dtype, param_dtype):
    for lam in (True, False):
        case = make_case(13, 13, 20, "random", dtype, param_dtype, lam=lam)
        needs = [bool(need) for need in needs]
        got = native.native_sparse_core_backward(*case.backward, needs)
        plain = reference.sparse_core_backward(*case.backward, needs)
        everything = native.native_sparse_core_backward(*case.backward, ALL)
        for part, same, whole, need in zip(got, plain, everything, needs, strict=True):
            assert part.dtype == same.dtype and part.shape == same.shape
            assert torch.equal(part, whole) if need else part.numel() == 0


def test_strided_parameters_and_plan(isa):
    case = make_case(23, 23, 30)
    want = native.native_sparse_core(*case.forward), *native.native_sparse_core_backward(*case.backward, ALL)

    def spread(t):
        return torch.stack([t.long(), t.long()], 1).to(t.dtype)[:, 1] if not t.is_floating_point() else wide(t)

    def wide(t):
        return torch.stack([torch.full_like(t, float("nan")), t], 1)[:, 1]

    params = wide(case.lam), wide(case.values)
    csr, csc = ([spread(t) for t in view] for view in (case.pattern.csr, case.pattern.csc))
    got = native.native_sparse_core(case.z, *params, *csr)
    assert torch.equal(got, want[0])
    for part, whole in zip(
        native.native_sparse_core_backward(case.u, case.z, *params, *csc, ALL), want[1:], strict=True
    ):
        assert torch.equal(part, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_nan_and_infinity_travel_along_entries_only(isa, dtype):
    """Nor do they leave their token: tiles are padded and gathered in blocks of tokens."""
    case = make_case(19, 19, 40, "gaps", dtype, dtype)
    case.z[4, 7], case.z[5, 39], case.u[3, 0] = float("nan"), float("inf"), -float("inf")
    for op in ("sparse_core", "sparse_core_backward"):
        args = case.forward if op == "sparse_core" else (*case.backward, ALL)
        got, want = getattr(native, f"native_{op}")(*args), getattr(reference, op)(*args)
        got, want = ((t,) if isinstance(t, torch.Tensor) else t for t in (got, want))
        for part, same in zip(got, want, strict=True):
            assert torch.equal(part.isnan(), same.isnan())
            assert torch.equal(part.isinf(), same.isinf())


def test_a_call_leaves_nothing_to_the_next(isa):
    """Scratch is kept between calls: what a large case of NaN left there must not reach a small one."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for layout in ("feature_major", "token_major", "strided"):
            bad = make_case(70, 70, 300, "dense", dtype)
            bad.z.fill_(float("nan")), bad.u.fill_(float("nan"))
            native.native_sparse_core(*bad.forward)
            native.native_sparse_core_backward(*bad.backward, ALL)
            check(make_case(9, 9, 5, "random", dtype).laid_out(layout))


def test_lazy_negation_is_resolved(isa):
    case = make_case(12, 12, 10)
    lazy = torch.complex(case.z, -case.z).conj().imag
    assert lazy.is_neg()
    got = native.native_sparse_core(lazy, *case.forward[1:])
    assert torch.equal(got, native.native_sparse_core(*case.forward))


def test_the_arguments_are_left_alone(isa):
    case = make_case(15, 15, 20, dtype=torch.float16)
    args = (*case.backward, *case.forward)
    before = [t.clone() for t in args]
    native.native_sparse_core(*case.forward)
    native.native_sparse_core_backward(*case.backward, ALL)
    for now, then in zip(args, before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("T", [4096, 100_000])
def test_long_sums_stay_accurate(isa, T):
    """dlam and dvalues sum over the tokens: partial sums keep the error near that of torch's pairwise sums."""
    case = make_case(4, 4, T, "dense")
    case.u, case.z = case.u + 1, case.z + 1  # a mean, so that the sum grows and its rounding with it
    check(case)


# ---- rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["feature_major", "token_major", "strided"])
def test_every_16_bit_number_is_read_and_rounded_as_torch_does(isa, layout, dtype):
    """All 65,536 of them, times factors that reach ties, subnormals, overflow, infinities and NaN."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    factors = torch.tensor([1.0, -1.0, 1 / 3, 1.0039, 3e-5, 2.0**-24, 7e4, 1e30, 0.0])
    n = factors.numel()
    z = LAYOUTS[layout](every.expand(n, -1))
    nothing = fk.SparsePattern(*torch.zeros(2, 0, dtype=torch.int64), (n, n))
    want = (every.float() * factors[:, None]).to(dtype)
    for token_major in (False, True):
        got = native.native_sparse_core(z, factors, factors[:0], *nothing.csr, token_major)
        dz, *_ = native.native_sparse_core_backward(
            z, z, factors, factors[:0], *nothing.csc, [True, False, False], token_major
        )
        for out in (got, dz):
            torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_storage_is_the_float32_sum_rounded_once(isa, dtype):
    case = make_case(60, 60, 77, "random", dtype)
    wide = case.laid_out("feature_major")
    wide.u, wide.z = case.u.float(), case.z.float()
    ours, theirs = outputs(native, case, "native_", False), outputs(native, wide, "native_", False)
    for narrow, rounded in zip(ours[:3], theirs[:3], strict=True):  # gradients of parameters sum in other blocks
        assert torch.equal(narrow, rounded.to(dtype))


# ---- determinism -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, param_dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("n, T", [(7, 3), (65, 9), (300, 40), (129, 1025)])
def test_same_bits_whatever_the_threads(isa, n, T, dtype, param_dtype):
    case = make_case(n, n, T, "random", dtype, param_dtype)
    runs = []
    for threads in (1, 2, 3, 4, 1):
        torch.set_num_threads(threads)
        runs.append(
            (native.native_sparse_core(*case.forward), *native.native_sparse_core_backward(*case.backward, ALL))
        )
    for run in runs[1:]:
        for first, again in zip(runs[0], run, strict=True):
            assert torch.equal(first, again)


def test_same_bits_in_every_layout(isa):
    """How the features lie in memory decides how they are read, not how they are summed."""
    case = make_case(50, 50, 77, "random", torch.bfloat16)
    want = native.native_sparse_core(*case.forward), *native.native_sparse_core_backward(*case.backward, ALL)
    for layout in ("token_major", "feature_pitched", "token_pitched", "strided"):
        other = case.laid_out(layout)
        got = native.native_sparse_core(*other.forward), *native.native_sparse_core_backward(*other.backward, ALL)
        for first, again in zip(want, got, strict=True):
            assert torch.equal(first, again)


def test_calls_from_several_threads_do_not_meet(isa):
    """Scratch belongs to a thread, and nothing else is kept."""
    cases = [make_case(n, n, T, "random") for n, T in ((20, 300), (64, 90), (33, 7), (90, 129))]
    want = [outputs(native, case, "native_", False) for case in cases]

    def run(k):
        return [outputs(native, cases[k % 4], "native_", False) for _ in range(10)]

    with ThreadPoolExecutor(8) as pool:
        for k, runs in enumerate(pool.map(run, range(16))):
            assert all(torch.equal(a, b) for got in runs for a, b in zip(got, want[k % 4], strict=True))


# ---- choosing the instruction set ------------------------------------------------------------------------------------


def test_an_unknown_level_is_refused(monkeypatch):
    monkeypatch.setenv("FRODKERNELS_CPU_ISA", "sse9")
    case = make_case(3, 3, 2)
    for call in (
        native.native_cpu_isa,
        lambda: native.native_sparse_core(*case.forward),
        lambda: native.native_sparse_core_backward(*case.backward, ALL),
        lambda: fk.sparse_core(case.z.t(), case.lam, case.values, case.pattern),
    ):
        with pytest.raises(RuntimeError, match="FRODKERNELS_CPU_ISA must be portable, avx2 or avx512, got sse9"):
            call()


def test_the_best_level_is_the_default(monkeypatch):
    monkeypatch.setenv("FRODKERNELS_CPU_ISA", "")
    best = native.native_cpu_isa()
    monkeypatch.delenv("FRODKERNELS_CPU_ISA")
    assert best == native.native_cpu_isa()
    assert best in ("portable", "avx2", "avx512")
    capability = torch.backends.cpu.get_cpu_capability()  # what torch found out about the same CPU
    if capability in ("AVX2", "AVX512"):
        assert best == capability.lower()
