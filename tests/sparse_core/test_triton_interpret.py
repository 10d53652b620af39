# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the sparse core, run by Triton's interpreter.

``make test`` runs this file in a process with TRITON_INTERPRET=1, which Triton reads when it is imported. The
interpreter's bfloat16 is wrong, so bfloat16 is compiled (``test_aot_triton.py``) but not run here.
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
from frodkernels.reference import sparse_core as reference
from frodkernels.triton_kernels import _config
from frodkernels.triton_kernels import sparse_core as kernels
from tests.support import KINDS, LAYOUTS, assert_no_worse_than_torch, make_case, names

ALL = [True, True, True]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
    (torch.float32, torch.float64),
    (torch.float16, torch.float64),
    (torch.float64, torch.float16),
]
dtypes = pytest.mark.parametrize("dtype, param_dtype", DTYPES, ids=[names(*pair) for pair in DTYPES])


def check_forward(case, token_major=False):
    got = kernels.sparse_core(*case.forward, token_major)
    assert_no_worse_than_torch(got, case.exact_forward(), reference.sparse_core(*case.forward))
    assert got.stride() == ((1, got.shape[0]) if token_major else (got.shape[1], 1))


def assert_within_bound(got, exact, magnitude, acc):
    """|error| <= 32 roundings of the accumulator on the sum of |products|, plus the last rounding, element by element.

    Where outputs are one or two numbers plain torch may be exact by luck: this bound holds for any single number.
    """
    info = torch.finfo(got.dtype)
    bound = 32 * torch.finfo(acc).eps * magnitude + 0.51 * info.eps * exact.abs() + info.smallest_normal
    assert got.shape == exact.shape
    assert ((got.double() - exact).abs() <= bound).all()


def check_backward(case, token_major=False):
    got = kernels.sparse_core_backward(*case.backward, ALL, token_major)
    plain = reference.sparse_core_backward(*case.backward, ALL)
    for parts in zip(got, case.exact_backward(), plain, strict=True):
        assert_no_worse_than_torch(*parts)
    assert got[0].stride() == ((1, got[0].shape[0]) if token_major else (got[0].shape[1], 1))


@dtypes
@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize("n, T", [(1, 1), (19, 5), (19, 33), (19, 257)])  # decode, short, wide; one past a tile
def test_forward_and_backward(n, T, dtype, param_dtype, token_major):
    case = make_case(n, n, T, "random", dtype, param_dtype)
    check_forward(case, token_major)
    check_backward(case, token_major)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 20])
def test_kinds_of_pattern(kind, T):
    case = make_case(7, 7, T, kind)
    check_forward(case)
    check_backward(case)


@pytest.mark.parametrize("m, n", [(5, 19), (19, 5), (1, 8)])
@pytest.mark.parametrize("kind", ["random", "empty"])
def test_rectangular(m, n, kind):
    case = make_case(m, n, 21, kind)
    check_forward(case)
    check_backward(case)


@pytest.mark.parametrize("n, T", [(0, 5), (6, 0), (0, 0)])
def test_nothing_to_do(n, T):
    case = make_case(n, n, T, "dense")
    assert kernels.sparse_core(*case.forward).shape == (n, T)
    dz, dlam, dvalues = kernels.sparse_core_backward(*case.backward, ALL)
    assert dz.shape == (n, T)
    assert torch.equal(dlam, torch.zeros(n)) and torch.equal(dvalues, torch.zeros(n * n))


@pytest.mark.parametrize("n", [2**16, 2**16 + 1])
def test_widest_narrow_and_narrowest_wide_index(n):
    cols = torch.tensor([0, 32767, 32768, 40000, n - 1])
    pattern = fk.SparsePattern(torch.tensor([0, 0, 1, 1, 1]), cols, (2, n))
    assert pattern.csr.indices.dtype == (torch.uint16 if n <= 2**16 else torch.int32)
    args = torch.randn(n, 3), None, torch.randn(5), *pattern.csr
    torch.testing.assert_close(kernels.sparse_core(*args), reference.sparse_core(*args))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("T, dtype", [(8, torch.float32), (136, torch.float16)], ids=str)
def test_layout_changes_nothing(layout, T, dtype):
    case = make_case(5, 5, T, "random", dtype).laid_out(layout)
    plain = case.laid_out("feature_major")
    assert torch.equal(kernels.sparse_core(*case.forward), kernels.sparse_core(*plain.forward))
    for got, want in zip(
        kernels.sparse_core_backward(*case.backward, ALL),
        kernels.sparse_core_backward(*plain.backward, ALL),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_strided_parameters():
    u, z, lam, values, *plan = make_case(9, 9, 20).backward
    strided = torch.stack([lam, lam + 1], 1)[:, 0], torch.stack([values + 1, values], 1)[:, 1]
    got = kernels.sparse_core_backward(u, z, *strided, *plan, ALL)
    want = kernels.sparse_core_backward(u, z, lam, values, *plan, ALL)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert got[1].is_contiguous() and got[2].is_contiguous()


@pytest.mark.parametrize("needs", [[bool(k & 4), bool(k & 2), bool(k & 1)] for k in range(8)], ids=str)
def test_needs(needs):
    case = make_case(6, 6, 40, "random", torch.float16)
    full = kernels.sparse_core_backward(*case.backward, ALL)
    parts = kernels.sparse_core_backward(*case.backward, needs)
    for part, whole, needed in zip(parts, full, needs, strict=True):
        assert part.dtype == whole.dtype
        assert torch.equal(part, whole) if needed else part.shape == (0,)


def test_repeats_bit_for_bit():
    case = make_case(6, 6, 300)
    once, again = (
        (kernels.sparse_core(*case.forward), *kernels.sparse_core_backward(*case.backward, ALL)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_nan_travels_along_entries_only():
    pattern = fk.SparsePattern(torch.tensor([0, 2, 3]), torch.tensor([1, 1, 0]), (4, 4))
    z = torch.ones(4, 6)
    z[1, 2] = float("nan")
    lam, values = torch.ones(4), torch.ones(3)
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[[0, 1, 2], 2] = True
    assert torch.equal(kernels.sparse_core(z, lam, values, *pattern.csr).isnan(), expected)
    dz, dlam, dvalues = kernels.sparse_core_backward(torch.ones(4, 6), z, lam, values, *pattern.csc, ALL)
    assert not dz.isnan().any()
    assert dlam.isnan().tolist() == [False, True, False, False]
    assert dvalues.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("splits, per_split", [(1, 3), (2, 2), (3, 1)])
def test_splits_of_several_tiles(monkeypatch, splits, per_split):
    monkeypatch.setattr(kernels, "token_splits", lambda tiles, programs: (splits, per_split))
    check_backward(make_case(6, 6, 600))


def test_more_tiles_than_the_grid_may_have(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_GRID_Y", 2)
    check_forward(make_case(3, 3, 1100))


def test_token_splits_cover_all_tiles_and_none_is_empty():
    for tiles in (1, 2, 7, 8, 9, 63, 64, 65, 1000, 12345):
        for programs in (1, 100, 4096, 10**6):
            splits, per_split = _config.token_splits(tiles, programs)
            assert 1 <= splits <= _config.MAX_SPLITS
            assert (splits - 1) * per_split < tiles <= splits * per_split


def test_bad_arguments_are_named():
    u, z, lam, values, indptr, indices, perm = make_case(6, 6, 4).backward
    plan = indptr, indices, perm
    with pytest.raises(ValueError, match="z is on meta"):
        kernels.sparse_core(z.to("meta"), lam, values, *plan)
    with pytest.raises(ValueError, match="lam is on meta"):
        kernels.sparse_core(z, lam.to("meta"), values, *plan)
    with pytest.raises(ValueError, match="values must be"):
        kernels.sparse_core(z, lam, values[1:], *plan)
    with pytest.raises(ValueError, match="lam must be"):
        kernels.sparse_core(z, lam[1:], values, *plan)
    with pytest.raises(ValueError, match="perm must be contiguous"):
        kernels.sparse_core(z, lam, values, indptr, indices, torch.stack([perm, perm], 1)[:, 0])
    with pytest.raises(ValueError, match="2147483647 tokens"):
        kernels.sparse_core(torch.ones(6, 1).expand(6, 2**31 - 1), lam, values, *plan)
    with pytest.raises(ValueError, match="z must be"):
        kernels.sparse_core_backward(u, z[:, 1:], lam, values, *plan, ALL)


@settings(max_examples=15)
@given(
    m=st.integers(1, 8),
    n=st.integers(1, 8),
    square=st.booleans(),
    T=st.integers(1, 140),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.float64]),
    token_major=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(m, n, square, T, kind, dtype, token_major, seed):
    case = make_case(n if square else m, n, T, kind, dtype, seed=seed)
    u, z, S = case.u.double().abs(), case.z.double().abs(), case.matrix().abs()
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    out = kernels.sparse_core(*case.forward, token_major)
    assert_within_bound(out, case.exact_forward(), S @ z, acc)
    products = u @ z.t()
    own = products.diagonal() if case.lam is not None else products.new_zeros(0)
    magnitudes = S.t() @ u, own, products[case.rows, case.cols]
    got = kernels.sparse_core_backward(*case.backward, ALL, token_major)
    for grad, exact, magnitude in zip(got, case.exact_backward(), magnitudes, strict=True):
        assert_within_bound(grad, exact, magnitude, acc)


def test_serves_the_registered_ops():
    case = make_case(8, 8, 10)
    leaves = [t.requires_grad_() for t in (case.z.t().contiguous(), case.lam, case.values)]
    results = []
    for name in ("triton", "reference"):
        with fk.backend(name):
            y = fk.sparse_core(*leaves, case.pattern)
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
