# SPDX-License-Identifier: Apache-2.0
"""The registered ops: schema, shapes, strides, tracing, and what they say to arguments they cannot take."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import frodkernels as fk
from frodkernels import _backends
from frodkernels.ops import householder as ops
from frodkernels.reference import householder as reference
from tests.householder.cases import F64, close, make_operands
from tests.support import LAYOUTS

BOTH = [True, True]
NEEDS = [[a, b] for a in (False, True) for b in (False, True)]
TYPES = [(dtype, acc) for dtype in (torch.float32, torch.bfloat16, torch.float16) for acc in (torch.float32, F64)] + [
    (F64, F64)
]

CASES = {  # T, n, r, m
    "square": (5, 9, 4, None),
    "base": (5, 9, 4, 7),
    "one token": (1, 9, 4, 7),
    "no tokens": (0, 9, 4, 7),
    "no tokens, no base": (0, 9, 4, None),
    "no features": (5, 0, 4, None),
    "no inputs": (5, 0, 4, 3),
    "no outputs": (5, 3, 4, 0),
    "no reflections": (5, 9, 0, 7),
    "one of each": (1, 1, 1, 1),
    "more reflections than features": (3, 5, 9, 6),
}
shapes = pytest.mark.parametrize("shape", CASES.values(), ids=CASES)


@pytest.fixture(params=["auto", "reference"])
def backend(request):
    with fk.backend(request.param):
        yield request.param


def calls(case, needs=BOTH):
    """(op, arguments) of all three ops, the first with and without a result."""
    return [
        (ops.householder, case.forward),
        (ops.householder, (case.x, case.left, None)),
        (ops.householder_backward, (*case.backward, needs)),
        (ops.householder_gradient, case.gradient),
    ]


@shapes
def test_opcheck(backend, shape):
    for op, args in calls(make_operands(*shape)):
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("dtype, acc", TYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_opcheck_of_every_dtype(dtype, acc):
    for op, args in calls(make_operands(5, 9, 4, 7, dtype, acc)):
        torch.library.opcheck(op, args)


def test_opcheck_of_rounded_factors():
    for m in (None, 7):
        case = make_operands(5, 9, 4, m, torch.bfloat16)
        torch.library.opcheck(ops.householder, (*case.forward, True))
        torch.library.opcheck(ops.householder_backward, (*case.backward, BOTH, True))


@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_opcheck_of_every_need(backend, needs):
    for m in (None, 7):
        torch.library.opcheck(ops.householder_backward, (*make_operands(5, 9, 4, m).backward, needs))


@shapes
def test_every_shape_has_values(backend, shape):
    """A sum of nothing is zero and is written; memory is not left as it was found."""
    case = make_operands(*shape)
    close(ops.householder(*case.forward), case.exact_forward())
    close(ops.householder(case.x, case.left, None)[1], case.exact_forward()[1])
    close(ops.householder_backward(*case.backward, BOTH), case.exact_backward())
    close(ops.householder_gradient(*case.gradient), case.x.t() @ case.coefficients)


def outputs(op, args):
    out = op(*args)
    return (out,) if isinstance(out, torch.Tensor) else out


@pytest.mark.parametrize("layout", ["token_major", "strided", "expanded"])
@shapes
def test_fake_and_meta_tensors_tell_shape_dtype_and_strides(backend, shape, layout):
    case = make_operands(*shape, dtype=torch.bfloat16)
    for name, tensor in case.tensors().items():
        setattr(case, name, LAYOUTS[layout](tensor.t()).t())
    for needs in NEEDS:
        for op, args in calls(case, needs):
            real = outputs(op, args)
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = outputs(op, [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args])
            meta = outputs(op, [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args])
            for one in (fake, meta):
                for got, right in zip(one, real, strict=True):
                    assert (got.shape, got.dtype) == (right.shape, right.dtype)
                    assert got.is_contiguous() and right.is_contiguous()


def test_every_op_is_in_the_table_of_backends():
    table = fk.backends()
    for op in (ops.FORWARD, ops.BACKWARD, ops.GRADIENT):
        assert table[op]["cpu"]["reference"] == table[op]["cuda"]["reference"] == "available"
        assert table[op]["cpu"]["chosen"] in ("native", "reference")


def test_ranks_beyond_the_kernels_of_a_gpu_are_plain_products(monkeypatch):
    """On a GPU and in Triton's interpreter; the native CPU kernels take any rank."""
    served = []

    counts = {ops.FORWARD: 4, ops.BACKWARD: 7, ops.GRADIENT: 2}  # the reference knows nothing of `rounded`

    def implementation(op, device):
        return chosen, lambda *args: served.append((op, device)) or getattr(reference, op)(*args[: counts[op]])

    monkeypatch.setattr(_backends, "implementation", implementation)
    for chosen, few, many in (("triton", 3, 0), ("native", 3, 3)):
        for r, count in ((ops.GPU_RANKS, few), (ops.GPU_RANKS + 1, many)):
            served.clear()
            for op, args in calls(make_operands(3, 5, r))[1:]:
                op(*args)
            assert len(served) == count, (chosen, r)
    device = torch.device("cuda")  # there need not be one: the choice reads type and rank only
    factor = type("Factor", (), {"device": device, "shape": (9, ops.GPU_RANKS + 1)})()
    assert ops._implementation(ops.FORWARD, factor) == (False, reference.householder)


# ---- misuse ----------------------------------------------------------------------------------------------------------


def changed(args, index, tensor):
    return (*args[:index], tensor, *args[index + 1 :])


def test_shape_functions_name_the_argument():
    """Under compile, export and on meta tensors the Python check speaks."""

    def move(args):
        return [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]

    for m in (None, 7):
        case = make_operands(5, 9, 4, m, torch.float32)
        f, b, s = case.forward, (*case.backward, BOTH), case.gradient
        forward = [
            (0, f[0][0], "x"),
            (0, f[0][:, :-1], "left"),
            (0, f[0].int(), "x"),
            (1, f[1][:-1], "left"),
            (1, f[1].bfloat16(), "left"),
            (1, f[1][0], "left"),
            (1, f[1][:, :-1], "right"),
            (2, f[2][0], "right"),
            (2, f[2].int(), "right"),
            (2, f[2].double(), "right"),
        ]
        backward = [
            (0, b[0][0], "g"),
            (0, b[0][:-1], "g"),
            (0, b[0].double(), "g"),
            (1, b[1][0], "x"),
            (1, b[1].bool(), "x"),
            (2, b[2][:-1], "coefficients"),
            (2, b[2][:, :-1], "coefficients"),
            (2, b[2].double(), "coefficients"),
            (3, b[3][:-1], "left"),
            (3, b[3].half(), "left"),
            (4, b[4][:-1], "right"),
            (4, b[4][:, :-1], "right"),
        ]
        if m is None:
            forward.append((2, f[2][:-1], "right"))
            backward.append((0, b[0][:, :-1], "g"))
        else:
            forward += [
                (3, f[3][:-1], "base"),
                (3, f[3][:, :-1], "base"),
                (3, f[3][0], "base"),
                (3, f[3].half(), "base"),
            ]
            backward += [(5, b[5][:-1], "base"), (5, b[5][:, :-1], "base"), (5, b[5].half(), "base")]
        for index, bad, name in forward:
            with pytest.raises(ValueError, match=f"^{name} must "):
                ops.householder(*move(changed(f, index, bad)))
        for index, bad, name in backward:
            with pytest.raises(ValueError, match=f"^{name} must "):
                ops.householder_backward(*move(changed(b, index, bad)))
        for index, bad, name in ((0, s[0][0], "x"), (1, s[1][:-1], "q"), (1, s[1].int(), "q"), (1, s[1][0], "q")):
            with pytest.raises(ValueError, match=f"^{name} must "):
                ops.householder_gradient(*move(changed(s, index, bad)))


def test_wide_features_need_wide_factors():
    case = make_operands(5, 9, 4).to("meta")
    with pytest.raises(ValueError, match="^left must be float32 .float64 beside float64."):
        ops.householder(case.x, case.left.float(), case.right.float())
    with pytest.raises(ValueError, match="^q must be float32 .float64 beside float64."):
        ops.householder_gradient(case.x, case.coefficients.float())
