# SPDX-License-Identifier: Apache-2.0
"""Where the device tests run.

The same bodies run on the CPU, where the CUDA-only machinery has plain stand-ins: so they are exercised everywhere. The
"cuda" half is made where there is a device.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from frodkernels import _backends
from tests.frod.cases import Layer
from tests.support import Case

VARIABLE = "FRODKERNELS_TEST_DEVICE"  # "cuda": the CPU half is left out and a missing device is a failure
WANTED = os.environ.get(VARIABLE, "")
OPS = ("sparse_core", "sparse_core_backward")
HOUSEHOLDER_OPS = ("householder", "householder_backward", "householder_gradient")


class _NewMemory(TorchDispatchMode):
    """The bytes of every tensor that is new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        held = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in held:
                self.bytes.append(t.untyped_storage().nbytes())
        return out


class Place:
    """The CPU: streams and graphs are the plain call."""

    compiler = "aot_eager"  # the tracing is what matters there; on a GPU Inductor's kernels run too
    tokens = 33  # of the tests that have one size

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    @property
    def type(self) -> str:
        return self.device.type

    def __repr__(self) -> str:
        return str(self.device)

    def has(self, backend: str, ops: Sequence[str] = OPS) -> str | None:
        """Why ``backend`` does not serve ``ops`` here; None where it does."""
        return next(filter(None, (_backends.unavailable(op, self.type, backend) for op in ops)), None)

    def others(self) -> list[torch.device]:
        """Further devices of the kind."""
        return [self.device]

    def wait(self) -> None:
        pass

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        """Work inside goes to another stream than the default one."""
        yield

    def delay(self) -> None:
        """Keep the current stream busy, so that whoever does not wait for it is seen."""

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Waiting for the device inside is an error."""
        yield

    def capture(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        """(replay, outputs): ``replay`` does what ``run`` did, on what its inputs hold then, into ``outputs``."""
        outputs = tuple(t.clone() for t in run())

        def replay() -> None:
            for kept, new in zip(outputs, run(), strict=True):
                kept.copy_(new)

        return replay, outputs

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """The largest piece of memory that ``run`` takes (on a GPU: all it holds at its peak)."""
        with _NewMemory() as recorder:
            run()
        return max(recorder.bytes)


class Cuda(Place):
    compiler = "inductor"
    tokens = 1000

    def others(self) -> list[torch.device]:
        return [torch.device("cuda", k) for k in range(torch.cuda.device_count()) if k != torch.cuda.current_device()]

    def wait(self) -> None:
        torch.cuda.synchronize()

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)

    def delay(self) -> None:
        torch.cuda._sleep(20_000_000)  # about 10 ms

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def capture(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        return graph.replay, outputs

    @contextlib.contextmanager
    def kernels(self) -> Iterator[set[str]]:
        """The names of the kernels that the device ran inside, filled in at the end."""
        from torch.profiler import ProfilerActivity, profile

        names: set[str] = set()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            yield names
            torch.cuda.synchronize()
        names.update(event.name for event in profiler.events() if event.device_type.name == "CUDA")

    def peak_bytes(self, run: Callable[[], object]) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def make_place(kind: str) -> Place:
    """The place of a test's parameter; fails where CUDA was asked for and there is no device."""
    if kind == "cpu":
        return Place("cpu")
    if not torch.cuda.is_available():
        pytest.fail(f"{VARIABLE}=cuda, but torch {torch.__version__} finds no CUDA device")
    return Cuda("cuda")


def kinds() -> list[str]:
    """The places that a test is made for: the CPU, and CUDA where there is a device or one was asked for."""
    if WANTED == "cuda":
        return ["cuda"]
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def case_on(case: Case, device: torch.device) -> Case:
    """The same numbers on ``device``. Exact answers come from the original: they are computed on the CPU."""
    lam = None if case.lam is None else case.lam.to(device)
    u, z = case.u.to(device), case.z.to(device)  # strides are kept where memory is dense
    return Case(u, z, lam, case.values.to(device), case.rows.to(device), case.cols.to(device), case.pattern.to(device))


def layer_on(layer: Layer, device: torch.device) -> Layer:
    """The same FRoD layer on ``device``."""
    moved = {name: None if t is None else t.detach().to(device) for name, t in vars(layer).items() if name != "pattern"}
    return Layer(**moved, pattern=layer.pattern.to(device))
