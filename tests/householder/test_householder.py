# SPDX-License-Identifier: Apache-2.0
"""fk.householder: values, gradients, layouts, degenerate directions, what is computed and what is not."""

import itertools
import warnings

import pytest
import torch

import frodkernels as fk
from frodkernels.ops import householder as products
from frodkernels.reference import householder as reference
from tests.householder.cases import F64, Chain, assert_as_good_as_plain, assert_exact, close, gradient_like, make_chain
from tests.support import DTYPE_IDS, DTYPES, LAYOUTS

RANKS = [1, 2, 3, 7, 8, 17, 32, 33, 64, 127, 128]
both_ways = pytest.mark.parametrize("transpose", [False, True])
either = pytest.mark.parametrize("orthogonalize", [False, True])


@both_ways
@either
@pytest.mark.parametrize("dtype, param_dtype", DTYPES, ids=DTYPE_IDS)
def test_values_and_gradients(dtype, param_dtype, orthogonalize, transpose):
    for n, r, T in ((96, 8, 130), (40, 13, 65)):
        chain = make_chain(n, r, T, dtype=dtype, param_dtype=param_dtype)
        assert_as_good_as_plain(chain, transpose=transpose, orthogonalize=orthogonalize)


@both_ways
@either
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradcheck(backend, orthogonalize, transpose):
    chain = make_chain(5, 3, 2, 3)

    def f(x, u):
        return fk.householder(x, u, transpose=transpose, orthogonalize=orthogonalize)

    with fk.backend(backend):
        assert torch.autograd.gradcheck(f, chain.leaves())


@either
@pytest.mark.parametrize("r", RANKS)
def test_every_rank(r, orthogonalize):
    """Up to n, and beyond it without Gram-Schmidt; as good as plain torch in float32 too."""
    for n in (r, r + 22) if orthogonalize else (max(r // 2, 1), r, 150):
        assert_exact(make_chain(n, r, 9), orthogonalize=orthogonalize)
    assert_as_good_as_plain(make_chain(150, r, 40, dtype=torch.float32), orthogonalize=orthogonalize)


@both_ways
@pytest.mark.parametrize("n, r, T", [(1, 1, 5), (1, 4, 3), (7, 3, 0), (7, 3, 1), (33, 5, 129), (0, 2, 4)])
def test_small_sizes(n, r, T, transpose):
    assert_exact(make_chain(n, r, T), transpose=transpose)


@either
@pytest.mark.parametrize("lead", [(), (1,), (0,), (5,), (2, 3), (2, 0, 3), (2, 1, 3, 2)], ids=str)
def test_leading_dimensions(lead, orthogonalize):
    chain = make_chain(9, 4, *lead)
    leaves = chain.leaves()
    y, exact = chain(orthogonalize=orthogonalize), chain.exact(orthogonalize=orthogonalize)
    assert y.shape == (*lead, 9)
    close(y, exact)
    y.sum().backward()  # the gradient is one number expanded with stride 0
    close([leaf.grad for leaf in leaves], torch.autograd.grad(exact.sum(), leaves))


@both_ways
@pytest.mark.parametrize("r", [2, 5, 40])  # kernels have ways of their own for a few columns
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_x_and_of_its_gradient(layout, r, transpose):
    chain = make_chain(12, r, 33)
    chain.x = LAYOUTS[layout](chain.x.t()).t()
    leaves = chain.leaves()
    y, exact = chain(transpose=transpose), chain.exact(transpose=transpose)
    close(y, exact)
    g = LAYOUTS[layout](torch.randn(12, 33, dtype=F64)).t()
    close(torch.autograd.grad(y, leaves, g), torch.autograd.grad(exact, leaves, g))


@either
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "expanded" not in name])
def test_layouts_of_u(layout, orthogonalize):
    chain = make_chain(12, 5, 33)
    chain.u = LAYOUTS[layout](chain.u)
    assert_exact(chain, orthogonalize=orthogonalize)


def test_one_column_repeated_by_a_stride_of_zero():
    chain = make_chain(12, 1, 9)
    chain.u = chain.u.expand(12, 6)
    close(chain(), chain.x)  # an even number of the same reflection
    assert_exact(chain)


@both_ways
@either
def test_transpose_undoes(transpose, orthogonalize):
    chain = make_chain(20, 11, 7)
    there = chain(transpose=transpose, orthogonalize=orthogonalize)
    assert not torch.allclose(there, chain.x)
    close(fk.householder(there, chain.u, transpose=not transpose, orthogonalize=orthogonalize), chain.x)


@either
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_lengths_of_directions_do_not_matter(scale, orthogonalize):
    for dtype in (torch.float32, F64):
        chain = make_chain(40, 6, 30, dtype=dtype)
        leaves = chain.leaves()
        g = gradient_like(chain.x)
        want = chain(orthogonalize=orthogonalize)
        dx, du = torch.autograd.grad(want, leaves, g)
        scales = scale ** torch.linspace(-1, 1, 6, dtype=F64).to(dtype)  # each column its own
        scaled = Chain(chain.x, (chain.u * scales).detach().requires_grad_())
        got = scaled(orthogonalize=orthogonalize)
        near = dict(rtol=1e-11, atol=1e-11) if dtype == F64 else dict(rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got, want, **near)
        dx2, du2 = torch.autograd.grad(got, [scaled.x, scaled.u], g)
        torch.testing.assert_close(dx2, dx, **near)
        torch.testing.assert_close(du2 * scales, du, **near)


def test_the_gradient_is_across_each_direction():
    """The map does not see a column's length: moving along it changes nothing."""
    chain = make_chain(20, 6, 15)
    x, u = chain.leaves()
    chain().square().mul(torch.linspace(0, 1, 20, dtype=F64)).sum().backward()
    assert u.grad.norm() > 1
    close((u.grad * u).sum(0), torch.zeros(6, dtype=F64))


# ---- directions that are none, that repeat, that depend on each other ------------------------------------------------


@both_ways
@either
@pytest.mark.parametrize("dtype, param_dtype", DTYPES, ids=DTYPE_IDS)
def test_a_zero_column_makes_everything_nan(dtype, param_dtype, orthogonalize, transpose):
    """As by the definition: never silently another map. The zero is no reflection; leaving it out would be a guess."""
    for column in (0, 2, 4):
        chain = make_chain(12, 5, 9, dtype=dtype, param_dtype=param_dtype)
        chain.u[:, column] = 0
        x, u = chain.leaves()
        y = chain(transpose=transpose, orthogonalize=orthogonalize)
        assert chain.exact(transpose, orthogonalize).isnan().all()
        assert y.isnan().all()
        y.float().sum().backward()
        assert x.grad.isnan().all() and u.grad[:, column].isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@either
def test_a_column_that_is_not_finite_makes_everything_nan(bad, orthogonalize):
    chain = make_chain(12, 5, 9)
    chain.u[3, 2] = bad
    assert chain(orthogonalize=orthogonalize).isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_token_spoils_no_other(bad):
    chain = make_chain(12, 5, 40, dtype=torch.float32)
    clean = chain()
    chain.x[17, 3] = bad
    y = chain()
    others = torch.arange(40) != 17
    assert y[17].isnan().any() and torch.equal(y[others], clean[others])


@both_ways
def test_identical_columns_cancel_in_pairs(transpose):
    """HRA's symmetric start: the identity."""
    chain = make_chain(20, 4, 9)
    chain.u = chain.u.repeat_interleave(2, dim=1)
    close(chain(transpose=transpose), chain.x)
    assert_exact(chain, transpose=transpose)


def test_a_direction_and_its_opposite_are_one_reflection():
    chain = make_chain(20, 3, 9)
    close(fk.householder(chain.x, chain.u * torch.tensor([1.0, -1.0, -2.0], dtype=F64)), chain())


@pytest.mark.parametrize("n, r", [(3, 7), (1, 5), (8, 100), (2, 128)])
def test_more_reflections_than_features(n, r):
    assert_exact(make_chain(n, r, 9))


def test_nearly_parallel_directions():
    """S stays well conditioned whatever u: u^T u may be singular."""
    chain = make_chain(30, 8, 9)
    chain.u = chain.u[:, :1] + 1e-9 * chain.u
    with torch.no_grad():
        close(chain(), chain.exact())
        close(chain(transpose=True), chain.exact(transpose=True))


def deficient(kind):
    u = make_chain(12, 4, 1).u
    if kind == "pairs":
        return u[:, :2].repeat_interleave(2, dim=1)
    if kind == "float32 pairs":
        return u[:, :2].float().repeat_interleave(2, dim=1)
    u[:, 3] = {"sum": u[:, 0] - 3 * u[:, 2], "multiple": -7 * u[:, 1]}[kind]
    return u


@pytest.mark.parametrize("kind", ["pairs", "float32 pairs", "sum", "multiple"])
def test_rank_deficient_directions_are_warned_of(kind):
    u = deficient(kind)
    x = torch.randn(5, 12, dtype=u.dtype)
    with pytest.warns(UserWarning, match=r"u is rank-deficient: \d of its 4 columns") as record:
        fk.householder(x, u, orthogonalize=True)
    assert [w.filename for w in record] == [__file__]  # the caller's line, not ours
    number = {"pairs": 2, "float32 pairs": 2}.get(kind, 1)
    assert f"rank-deficient: {number} of" in str(record[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fk.householder(x, u)  # without Gram-Schmidt there is nothing wrong with them


@pytest.mark.parametrize("r", [1, 8, 40])
@pytest.mark.parametrize("dtype, param_dtype", DTYPES, ids=DTYPE_IDS)
def test_independent_directions_are_not_warned_of(dtype, param_dtype, r):
    chain = make_chain(40, r, 5, dtype=dtype, param_dtype=param_dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chain(orthogonalize=True)
        fk.householder(chain.x, 1e-12 * chain.u.double(), orthogonalize=True)


def test_no_warning_where_asking_would_wait_for_a_device():
    chain = Chain(torch.randn(5, 12, device="meta"), torch.ones(12, 4, device="meta"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chain(orthogonalize=True)


# ---- what is computed ------------------------------------------------------------------------------------------------


@either
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=2)), ids=str)
def test_gradients_only_where_asked(wanted, orthogonalize, monkeypatch):
    """A frozen x costs no gradient, frozen directions cost no sum over the tokens."""
    asked, projected = [], []
    real, forward = products.householder_backward, products.householder
    monkeypatch.setattr(products, "householder_backward", lambda *a: asked.append(list(a[6])) or real(*a))
    monkeypatch.setattr(products, "householder", lambda *a: projected.append(tuple(a[0].shape)) or forward(*a))
    chain = make_chain(9, 4, 7)
    names = [name for name, want in zip(("x", "u"), wanted, strict=True) if want]
    leaves = chain.leaves(*names) if names else []
    with fk.backend("reference"):  # natively the products are one call
        y = chain(orthogonalize=orthogonalize)
        assert y.requires_grad == bool(names) and projected.count((7, 9)) == 1
        if names:
            y.square().sum().backward()
    if names:
        exact = torch.autograd.grad(chain.exact(orthogonalize=orthogonalize).square().sum(), leaves)
        close([leaf.grad for leaf in leaves], list(exact))
    assert all(t.grad is None for name, t in chain.tensors().items() if name not in names)
    assert asked == ([[wanted[0], True]] if wanted[1] else [])
    assert projected.count((7, 9)) == (2 if wanted == (True, False) else 1)


def test_no_graph_without_gradients():
    chain = make_chain(9, 4, 7)
    chain.leaves()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = chain()
        assert y.grad_fn is None and not y.requires_grad
        assert torch.equal(y.clone(), chain().detach())


@either
def test_arguments_are_left_alone(orthogonalize):
    chain = make_chain(9, 4, 7)
    before = [t.clone() for t in (chain.x, chain.u)]
    chain.leaves()
    chain(orthogonalize=orthogonalize).sum().backward()
    assert torch.equal(chain.x, before[0]) and torch.equal(chain.u, before[1])


@either
def test_the_output_is_new_memory(orthogonalize):
    for T in (0, 7):
        chain = make_chain(9, 4, T)
        y = chain(orthogonalize=orthogonalize)
        assert y.is_contiguous()
        if T:
            assert y.untyped_storage().data_ptr() != chain.x.untyped_storage().data_ptr()


def test_nothing_is_cached_between_calls():
    """EMA code writes p.data behind autograd's back; a function must see it."""
    chain = make_chain(9, 4, 7)
    chain.leaves()
    chain()
    chain.u.data.copy_(torch.randn(9, 4))
    close(chain(), chain.exact())


@pytest.mark.parametrize("name", ["x", "u"])
def test_changed_arguments_are_noticed_by_the_backward(name):
    chain = make_chain(9, 4, 7)
    chain.leaves("u")
    y = chain()
    with torch.no_grad():
        getattr(chain, name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@either
@pytest.mark.parametrize("wanted", ["x", "u"])
def test_differentiating_twice_is_refused(wanted, orthogonalize):
    chain = make_chain(9, 4, 7)
    (leaf,) = chain.leaves(wanted)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(chain(orthogonalize=orthogonalize).square().sum(), leaf, create_graph=True)


class FloatGradient(torch.autograd.Function):
    """The identity, whose gradient is float32 whatever flowed forward, as FSDP2 may send it."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        return g.float()


def test_a_wider_gradient_is_taken():
    chain = make_chain(40, 8, 30, dtype=torch.bfloat16, param_dtype=torch.float32)
    leaves = chain.leaves()
    y = chain()
    want = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    got = torch.autograd.grad(FloatGradient.apply(y).sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@either
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_repeatable(dtype, orthogonalize):
    chain = make_chain(130, 17, 300, dtype=dtype, param_dtype=torch.float32)
    leaves = chain.leaves()

    def run():
        y = chain(orthogonalize=orthogonalize)
        return y, *torch.autograd.grad(y.float().square().sum(), leaves)

    first = run()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit(dtype):
    chain = make_chain(257, 16, 700, dtype=dtype, param_dtype=torch.float32)
    leaves = chain.leaves()
    g = gradient_like(chain.x)
    runs = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        y = chain()
        runs.append((y, *torch.autograd.grad(y, leaves, g)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_every_op_is_registered_for_the_definition_of_a_chain():
    """The three reference products put together are reflect: independent of any autograd.Function."""
    chain = make_chain(10, 4, 6)
    q = chain.u / chain.u.norm(dim=0)
    S = torch.triu(q.t() @ q, 1) + torch.eye(4, dtype=F64) / 2
    out, _ = reference.householder(chain.x, q @ torch.linalg.inv(S), q)
    close(out, chain.exact())
