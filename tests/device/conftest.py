# SPDX-License-Identifier: Apache-2.0
import os

import pytest
import torch

import frodkernels as fk
from tests.device.places import OPS, kinds, make_place
from tests.device.ways import WAYS, force
from tests.support import names

BACKENDS = ("native", "triton", "reference")


def pytest_generate_tests(metafunc):
    """``place``: the CPU and CUDA. With ``backend``: each with every backend that is meant for it. With ``way``: every
    way of the native backend, and ``dtype`` and ``param_dtype``, where asked for, those that it serves."""
    if "place" not in metafunc.fixturenames:
        return
    if "way" in metafunc.fixturenames:
        given = ["way", *(name for name in ("dtype", "param_dtype") if name in metafunc.fixturenames)]
        sets = list(dict.fromkeys(one[: len(given)] for one in WAYS))
        ids = ["-".join([way, names(*dtypes)]).rstrip("-") for way, *dtypes in sets]
        metafunc.parametrize(given, sets, indirect=["way"], ids=ids)
    if "backend" not in metafunc.fixturenames:
        metafunc.parametrize("place", kinds(), indirect=True)
        return
    pairs = []
    for kind in kinds():
        if kind == "cpu":
            pairs += [("cpu", "native"), ("cpu", "reference")]
            if os.environ.get("TRITON_INTERPRET") == "1":  # asked for by hand; bfloat16 is wrong there
                pairs.append(("cpu", "triton"))
        else:
            pairs += [("cuda", name) for name in BACKENDS]
    metafunc.parametrize("place, backend", pairs, indirect=True, ids=["-".join(pair) for pair in pairs])


@pytest.fixture
def place(request):
    """A test runs once per place: the CPU and, where there is one, a CUDA device."""
    return make_place(request.param)


@pytest.fixture
def backend(request, place):
    """The backend that is forced in the test; skipped where it does not serve the module's ``OPS`` in the place."""
    reason = place.has(request.param, getattr(request.module, "OPS", OPS))
    if reason is not None:
        pytest.skip(reason)
    with fk.backend(request.param):
        yield request.param


@pytest.fixture
def way(request, place, monkeypatch):
    """The way of the native backend that is forced in the test."""
    reason = place.has("native")
    if reason is not None:
        pytest.skip(reason)
    way = force(request.param, place, monkeypatch)
    with fk.backend("native"):
        yield way


@pytest.fixture(autouse=True)
def clean_device():
    """A test that leaves the device broken fails itself, and not the one after it."""
    yield
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
