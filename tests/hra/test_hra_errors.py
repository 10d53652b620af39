# SPDX-License-Identifier: Apache-2.0
"""Every bad argument of hra_linear and hra_conv2d raises ValueError and names it."""

import pytest
import torch

import frodkernels as fk
from tests.householder.cases import make_conv, make_layer
from tests.householder.test_errors import BAD_TENSORS

FUNCTIONS = {"linear": fk.hra_linear, "conv": fk.hra_conv2d}


def arguments(kind):
    if kind == "linear":
        return make_layer(6, 8, 3, 5, dtype=torch.float32).tensors()
    return make_conv(6, 4, (2, 3), 3, (2, 5, 7), dtype=torch.float32).tensors()


BAD_SHAPES = {
    ("linear", "x", "scalar"): (lambda a: a["x"][0, 0], r"x must be \[\.\.\., n\], got a scalar"),
    ("linear", "x", "too narrow"): (lambda a: a["x"][:, :-1], r"weight must be \[m, 7\] to match x \[5, 7\], got"),
    ("linear", "weight", "vector"): (lambda a: a["weight"][0], r"weight must be \[m, 8\].*got \[8\]"),
    ("linear", "weight", "transposed"): (lambda a: a["weight"].t(), r"weight must be \[m, 8\].*got \[8, 6\]"),
    ("linear", "weight", "cube"): (lambda a: a["weight"][None], r"weight must be \[m, 8\]"),
    ("linear", "u", "vector"): (lambda a: a["u"][:, 0], r"u must be \[8, r\] with r >= 1, got \[8\]"),
    ("linear", "u", "transposed"): (lambda a: a["u"].t(), r"u must be \[8, r\].*got \[3, 8\]"),
    ("linear", "u", "of the outputs"): (lambda a: a["u"][:6], r"u must be \[8, r\].*got \[6, 3\]"),
    ("linear", "u", "no columns"): (lambda a: a["u"][:, :0], r"u must be \[8, r\] with r >= 1, got \[8, 0\]"),
    ("linear", "bias", "too long"): (lambda a: torch.ones(7), r"bias must be \[6\], got \[7\]"),
    ("linear", "bias", "row"): (lambda a: torch.ones(1, 6), r"bias must be \[6\], got \[1, 6\]"),
    ("linear", "bias", "scalar"): (lambda a: torch.tensor(1.0), r"bias must be \[6\], got \[\]"),
    ("conv", "x", "matrix"): (lambda a: a["x"][0, 0], r"x must be \[N, 4, height, width\].*got \[5, 7\]"),
    ("conv", "x", "channels"): (lambda a: a["x"][:, :3], r"x must be \[N, 4, height, width\] to match weight"),
    ("conv", "x", "volume"): (lambda a: a["x"][None], r"x must be \[N, 4, height, width\]"),
    ("conv", "weight", "matrix"): (lambda a: a["weight"].flatten(1), r"weight must be \[m, C, kh, kw\], got \[6, 24\]"),
    ("conv", "weight", "grouped"): (lambda a: a["weight"][:, :2], r"x must be \[N, 2, height, width\].*no groups"),
    ("conv", "u", "of the channels"): (lambda a: a["u"][:4], r"u must be \[24, r\] with r >= 1, got \[4, 3\]"),
    ("conv", "u", "vector"): (lambda a: a["u"][:, 0], r"u must be \[24, r\] with r >= 1, got \[24\]"),
    ("conv", "u", "no columns"): (lambda a: a["u"][:, :0], r"u must be \[24, r\] with r >= 1, got \[24, 0\]"),
    ("conv", "bias", "too long"): (lambda a: torch.ones(7), r"bias must be \[6\], got \[7\]"),
    ("conv", "bias", "scalar"): (lambda a: torch.tensor(1.0), r"bias must be \[6\], got \[\]"),
}


@pytest.mark.parametrize("how", BAD_TENSORS)
@pytest.mark.parametrize("name", ["x", "u", "weight", "bias"])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_wrong_kinds_of_tensor(kind, name, how):
    change, message = BAD_TENSORS[how]
    args = arguments(kind)
    args[name] = change(args[name])
    if (name, how) == ("bias", "none"):
        assert FUNCTIONS[kind](**args).isfinite().all()
        return
    with pytest.raises(ValueError, match=f"^{name} {message}"):
        FUNCTIONS[kind](**args)


@pytest.mark.parametrize("kind, name, how", BAD_SHAPES)
def test_wrong_shapes(kind, name, how):
    change, message = BAD_SHAPES[kind, name, how]
    args = arguments(kind)
    args[name] = change(args)
    for orthogonalize in (False, True):
        with pytest.raises(ValueError, match=f"^{message}"):
            FUNCTIONS[kind](**args, orthogonalize=orthogonalize)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_gram_schmidt_of_more_columns_than_features(kind):
    args = arguments(kind)
    n = args["u"].shape[0]
    args["u"] = torch.randn(n, n + 1)
    with pytest.raises(ValueError, match=rf"^u has {n + 1} columns of {n} entries: orthogonalize needs r <= n"):
        FUNCTIONS[kind](**args, orthogonalize=True)
    assert FUNCTIONS[kind](**args).isfinite().all()


@pytest.mark.parametrize("name", ["weight", "u", "bias"])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_wrong_devices(kind, name):
    args = arguments(kind)
    args[name] = args[name].to("meta")
    with pytest.raises(ValueError, match=f"^{name} is on meta but x is on cpu"):
        FUNCTIONS[kind](**args)


@pytest.mark.parametrize("side", ["", "Input", "left", None, 0])
def test_unknown_sides(side):
    with pytest.raises(ValueError, match="^side must be 'auto', 'input' or 'output', got"):
        fk.hra_linear(**arguments("linear"), side=side)


def test_options_are_named():
    args = arguments("linear")
    with pytest.raises(TypeError):
        fk.hra_linear(args["x"], args["weight"], args["u"], args["bias"], True)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_no_argument_was_changed_by_a_refusal(kind):
    args = arguments(kind)
    before = {name: t.clone() for name, t in args.items()}
    with pytest.raises(ValueError):
        FUNCTIONS[kind](**{**args, "bias": torch.ones(7)})
    assert all(torch.equal(args[name], t) for name, t in before.items())


def test_rank_deficient_directions_are_warned_of_at_the_callers_line():
    args = arguments("linear")
    args["u"] = args["u"][:, [0, 0, 1, 1]]
    for side in ("auto", "input", "output"):
        with pytest.warns(UserWarning, match="u is rank-deficient: 2 of its 4 columns") as record:
            fk.hra_linear(**args, orthogonalize=True, side=side)
        assert [w.filename for w in record] == [__file__]
