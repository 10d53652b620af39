# SPDX-License-Identifier: Apache-2.0
"""Algebra that must hold for every size, rank, scale and layout, on every backend the CPU has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import frodkernels as fk
from frodkernels.ops import householder as ops
from tests.householder.cases import F64, Chain, close, make_chain, make_operands
from tests.support import LAYOUTS

few = settings(max_examples=60)
either = st.booleans()


@pytest.fixture(params=["auto", "reference"], autouse=True)
def backend(request):
    with fk.backend(request.param):
        yield


@st.composite
def chains(draw, most=24):
    """float64: what is wrong then is the algebra and not the rounding. Columns of very different lengths."""
    n, r, T = draw(st.integers(1, 40)), draw(st.integers(1, most)), draw(st.integers(0, 70))
    chain = make_chain(n, r, T, seed=draw(st.integers(0, 99)))
    chain.x = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](chain.x.t()).t()
    chain.u = chain.u * 10.0 ** draw(st.lists(st.integers(-12, 12), min_size=r, max_size=r).map(torch.tensor))
    return chain


@few
@given(chains(), either)
def test_the_definition(chain, transpose):
    close(chain(transpose=transpose), chain.exact(transpose))


@few
@given(chains(), either)
def test_orthogonal(chain, transpose):
    """Lengths and angles between tokens stay."""
    y = chain(transpose=transpose)
    close(y @ y.t(), chain.x @ chain.x.t())


@few
@given(chains())
def test_transposed_undoes(chain):
    close(Chain(chain(), chain.u)(transpose=True), chain.x)


@few
@given(chains(), st.data())
def test_chains_compose(chain, data):
    """householder(householder(x, u1), u2) = householder(x, [u1 | u2]); transposed, the other way round."""
    cut = data.draw(st.integers(1, chain.u.shape[1]))
    first, second = chain.u[:, :cut], chain.u[:, cut:]
    if not second.numel():
        second = first
        chain.u = torch.cat([first, first], 1)
    close(fk.householder(fk.householder(chain.x, first), second), chain())
    back = fk.householder(fk.householder(chain.x, second, transpose=True), first, transpose=True)
    close(back, chain(transpose=True))


@few
@given(chains(), st.floats(-3, 3), either)
def test_linear_in_x(chain, a, transpose):
    other = torch.randn(chain.x.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    both = Chain(a * chain.x + other, chain.u)(transpose=transpose)
    close(both, a * chain(transpose=transpose) + Chain(other, chain.u)(transpose=transpose))


@few
@given(chains(), st.randoms(use_true_random=False))
def test_tokens_do_not_mix(chain, random):
    order = list(range(chain.x.shape[0]))
    random.shuffle(order)
    close(Chain(chain.x[order], chain.u)(), chain()[order])


@few
@given(chains(), st.randoms(use_true_random=False))
def test_features_may_be_permuted(chain, random):
    """A rotation of the features is a rotation of the directions."""
    order = list(range(chain.x.shape[1]))
    random.shuffle(order)
    close(Chain(chain.x[:, order], chain.u[order])(), chain()[:, order])


@few
@given(chains(), st.randoms(use_true_random=False))
def test_gram_schmidt_depends_on_the_span_alone(chain, random):
    """The order of independent columns does not matter then, and the map is symmetric."""
    u = chain.u[:, : min(chain.u.shape)]
    q, _ = torch.linalg.qr(torch.randn(u.shape, dtype=F64, generator=torch.Generator().manual_seed(7)))
    chain.u = q @ (torch.eye(q.shape[1], dtype=F64) + 0.1)
    order = list(range(q.shape[1]))
    random.shuffle(order)
    y = chain(orthogonalize=True)
    close(Chain(chain.x, chain.u[:, order])(orthogonalize=True), y)
    close(chain(orthogonalize=True, transpose=True), y)
    close(y, chain.x - 2 * chain.x @ q @ q.t())
    close(Chain(chain.x, q)(), y)  # orthonormal columns are their own basis


@few
@given(chains(most=9), either)
def test_the_backward_is_the_adjoint(chain, transpose):
    """<x H, g> = <x, dx>"""
    x, _ = chain.leaves()
    g = torch.randn(x.shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    y = chain(transpose=transpose)
    (dx,) = torch.autograd.grad(y, x, g)
    close((y * g).sum(), (x * dx).sum())


@st.composite
def operands(draw):
    T, n, r = draw(st.integers(0, 70)), draw(st.integers(0, 40)), draw(st.integers(0, 40))
    case = make_operands(T, n, r, draw(st.none() | st.integers(0, 40)), seed=draw(st.integers(0, 99)))
    for name in ("x", "g", "base_in", "base_out"):
        tensor = getattr(case, name)
        if tensor is not None:
            setattr(case, name, LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](tensor.t()).t())
    return case


@few
@given(operands())
def test_the_ops_are_their_formulas(case):
    close(ops.householder(*case.forward), case.exact_forward())
    close(ops.householder(case.x, case.left, None)[1], case.exact_forward()[1])
    close(ops.householder_backward(*case.backward, [True, True]), case.exact_backward())
    close(ops.householder_gradient(*case.gradient), case.x.t() @ case.coefficients)


@few
@given(operands(), st.tuples(either, either))
def test_twice_is_bitwise_the_same(case, needs):
    args = *case.backward, list(needs)
    for first, again in zip(ops.householder_backward(*args), ops.householder_backward(*args), strict=True):
        assert torch.equal(first, again)
