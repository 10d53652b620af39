# SPDX-License-Identifier: Apache-2.0
"""The registered ops of the family: schema, fake tensors, and native ops that survive any plan."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import frodkernels as fk
from tests.sampled.cases import SAMPLED_DTYPES, make_sampling
from tests.sparse_core.test_registration import bad_plans, refuses, wrong_types
from tests.support import names

ops = fk.ops.sampled
NATIVE = torch.ops.frodkernels
SHAPES = {"square": (9, 9, 5), "one token": (9, 9, 1), "no tokens": (9, 9, 0), "tall": (12, 5, 7), "nothing": (0, 0, 4)}


@pytest.fixture(params=["native", "reference"])
def backend(request):
    with fk.backend(request.param):
        yield request.param


@pytest.mark.parametrize("tiled", [None, False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_opcheck_of_the_sampled_product(backend, shape, tiled):
    torch.library.opcheck(ops.sampled_product, (*make_sampling(*shape).by_columns, tiled))


@pytest.mark.parametrize("features, dtype", SAMPLED_DTYPES, ids=[names(*pair) for pair in SAMPLED_DTYPES])
def test_opcheck_of_every_dtype(backend, features, dtype):
    torch.library.opcheck(ops.sampled_product, make_sampling(6, 7, 5, "random", features, dtype).by_columns)


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype, values_dtype", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_opcheck_of_the_scatter(backend, keep, accumulate, dtype, values_dtype):
    case = make_sampling(9, 7, 1)
    weight, values = torch.randn(9, 7).to(dtype), torch.randn(case.pattern.nnz).to(values_dtype)
    old = torch.zeros(case.pattern.nnz, dtype=dtype) if keep else None
    torch.library.opcheck(ops.scatter_values_, (weight, values, *case.pattern.csr, 0.5, accumulate, old))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fake_and_meta_tensors_tell_shape_and_dtype(backend, shape):
    case = make_sampling(*shape, "random", torch.bfloat16, torch.float32)
    want = ops.sampled_product(*case.by_columns)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = ops.sampled_product(
            *(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in case.by_columns)
        )
    meta = ops.sampled_product(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in case.by_columns))
    for got in (fake, meta):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("tiled", [True, False])
def test_native_ops_survive_every_bad_plan(narrow, tiled):
    """An op can be called with anything; it must say so and neither read nor write out of bounds."""
    case = make_sampling(20, 20, 40)
    weight, values = torch.randn(20, 20), torch.randn(case.pattern.nnz)
    before = weight.clone()
    for view, op, head, tail in (
        (case.pattern.csc, NATIVE.native_sampled_product, (case.a, case.b), (torch.float32, tiled)),
        (case.pattern.csr, NATIVE.native_scatter_values_, (weight, values), (1.0, tiled, None)),
        (case.pattern.csr, NATIVE.native_sparse_core_add_, (case.a.clone(), case.b, values), ()),
        (case.pattern.csc, NATIVE.native_sparse_core_backward_add_, (case.b.clone(), case.a, case.b, values), (tiled,)),
    ):
        plan = view if narrow else (view.indptr, view.indices.int(), view.perm)
        for what, *bad in (*bad_plans(*plan, 20), *wrong_types(*plan)):
            refuses(op, (*head, *bad, *tail), what)
    assert torch.equal(weight, before)


def test_blocks_refuse_indices_that_do_not_ascend():
    """They are searched: the wrong place would be read."""
    n = 100_000
    indptr, perm = torch.tensor([0, 3], dtype=torch.int32), torch.arange(3, dtype=torch.int32)
    for indices in ([n - 1, 5, 3], [3, 5, 5], [5, 3, n - 1]):
        plan = indptr, torch.tensor(indices, dtype=torch.int32), perm
        refuses(
            NATIVE.native_sampled_product, (torch.ones(n, 4), torch.ones(1, 4), *plan, torch.float32, True), indices
        )


def test_native_ops_refuse_mismatched_sizes_and_dtypes():
    case = make_sampling(20, 24, 8)
    plan = case.pattern.csc
    for a, b in (
        (case.a[:, :-1], case.b),
        (case.a.double(), case.b),
        (case.a, case.b[:-1]),
        (case.a[0], case.b),
        (case.a.int(), case.b.int()),
        (case.a[:19], case.b),  # an index points past the end
    ):
        refuses(NATIVE.native_sampled_product, (a, b, *plan, torch.float32, False), "sampled product")
    refuses(NATIVE.native_sampled_product, (case.a, case.b, *plan, torch.int32, False), "integers out")
    weight, values = torch.randn(20, 24), torch.randn(case.pattern.nnz)
    for w, v, old in (
        (weight[:-1], values, None),
        (weight[:, :-1], values, None),
        (weight.int(), values, None),
        (weight, values[:-1], None),
        (weight, values, values.double()),
        (weight, values, values[:-1]),
    ):
        refuses(NATIVE.native_scatter_values_, (w, v, *case.pattern.csr, 1.0, True, old), "scatter")
    out = torch.randn(20, 8)
    for o, z, v in ((out[:-1], case.b, values), (out.double(), case.b, values), (out, case.b[:, :-1], values)):
        refuses(NATIVE.native_sparse_core_add_, (o, z, v, *case.pattern.csr), "adding")


def test_shape_functions_name_the_argument():
    case = make_sampling(20, 24, 8)
    good = case.by_columns
    for index, bad, name in (
        (0, good[0][0], "a must be"),
        (0, good[0][:, :-1], "a and b must hold equally many tokens"),
        (0, good[0].double(), "a and b must share a dtype"),
        (0, good[0].int(), "a must be"),
        (1, good[1][:-1], "b must be"),
        (2, good[2].long(), "indptr must be"),
        (3, good[3].long(), "indices must be"),
        (4, good[4][:-1], "perm must be"),
        (5, torch.int32, "dtype must be"),
    ):
        arguments = [
            x.to("meta") if isinstance(x, torch.Tensor) else x for x in (*good[:index], bad, *good[index + 1 :])
        ]
        with pytest.raises(ValueError, match=f"^{name}"):
            ops.sampled_product(*arguments)
