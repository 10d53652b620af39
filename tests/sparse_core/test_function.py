# SPDX-License-Identifier: Apache-2.0
"""fk.sparse_core: values, gradients, layouts and refusals of the public function."""

import pytest
import torch

import frodkernels as fk
from tests.support import DTYPE_IDS, DTYPES, LAYOUTS, assert_no_worse_than_torch, make_case


@pytest.mark.parametrize("dtype, param_dtype", DTYPES, ids=DTYPE_IDS)
def test_value_and_gradients(dtype, param_dtype):
    case = make_case(37, 37, 50, "random", dtype, param_dtype)
    leaves = [t.detach().clone().requires_grad_() for t in (case.z.t(), case.lam, case.values)]
    y = fk.sparse_core(*leaves, case.pattern)
    got = torch.autograd.grad(y, leaves, case.u.t())
    with fk.backend("reference"):
        same = fk.sparse_core(*leaves, case.pattern)
        plain = torch.autograd.grad(same, leaves, case.u.t())
    dz, dlam, dvalues = case.exact_backward()
    assert y.dtype == dtype and y.is_contiguous() and [t.dtype for t in got] == [dtype, param_dtype, param_dtype]
    assert_no_worse_than_torch(y, case.exact_forward().t(), same)
    for part, exact, other in zip(got, (dz.t(), dlam, dvalues), plain, strict=True):
        assert_no_worse_than_torch(part, exact, other)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gradcheck(backend):
    case = make_case(6, 6, 5, "random", torch.float64, torch.float64)
    z = case.z.t().reshape(1, 5, 6).clone()
    leaves = [t.requires_grad_() for t in (z, case.lam, case.values)]
    with fk.backend(backend):
        assert torch.autograd.gradcheck(lambda *a: fk.sparse_core(*a, case.pattern), leaves)


@pytest.mark.parametrize("lead", [(), (0,), (1,), (7,), (2, 3), (2, 0, 3), (2, 1, 3, 2)], ids=str)
def test_leading_dimensions(lead):
    case = make_case(9, 9, 1, "random", torch.float64, torch.float64)
    z = torch.randn(*lead, 9, dtype=torch.float64, requires_grad=True)
    y = fk.sparse_core(z, case.lam, case.values, case.pattern)
    torch.testing.assert_close(y, z @ case.matrix().t())
    y.sum().backward()  # an expanded gradient of stride 0
    torch.testing.assert_close(z.grad, case.matrix().sum(0).expand(z.shape))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    case = make_case(20, 20, 33, "random", torch.float64, torch.float64).laid_out(layout)
    z = case.z.t().detach().requires_grad_()
    y = fk.sparse_core(z, case.lam, case.values, case.pattern)
    torch.testing.assert_close(y, case.exact_forward().t())
    (dz,) = torch.autograd.grad(y, z, case.u.t())
    torch.testing.assert_close(dz, case.exact_transpose().t())


def test_no_features():
    pattern = fk.SparsePattern(*torch.zeros(2, 0, dtype=torch.int64), (0, 0))
    z = torch.randn(5, 0, requires_grad=True)
    y = fk.sparse_core(z, torch.zeros(0), torch.zeros(0), pattern)
    assert y.shape == (5, 0)
    y.sum().backward()
    assert z.grad.shape == (5, 0)


@pytest.mark.parametrize("wanted", [[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)], ids=str)
def test_gradients_only_where_asked(wanted):
    case = make_case(8, 8, 5)
    tensors = case.z.t(), case.lam, case.values
    leaves = [t.clone().requires_grad_(bool(need)) for t, need in zip(tensors, wanted, strict=True)]
    y = fk.sparse_core(*leaves, case.pattern)
    assert y.requires_grad == any(wanted)
    if any(wanted):
        y.square().sum().backward()
    assert [t.grad is not None for t in leaves] == [bool(need) for need in wanted]


def test_differentiating_twice_is_refused():
    case = make_case(8, 8, 5)
    z = case.z.t().clone().requires_grad_()
    y = fk.sparse_core(z, case.lam, case.values, case.pattern)
    with pytest.raises(RuntimeError, match="differentiable once"):  # grad(inputs=...) of a gradient would return None
        torch.autograd.grad(y.square().sum(), z, create_graph=True)


def test_bad_arguments_are_named():
    case = make_case(8, 8, 5)
    z, lam, values, pattern = case.z.t(), case.lam, case.values, case.pattern
    rectangular = fk.SparsePattern(case.rows, case.cols, (8, 9))
    for bad, message in (
        ((torch.tensor(1.0), lam, values, pattern), r"z must be \[\.\.\., n\], got a scalar"),
        ((z.int(), lam, values, pattern), "z must be float32"),
        (([1.0], lam, values, pattern), "z must be a tensor, got list"),
        ((z.to_sparse(), lam, values, pattern), "z must be a dense tensor"),
        ((z, lam[:-1], values, pattern), r"lam must be \[8\], got \[7\]"),
        ((z, lam.int(), values, pattern), "lam must be float32"),
        ((z, None, values, pattern), "lam must be a tensor, got NoneType"),
        ((z, lam, values[:-1], pattern), "values must be"),
        ((z, lam, values.bool(), pattern), "values must be float32"),
        ((z, lam, values, rectangular), "pattern must be 8 x 8, got 8 x 9"),
        ((z[:, :-1], lam, values, pattern), "pattern must be 7 x 7, got 8 x 8"),
        ((z, lam, values, (case.rows, case.cols)), "pattern must be a frodkernels.SparsePattern, got tuple"),
        ((z, lam.to("meta"), values, pattern), "lam must be on cpu, got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            fk.sparse_core(*bad)
