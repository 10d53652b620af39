# SPDX-License-Identifier: Apache-2.0
"""hra_conv2d against a convolution with the adapted weight, which it never forms."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import frodkernels as fk
from tests.householder.cases import F64, assert_as_good_as_plain, assert_exact, close, gradient_like, make_conv
from tests.support import DTYPE_IDS, DTYPES

TRAINABLE = ("x", "u", "weight", "bias")
either = pytest.mark.parametrize("orthogonalize", [False, True])

GEOMETRIES = {  # kernel, image, options
    "plain": ((3, 3), (2, 7, 8), {}),
    "one by one": ((1, 1), (2, 5, 4), {}),
    "wide kernel": ((1, 4), (2, 6, 9), {}),
    "tall kernel": ((3, 2), (2, 6, 9), {}),
    "stride": ((3, 3), (2, 9, 8), {"stride": 2}),
    "strides": ((3, 2), (2, 9, 8), {"stride": (1, 3)}),
    "padding": ((3, 3), (2, 5, 6), {"padding": 1}),
    "paddings": ((3, 5), (2, 5, 6), {"padding": (0, 3)}),
    "same": ((3, 5), (2, 5, 6), {"padding": "same"}),
    "valid": ((3, 2), (2, 5, 6), {"padding": "valid"}),
    "dilation": ((3, 3), (2, 9, 9), {"dilation": 2}),
    "all": ((3, 2), (2, 9, 11), {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 3)}),
    "one image": ((3, 3), (7, 8), {"padding": 1}),
    "no images": ((3, 3), (0, 7, 8), {}),
    "one pixel": ((3, 3), (2, 3, 3), {}),
}
geometries = pytest.mark.parametrize("kernel, size, options", GEOMETRIES.values(), ids=GEOMETRIES)


@either
@geometries
def test_geometry(kernel, size, options, orthogonalize):
    for bias in (True, False):
        case = make_conv(5, 3, kernel, 3, size, bias=bias, **options)
        assert_exact(case, orthogonalize=orthogonalize)


@geometries
def test_output_shape_is_that_of_a_convolution(kernel, size, options):
    case = make_conv(5, 3, kernel, 3, size, **options)
    want = F.conv2d(case.x, case.weight, case.bias, **options)
    got = case()
    assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


@either
@pytest.mark.parametrize("dtype, param_dtype", DTYPES, ids=DTYPE_IDS)
def test_values_and_gradients(dtype, param_dtype, orthogonalize):
    """The yardstick rounds the weight it forms; here filters, coefficients and their product are rounded."""
    case = make_conv(16, 8, (3, 3), 6, (3, 10, 11), dtype=dtype, param_dtype=param_dtype, padding=1)
    assert_as_good_as_plain(case, factor=2.0, orthogonalize=orthogonalize)


@either
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradcheck(backend, orthogonalize):
    case = make_conv(3, 2, (2, 3), 3, (2, 4, 5), stride=(1, 2), padding=1)
    leaves = case.leaves()

    def f(x, u, weight, bias):
        return fk.hra_conv2d(x, weight, u, bias, (1, 2), 1, orthogonalize=orthogonalize)

    with fk.backend(backend):
        assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("r", [1, 2, 7, 18, 33, 128])
def test_every_rank(r):
    """18 inputs per pixel: more reflections than that too."""
    assert_exact(make_conv(5, 2, (3, 3), r, (2, 6, 6)))
    if r <= 18:
        assert_exact(make_conv(5, 2, (3, 3), r, (2, 6, 6)), orthogonalize=True)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_layouts(memory_format):
    case = make_conv(5, 3, (3, 2), 4, (2, 8, 9))
    for change in (
        lambda t: t.contiguous(memory_format=memory_format),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: t[:, :1].expand(t.shape),
    ):
        case.x, case.weight = change(case.x), change(case.weight)
        case.u = case.u.t().contiguous().t()
        assert_exact(case)
    y = case()
    y.sum().backward()  # the gradient is one number expanded with stride 0
    close(case.u.grad, torch.autograd.grad(case.exact().sum(), case.u)[0])


@pytest.mark.parametrize(
    "wanted", list(itertools.product([False, True], repeat=4)), ids=lambda w: "".join("01"[b] for b in w)
)
@either
def test_gradients_only_where_asked(wanted, orthogonalize):
    case = make_conv(5, 3, (3, 2), 4, (2, 6, 6))
    names = [name for name, want in zip(TRAINABLE, wanted, strict=True) if want]
    leaves = case.leaves(*names) if names else []
    y = case(orthogonalize=orthogonalize)
    assert y.requires_grad == bool(names)
    if not names:
        return
    y.square().sum().backward()
    exact = torch.autograd.grad(case.exact(orthogonalize).square().sum(), leaves)
    close([leaf.grad for leaf in leaves], list(exact))
    assert all(getattr(case, name).grad is None for name in TRAINABLE if name not in names)


@either
def test_a_zero_column_makes_everything_nan(orthogonalize):
    case = make_conv(5, 3, (3, 2), 4, (2, 6, 6))
    case.u[:, 1] = 0
    assert case.exact(orthogonalize).isnan().all() and case(orthogonalize=orthogonalize).isnan().all()


def test_equal_pairs_leave_the_convolution_as_it_is():
    case = make_conv(5, 3, (3, 2), 2, (2, 6, 6))
    case.u = case.u.repeat_interleave(2, dim=1)
    close(case(), F.conv2d(case.x, case.weight, case.bias))
    assert_exact(case)


def test_rank_deficient_directions_are_warned_of():
    case = make_conv(5, 3, (3, 2), 2, (2, 6, 6))
    u = case.u.repeat_interleave(2, dim=1)
    with pytest.warns(UserWarning, match="u is rank-deficient: 2 of its 4 columns") as record:
        fk.hra_conv2d(case.x, case.weight, u, orthogonalize=True)
    assert [w.filename for w in record] == [__file__]


def test_differentiating_twice_is_refused():
    case = make_conv(5, 3, (3, 2), 2, (2, 6, 6))
    (u,) = case.leaves("u")
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(case().square().sum(), u, create_graph=True)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(low):
    case = make_conv(16, 8, (3, 3), 6, (3, 10, 11), dtype=torch.float32, padding=1)
    leaves = case.leaves()
    with torch.autocast("cpu", low):
        y = case()
        assert y.dtype == F.conv2d(case.x, case.weight).dtype == low
    same = fk.hra_conv2d(case.x.to(low), case.weight.to(low), case.u, case.bias.to(low), padding=1)
    assert torch.equal(y, same)
    g = gradient_like(y)
    got = torch.autograd.grad(y, leaves, g)
    assert [t.dtype for t in got] == [torch.float32] * 4
    for ours, others in zip(got, torch.autograd.grad(same, leaves, g), strict=True):
        assert torch.equal(ours, others)


def test_autocast_leaves_float64_exact():
    case = make_conv(5, 3, (3, 2), 4, (2, 6, 6))
    with torch.autocast("cpu", torch.bfloat16):
        close(case(), case.exact())


def test_the_weight_is_never_formed():
    """W H is [m, C kh kw]; nothing of that size is allocated, in either direction."""
    from tests.frod.test_memory import Recorder

    case = make_conv(64, 16, (3, 3), 4, (1, 6, 6))
    case.leaves("x", "u")
    case()
    with Recorder() as recorder:
        case().sum().backward()
    assert max(recorder.sizes) < case.weight.numel()


def test_chains_of_one_input_channel_in_every_dtype_are_finite():
    for dtype, param_dtype in DTYPES:
        case = make_conv(3, 1, (2, 2), 3, (2, 4, 4), dtype=dtype, param_dtype=param_dtype)
        assert case().isfinite().all()
        assert case().dtype == dtype and case.exact().dtype == F64
