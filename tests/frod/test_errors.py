# SPDX-License-Identifier: Apache-2.0
"""Every bad argument of frod_linear and frod_weight raises ValueError and names it."""

import pytest
import torch

import frodkernels as fk
from tests.frod.cases import make_layer

M, N, T = 6, 8, 5


def arguments():
    layer = make_layer(M, N, T)
    return {
        "x": layer.x,
        "U": layer.U,
        "V": layer.V,
        "lam": layer.lam,
        "values": layer.values,
        "pattern": layer.pattern,
        "bias": layer.bias,
    }


def other_pattern(m, n, nnz):
    flat = torch.arange(nnz)
    return fk.SparsePattern(flat // n, flat % n, (m, n))


TENSORS = ("x", "U", "V", "lam", "values", "bias")
BAD_TENSORS = {
    "list": (lambda t: t.tolist(), "must be a tensor, got list"),
    "integers": (lambda t: t.int(), "must be float32, float64, bfloat16 or float16, got torch.int32"),
    "booleans": (lambda t: t.bool(), "must be float32.*got torch.bool"),
    "complex": (lambda t: t.to(torch.complex64), "must be float32.*got torch.complex64"),
    "float8": (lambda t: t.to(torch.float8_e5m2), "must be float32.*got torch.float8_e5m2"),
    "sparse": (lambda t: t.to_sparse(), "must be a dense tensor, got torch.sparse_coo"),
}
BAD_SHAPES = {
    ("x", "scalar"): (lambda a: a["x"][0, 0], r"x must be \[\.\.\., 8\] to match V \[8, 8\], got \[\]"),
    ("x", "too narrow"): (lambda a: a["x"][:, :-1], r"x must be \[\.\.\., 8\].*got \[5, 7\]"),
    ("x", "transposed"): (lambda a: a["x"].t(), r"x must be \[\.\.\., 8\].*got \[8, 5\]"),
    ("U", "vector"): (lambda a: a["U"][0], r"U must be \[m, n\], got \[8\]"),
    ("U", "cube"): (lambda a: a["U"][None], r"U must be \[m, n\], got \[1, 6, 8\]"),
    ("V", "transposed U"): (lambda a: a["U"].t(), r"V must be \[8, 8\] to match U \[6, 8\], got \[8, 6\]"),
    ("V", "too small"): (lambda a: a["V"][:-1, :-1], r"V must be \[8, 8\].*got \[7, 7\]"),
    ("V", "cube"): (lambda a: a["V"][None], r"V must be \[8, 8\]"),
    ("lam", "too short"): (lambda a: a["lam"][:-1], r"lam must be \[8\], got \[7\]"),
    ("lam", "matrix"): (lambda a: torch.diag(a["lam"]), r"lam must be \[8\], got \[8, 8\]"),
    ("lam", "scalar"): (lambda a: a["lam"][0], r"lam must be \[8\], got \[\]"),
    ("values", "too short"): (lambda a: a["values"][:-1], r"values must be \[\d+\], got"),
    ("values", "too long"): (lambda a: torch.cat([a["values"]] * 2), r"values must be \[\d+\], got"),
    ("values", "column"): (lambda a: a["values"][:, None], r"values must be \[\d+\], got"),
    ("bias", "too long"): (lambda a: torch.ones(7), r"bias must be \[6\], got \[7\]"),
    ("bias", "row"): (lambda a: torch.ones(1, 6), r"bias must be \[6\], got \[1, 6\]"),
    ("bias", "scalar"): (lambda a: torch.tensor(1.0), r"bias must be \[6\], got \[\]"),
    ("pattern", "none"): (lambda a: None, "pattern must be a frodkernels.SparsePattern, got NoneType"),
    ("pattern", "indices"): (lambda a: torch.zeros(2, 9), "pattern must be a frodkernels.SparsePattern, got Tensor"),
    ("pattern", "rectangular"): (lambda a: other_pattern(8, 9, 9), "pattern must be 8 x 8, got 8 x 9"),
    ("pattern", "too large"): (lambda a: other_pattern(9, 9, 9), "pattern must be 8 x 8, got 9 x 9"),
    ("pattern", "other count"): (lambda a: other_pattern(8, 8, 3), r"values must be \[3\], got"),
}


def call(function, args):
    if function is fk.frod_weight:
        args = {name: args[name] for name in ("U", "V", "lam", "values", "pattern")}
    return function(**args)


@pytest.mark.parametrize("how", BAD_TENSORS)
@pytest.mark.parametrize("name", TENSORS)
def test_wrong_kinds_of_tensor(name, how):
    change, message = BAD_TENSORS[how]
    args = arguments()
    args[name] = change(args[name])
    for function in (fk.frod_linear, fk.frod_weight):
        if function is fk.frod_weight and name in ("x", "bias"):
            continue
        with pytest.raises(ValueError, match=f"^{name} {message}"):
            call(function, args)


@pytest.mark.parametrize("name, how", BAD_SHAPES)
def test_wrong_shapes(name, how):
    change, message = BAD_SHAPES[name, how]
    args = arguments()
    args[name] = change(args)
    for function in (fk.frod_linear, fk.frod_weight):
        if function is fk.frod_weight and name in ("x", "bias"):
            continue
        with pytest.raises(ValueError, match=f"^{message}"):
            call(function, args)


@pytest.mark.parametrize("name", ["U", "V", "lam", "values", "bias"])
def test_wrong_devices(name):
    args = arguments()
    args[name] = args[name].to("meta")
    with pytest.raises(ValueError, match=f"^{name} is on meta but x is on cpu"):
        fk.frod_linear(**args)
    if name in ("V", "lam", "values"):
        with pytest.raises(ValueError, match=f"^{name} is on meta but U is on cpu"):
            call(fk.frod_weight, args)


@pytest.mark.parametrize("name", ["x", "U", "V", "lam", "values"])
def test_none_is_no_tensor(name):
    args = arguments()
    args[name] = None
    with pytest.raises(ValueError, match=f"^{name} must be a tensor, got NoneType"):
        fk.frod_linear(**args)


@pytest.mark.parametrize("path", ["", "Activation", "dense", None, 0])
def test_unknown_paths(path):
    with pytest.raises(ValueError, match="^path must be 'auto', 'activation', 'fold' or 'materialize', got"):
        fk.frod_linear(**arguments(), path=path)


@pytest.mark.parametrize("name", ["U", "V"])
def test_frozen_factors_take_no_gradient(name):
    """A clear error, never a silent None; where nothing is differentiated there is nothing to say."""
    args = arguments()
    args[name].requires_grad_()
    for function in (fk.frod_linear, fk.frod_weight):
        with pytest.raises(NotImplementedError, match=f"^{name} requires grad, but U and V are frozen"):
            call(function, args)
        with torch.no_grad():
            assert call(function, args).isfinite().all()


def test_no_argument_was_changed_by_a_refusal():
    args = arguments()
    before = {name: t.clone() for name, t in args.items() if isinstance(t, torch.Tensor)}
    with pytest.raises(ValueError):
        fk.frod_linear(**{**args, "bias": torch.ones(7)})
    assert all(torch.equal(args[name], t) for name, t in before.items())
