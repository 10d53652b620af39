# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel in the tree is run under the checker by a test.

A test says so by ``@pytest.mark.kernel("name")``, and conftest.py fails it if it did not launch the kernel in the
modules that it used. Here the marks are read off the tests that pytest really collects, not off their source.
"""

import pytest

from tests.simt import coverage
from tests.simt.executor import ROOT


class Recorder:
    """Keeps (marked kernels, fixtures, skipped) of each collected test."""

    def __init__(self):
        self.tests = []

    def pytest_collection_finish(self, session):
        for item in session.items:
            marked = {name for mark in item.iter_markers("kernel") for name in mark.args}
            skipped = any(
                item.iter_markers(name) for name in ("skip", "skipif", "xfail") if item.get_closest_marker(name)
            )
            self.tests.append((marked, set(item.fixturenames), skipped))


@pytest.fixture(scope="module")
def collected():
    recorder = Recorder()
    # No report of its own, hence none of the options about one.
    options = ["--collect-only", "-p", "no:terminal", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    options += ["-o", "addopts=--strict-markers --import-mode=importlib"]
    status = pytest.main([*options, str(ROOT / "tests" / "simt")], plugins=[recorder])
    assert status == 0, f"the tests of the executor cannot be collected: status {status}"
    return recorder.tests


def test_every_kernel_runs_under_the_checker(collected):
    kernels = coverage.kernels_of(ROOT / "csrc" / "cuda")
    assert kernels, "no kernels found: the search must be wrong"
    missing = coverage.uncovered(kernels, collected)
    assert not missing, f"kernels without a test under the checker (@pytest.mark.kernel): {missing}"


def test_marks_name_kernels_that_exist(collected):
    marked = {name for names, _, _ in collected for name in names}
    assert marked <= set(coverage.kernels_of(ROOT / "csrc" / "cuda"))


def test_kernels_are_found_in_all_their_spellings():
    source = """
    // __global__ void in_a_comment();
    __global__ void plain_one(float* x) {}
    template <int N>
    __global__ void __launch_bounds__(N * (2 + 1)) bounded(float* x) {}
    __global__ __launch_bounds__(256, 2) void bounded_first(int* x);
    template <class T> static __global__ inline void __launch_bounds__(64)
        wrapped(T x) {}
    """.replace("static __global__", "__global__")
    assert coverage.kernels_in(source) == {"plain_one", "bounded", "bounded_first", "wrapped"}
    with pytest.raises(ValueError, match="could be read"):
        coverage.kernels_in("__global__ auto odd(int) -> void;")


def test_a_kernel_without_a_checked_test_is_missed():
    kernels = {"a": "a.cuh", "b": "b.cuh", "c": "c.cuh", "d": "d.cuh"}
    tests = [
        ({"a"}, {"checker"}, False),
        ({"b"}, {"plain"}, False),
        ({"c"}, {"checker"}, True),
        (set(), {"checker"}, False),
    ]
    assert set(coverage.uncovered(kernels, tests)) == {"b", "c", "d"}


def test_a_launch_counts_only_while_the_test_runs():
    before = {"old<float>": 3, "again<T>": 1}
    after = {"old<float>": 3, "again<T>": 2, "ns::fresh<float, 4>": 1}
    assert coverage.launched_between(before, after) == {"again", "fresh"}
