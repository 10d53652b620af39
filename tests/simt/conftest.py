# SPDX-License-Identifier: Apache-2.0
"""The executor's modules as fixtures, fresh for each test; the ``kernel`` marker and its proof."""

import pytest

from tests.simt import coverage, executor


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "kernel(*names): this test runs these __global__ functions of csrc/cuda; it fails if it launches none",
    )


def fresh(module_of):
    try:
        module = module_of()
    except executor.NoToolkit as error:
        pytest.skip(str(error))
    module.configure()
    module.reset()
    return module


def module_fixture(name, module_of):
    """A module of the executor. What it reports must be looked at: an unread report fails the test."""

    @pytest.fixture(name=name)
    def module_for_one_test():
        module = fresh(module_of)
        yield module
        unread = module.reports()
        module.configure()
        module.reset()
        assert not unread, "\n".join(unread)

    return module_for_one_test


plain = module_fixture("plain", executor.plain)  # fast
checker = module_fixture("checker", executor.checker)  # checks and counts every access


@pytest.fixture(autouse=True)
def marked_kernels_are_launched(request):
    """A test marked for a kernel must launch it, in every module that it uses."""
    names = {name for mark in request.node.iter_markers("kernel") for name in mark.args}
    modules = {name: request.getfixturevalue(name) for name in ("plain", "checker") if name in request.fixturenames}
    before = {name: module.launches_ever() for name, module in modules.items()}
    yield
    if not names:
        return
    assert modules, "a test of a kernel needs the fixture `plain` or `checker`"
    for name, module in modules.items():
        missing = names - coverage.launched_between(before[name], module.launches_ever())
        assert not missing, f"marked for {sorted(missing)}, which the test did not launch in `{name}`"
