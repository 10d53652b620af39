# SPDX-License-Identifier: Apache-2.0
"""What every test gets: poisoned fresh memory, one thread, a fixed seed, repeatable hypothesis examples."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """``torch.empty`` and its kin hand out NaN (integers: the largest), to Python and to C++ alike.

    An element that a kernel forgets to write then shows as NaN instead of as whatever the allocator had left there.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    """Small tensors on few cores: one thread is fastest. Tests of thread counts set their own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request, monkeypatch):
    """Each instruction set of the native CPU kernels in turn."""
    from frodkernels import _native

    assert _native.load(), _native.why_not()  # `make test` builds it: its absence is a failure, not a reason to skip
    monkeypatch.setenv("FRODKERNELS_CPU_ISA", request.param)
    try:
        assert torch.ops.frodkernels.native_cpu_isa() == request.param
    except RuntimeError as error:
        pytest.skip(str(error))
    return request.param
