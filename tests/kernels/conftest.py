# SPDX-License-Identifier: Apache-2.0
"""The figures that ``python -m bench.kernels`` prints, made once."""

import json

import pytest

from bench.kernels import __main__ as command
from tests.simt import executor


@pytest.fixture(scope="session")
def toolkit():
    """Counts need the executor, and that the CUDA toolkit's headers."""
    try:
        executor.checker()
    except executor.NoToolkit as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def figures(toolkit, tmp_path_factory):
    """What the command prints when it is given no options."""
    path = tmp_path_factory.mktemp("kernels") / "figures.json"
    assert command.main(["--output", str(path)]) == 0
    return json.loads(path.read_text())
