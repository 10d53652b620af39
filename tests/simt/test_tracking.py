# SPDX-License-Identifier: Apache-2.0
"""What the checker makes of buffers: views of one storage, memory that is used again, bindings that observe."""

import torch

from tests.simt.planted import run, track


def copy(checker, x, y, n):
    return run(checker, "copy", (x, ""), (y, ""), sizes=[n], tracked=False)


def test_views_of_one_storage_are_known_together(checker):
    """Interleaved columns overlap in their spans; either alone would put the other out of bounds."""
    storage, y = torch.randn(150), torch.empty(150)
    track(checker, "left", storage[:100], "r")
    track(checker, "right", storage[50:], "r")
    track(checker, "y", y, "w")
    assert copy(checker, storage, y, 150).clean
    assert torch.equal(y, storage)


def test_memory_used_again_has_its_new_bounds(checker):
    storage, y = torch.randn(150), torch.empty(150)
    track(checker, "first", storage, "r")
    track(checker, "y", y, "w")
    assert copy(checker, storage, y, 150).clean
    track(checker, "second", storage[:100], "r")  # since a launch: not a view of the first, but its successor
    track(checker, "y", y, "w")
    assert copy(checker, storage, y, 101).says("out of bounds: read", "4 bytes past the end of second (400 bytes)")


def test_memory_used_again_is_uninitialised_again(checker):
    x, y, z = torch.randn(64), torch.empty(64), torch.empty(64)
    track(checker, "x", x, "r")
    track(checker, "y", y, "w")
    track(checker, "z", z, "w")
    assert copy(checker, x, y, 64).clean
    assert copy(checker, y, z, 64).clean
    track(checker, "y again", y, "w")
    assert copy(checker, y, z, 64).says("read of uninitialised memory: y again byte 0")


def test_an_output_beside_an_input(checker):
    """An output inside what was tracked as an input: what is left of the input is unknown, not silently writable."""
    storage = torch.randn(100)
    track(checker, "input", storage, "r")
    track(checker, "output", storage[50:], "w")
    assert copy(checker, storage, storage[50:], 50).says("out of bounds: read", "in no buffer")


def test_bindings_observe_their_tensors(checker):
    """Nothing is tracked by hand here: the binding tells the checker, strides and offsets included."""
    z, lam = torch.randn(40, 9).T[2:8], torch.randn(6)
    values = torch.randn(3)
    arguments = [torch.tensor(v, dtype=torch.int32) for v in ([0, 1, 1, 2, 2, 2, 3], [1, 4, 0], [2, 0, 1])]
    out = torch.ops.simt_check.native_sparse_core(z, lam, values, *arguments)
    dense = torch.diag(lam)
    dense[0, 1], dense[2, 4], dense[5, 0] = values[2], values[0], values[1]
    torch.testing.assert_close(out, dense @ z)
