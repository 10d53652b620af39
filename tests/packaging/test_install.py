# SPDX-License-Identifier: Apache-2.0
"""The wheel in an environment that has torch and nothing else: no compiler, no CUDA, no Triton, no PEFT."""

import shutil

import pytest

USE = """
import shutil, sys
assert not any(map(shutil.which, ("cc", "c++", "gcc", "g++", "clang++", "cmake", "ninja", "nvcc")))
import torch
import frodkernels as fk
assert "site-packages" in fk.__file__, fk.__file__
for name in ("triton", "peft", "transformers"):
    assert name not in sys.modules
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{name} should not be here")
assert not torch.cuda.is_initialized()
"""

CALL = """
torch.manual_seed(0)
pattern = fk.SparsePattern(torch.tensor([0, 2, 2, 4]), torch.tensor([1, 0, 3, 4]), (5, 5))
z, lam, values = torch.randn(7, 5), torch.randn(5), torch.randn(4)
dense = torch.diag(lam)
dense[[0, 2, 2, 4], [1, 0, 3, 4]] += values
torch.testing.assert_close(fk.sparse_core(z, lam, values, pattern), z @ dense.T)
"""


def test_imports_and_runs_a_native_op(environment):
    environment.run(USE + "with fk.backend('native'):\n" + CALL.replace("\n", "\n    "))


def test_import_leaves_fork_usable(environment):
    """A process that imported us may fork: nothing has touched CUDA or started threads that a child would miss."""
    environment.run(
        USE + "import os\npid = os.fork()\nif pid == 0:\n    fk.backends(); os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0"
    )


@pytest.fixture(params=["missing", "broken"])
def spoiled(environment, request):
    """The same installation with its library missing, or not loadable."""
    library = environment.package / "_C.abi3.so"
    saved = library.with_suffix(".saved")
    shutil.move(library, saved)
    if request.param == "broken":
        library.write_bytes(b"not a library")
    yield request.param
    library.unlink(missing_ok=True)
    shutil.move(saved, library)


def test_works_without_a_usable_library(environment, spoiled):
    environment.run(USE + CALL + "assert not fk._native.load() and not fk._native.load()\nprint(fk.backends())")


def test_a_native_op_says_what_to_do_when_called(environment, spoiled):
    done = environment.run(USE + "with fk.backend('native'):\n" + CALL.replace("\n", "\n    "), check=False)
    assert done.returncode != 0
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: backend 'native' was asked for"), done.stdout
    assert "install" in last and str(environment.package) in last


def test_can_be_switched_off(environment):
    code = USE + "assert not fk._native.load()\nprint(fk._native.why_not())"
    assert "unset it" in environment.run(code, FRODKERNELS_DISABLE_NATIVE="1").stdout
    environment.run(USE + "assert fk._native.load() and fk._native.why_not() is None", FRODKERNELS_DISABLE_NATIVE="0")
