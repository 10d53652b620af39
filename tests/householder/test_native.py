# SPDX-License-Identifier: Apache-2.0
"""The native CPU kernels of the chained reflections, at every instruction set, against float64 and plain torch."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from frodkernels.reference import householder as reference
from tests.householder.cases import F64, Operands, make_operands
from tests.support import FLOATS, LAYOUTS, assert_no_worse_than_torch, names

BOTH = [True, True]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# dtype of the tokens and of the factors
DTYPES = [(F32, F32), (F64, F64), (BF16, F32), (F16, F32), (F32, F64), (BF16, F64), (F16, F64)]
DTYPE_IDS = [names(*pair) for pair in DTYPES]
dtypes = pytest.mark.parametrize("dtype, acc", DTYPES, ids=DTYPE_IDS)
# Around every boundary: vectors of 2 to 16 numbers, blocks of up to 64 features, panels of 256, groups of 12 tokens.
FEATURES = [0, 1, 2, 5, 7, 15, 16, 17, 31, 33, 63, 64, 65, 129, 255, 257, 1100]
RANKS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 64, 129]
TOKENS = [0, 1, 2, 3, 4, 5, 7, 11, 12, 13, 23, 25, 47, 48, 49, 97, 129, 1000]
native = torch.ops.frodkernels


def run(where, prefix: str, case: Operands) -> list[Tensor]:
    """(out, coefficients; dx, q, sum_x, sum_g; xᵀ coefficients)"""
    forward = getattr(where, f"{prefix}householder")(*case.forward)
    backward = getattr(where, f"{prefix}householder_backward")(*case.backward, BOTH)
    return [*forward, *backward, getattr(where, f"{prefix}householder_gradient")(*case.gradient)]


def exact(case: Operands) -> list[Tensor]:
    """Rounded to float64, from wider sums where float64 is what is tested."""
    wide = np.longdouble if case.left.dtype == F64 else np.float64
    x, g, left, right, c, out, into = (
        None if t is None else t.double().numpy().astype(wide) for t in vars(case).values()
    )
    coefficients, q = x @ left, g @ right
    sums = [x.T @ q, g.T @ c]
    found = [(x if out is None else out) - coefficients @ right.T, coefficients]
    found += [
        (g if into is None else into) - q @ left.T,
        q,
        *([sums[0] + sums[1], np.empty(0)] if into is None else sums),
    ]
    return [torch.from_numpy(np.asarray(t, dtype=np.float64)) for t in (*found, x.T @ c)]


def check(*cases: Operands) -> None:
    """Every result is contiguous and no worse than plain torch's in the same dtypes.

    The error bar compares norms. Where an output is a handful of numbers, one luckily rounded sum would decide it, so
    such tests hand in several cases, and the errors of all of them make the norm.
    """
    got = [run(native, "native_", case) for case in cases]
    plain = [run(reference, "", case) for case in cases]
    right = [exact(case) for case in cases]
    assert all(t.is_contiguous() for ts in got for t in ts)
    for ours, torchs, correct in zip(*(zip(*each, strict=True) for each in (got, plain, right)), strict=True):
        assert [t.shape for t in ours] == [t.shape for t in correct]
        assert_no_worse_than_torch(*(torch.cat([t.flatten() for t in ts]) for ts in (ours, correct, torchs)))


def several(*sizes: int, few: bool, **options) -> list[Operands]:
    """The case, or enough of them for a norm where it has few numbers."""
    return [make_operands(*sizes, **options, seed=seed) for seed in range(32 if few else 1)]


# ---- shapes ----------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("T", TOKENS)
def test_every_token_count(isa, T, dtype, acc):
    check(*several(T, 37, 5, few=T < 8, dtype=dtype, acc=acc))
    check(*several(T, 37, 19, 21, few=T < 8, dtype=dtype, acc=acc))


@dtypes
@pytest.mark.parametrize("r", RANKS)
def test_every_rank(isa, r, dtype, acc):
    check(*several(14, 70, r, few=r < 4, dtype=dtype, acc=acc))
    check(*several(31, 70, r, 35, few=r < 4, dtype=dtype, acc=acc))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", FEATURES)
def test_every_feature_count(isa, n, dtype):
    for r in (3, 8, 20):
        check(*several(27, n, r, few=n < 8, dtype=dtype))
        check(*several(27, n, r, 33, few=n < 8, dtype=dtype))
        check(*several(27, 33, r, n, few=n < 8, dtype=dtype))


@pytest.mark.parametrize("T, n, r, m", list(itertools.product((0, 3), (0, 4), (0, 2), (0, 5))))
def test_nothing_along_an_axis(isa, T, n, r, m):
    case = make_operands(T, n, r, m, dtype=F32)
    for ours, correct in zip(run(native, "native_", case), exact(case), strict=True):
        assert ours.shape == correct.shape
        torch.testing.assert_close(ours.double(), correct, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [4096, 50_000])
def test_long_sums_stay_accurate(isa, T):
    """The gradients sum over the tokens: partial sums keep the error near that of torch's pairwise sums."""
    case = make_operands(T, 5, 2, dtype=F32)
    case.x, case.coefficients = case.x + 1, case.coefficients + 1  # a mean, so that the sum grows and its rounding too
    check(case)


def test_many_features_are_summed_as_accurately(isa):
    check(make_operands(13, 9000, 4, dtype=F32), make_operands(13, 9000, 18, dtype=F32))


# ---- layouts ---------------------------------------------------------------------------------------------------------


def laid_out(case: Operands, layout: str) -> Operands:
    """Every operand, the factors too, in another layout (an expanded one changes the numbers)."""
    change = LAYOUTS[layout]
    return Operands(*(None if t is None else change(t) for t in vars(case).values()))


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(isa, layout, dtype, acc):
    # One number summed with itself rounds the same way every time: few of it, or one lucky case decides the norm.
    T, n, r, k = (5, 7, 3, 4) if layout == "expanded" else (29, 35, 6, 18)
    for m in (None, k):
        check(*(laid_out(case, layout) for case in several(T, n, r, m, few=True, dtype=dtype, acc=acc)))


def test_layouts_that_differ(isa):
    for one, other in itertools.product(LAYOUTS, LAYOUTS):
        case = make_operands(25, 40, 9, 40, dtype=BF16)
        case.x, case.g = LAYOUTS[one](case.x), LAYOUTS[other](case.g)
        case.base_out, case.base_in = LAYOUTS[other](case.base_out), LAYOUTS[one](case.base_in)
        check(case)


def test_same_bits_in_every_layout(isa):
    case = make_operands(77, 130, 17, 50, dtype=BF16)
    want = run(native, "native_", case)
    for layout in ("feature_major", "token_major", "feature_pitched", "token_pitched", "strided"):
        for first, again in zip(want, run(native, "native_", laid_out(case, layout)), strict=True):
            assert torch.equal(first, again)


def test_lazy_negation_is_resolved(isa):
    case = make_operands(12, 10, 4, dtype=F32)
    lazy = torch.complex(case.x, -case.x).conj().imag
    assert lazy.is_neg()
    got = native.native_householder(lazy, case.left, case.right)
    for ours, same in zip(got, native.native_householder(*case.forward), strict=True):
        assert torch.equal(ours, same)


def test_the_arguments_are_left_alone(isa):
    case = make_operands(15, 20, 7, 13, dtype=F16)
    before = [t.clone() for t in vars(case).values()]
    run(native, "native_", case)
    for now, then in zip(vars(case).values(), before, strict=True):
        assert torch.equal(now, then)


# ---- what is asked for -----------------------------------------------------------------------------------------------


@dtypes
def test_projection_alone(isa, dtype, acc):
    for r in (3, 21):
        case = make_operands(30, 41, r, dtype=dtype, acc=acc)
        out, coefficients = native.native_householder(case.x, case.left, None)
        assert out.shape == (0,) and out.dtype == dtype
        assert torch.equal(coefficients, native.native_householder(*case.forward)[1])


@pytest.mark.parametrize("needs", [[a, b] for a in (False, True) for b in (False, True)], ids=str)
@dtypes
def test_what_is_not_needed_is_empty(isa, needs, dtype, acc):
    for m in (None, 23):
        case = make_operands(26, 40, 11, m, dtype=dtype, acc=acc)
        dx, q, sum_x, sum_g = native.native_householder_backward(*case.backward, needs)
        everything = native.native_householder_backward(*case.backward, BOTH)
        plain = reference.householder_backward(*case.backward, needs)
        assert [(t.shape, t.dtype) for t in (dx, q, sum_x, sum_g)] == [(t.shape, t.dtype) for t in plain]
        wanted = zip((needs[0], True, needs[1], needs[1]), (dx, q, sum_x, sum_g), everything, strict=True)
        assert all(torch.equal(part, whole) for need, part, whole in wanted if need)


# ---- numbers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("r", [1, 5, 8, 13, 33])
def test_nan_and_infinity_stay_with_their_token(isa, dtype, r):
    """Nor do the zeros that fill up vectors make NaN of an infinity."""
    for n, m in ((37, None), (70, 37), (37, 70)):
        case = make_operands(31, n, r, m, dtype=dtype)
        clean = run(native, "native_", case)
        bad = torch.zeros(31, dtype=torch.bool)
        for row, column, value in ((0, 0, "nan"), (13, n - 1, "inf"), (30, n // 2, "-inf")):
            case.x[row, column] = case.g[row, -1] = float(value)
            bad[row] = True
        got = run(native, "native_", case)
        for ours, before in zip((got[0], got[1], got[2], got[3]), clean[:4], strict=True):
            assert torch.equal(ours[~bad], before[~bad])
        plain = run(reference, "", case)
        for ours, torchs in zip(got, plain, strict=True):
            assert torch.equal(ours.isnan(), torchs.isnan()) and torch.equal(ours.isinf(), torchs.isinf())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_infinite_factors_meet_their_features_only(isa, dtype):
    for r in (3, 9):
        case = make_operands(9, 21, r, dtype=dtype)
        case.right[4, 1] = float("inf")
        out, coefficients = native.native_householder(*case.forward)
        assert coefficients.isfinite().all()
        assert out[:, 4].isinf().all() and out[:, torch.arange(21) != 4].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_old_scratch_does_not_show(isa, dtype):
    """Scratch is kept between calls; what an earlier one left in it, NaN even, is never read."""
    for r, m in ((40, None), (5, 33)):
        bad = make_operands(100, 300, r, m, dtype=dtype)
        for t in vars(bad).values():
            if t is not None:
                t.fill_(float("nan"))
        run(native, "native_", bad)
        check(*several(7, 9, 2, few=True, dtype=dtype), *several(19, 33, 10, few=True, dtype=dtype))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("tail", [0, 3])
def test_every_16_bit_number_is_read_and_rounded_as_torch_does(isa, tail, dtype):
    """All 65,536 of them, less multiples that reach ties, subnormals, overflow, infinities and NaN."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    base = torch.cat([every, every[:tail]])[None]
    x = torch.ones(1, 1, dtype=dtype)
    for shift in (0.0, 1.0, 2.0**-24, 3e-5, 1 / 3, 7e4, 1e30, float("inf")):
        right = torch.full((base.shape[1], 1), shift)
        out, _ = native.native_householder(x, torch.ones(1, 1), right, base)
        torch.testing.assert_close(out, (base.float() - shift).to(dtype), rtol=0, atol=0, equal_nan=True)


# ---- determinism -----------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("T, n, r, m", [(3, 7, 2, None), (200, 65, 8, None), (1025, 40, 9, 30), (700, 300, 33, None)])
def test_same_bits_whatever_the_threads(isa, T, n, r, m, dtype, acc):
    case = make_operands(T, n, r, m, dtype=dtype, acc=acc)
    runs = []
    for threads in (1, 2, 3, 4, 1):
        torch.set_num_threads(threads)
        runs.append(run(native, "native_", case))
    for again in runs[1:]:
        assert all(torch.equal(first, same) for first, same in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_token_has_the_same_bits_beside_any_others(isa, dtype):
    """Tokens are cut into groups and tiles, but none of its sums depends on the company it is in."""
    case = make_operands(700, 90, 11, dtype=dtype)
    out, coefficients = native.native_householder(*case.forward)
    for first, last in ((0, 1), (5, 17), (300, 449), (699, 700)):
        some = native.native_householder(case.x[first:last], case.left, case.right)
        assert torch.equal(some[0], out[first:last]) and torch.equal(some[1], coefficients[first:last])


def test_calls_from_several_threads_do_not_meet(isa):
    """Scratch belongs to a thread, and nothing else is kept."""
    sizes = (300, 20, 5, None), (90, 64, 33, 20), (7, 33, 8, None), (129, 90, 12, 91)
    cases = [make_operands(T, n, r, m, dtype=F32) for T, n, r, m in sizes]
    want = [run(native, "native_", case) for case in cases]

    def again(k):
        return [run(native, "native_", cases[k % 4]) for _ in range(10)]

    with ThreadPoolExecutor(8) as pool:
        for k, runs in enumerate(pool.map(again, range(16))):
            assert all(torch.equal(a, b) for got in runs for a, b in zip(got, want[k % 4], strict=True))


# ---- errors ----------------------------------------------------------------------------------------------------------


def wrong_arguments():
    """(name of the op, arguments, what the message says)"""
    case = make_operands(6, 8, 3, 5, dtype=F32)
    x, g, left, right, c, out, into = vars(case).values()
    yield "householder", (x[0], left, right, out), "x must be"
    yield "householder", (x.long(), left, right, out.long()), "x must be"
    yield "householder", (x, left[0], right, out), "left must be"
    yield "householder", (x, left[1:], right, out), "left must be"
    yield "householder", (x, left.long(), right, out), "left must be"
    yield "householder", (x, left, right[:, 1:], out), "right must be"
    yield "householder", (x, left, right), "right must be"
    yield "householder", (x, left, right.cfloat(), out), "right must be"
    yield "householder", (x, left, right, out[1:]), "base must be"
    yield "householder", (x, left, right, out[:, 1:]), "base must be"
    yield "householder", (x, left, right, out.half()), "base must"
    backward = (g, x, c, right, left, into)
    for k, (name, good) in enumerate(zip(("g", "x", "coefficients", "left", "right", "base"), backward, strict=True)):
        for bad in (good[0], good.repeat(2, 1)):
            args = (*backward[:k], bad, *backward[k + 1 :], BOTH)
            blamed = "x" if name == "g" and bad.dim() == 2 else name  # the others follow g's shape
            yield "householder_backward", args, f"{blamed} must be"
    for k, name in ((1, "x"), (5, "base")):
        yield "householder_backward", (*backward[:k], backward[k].half(), *backward[k + 1 :], BOTH), f"{name} must"
    yield "householder_backward", (g, x, c, right, left, None, BOTH), "x must be"
    yield "householder_backward", (*backward, [True]), ".*"
    yield "householder_gradient", (x[0], c), "x must be"
    yield "householder_gradient", (x.long(), c), "x must be"
    yield "householder_gradient", (x, c[1:]), "q must be"
    yield "householder_gradient", (x, c[0]), "q must be"
    yield "householder_gradient", (x, c.bool()), "q must be"


@pytest.mark.parametrize("name, args, message", list(wrong_arguments()))
def test_wrong_arguments_are_named(name, args, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(native, f"native_{name}")(*args)


def test_an_unknown_level_is_refused(monkeypatch):
    monkeypatch.setenv("FRODKERNELS_CPU_ISA", "sse9")
    case = make_operands(3, 3, 2, dtype=F64)
    for name, args in (
        ("householder", case.forward),
        ("householder_backward", (*case.backward, BOTH)),
        ("householder_gradient", case.gradient),
    ):
        with pytest.raises(RuntimeError, match="FRODKERNELS_CPU_ISA must be portable, avx2 or avx512, got sse9"):
            getattr(native, f"native_{name}")(*args)
