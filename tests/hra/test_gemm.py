# SPDX-License-Identifier: Apache-2.0
"""The dense products around the kernels: the same values by either library, as accurate, and torch's own elsewhere."""

import pytest
import torch

from frodkernels.functional import _gemm
from frodkernels.functional._gemm import linear, times

SIZES = [(64, 512, 512), (65, 300, 900), (1000, 129, 257), (256, 1024, 1030), (3000, 1, 6000)]


@pytest.fixture(params=[False, True], ids=["torch", "onednn"])
def library(request, monkeypatch):
    """Each library in turn, whatever this machine would choose."""
    assert hasattr(torch.ops.mkldnn, "_linear_pointwise")
    monkeypatch.setattr(_gemm, "_onednn_is_faster", lambda: request.param)
    calls, real = [], _gemm._in_parts
    monkeypatch.setattr(_gemm, "_in_parts", lambda *a: calls.append(len(a[0])) or real(*a))
    yield request.param
    assert bool(calls) == request.param


def relative(got, exact):
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("T, m, n", SIZES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_values(library, T, m, n, with_bias):
    x, W, g = torch.randn(T, n), torch.randn(m, n), torch.randn(T, m)
    bias = torch.randn(m) if with_bias else None
    y, dx = linear(x, W, bias), times(g, W)
    assert y.is_contiguous() and dx.is_contiguous()
    exact = x.double() @ W.double().t() + (0 if bias is None else bias.double())
    # sums of 256 terms; one chain of 6000, as torch's own product with a single column, loses 7e-7
    bar = 4e-7 if library else 1e-6
    assert relative(y, exact) <= bar
    assert relative(dx, g.double() @ W.double()) <= bar


def test_layouts(library):
    x, W = torch.randn(300, 400), torch.randn(350, 400)
    want = linear(x, W), times(torch.ones(300, 350), W)
    wide = torch.randn(300, 500)
    wide[:, 50:450] = x
    for other in (x.t().contiguous().t(), wide[:, 50:450]):
        torch.testing.assert_close(linear(other, W), want[0])
    torch.testing.assert_close(linear(x, W.t().contiguous().t()), want[0])
    torch.testing.assert_close(times(torch.ones(1, 1).expand(300, 350), W), want[1])


def test_equal_calls_give_equal_bits(library):
    x, W = torch.randn(300, 400), torch.randn(350, 400)
    assert torch.equal(linear(x, W), linear(x, W))


def test_nan_stays_in_its_row(library):
    x, W = torch.randn(300, 400), torch.randn(350, 400)
    before = linear(x, W)
    x[7, 399] = float("nan")
    got = linear(x, W)
    rows = torch.arange(300) != 7
    assert got[7].isnan().all() and torch.equal(got[rows], before[rows])


@pytest.mark.parametrize(
    "x, W",
    [
        (torch.randn(8, 4000), torch.randn(4000, 4000)),  # few rows
        (torch.randn(64, 64), torch.randn(64, 64)),  # little work
        (torch.randn(300, 400).double(), torch.randn(350, 400).double()),
        (torch.randn(300, 400).bfloat16(), torch.randn(350, 400).bfloat16()),
    ],
    ids=["rows", "work", "float64", "bfloat16"],
)
def test_torch_serves_the_rest(monkeypatch, x, W):
    monkeypatch.setattr(_gemm, "_onednn_is_faster", lambda: True)
    monkeypatch.setattr(_gemm, "_in_parts", None)
    assert torch.equal(linear(x, W), x @ W.t())


def test_users_can_switch_it_off(monkeypatch):
    monkeypatch.setattr(_gemm, "_onednn_is_faster", lambda: True)
    x, W = torch.randn(300, 400), torch.randn(350, 400)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not _gemm._through_onednn(x, W)
    assert _gemm._through_onednn(x, W)
