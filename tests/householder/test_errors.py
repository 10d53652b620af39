# SPDX-License-Identifier: Apache-2.0
"""Every bad argument of householder and orthogonality_penalty raises ValueError and names it."""

import pytest
import torch

import frodkernels as fk
from tests.householder.cases import make_chain

N, R, T = 8, 3, 5

BAD_TENSORS = {
    "list": (lambda t: t.tolist(), "must be a tensor, got list"),
    "none": (lambda t: None, "must be a tensor, got NoneType"),
    "integers": (lambda t: t.int(), "must be float32, float64, bfloat16 or float16, got torch.int32"),
    "booleans": (lambda t: t.bool(), "must be float32.*got torch.bool"),
    "complex": (lambda t: t.to(torch.complex64), "must be float32.*got torch.complex64"),
    "float8": (lambda t: t.to(torch.float8_e5m2), "must be float32.*got torch.float8_e5m2"),
    "sparse": (lambda t: t.to_sparse(), "must be a dense tensor, got torch.sparse_coo"),
}
BAD_SHAPES = {
    ("x", "scalar"): (lambda a: a["x"][0, 0], r"x must be \[\.\.\., n\], got a scalar"),
    ("x", "too narrow"): (lambda a: a["x"][:, :-1], r"u must be \[7, r\] with r >= 1, got \[8, 3\]"),
    ("u", "vector"): (lambda a: a["u"][:, 0], r"u must be \[8, r\] with r >= 1, got \[8\]"),
    ("u", "cube"): (lambda a: a["u"][None], r"u must be \[8, r\] with r >= 1, got \[1, 8, 3\]"),
    ("u", "transposed"): (lambda a: a["u"].t(), r"u must be \[8, r\] with r >= 1, got \[3, 8\]"),
    ("u", "no columns"): (lambda a: a["u"][:, :0], r"u must be \[8, r\] with r >= 1, got \[8, 0\]"),
}


def arguments():
    return make_chain(N, R, T, dtype=torch.float32).tensors()


@pytest.mark.parametrize("how", BAD_TENSORS)
@pytest.mark.parametrize("name", ["x", "u"])
def test_wrong_kinds_of_tensor(name, how):
    change, message = BAD_TENSORS[how]
    args = arguments()
    args[name] = change(args[name])
    with pytest.raises(ValueError, match=f"^{name} {message}"):
        fk.householder(**args)
    if name == "u":
        with pytest.raises(ValueError, match=f"^u {message}"):
            fk.orthogonality_penalty(args["u"])


def test_nested_tensors():
    args = arguments()
    args["x"] = torch.nested.nested_tensor([args["x"], args["x"][:2]], layout=torch.jagged)
    with pytest.raises(ValueError, match="^x must be a dense tensor, got nested"):
        fk.householder(**args)


@pytest.mark.parametrize("orthogonalize", [False, True])
@pytest.mark.parametrize("name, how", BAD_SHAPES)
def test_wrong_shapes(name, how, orthogonalize):
    change, message = BAD_SHAPES[name, how]
    args = arguments()
    args[name] = change(args)
    with pytest.raises(ValueError, match=f"^{message}"):
        fk.householder(**args, orthogonalize=orthogonalize)


def test_gram_schmidt_of_more_columns_than_features():
    chain = make_chain(4, 5, 3)
    with pytest.raises(ValueError, match="^u has 5 columns of 4 entries: orthogonalize needs r <= n"):
        chain(orthogonalize=True)
    assert chain().isfinite().all()


def test_wrong_devices():
    args = arguments()
    with pytest.raises(ValueError, match="^u is on meta but x is on cpu"):
        fk.householder(args["x"], args["u"].to("meta"))
    with pytest.raises(ValueError, match="^u is on cpu but x is on meta"):
        fk.householder(args["x"].to("meta"), args["u"])


@pytest.mark.parametrize("u", [torch.ones(5), torch.ones(2, 5, 3), torch.ones(5, 0), torch.tensor(1.0)], ids=str)
def test_penalties_of_what_is_no_matrix(u):
    with pytest.raises(ValueError, match=r"^u must be \[n, r\] with r >= 1, got"):
        fk.orthogonality_penalty(u)


def test_options_are_named():
    """x, u, True, True would read as anything."""
    args = arguments()
    with pytest.raises(TypeError):
        fk.householder(args["x"], args["u"], True)


def test_no_argument_was_changed_by_a_refusal():
    args = arguments()
    before = {name: t.clone() for name, t in args.items()}
    with pytest.raises(ValueError):
        fk.householder(args["x"], args["u"].t())
    assert all(torch.equal(args[name], t) for name, t in before.items())
