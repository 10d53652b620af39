# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the chained reflections, run by Triton's interpreter.

``make test`` runs this file in a process with TRITON_INTERPRET=1, which Triton reads when it is imported. The
interpreter's bfloat16 is wrong, so features in bfloat16 are compiled (``test_aot_triton.py``) but not run here, and the
parts that fp32 numbers are cut into are bfloat16 numbers in float32.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported (make test sets it)", allow_module_level=True)
pytest.importorskip("triton")

import frodkernels as fk
from frodkernels.reference import householder as reference
from frodkernels.triton_kernels import _config
from frodkernels.triton_kernels import householder as kernels
from tests.householder.cases import F64, close, make_operands
from tests.support import LAYOUTS, assert_no_worse_than_torch, names

F32, F16 = torch.float32, torch.float16
BOTH = [True, True]
DTYPES = [(F32, F32), (F16, F32), (F64, F64), (F32, F64), (F16, F64)]
dtypes = pytest.mark.parametrize("dtype, acc", DTYPES, ids=[names(*pair) for pair in DTYPES])


def calls(case, needs=BOTH):
    """(name, arguments) of every op, the first with and without a result."""
    return [
        ("householder", case.forward),
        ("householder", (case.x, case.left, None)),
        ("householder_backward", (*case.backward, needs)),
        ("householder_gradient", case.gradient),
    ]


def outputs(case, needs=BOTH):
    found = []
    for name, args in calls(case, needs):
        got = getattr(kernels, name)(*args)
        found += got if isinstance(got, tuple) else [got]
    return found


def exact(case):
    forward = case.exact_forward()
    gradient = torch.einsum("tn,tr->nr", case.x.double(), case.coefficients.double())
    return [*forward, forward[0].new_empty(0), forward[1], *case.exact_backward(), gradient]


def plain(case):
    found = []
    for name, args in calls(case):
        same = getattr(reference, name)(*args)
        found += same if isinstance(same, tuple) else [same]
    return found


def check(case):
    """Every output of every op: no worse than plain torch, contiguous."""
    for got, right, same in zip(outputs(case), exact(case), plain(case), strict=True):
        assert got.is_contiguous()
        if got.dtype == F64:  # the yardstick's own precision
            close(got, right)
        else:
            assert_no_worse_than_torch(got, right, same)


def force_splits(monkeypatch, splits):
    monkeypatch.setattr(kernels, "householder_splits", lambda *sizes: splits)


@dtypes
@pytest.mark.parametrize("T, n, r, m", [(5, 33, 3, None), (18, 40, 17, 20)])  # decode and wide tiles
def test_every_op_and_dtype(T, n, r, m, dtype, acc):
    check(make_operands(T, n, r, m, dtype, acc))


@pytest.mark.parametrize("T, r", [(1, 1), (1, 128), (18, 2), (18, 16), (18, 33), (2, 64), (18, 127), (18, 128)])
def test_ranks(T, r):
    check(make_operands(T, 11, r, 6, F32))


@pytest.mark.parametrize("splits", [1, 2, 4])  # 1: the fused kernel; 4: more splits than some sums have blocks
@pytest.mark.parametrize("T, n, r, m", [(65, 40, 5, None), (9, 130, 5, 70)])
def test_splits(monkeypatch, splits, T, n, r, m):
    force_splits(monkeypatch, splits)
    check(make_operands(T, n, r, m, F32))


def test_several_blocks_in_16_bits(monkeypatch):
    force_splits(monkeypatch, 1)
    check(make_operands(65, 70, 4, None, F16, F32))


def test_the_products_of_bfloat16_features(monkeypatch):
    """bfloat16 numbers in float32, multiplied as bfloat16 features are: uncut, and the update in two parts."""
    monkeypatch.setattr(kernels, "feature_parts", lambda dtype: 1)
    monkeypatch.setattr(kernels, "update_parts", lambda dtype: 2)
    narrow = make_operands(20, 40, 6, 35, torch.bfloat16, F32)
    wide = make_operands(20, 40, 6, 35, torch.bfloat16, F32)
    wide.x, wide.g, wide.base_out, wide.base_in = (t.float() for t in (wide.x, wide.g, wide.base_out, wide.base_in))
    for got, right, same in zip(outputs(wide), exact(narrow), plain(narrow), strict=True):
        assert_no_worse_than_torch(got.to(same.dtype), right, same)


EMPTY = [(0, 9, 4, 7), (0, 9, 4, None), (5, 0, 4, None), (5, 0, 4, 3), (5, 3, 4, 0), (5, 9, 0, 7), (5, 9, 0, None)]


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("splits", [1, 2])
def test_empty(monkeypatch, splits, shape):
    force_splits(monkeypatch, splits)
    case = make_operands(*shape, F32)
    for got, want in zip(outputs(case), plain(case), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(layout):
    change = LAYOUTS[layout]
    case, plainly = make_operands(4, 10, 3, 8, F16, F32), make_operands(4, 10, 3, 8, F16, F32)
    for name, tensor in case.tensors().items():
        setattr(case, name, change(tensor))
        setattr(plainly, name, change(tensor).contiguous())
    for got, want in zip(outputs(case), outputs(plainly), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("m", [None, 5])
@pytest.mark.parametrize("needs", [[a, b] for a in (False, True) for b in (False, True)], ids=str)
def test_needs(needs, m):
    case = make_operands(18, 6, 3, m, F16, F32)
    full = kernels.householder_backward(*case.backward, BOTH)
    parts = kernels.householder_backward(*case.backward, needs)
    needed = needs[0], True, needs[1], needs[1]
    for part, whole, wanted in zip(parts, full, needed, strict=True):
        assert part.dtype == whole.dtype
        assert torch.equal(part, whole) if wanted else part.shape == (0,)


def test_repeats_bit_for_bit():
    case = make_operands(34, 40, 5, None, F32)
    assert all(torch.equal(a, b) for a, b in zip(outputs(case), outputs(case), strict=True))


NAN, INF = float("nan"), float("inf")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value, dtype, splits", [(NAN, F32, 1), (NAN, F16, 2), (INF, F16, 1), (-INF, F32, 2)], ids=str)
def test_a_wild_token_stays_a_token(monkeypatch, value, dtype, splits):
    force_splits(monkeypatch, splits)
    case = make_operands(20, 40, 3, 35, dtype, F32)
    quiet = outputs(case)
    case.x[17, 5] = case.g[13, 9] = value
    for index, (got, before, want) in enumerate(zip(outputs(case), quiet, plain(case), strict=True)):
        assert torch.equal(got.isfinite(), want.isfinite())
        if value != value:
            assert torch.equal(got.isnan(), want.isnan())
        if index < 6 and got.numel():  # not the sums over tokens
            calm = want.isfinite().all(1)
            assert torch.equal(got[calm], before[calm]) and (~calm).sum() == 1


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_wild_factors_reach_what_the_reference_says():
    case = make_operands(18, 40, 3, 35, F32)
    case.left[7, 1] = case.right[3, 2] = case.coefficients[4, 0] = NAN
    for got, want in zip(outputs(case), plain(case), strict=True):
        assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_cutting_loses_nothing(dtype):
    """A token that is one 1 picks a row of left, and a gradient that is one 1 a row of q: to the last bit."""
    left = torch.randn(40, 5) * torch.logspace(-30, 30, 40).unsqueeze(1)
    x = torch.eye(40, dtype=dtype)
    assert torch.equal(kernels.householder(x, left, None)[1], left)
    assert torch.equal(kernels.householder_gradient(x, left), left)


@pytest.mark.parametrize("dtype", [torch.bfloat16, F16, F32], ids=str)
def test_as_many_parts_as_a_number_has(dtype):
    if dtype == F32:
        numbers = torch.randn(10000) * torch.logspace(-30, 30, 10000)
    else:
        numbers = torch.arange(2**16).to(torch.uint16).view(dtype).float()
    rest = numbers[numbers.isfinite()]
    for _ in range(kernels.feature_parts(dtype)):
        assert rest.any()
        rest = rest - rest.bfloat16().float()
    assert not rest.any()


def test_bad_arguments_are_named():
    case = make_operands(5, 6, 3, 4, F32)
    x, left, right, base = case.forward
    with pytest.raises(ValueError, match="x is on meta"):
        kernels.householder(x.to("meta"), left, right, base)
    with pytest.raises(ValueError, match="right is on meta"):
        kernels.householder(x, left, right.to("meta"), base)
    with pytest.raises(ValueError, match=r"left must be \[6, 3\]"):
        kernels.householder(x, left[1:], right, base)
    with pytest.raises(ValueError, match=r"right must be \[4, 3\]"):
        kernels.householder(x, left, right[1:], base)
    with pytest.raises(ValueError, match=r"base must be \[5, 4\]"):
        kernels.householder(x, left, right, base[1:])
    with pytest.raises(ValueError, match=r"base is torch.float16"):
        kernels.householder(x, left, right, base.half())
    with pytest.raises(ValueError, match=r"x is torch.int64"):
        kernels.householder(x.long(), left, None)
    with pytest.raises(ValueError, match="2147483647 tokens"):
        kernels.householder(torch.ones(1, 6).expand(2**31 - 1, 6), left, None)
    g, x, coefficients, left, right, base = case.backward
    with pytest.raises(ValueError, match=r"coefficients must be \[5, 3\]"):
        kernels.householder_backward(g, x, coefficients[1:], left, right, base, BOTH)
    with pytest.raises(ValueError, match=r"x must be \[5, 4\]"):
        kernels.householder_backward(g, x, coefficients, left, right, None, BOTH)
    with pytest.raises(ValueError, match=r"q must be \[5, r\]"):
        kernels.householder_gradient(x, coefficients[1:])
    with pytest.raises(ValueError, match="q is torch.float16"):
        kernels.householder_gradient(x, coefficients.half())


def test_more_ranks_than_the_kernels_serve():
    case = make_operands(2, 5, 129, None, F32)
    for name, args in calls(case):
        with pytest.raises(NotImplementedError, match="rank 129"):
            getattr(kernels, name)(*args)


def test_splits_are_powers_of_two_that_shapes_decide():
    for programs in (1, 2, 16, 127, 128, 129, 256, 10**6):
        for blocks in (1, 2, 3, 16, 100):
            for wanted in (_config.HOUSEHOLDER_PROGRAMS, _config.HOUSEHOLDER_GRADIENT_PROGRAMS):
                splits = _config.householder_splits(programs, blocks, wanted)
                assert splits in (1, 2, 4, 8, 16) and splits <= blocks
                assert splits == 1 or splits * programs <= wanted


def test_every_rank_has_a_tile():
    for kind in ("wide", "decode", "gradient"):
        for itemsize in (2, 4, 8):
            for r in range(1, _config.MOST_RANKS + 1):
                config = _config.householder_config(kind, itemsize, r)
                assert config.block_r >= max(r, 16) and config.block_r < 2 * max(r, 16)


@settings(max_examples=8)
@given(
    T=st.integers(1, 36),
    n=st.integers(1, 36),
    r=st.integers(1, 20),
    m=st.none() | st.integers(1, 36),
    dtype=st.sampled_from([F32, F16, F64]),
    seed=st.integers(0, 1000),
)
def test_any_shape(T, n, r, m, dtype, seed):
    """Element by element, where plain torch may be exact by luck: roundings of the sums of |products|, and the last."""
    case = make_operands(T, n, r, m, dtype, seed=seed)
    eps = torch.finfo(F64 if dtype == F64 else F32).eps
    sizes = case.to(F64)
    for name, tensor in sizes.tensors().items():
        setattr(sizes, name, -tensor.abs() if name.startswith("base") else tensor.abs())
    if m is None:  # base is x: of both signs here
        sizes.base_out, sizes.base_in = -sizes.x, -sizes.g
    magnitudes = exact(sizes)
    if m is None:
        magnitudes[6], magnitudes[7] = magnitudes[6] + magnitudes[7], magnitudes[7].new_empty(0)
    for index, (got, right, size) in enumerate(zip(outputs(case), exact(case), magnitudes, strict=True)):
        parts = 2**-15 if dtype == F16 and index in (0, 4) else 0  # coefficients and right in two parts
        info = torch.finfo(got.dtype)
        bound = (64 * eps + parts) * size.abs() + 0.51 * info.eps * right.abs() + info.smallest_normal
        assert got.shape == right.shape
        assert ((got.double() - right).abs() <= bound).all()


@pytest.mark.parametrize("r", [4, 130])
def test_serves_the_registered_ops(r):
    x, u = torch.randn(2, 5, 12), torch.randn(12, r)
    results = []
    for name in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, u)]
        with fk.backend(name):
            y = fk.householder(*leaves)
            results.append((y, *torch.autograd.grad(y.square().sum() + y.sum(), leaves)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
