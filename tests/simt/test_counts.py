# SPDX-License-Identifier: Apache-2.0
"""The checker's counts on access patterns with known answers."""

import pytest
import torch

from tests.simt.planted import run

SIZES = [4, 8, 16]


def offsets(values):
    return torch.tensor(list(values), dtype=torch.int32)


def the_site(checker, space, write, size, kernel):
    """The one place where the kernel reads or writes by its pattern: found by the pattern's own size and space."""
    found = [s for s in checker.sites() if (s["space"], s["write"], s["bytes"]) == (space, write, size)]
    found = [s for s in found if s["kernel"].startswith(kernel)]
    assert found and all(s["file"] == "probes.cuh" and s["line"] > 0 for s in found)
    return found[0] if len(found) == 1 else max(found, key=lambda s: s["line"])


def global_load(checker, pattern, size=4, lanes=32):
    checker.reset()
    pattern = offsets(pattern)
    x = torch.zeros(int(pattern.max()) + size + 32, dtype=torch.uint8)
    skip = -x.data_ptr() % 32  # sectors begin at multiples of 32
    y = torch.empty(32 * size, dtype=torch.uint8)
    kernel_buffers = (x[skip:], "r"), (pattern, "r"), (y, "w")
    assert run(checker, "load_global", *kernel_buffers, sizes=[lanes, size]).clean
    loads = [s for s in checker.sites() if s["space"] == "global" and not s["write"]]
    return max(loads, key=lambda s: s["line"])  # the offsets are read on the line before


def shared_load(checker, pattern, size=4, lanes=32):
    checker.reset()
    pattern = offsets(pattern)
    bytes_ = (int(pattern.max()) + size + 127) // 128 * 128
    y = torch.empty(32 * size, dtype=torch.uint8)
    x = torch.zeros(bytes_, dtype=torch.uint8)
    buffers = (x, "r"), (pattern, "r"), (y, "w")
    assert run(checker, "load_shared", *buffers, sizes=[lanes, size, bytes_]).clean
    return the_site(checker, "shared", False, size, "load_shared")


# --- global memory: 32-byte sectors ----------------------------------------------------------------------------------
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lanes", [32, 7, 1])
def test_consecutive_elements(checker, size, lanes):
    s = global_load(checker, [size * i for i in range(32)], size, lanes)
    assert (s["requests"], s["lanes"], s["bytes"]) == (1, lanes, size)
    assert s["sectors"] == s["sectors_least"] == -(-lanes * size // 32)


@pytest.mark.parametrize("stride, sectors", [(1, 4), (2, 8), (3, 12), (8, 32), (32, 32)], ids=lambda v: str(v))
def test_strided_elements(checker, stride, sectors):
    s = global_load(checker, [4 * stride * i for i in range(32)])
    assert (s["sectors"], s["sectors_least"]) == (sectors, 4)


def test_shifted_row(checker):
    s = global_load(checker, [4 * i + 4 for i in range(32)])
    assert (s["sectors"], s["sectors_least"]) == (5, 4)


def test_one_address_for_all(checker):
    s = global_load(checker, [64] * 32)
    assert (s["sectors"], s["sectors_least"]) == (1, 1)


def test_order_of_lanes_costs_nothing(checker):
    s = global_load(checker, [4 * i for i in torch.randperm(32).tolist()])
    assert (s["sectors"], s["sectors_least"]) == (4, 4)


@pytest.mark.parametrize("stride, sectors", [(1, 16), (2, 32), (4, 32)])
def test_asynchronous_copies(checker, stride, sectors):
    x, y = torch.zeros(32 * 16 * stride + 32, dtype=torch.uint8), torch.empty(32)
    skip = -x.data_ptr() % 32
    assert run(checker, "copy_sixteens", (x[skip:], "r"), (y, "w"), sizes=[stride]).clean
    read = the_site(checker, "global", False, 16, "copy_sixteens")
    assert (read["requests"], read["sectors"], read["sectors_least"]) == (1, sectors, 16)
    write = the_site(checker, "shared", True, 16, "copy_sixteens")
    assert (write["requests"], write["wavefronts"], write["wavefronts_least"]) == (1, 4, 4)
    assert read["line"] == write["line"]  # the kernel's line that calls cp_async


# --- shared memory: wavefronts ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "stride, wavefronts", [(0, 1), (1, 1), (2, 2), (3, 1), (4, 4), (16, 16), (32, 32), (33, 1), (34, 2)]
)
def test_columns_of_words(checker, stride, wavefronts):
    """Stride in words: 32 is a column of a [32][32] tile, 33 of a padded one, 0 a broadcast."""
    s = shared_load(checker, [4 * stride * i for i in range(32)])
    assert (s["requests"], s["wavefronts"], s["wavefronts_least"]) == (1, wavefronts, 1)


@pytest.mark.parametrize("lanes, wavefronts", [(32, 32), (10, 10), (1, 1)])
def test_partly_active_warp(checker, lanes, wavefronts):
    s = shared_load(checker, [128 * i for i in range(32)], lanes=lanes)
    assert (s["lanes"], s["wavefronts"], s["wavefronts_least"]) == (lanes, wavefronts, 1)


@pytest.mark.parametrize("size, lanes, least", [(8, 32, 2), (8, 16, 1), (8, 3, 1), (16, 32, 4), (16, 9, 2), (16, 8, 1)])
def test_wide_rows_without_conflict(checker, size, lanes, least):
    s = shared_load(checker, [size * i for i in range(32)], size, lanes)
    assert (s["wavefronts"], s["wavefronts_least"]) == (least, least)


@pytest.mark.parametrize(
    "size, stride, wavefronts", [(8, 128, 32), (8, 16, 4), (16, 128, 32), (16, 32, 8), (16, 144, 4)]
)
def test_wide_rows_with_conflicts(checker, size, stride, wavefronts):
    """Half warps (8 bytes) and quarters (16 bytes) alone: 16 lanes 16 bytes apart share banks in twos."""
    s = shared_load(checker, [stride * i for i in range(32)], size)
    assert (s["wavefronts"], s["wavefronts_least"]) == (wavefronts, 32 * size // 128)


def test_wide_broadcast(checker):
    s = shared_load(checker, [0] * 32, 16)
    assert (s["wavefronts"], s["wavefronts_least"]) == (4, 4)


def test_shared_stores(checker):
    for stride, wavefronts in ((4, 1), (8, 2), (128, 32)):
        checker.reset()
        pattern, y = offsets(stride * i for i in range(32)), torch.empty(32)
        assert run(checker, "store_shared", (pattern, "r"), (y, "w"), sizes=[32, 4, 128 * 32]).clean
        s = the_site(checker, "shared", True, 4, "store_shared")
        assert (s["requests"], s["wavefronts"], s["wavefronts_least"]) == (1, wavefronts, 1)


@pytest.mark.parametrize(
    "pitch, wavefronts",
    [(16, 4), (128, 32), (144, 4), (32, 8), (64, 16), (80, 4)],
    ids=["dense", "8 rows in one bank group", "padded by 16", "every other", "every fourth", "40 halves"],
)
def test_ldmatrix_rows(checker, pitch, wavefronts):
    """x4: four matrices of 8 rows of 16 bytes; one wavefront each where the 8 rows meet all banks once."""
    pattern, y = offsets(pitch * i for i in range(32)), torch.empty(32, dtype=torch.int32)
    assert run(checker, "load_rows", (pattern, "r"), (y, "w"), sizes=[128 * 36]).clean
    s = the_site(checker, "shared", False, 16, "load_rows")
    assert (s["requests"], s["lanes"], s["wavefronts"], s["wavefronts_least"]) == (1, 32, wavefronts, 4)


# --- attribution -----------------------------------------------------------------------------------------------------
def lines_with(text):
    from tests.simt.executor import ROOT

    source = (ROOT / "csrc" / "simt" / "planted" / "probes.cuh").read_text().splitlines()
    return [number for number, line in enumerate(source, 1) if text in line]


def test_sites_are_the_kernels_own_lines(checker):
    assert [global_load(checker, [0] * 32)["line"]] == lines_with("counted: global loads")
    assert [shared_load(checker, [0] * 32)["line"]] == lines_with("counted: shared loads")
    checker.reset()
    run(checker, "load_rows", (offsets([0] * 32), "r"), (torch.empty(32), "w"), sizes=[128])
    assert [the_site(checker, "shared", False, 16, "load_rows")["line"]] == lines_with("counted: ldmatrix")
    checker.reset()
    run(checker, "copy_sixteens", (torch.zeros(512), "r"), (torch.empty(32), "w"), sizes=[1])
    assert [the_site(checker, "global", False, 16, "copy_sixteens")["line"]] == lines_with("counted: cp.async")


def test_counts_by_kernel(checker):
    x, y = torch.zeros(512), torch.empty(32)
    for _ in range(3):
        run(checker, "copy_sixteens", (x, "r"), (y, "w"), sizes=[1])
    run(checker, "multiply_ones", (torch.empty(64), "w"), sizes=[64])
    assert checker.launches() == {"copy_sixteens": 3, "multiply_ones<kBug>": 1}
    kernels = checker.kernels()
    assert kernels["copy_sixteens"]["cp_async"] == 96 and kernels["copy_sixteens"]["mma"] == 0
    assert kernels["multiply_ones<kBug>"]["mma"] == 2  # instructions, one a warp
    assert kernels["multiply_ones<kBug>"]["threads"] == 64
    assert checker.stats()["launches"] == 4
    assert {s["kernel"] for s in checker.sites()} == {"copy_sixteens", "multiply_ones<kBug>"}
    checker.reset()
    assert checker.sites() == [] and checker.launches() == {}


@pytest.mark.parametrize("collective, requests", [(1, 4), (0, 4)])
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_loops_of_uneven_length(checker, order, collective, requests):
    """Lane i makes i % 4 + 1 trips from the first on: the trips pair up by number, with or without a collective."""
    checker.configure(order=order)
    x, y = torch.zeros(128), torch.empty(32)
    assert run(checker, "uneven_trips", (x, "r"), (y, "w"), sizes=[collective]).clean
    s = the_site(checker, "global", False, 4, "uneven_trips")
    assert (s["requests"], s["lanes"]) == (requests, 32 + 24 + 16 + 8)
    assert [s["line"]] == lines_with("counted: uneven trips")
