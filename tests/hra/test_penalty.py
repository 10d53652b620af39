# SPDX-License-Identifier: Apache-2.0
"""orthogonality_penalty: HRA's regulariser ||Q^T Q - I||_F on the unit columns Q of u."""

import pytest
import torch

import frodkernels as fk
from tests.householder.cases import F64, close, make_chain
from tests.support import FLOATS


def definition(u):
    """Twice the cosines of all pairs of columns, squared, summed, rooted."""
    columns = [column / column.norm() for column in u.double().unbind(1)]
    total = sum(2 * (a @ b) ** 2 for i, a in enumerate(columns) for b in columns[:i])
    return torch.as_tensor(total, dtype=F64).sqrt()


@pytest.mark.parametrize("n, r", [(1, 1), (5, 2), (9, 4), (4, 9), (64, 33)])
def test_value(n, r):
    u = make_chain(n, r, 1).u
    penalty = fk.orthogonality_penalty(u)
    assert penalty.shape == () and penalty.dtype == F64
    torch.testing.assert_close(penalty, definition(u), rtol=1e-12, atol=1e-7 if r == 1 else 0)


def test_orthogonal_directions_cost_nothing_and_equal_ones_most():
    q, _ = torch.linalg.qr(torch.randn(9, 4, dtype=F64))
    lengths = torch.tensor([1e-6, 1.0, 3.0, 1e6], dtype=F64)
    assert fk.orthogonality_penalty(q * lengths) < 1e-14
    close(fk.orthogonality_penalty(q[:, :1].expand(9, 4)), torch.tensor(12.0, dtype=F64).sqrt())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(dtype):
    u = make_chain(30, 6, 1, dtype=dtype).u.requires_grad_()
    penalty = fk.orthogonality_penalty(u)
    assert penalty.dtype == (F64 if dtype == F64 else torch.float32)
    torch.testing.assert_close(penalty.double(), definition(u), rtol=1e-5, atol=0)
    penalty.backward()
    assert u.grad.dtype == dtype and u.grad.isfinite().all()


def test_gradients_of_both_orders():
    u = make_chain(6, 4, 1).u.requires_grad_()
    assert torch.autograd.gradcheck(fk.orthogonality_penalty, u)
    assert torch.autograd.gradgradcheck(fk.orthogonality_penalty, u)
    (du,) = torch.autograd.grad(fk.orthogonality_penalty(u), u)
    close((du * u).sum(0), torch.zeros(4, dtype=F64))  # lengths do not matter


@pytest.mark.parametrize("column", [0, 2])
def test_a_zero_column_is_nan(column):
    u = make_chain(6, 4, 1).u
    u[:, column] = 0
    assert fk.orthogonality_penalty(u).isnan()


def test_descending_it_makes_directions_orthogonal():
    u = make_chain(12, 4, 1).u.requires_grad_()
    start = fk.orthogonality_penalty(u).item()
    for _ in range(400):
        (du,) = torch.autograd.grad(fk.orthogonality_penalty(u).square(), u)
        with torch.no_grad():
            u -= 0.3 * du
    assert fk.orthogonality_penalty(u).item() < 1e-3 * start


def test_orthogonal_reflections_commute():
    """What it is for: without it the order matters."""
    chain = make_chain(12, 4, 5)
    assert not torch.allclose(chain(), chain(transpose=True))
    chain.u, _ = torch.linalg.qr(chain.u)
    assert fk.orthogonality_penalty(chain.u) < 1e-14
    close(chain(), chain(transpose=True))
