# SPDX-License-Identifier: Apache-2.0
"""``pytest bench --benchmark-only``: the same groups, reported by pytest-benchmark.

pytest-benchmark times one implementation after another; here a group is measured in interleaved rounds the first time
one of its tests runs, and each test then hands its own samples to the ``benchmark`` fixture.
"""

from __future__ import annotations

import functools

import pytest

from bench._interleave import OK, Group, Result, Settings, measure
from bench._machine import find_device
from bench._timing import make_clock
from bench.shapes import SIZES
from bench.suites import DTYPES, FAMILIES, Spec, specs


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("frodkernels benchmarks")
    group.addoption("--size", choices=sorted(SIZES), default="quick", help="which shapes (default: quick)")
    group.addoption("--dtypes", default="float32,bfloat16", help=f"comma-separated, of {', '.join(DTYPES)}")
    group.addoption("--bench-device", default="auto", help="auto, cpu or cuda")
    group.addoption("--seconds", type=float, default=2.0, help="of rounds per group")
    group.addoption("--cold", action="store_true", help="flush the processor's caches before every call")
    group.addoption("--with-compile", action="store_true", help="include torch.compile")


class Replay:
    """A timer for pytest-benchmark that steps through samples taken before: two readings per sample."""

    __name__ = "interleaved"
    __module__ = __name__

    def __init__(self) -> None:
        self._readings = iter(())

    def load(self, samples: list[float]) -> None:
        now = 0.0
        readings = []
        for sample in samples:
            readings += [now, now + sample]
            now += sample
        self._readings = iter(readings)

    def __call__(self) -> float:
        return next(self._readings)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "impl" not in metafunc.fixturenames:
        return
    options = metafunc.config.option
    parameters = []
    for spec in specs(options.size, options.dtypes.split(",")):
        for impl in FAMILIES[spec.op].implementations(spec.mode, options.with_compile):
            mark = pytest.mark.benchmark(group=spec.id, timer=Replay())
            parameters.append(pytest.param(spec, impl, id=f"{spec.id}/{impl}", marks=mark))
    metafunc.parametrize(("spec", "impl"), parameters)


@functools.lru_cache(maxsize=1)  # tests come in order of their groups
def _measured(spec: Spec, config: pytest.Config) -> tuple[Group, dict[str, Result]]:
    options = config.option
    device = find_device(options.bench_device)
    clock = make_clock(device, options.cold)
    group = spec.build(clock, device, compile=options.with_compile)
    settings = Settings(options.seconds, min_rounds=5)
    return group, {result.impl: result for result in measure(group, clock, settings)}


@pytest.fixture
def result(spec: Spec, impl: str, pytestconfig: pytest.Config) -> Result:
    """The interleaved measurement of one implementation: skipped where it cannot run, failed where it is wrong."""
    found = _measured(spec, pytestconfig)[1][impl]
    if found.status.startswith("unavailable"):
        pytest.skip(found.status)
    assert found.status == OK, found.status
    return found
