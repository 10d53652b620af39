# SPDX-License-Identifier: Apache-2.0
"""What a driver would refuse, the executor refuses; shared memory beyond 48 KiB must have been asked for."""

import pytest
import torch

from tests.simt.planted import run

KIB = 1024


def fill(module, launched, allowed=0):
    y = torch.empty(1)
    outcome = run(module, "fill_shared", (y, "w"), sizes=[launched, allowed])
    return outcome.error or (None if y.item() == 1 and not outcome.reports else "wrong")


@pytest.mark.parametrize(
    "shape, accepted",
    [
        ((1, 1, 1, 1024, 1, 1), True),
        ((1, 1, 1, 1, 1, 64), True),
        ((3, 65535, 1, 1, 1, 1), True),
        ((1, 1, 1, 1025, 1, 1), False),
        ((1, 1, 1, 512, 4, 1), False),
        ((1, 1, 1, 1, 1, 65), False),
        ((1, 1, 1, 0, 1, 1), False),
        ((0, 1, 1, 1, 1, 1), False),
        ((1, 65536, 1, 1, 1, 1), False),
        ((1, 1, 65536, 1, 1, 1), False),
    ],
)
def test_grid_and_block(plain, shape, accepted):
    if accepted:
        plain.planted("launch_limits", [], list(shape))
    else:
        with pytest.raises(RuntimeError, match="invalid (grid|block)"):
            plain.planted("launch_limits", [], list(shape))
    assert plain.launches() == ({"copy<0>": 1} if accepted else {})


def test_shared_memory_must_be_asked_for(plain, checker):
    for module in (plain, checker):
        assert fill(module, 48 * KIB) is None
    # Allowances stay with the kernel, as on a device; so the refusal is tried first, in a fresh module where possible.
    assert fill(plain, 64 * KIB, allowed=64 * KIB) is None
    assert fill(plain, 64 * KIB) is None
    assert "gpu::allow_shared permits 65536" in fill(plain, 64 * KIB + 4)
    assert "gpu::allow_shared permits 50000" in fill(plain, 64 * KIB, allowed=50000)


def test_shared_memory_without_asking_is_refused(plain):
    with pytest.raises(RuntimeError, match="98304 bytes of dynamic shared memory .* permits 49152"):
        plain.planted("histogram", [0, 0], [1, 24 * KIB], 0)


def test_shared_memory_the_device_does_not_have(plain):
    assert "a block of this device has 166912" in fill(plain, 0, allowed=166916)
    assert fill(plain, 163 * KIB, allowed=163 * KIB) is None
    plain.configure(shared_per_block=101376)  # sm_86, sm_89, sm_120
    assert "a block of this device has 101376" in fill(plain, 0, allowed=163 * KIB)
    assert "this device has 101376" in fill(plain, 163 * KIB)
    assert fill(plain, 99 * KIB, allowed=99 * KIB) is None


def test_static_shared_memory(plain):
    assert run(plain, "too_many_statics", (torch.empty(64), "w")).says("65536 bytes of static variables")


def test_overrun_of_dynamic_shared_memory(checker):
    """`histogram` with more bins than its launch has room for."""
    x, y = torch.full((10,), 8, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    outcome = run(checker, "histogram", (x, "r"), (y, "rw"), sizes=[10, 8])
    assert outcome.says(
        "out of bounds: write of 4 bytes ending 4 bytes past the end of dynamic shared memory (32 bytes)"
    )


def test_sampled_blocks(plain, checker):
    """Every third block of `copy` runs, in any order; what it counts is of those."""
    x = torch.randn(64 * 10)
    for module, order in ((plain, "forward"), (plain, "random"), (checker, "reverse")):
        module.reset()
        module.configure(order=order, sample={"copy": 3})
        y = torch.zeros(64 * 10)
        assert run(module, "copy", (x, "r"), (y, "rw"), sizes=[639]).clean  # 10 blocks
        ran = torch.arange(640).div(64, rounding_mode="floor") % 3 == 0
        ran[639] = False
        assert torch.equal(y, torch.where(ran, x, 0))
        assert module.kernels()["copy<kBug>"]["blocks"] == 4
