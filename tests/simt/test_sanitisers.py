# SPDX-License-Identifier: Apache-2.0
"""AddressSanitizer and UBSan on kernels, in a process of their own."""

import pytest

from tests.simt import executor

# x has n floats, k two ints. Their memory comes from the allocator that the sanitiser watches.
SCRIPT = """
n = 40
x, k = torch.ones(n), torch.tensor([2**31 - 1, 1], dtype=torch.int32)
simt.planted("unsanitary", [x.data_ptr(), k.data_ptr()], [n], {bug})
print("came through", x[0].item())
"""
RIGHT = """
x, y = torch.randn(192), torch.empty(192)
for order in ("forward", "reverse", "random"):
    simt.configure(order=order)
    simt.planted("reverse_copies", [x.data_ptr(), y.data_ptr()], [3], 0)
    assert torch.equal(y, x.view(-1, 64).flip(1).reshape(-1))
for bug in (1, 2):  # the executor's own faults leave fibers behind; the sanitiser must not stumble over them
    try:
        simt.planted("barriers", [y.data_ptr()], [], bug)
    except RuntimeError:
        simt.planted("barriers", [y.data_ptr()], [], 0)
print("came through", torch.ops.simt_asan.native_sparse_core)
"""


@pytest.fixture(scope="module")
def ends():
    scripts = {bug: SCRIPT.format(bug=bug) for bug in range(5)} | {"right": RIGHT, "raises": "raise ValueError('no')"}
    try:
        return dict(zip(scripts, executor.under_asan(list(scripts.values())), strict=True))
    except executor.NoToolkit as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("which", [0, "right"])
def test_right_kernels_come_through(ends, which):
    assert ends[which].status == 0 and "came through" in ends[which].output, ends[which].output


@pytest.mark.parametrize(
    "bug, text",
    [
        (1, "heap-buffer-overflow"),
        (2, "use-after-poison"),  # the gap behind a shared variable
        (3, "signed integer overflow: 2147483647 + 1"),
        (4, "load of misaligned address"),
    ],
    ids=["heap overflow", "shared overflow", "signed overflow", "misaligned load"],
)
def test_planted_faults_are_caught(ends, bug, text):
    assert ends[bug].status != 0 and "came through" not in ends[bug].output
    assert text in ends[bug].output and "faults.cuh:" in ends[bug].output


def test_a_script_that_raises_is_no_success(ends):
    assert ends["raises"].status == 1 and "ValueError: no" in ends["raises"].output
