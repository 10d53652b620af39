# SPDX-License-Identifier: Apache-2.0
"""Each class of fault is planted and must be caught; its right twin must pass in silence (simt/planted/faults.cuh)."""

import pytest
import torch

from tests.simt.planted import run

SCHEDULES = [dict(order="forward"), dict(order="reverse"), dict(order="random", seed=7), dict(yield_permille=200)]


def reversed_tiles(x):
    return x.view(-1, 64).flip(1).reshape(-1)


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype)


@pytest.fixture(params=SCHEDULES, ids=lambda s: "-".join(map(str, s.values())))
def scheduled(request, checker):
    checker.configure(**request.param)
    return checker


# --- races and barriers -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kernel", ["reverse_tiles", "reverse_copies"])
def test_right_twins_of_the_tile_kernels(scheduled, kernel):
    x, y = torch.randn(192), empty(192)
    assert run(scheduled, kernel, (x, "r"), (y, "w"), sizes=[3]).clean
    assert torch.equal(y, reversed_tiles(x))


@pytest.mark.parametrize("bug, pair", [(1, "write, read"), (2, "read, write")], ids=["after load", "before reuse"])
def test_dropped_syncthreads(scheduled, bug, pair):
    x, y = torch.randn(192), empty(192)
    outcome = run(scheduled, "reverse_tiles", (x, "r"), (y, "w"), sizes=[3], bug=bug)
    shared = [text for text in outcome.reports if "a shared variable" in text]
    assert any(text.startswith(f"race ({pair})") for text in shared) or any("uninitialised" in text for text in shared)
    assert all("faults.cuh:" in text for text in shared) and shared


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("bug", [1, 3], ids=["no wait", "waits for too few groups"])
def test_dropped_copy_wait(checker, bug, lazy):
    checker.configure(lazy_copies=lazy)
    x, y = torch.randn(192), empty(192)
    outcome = run(checker, "reverse_copies", (x, "r"), (y, "w"), sizes=[3], bug=bug)
    assert outcome.says("cp.async not waited for: a shared variable", "read by")
    assert torch.equal(y, reversed_tiles(x)) == (not lazy)  # late copies show in the result as well


def test_copy_into_a_buffer_still_read(checker):
    x, y = torch.randn(192), empty(192)
    assert run(checker, "reverse_copies", (x, "r"), (y, "w"), sizes=[3], bug=2).says("race (read, write)")


def test_store_to_where_a_copy_lands(checker):
    outcome = run(checker, "copy_rows", (torch.randn(128), "r"), (empty(32), "w"), bug=4)
    assert outcome.says("cp.async not waited for: a shared variable", "written by thread")


def test_copy_waited_for_but_not_shared_by_a_barrier(checker):
    x, y = torch.randn(192), empty(192)
    outcome = run(checker, "reverse_copies", (x, "r"), (y, "w"), sizes=[3], bug=4)
    assert outcome.says("race (write, read)") or outcome.says("cp.async not waited for")


def test_exit_with_a_copy_in_flight(checker):
    x = torch.randn(128)
    assert run(checker, "copy_rows", (x, "r"), (empty(32), "w")).clean
    outcome = run(checker, "copy_rows", (x, "r"), (empty(32), "w"), bug=1)
    assert outcome.says("cp.async not waited for: a thread exits")


def test_syncwarp_orders_a_warp(scheduled):
    x, y = torch.randn(64), empty(64)
    assert run(scheduled, "swap_neighbours", (x, "r"), (y, "w")).clean
    assert torch.equal(y, x.view(-1, 2).flip(1).reshape(-1))
    outcome = run(scheduled, "swap_neighbours", (x, "r"), (y, "w"), bug=1)
    assert outcome.says("race", "a shared variable") or outcome.says("uninitialised")


@pytest.mark.parametrize("bug, space", [(1, "dynamic shared memory"), (2, "p1")], ids=["shared", "global"])
def test_plain_add_for_an_atomic(scheduled, bug, space):
    x, n, bins = torch.randint(0, 7, (1000,), dtype=torch.int32), 1000, 7
    y = torch.zeros(bins, dtype=torch.int32)
    assert run(scheduled, "histogram", (x, "r"), (y, "rw"), sizes=[n, bins]).clean
    assert torch.equal(y, torch.bincount(x, minlength=bins).int())
    assert run(scheduled, "histogram", (x, "r"), (y.zero_(), "rw"), sizes=[n, bins], bug=bug).says("race", space)


def test_blocks_that_write_the_same_element(checker):
    x, y = torch.randn(200), empty(200)
    outcome = run(checker, "copy", (x, "r"), (y, "w"), sizes=[200], bug=5)
    assert outcome.says("race (write, write): p1 byte 0", "block 0", "block 1")


def test_last_block_pattern_is_reported(checker):
    """A limit, kept in view: legal on a device, but the checker knows no order between blocks."""
    y, finished = torch.zeros(5), torch.zeros(1, dtype=torch.int32)
    outcome = run(checker, "last_block", (y, "rw"), (finished, "rw"), sizes=[4])
    assert y[0] == 4 and outcome.error is None
    assert outcome.reports and all(text.startswith("race (write, read): p0") for text in outcome.reports)


# --- indices, bounds, alignment, initialisation -----------------------------------------------------------------------
def test_swapped_index(checker, plain):
    square, wide = torch.randn(20, 20), torch.randn(20, 30)
    for x in (square, wide):
        y = empty(*x.T.shape)
        assert run(checker, "transpose", (x, "r"), (y, "w"), sizes=x.shape).clean
        assert torch.equal(y, x.T)
    y = empty(20, 20)
    run(plain, "transpose", (square, "r"), (y, "w"), sizes=[20, 20], bug=1)
    assert not torch.equal(y, square.T)
    tall = torch.randn(30, 20)
    outcome = run(checker, "transpose", (tall, "r"), (empty(20, 30), "w"), sizes=[30, 20], bug=1)
    assert outcome.says("out of bounds: write of 4 bytes", "past the end of p1", "faults.cuh:")


@pytest.mark.parametrize("bug, kind", [(1, "read"), (2, "write")])
def test_one_element_past_the_end(checker, bug, kind):
    x, y = torch.randn(101), empty(101)
    memory = torch.zeros(102), torch.zeros(102)  # what lies behind is there, yet not the buffer's
    memory[0][:101] = x
    assert run(checker, "copy", (memory[0][:101], "r"), (memory[1][:101], "w"), sizes=[101]).clean
    assert torch.equal(memory[1][:101], x)
    outcome = run(checker, "copy", (memory[0][:101], "r"), (y, "w"), sizes=[101], bug=bug)
    assert outcome.error.startswith(
        f"out of bounds: {kind} of 4 bytes ending 4 bytes past the end of p{bug - 1} (404 bytes)"
    )


def test_an_untracked_buffer_is_out_of_bounds(checker):
    x, y = torch.randn(10), empty(10)
    assert run(checker, "copy", (x, "r"), (y, "w"), sizes=[10], tracked=False).says(
        "out of bounds: read", "in no buffer"
    )


def test_write_to_an_input(checker):
    outcome = run(checker, "copy", (torch.randn(10), "r"), (empty(10), "w"), sizes=[10], bug=3)
    assert outcome.says("write to an input: p0 byte", "faults.cuh:")


def test_uninitialised_shared_memory(scheduled):
    x, y = torch.randn(50), empty(1)
    assert run(scheduled, "edge_tile", (x, "r"), (y, "w"), sizes=[50]).clean
    assert torch.allclose(y, x.sum())
    outcome = run(scheduled, "edge_tile", (x, "r"), (y, "w"), sizes=[50], bug=1)
    assert outcome.says("read of uninitialised memory: a shared variable byte 200")
    assert y.isnan().all()  # poisoned memory shows in the result too


def test_uninitialised_shared_memory_in_a_later_block(plain):
    """Each block's shared memory is poisoned afresh: nothing survives from the block before."""
    y = empty(1)
    assert run(plain, "edge_tile", (torch.randn(64), "r"), (y, "w"), sizes=[64]).clean and not y.isnan().any()
    run(plain, "edge_tile", (torch.randn(50), "r"), (y, "w"), sizes=[50], bug=1)
    assert y.isnan().all()


def test_uninitialised_workspace_across_launches(checker):
    x, workspace, y = torch.randn(64), empty(64), empty(64)
    outcome = run(checker, "copy", (x, "r"), (workspace, "w"), sizes=[64], bug=4)
    assert outcome.clean
    checker.track(y.data_ptr(), y.nbytes, "y", writable=True, initialised=False)
    outcome = run(checker, "copy", (workspace, "r"), (y, "w"), sizes=[64], tracked=False)
    assert outcome.says("read of uninitialised memory: p1 byte 4")
    # and the right twin: written in one launch, read in the next
    assert run(checker, "copy", (x, "r"), (workspace, "w"), sizes=[64]).clean
    checker.track(y.data_ptr(), y.nbytes, "y", writable=True, initialised=False)
    assert run(checker, "copy", (workspace, "r"), (y, "w"), sizes=[64], tracked=False).clean


@pytest.mark.parametrize("bug, text", [(1, "read: 16 bytes"), (2, "read: 8 bytes"), (3, "write: 8 bytes")])
def test_misaligned_vector_access(checker, bug, text):
    x, y = torch.randn(40), empty(20)
    assert run(checker, "read_fours", (x, "r"), (y, "w"), sizes=[8]).clean
    assert torch.equal(y[:16].view(8, 2), x[:32].view(8, 4)[:, [0, 3]])
    assert run(checker, "read_fours", (x, "r"), (y, "w"), sizes=[8], bug=bug).says(f"misaligned {text}", "faults.cuh:")


@pytest.mark.parametrize("bug, text", [(2, "misaligned cp.async"), (3, "misaligned ldmatrix")])
def test_misaligned_instructions(plain, checker, bug, text):
    for module in (plain, checker):
        assert run(module, "copy_rows", (torch.randn(128), "r"), (empty(32), "w"), bug=bug).says(text, "faults.cuh:")


# --- barriers and collectives -----------------------------------------------------------------------------------------
def test_divergent_barriers(plain):
    assert run(plain, "barriers", (empty(64), "w")).clean
    assert run(plain, "barriers", (empty(64), "w"), bug=1).says("divergent barrier", "faults.cuh:")
    deadlock = run(plain, "barriers", (empty(64), "w"), bug=2)
    assert deadlock.says("deadlock", "__syncthreads at faults.cuh:", "a warp collective at faults.cuh:")
    assert run(plain, "barriers", (empty(64), "w"), bug=3).says("exit before a barrier: 32 threads")


@pytest.mark.parametrize(
    "bug, text",
    [
        (1, "divergent warp collective"),
        (2, "is not in the mask 0x0000ffff"),
        (3, "shuffle from an absent lane: lane 0 reads lane 16"),
        (4, "shuffle from an absent lane"),
        (5, "deadlock: 64 of 64 threads wait"),
    ],
    ids=["two shuffles", "caller outside the mask", "source outside the mask", "early exit", "two masks"],
)
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_misused_shuffles(plain, order, bug, text):
    plain.configure(order=order)
    y = empty(64)
    assert run(plain, "warp_sums", (y, "w")).clean
    assert (y == 32).all()
    assert run(plain, "warp_sums", (y, "w"), bug=bug).says(text)


def test_mma_needs_a_whole_warp(plain):
    y = empty(64)
    assert run(plain, "multiply_ones", (y, "w"), sizes=[64]).clean
    assert (y == 16).all()
    assert run(plain, "multiply_ones", (y, "w"), sizes=[48]).says("needs 32 lanes; only lanes 0x0000ffff are there")
    assert run(plain, "multiply_ones", (y, "w"), sizes=[32], bug=1).says("needs 32 lanes", "0xffffff7f")
    assert run(plain, "multiply_ones", (y, "w"), sizes=[32], bug=2).says("divergent warp collective")


def test_after_a_fault_the_next_launch_is_sound(plain):
    y = empty(64)
    for _ in range(3):
        assert run(plain, "barriers", (y, "w"), bug=2).error
        assert run(plain, "warp_sums", (y, "w"), bug=1).error
        assert run(plain, "barriers", (y, "w")).clean and (y == 1).all()
