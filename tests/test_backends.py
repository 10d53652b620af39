# SPDX-License-Identifier: Apache-2.0
"""Choosing a backend: what is available, forcing one, and what is said when it cannot serve."""

import importlib.util
import os
import subprocess
import sys
import threading

import pytest
import torch

import frodkernels as fk
from frodkernels import _backends, _native, _ops
from tests.support import assert_no_worse_than_torch, make_case

OPS = (
    "sparse_core",
    "sparse_core_backward",
    "householder",
    "householder_backward",
    "householder_gradient",
    "sampled_product",
    "scatter_values_",
)
ALL = [True, True, True]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def test_the_native_library_serves_the_cpu():
    assert _native.load(), _native.why_not()
    for op in OPS:
        assert _backends.select(op, "cpu") == "native"
        assert _ops.native_serves(op, "cpu")


def test_the_table_tells_every_op_device_and_backend():
    table = fk.backends()
    assert set(table) == set(OPS)
    for row in (table[op][device] for op in table for device in ("cpu", "cuda")):
        assert set(row) == {"native", "triton", "reference", "chosen"}
        assert row["reference"] == "available" and row[row["chosen"]] == "available"
        assert all(row.values())
    with fk.backend("reference"):
        assert all(fk.backends()[op]["cpu"]["chosen"] == "reference" for op in OPS)


@pytest.mark.parametrize("name", ["cuda", "", "Native", None, 3])
def test_an_unknown_name_is_refused_at_once(name):
    with pytest.raises(ValueError, match="name must be 'auto', 'reference', 'native' or 'triton'"):
        with fk.backend(name):
            pytest.fail("the block must not run")
    assert _backends.select("sparse_core", "cpu") == "native"


def test_forcing_nests_and_ends_with_the_block():
    assert _backends.select("sparse_core", "cpu") == "native"
    with fk.backend("reference"):
        assert _backends.select("sparse_core", "cpu") == "reference"
        with fk.backend("auto"):
            assert _backends.select("sparse_core", "cpu") == "native"
        with pytest.raises(KeyError), fk.backend("native"):
            raise KeyError
        assert _backends.select("sparse_core", "cpu") == "reference"
    assert _backends.select("sparse_core", "cpu") == "native"


def test_it_is_restored_after_an_exception():
    with pytest.raises(ZeroDivisionError), fk.backend("reference"):
        1 / 0  # noqa: B018
    assert _backends.select("sparse_core", "cpu") == "native"


def test_a_forced_backend_is_the_one_that_runs(monkeypatch):
    case = make_case(9, 9, 4)
    calls = []
    for name in ("native", "reference"):
        for op in OPS:
            real = _backends._load(op, name)

            def spy(*args, _real=real, _what=(name, op)):
                calls.append(_what)
                return _real(*args)

            monkeypatch.setattr(_backends, "_load", _route(_backends._load, (op, name), spy))
    z = case.z.t().clone().requires_grad_()
    for name in ("native", "reference"):
        calls.clear()
        with fk.backend(name):
            fk.sparse_core(z, case.lam, case.values, case.pattern).sum().backward()
        assert calls == [(name, "sparse_core"), (name, "sparse_core_backward")]


def _route(load, key, spy):
    return lambda op, name: spy if (op, name) == key else load(op, name)


def test_it_holds_in_other_threads():
    """Autograd runs backward passes in threads of its own."""
    seen = []
    with fk.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(_backends.select("sparse_core", "cpu")))
        thread.start()
        thread.join()
    assert seen == ["reference"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_reference_backend_is_the_reference(dtype):
    from frodkernels.reference import sparse_core as reference

    case = make_case(21, 21, 30, dtype=dtype)
    ops = fk.ops.sparse_core
    with fk.backend("reference"):
        assert torch.equal(ops.sparse_core(*case.forward), reference.sparse_core(*case.forward))
        got = ops.sparse_core_backward(*case.backward, ALL)
    plain = reference.sparse_core_backward(*case.backward, ALL)
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))
    with fk.backend("native"):
        out = ops.sparse_core(*case.forward)
    assert_no_worse_than_torch(out, case.exact_forward(), reference.sparse_core(*case.forward))


@pytest.mark.skipif(INTERPRETING, reason="Triton serves the CPU in its interpreter")
def test_triton_cannot_serve_the_cpu_and_says_why():
    case = make_case(5, 5, 3)
    why = "interpreter" if importlib.util.find_spec("triton") else "triton is not installed"
    with (
        fk.backend("triton"),
        pytest.raises(RuntimeError, match=f"'triton' was asked for .* sparse_core on cpu: .*{why}"),
    ):
        fk.sparse_core(case.z.t(), case.lam, case.values, case.pattern)
    z = case.z.t().clone().requires_grad_()
    y = fk.sparse_core(z, case.lam, case.values, case.pattern)
    with fk.backend("triton"), pytest.raises(RuntimeError, match="cannot serve sparse_core_backward on cpu"):
        y.sum().backward()


def test_without_the_native_library_the_reference_serves():
    """And forcing it says what was looked for and what to do. In a process of its own: loading happens once."""
    code = """
import torch, frodkernels as fk
from frodkernels import _backends
assert _backends.select("sparse_core", "cpu") == "reference"
assert "FRODKERNELS_DISABLE_NATIVE" in fk.backends()["sparse_core"]["cpu"]["native"]
pattern = fk.SparsePattern(torch.tensor([0]), torch.tensor([1]), (2, 2))
args = torch.ones(3, 2), torch.ones(2), torch.ones(1), pattern
assert fk.sparse_core(*args).tolist() == [[2, 1]] * 3
try:
    with fk.backend("native"):
        fk.sparse_core(*args)
except RuntimeError as error:
    assert "'native' was asked for" in str(error) and "unset it" in str(error), error
else:
    raise SystemExit("native must not be served")
assert not torch.cuda.is_initialized()
"""
    env = {**os.environ, "FRODKERNELS_DISABLE_NATIVE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
