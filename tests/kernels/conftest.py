# SPDX-License-Identifier: Apache-2.0
"""The figures that ``python -m bench.kernels`` prints, made once."""

import json

import pytest

from bench.kernels import __main__ as command
from bench.kernels import static
from frodkernels import _native, _ops
from tests.simt import executor


@pytest.fixture(scope="session")
def library():
    """The built library's kernels."""
    assert _native.load(), _native.why_not()
    if "cuda=none" in _ops.native("build_info")():
        pytest.skip("the library was built where there is no CUDA toolkit")
    return static.library()


@pytest.fixture(scope="session")
def toolkit(library):
    """Counts need the executor, and that the CUDA toolkit's headers."""
    executor.checker()


@pytest.fixture(scope="session")
def figures(toolkit, tmp_path_factory):
    """What the command prints for one architecture."""
    path = tmp_path_factory.mktemp("kernels") / "figures.json"
    assert command.main(["--arch", "80", "--output", str(path)]) == 0
    return json.loads(path.read_text())
