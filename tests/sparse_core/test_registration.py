# SPDX-License-Identifier: Apache-2.0
"""The registered ops: schema, shapes, strides, tracing, and what they say to arguments they cannot take."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import frodkernels as fk
from tests.support import DTYPE_IDS, DTYPES, make_case

ALL = [True, True, True]
ops = fk.ops.sparse_core

CASES = {
    "square": (9, 9, 5, "random"),
    "one token": (9, 9, 1, "random"),
    "no tokens": (9, 9, 0, "random"),
    "no entries": (9, 9, 5, "empty"),
    "tall": (12, 5, 7, "random"),
    "wide": (5, 12, 7, "random"),
    "one feature": (1, 1, 4, "dense"),
    "nothing": (0, 0, 4, "empty"),
}


@pytest.fixture(params=["native", "reference"])
def backend(request):
    with fk.backend(request.param):
        yield request.param


@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_opcheck(backend, shape, token_major):
    case = make_case(*shape)
    torch.library.opcheck(ops.sparse_core, (*case.forward, token_major))
    torch.library.opcheck(ops.sparse_core_backward, (*case.backward, ALL, token_major))


@pytest.mark.parametrize("dtype, param_dtype", DTYPES, ids=DTYPE_IDS)
def test_opcheck_of_every_dtype(backend, dtype, param_dtype):
    for lam in (True, False):
        case = make_case(6, 6, 5, "random", dtype, param_dtype, lam=lam)
        torch.library.opcheck(ops.sparse_core, case.forward)
        torch.library.opcheck(ops.sparse_core_backward, (*case.backward, ALL))


@pytest.mark.parametrize("needs", [[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)], ids=str)
def test_opcheck_of_every_need(backend, needs):
    for token_major in (False, True):
        args = (*make_case(6, 6, 5).backward, [bool(need) for need in needs], token_major)
        torch.library.opcheck(ops.sparse_core_backward, args)


def strides(t):
    """What of the strides can be seen: those of dimensions of one entry, or of an empty tensor, mean nothing."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1 and t.numel()]


@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_fake_and_meta_tensors_tell_shape_dtype_and_strides(backend, shape, token_major):
    case = make_case(*shape, torch.bfloat16)
    args = {ops.sparse_core: case.forward, ops.sparse_core_backward: (*case.backward, ALL)}
    for op, real in args.items():
        want = op(*real, token_major)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in real]
            fake = op(*fakes, token_major)
        meta = op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in real), token_major)
        for one in (fake, meta):
            for got, right in zip(*((o,) if isinstance(o, torch.Tensor) else o for o in (one, want)), strict=True):
                assert (got.shape, got.dtype) == (right.shape, right.dtype)
                assert strides(got) == strides(right)


# ---- misuse ----------------------------------------------------------------------------------------------------------


def changed(args, index, tensor):
    return (*args[:index], tensor, *args[index + 1 :])


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def bad_plans(indptr, indices, perm, size):
    """(what is wrong, indptr, indices, perm): all of the right dtypes, none a plan for `size` gathered features."""
    wide = indices.int()
    yield "index past the end", indptr, wide.clone().fill_(size), perm
    yield "index far past the end", indptr, wide.clone().fill_(2**31 - 1), perm
    yield "negative index", indptr, wide.clone().fill_(-1), perm
    yield "narrow index past the end", indptr, indices.new_full(indices.shape, 65535), perm
    yield "perm past the end", indptr, indices, perm.clone().fill_(perm.numel())
    yield "perm far past the end", indptr, indices, perm.clone().fill_(2**31 - 1)
    yield "negative perm", indptr, indices, perm.clone().fill_(-1)
    yield "indptr falls", torch.cat([indptr[:1], indptr[1:-1].flip(0), indptr[-1:]]), indices, perm
    yield "indptr starts late", torch.cat([ints(1), indptr[1:]]), indices, perm
    yield "indptr negative", torch.cat([ints(-5), indptr[1:]]), indices, perm
    yield "indptr ends early", torch.cat([indptr[:-1], indptr[-1:] - 1]), indices, perm
    yield "indptr ends late", torch.cat([indptr[:-1], indptr[-1:] + 1]), indices, perm
    yield (
        "indptr overshoots inside",
        torch.cat([indptr[:1], indptr[1:-1].clone().fill_(2**31 - 1), indptr[-1:]]),
        indices,
        perm,
    )
    yield "short perm", indptr, indices, perm[:-1]
    yield "long perm", indptr, indices, torch.cat([perm, perm[:1]])


def wrong_types(indptr, indices, perm):
    yield "empty indptr", indptr[:0], indices, perm
    yield "int64 indptr", indptr.long(), indices, perm
    yield "float indptr", indptr.float(), indices, perm
    yield "matrix indptr", indptr[None], indices, perm
    yield "int64 indices", indptr, indices.long(), perm
    yield "int16 indices", indptr, indices.to(torch.int16), perm
    yield "float indices", indptr, indices.float(), perm
    yield "matrix indices", indptr, indices[None], perm
    yield "int64 perm", indptr, indices, perm.long()
    yield "uint16 perm", indptr, indices, perm.to(torch.uint16)
    yield "matrix perm", indptr, indices, perm[None]


NATIVE = torch.ops.frodkernels
WRONG = (RuntimeError, ValueError, IndexError)


def refuses(op, args, what):
    with pytest.raises(WRONG):
        op(*args)
        pytest.fail(f"{what}: accepted")


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("T", [1, 40])
def test_native_ops_survive_every_bad_plan(T, narrow):
    """An op can be called with anything; it must say so and neither read nor write out of bounds."""
    case = make_case(20, 20, T, "random")
    for lam in (case.lam, None):
        for view, op, head, tail in (
            (case.pattern.csr, NATIVE.native_sparse_core, (case.z, lam, case.values), ()),
            (case.pattern.csc, NATIVE.native_sparse_core_backward, (case.u, case.z, lam, case.values), (ALL,)),
        ):
            plan = view if narrow else (view.indptr, view.indices.int(), view.perm)
            for what, *bad in (*bad_plans(*plan, 20), *wrong_types(*plan)):
                refuses(op, (*head, *bad, *tail), what)


def test_native_ops_refuse_mismatched_sizes_and_dtypes():
    case = make_case(20, 20, 8)
    f, b = case.forward, (*case.backward, ALL)
    forward, backward = NATIVE.native_sparse_core, NATIVE.native_sparse_core_backward
    other = {
        "integers": lambda t: t.int(),
        "complex": lambda t: t.to(torch.complex64),
        "booleans": lambda t: t.bool(),
        "float8": lambda t: t.to(torch.float8_e4m3fn),
        "a missing row": lambda t: t[:-1],
        "one more dimension": lambda t: t[None],
        "one dimension less": lambda t: t[0],
    }
    for what, change in other.items():
        for index in (0, 1, 2):
            refuses(forward, changed(f, index, change(f[index])), f"forward {index} {what}")
        for index in (0, 1, 2, 3):
            refuses(backward, changed(b, index, change(b[index])), f"backward {index} {what}")
    refuses(backward, changed(b, 0, b[0][:, :-1]), "fewer tokens in u")
    refuses(backward, changed(b, 0, b[0].double()), "u wider than z")
    refuses(backward, changed(b, 7, [True, True]), "two needs")
    refuses(forward, changed(f, 2, torch.cat([f[2], f[2]])), "twice the values")
    refuses(forward, (torch.randn(30, 8), *f[1:]), "lam with a rectangular product")


def test_a_perm_that_repeats_is_survived():
    """Not detectable at a reasonable price; the result means nothing, but memory is safe.

    What no entry wrote is poison, which shows that the tests' poisoned memory reaches C++ allocations.
    """
    case = make_case(20, 20, 8)
    same = torch.zeros_like(case.pattern.csc.perm)
    dz, dlam, dvalues = NATIVE.native_sparse_core_backward(*changed(case.backward, 6, same), ALL)
    assert dz.shape == (20, 8) and dlam.shape == (20,) and dvalues.shape == case.values.shape
    assert dvalues[0].isfinite() and dvalues[1:].isnan().all()


def test_shape_functions_name_the_argument():
    """Under compile, export and on meta tensors the Python check speaks."""
    case = make_case(20, 20, 8)

    def move(args):
        return [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]

    f, b = case.forward, (*case.backward, ALL)
    for index, bad, name in (
        (0, f[0][0], "z"),
        (0, f[0][:-1], "z"),
        (0, f[0].int(), "z"),
        (1, f[1][:-1], "lam"),
        (1, f[1].int(), "lam"),
        (2, f[2][:-1], "values"),
        (2, f[2].int(), "values"),
        (3, f[3].long(), "indptr"),
        (3, f[3][:0], "indptr"),
        (4, f[4].long(), "indices"),
        (5, f[5][:-1], "perm"),
        (5, f[5].long(), "perm"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            ops.sparse_core(*move(changed(f, index, bad)))
    for index, bad, name in (
        (0, b[0][:, :-1], "u and z must hold equally many tokens"),
        (0, b[0].double(), "u and z must share a dtype"),
        (0, b[0][:-1], "u must be"),
        (1, b[1][:-1], "z must be"),
        (2, b[2][:-1], "lam must be"),
        (3, b[3][:-1], "values must be"),
    ):
        with pytest.raises(ValueError, match=f"^{name}"):
            ops.sparse_core_backward(*move(changed(b, index, bad)))
