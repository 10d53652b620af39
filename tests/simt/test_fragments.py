# SPDX-License-Identifier: Apache-2.0
"""mma, ldmatrix and cp.async against definitions written from the PTX ISA, all lanes, all elements."""

import numpy as np
import pytest
import torch

from tests.simt.planted import run

LANES = range(32)


def a_of(lane, i):
    """PTX ISA, m16n8k16 with 16-bit elements: (row, column) of element a_i of A [16, 16]."""
    group, member = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    column = member * 2 + (i & 1) if i < 4 else member * 2 + (i & 1) + 8
    return row, column


def b_of(lane, i):
    """(row, column) of element b_i of B [16, 8]."""
    group, member = lane >> 2, lane % 4
    return (member * 2 + (i & 1) if i < 2 else member * 2 + (i & 1) + 8), group


def c_of(lane, i):
    """(row, column) of element c_i of C and D [16, 8]."""
    group, member = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), member * 2 + (i & 1)


def fragments(matrix, place, count):
    """[32, count] of a matrix's elements as the lanes hold them."""
    return torch.stack([torch.stack([matrix[place(lane, i)] for i in range(count)]) for lane in LANES])


def as_pairs(fragment):
    """16-bit [32, k] -> int32 [32, k / 2]: the lower half-word first."""
    return fragment.contiguous().view(torch.int32)


@pytest.mark.parametrize("dtype, kernel", [(torch.float16, "mma_half"), (torch.bfloat16, "mma_bfloat16")])
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_mma(plain, checker, dtype, kernel, order):
    # Small whole numbers: every sum is exact, so any misplaced element shows.
    a, b = torch.randint(-8, 9, (16, 16)).to(dtype), torch.randint(-8, 9, (16, 8)).to(dtype)
    c = torch.randint(-99, 99, (16, 8)).float()
    for module in (plain, checker):
        module.configure(order=order)
        d = fragments(c, c_of, 4).contiguous()
        fa, fb = as_pairs(fragments(a, a_of, 8)), as_pairs(fragments(b, b_of, 4))
        assert run(module, kernel, (fa, "r"), (fb, "r"), (d, "rw")).clean
        assert torch.equal(d, fragments(a.float() @ b.float() + c, c_of, 4))
        assert module.stats()["mma"] == 1


@pytest.mark.parametrize("dtype, kernel", [(torch.float16, "mma_half"), (torch.bfloat16, "mma_bfloat16")])
def test_mma_one_element_at_a_time(plain, dtype, kernel):
    """Every (i, k, j): A = e_ik, B = e_kj gives D = e_ij. 16 k, with all i and j in two products each."""
    for k in range(16):
        a, b = torch.zeros(16, 16, dtype=dtype), torch.zeros(16, 8, dtype=dtype)
        a[:, k], b[k] = torch.arange(16).to(dtype), torch.arange(8).to(dtype)
        d = torch.zeros(32, 4)
        fa, fb = as_pairs(fragments(a, a_of, 8)), as_pairs(fragments(b, b_of, 4))
        assert run(plain, kernel, (fa, "r"), (fb, "r"), (d, "rw")).clean
        assert torch.equal(d, fragments(torch.outer(torch.arange(16.0), torch.arange(8.0)), c_of, 4))


def test_mma_special_values(plain):
    """Subnormal, large and infinite half values reach the product unharmed."""
    a, b = torch.zeros(16, 16, dtype=torch.float16), torch.zeros(16, 8, dtype=torch.float16)
    a[0, 0], a[1, 0], a[2, 0] = 2**-24, 65504, float("inf")
    b[0] = 1
    d = torch.zeros(32, 4)
    run(plain, "mma_half", (as_pairs(fragments(a, a_of, 8)), "r"), (as_pairs(fragments(b, b_of, 4)), "r"), (d, "rw"))
    expected = torch.zeros(16, 8)
    expected[0], expected[1], expected[2] = 2**-24, 65504, float("inf")
    assert torch.equal(d, fragments(expected, c_of, 4))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_ldmatrix(plain, checker, count, transposed, order):
    """PTX ISA: thread i gets of matrix j the elements (i / 4, 2 (i % 4)) and the next of the row; with .trans of the
    transposed matrix. Threads 8 j .. 8 j + 7 name the rows of matrix j."""
    words = torch.randint(-(2**31), 2**31, (32, 4), dtype=torch.int32)
    halves = words.view(torch.int16).view(4, 8, 8)
    if transposed:
        halves = halves.transpose(1, 2)
    expected = torch.stack([halves[:count, i // 4, 2 * (i % 4) : 2 * (i % 4) + 2].reshape(-1) for i in LANES])
    for module in (plain, checker):
        module.configure(order=order)
        got = torch.empty(32, count, dtype=torch.int32)
        kernel = "ldmatrix_trans" if transposed else "ldmatrix"
        assert run(module, kernel, (words, "r"), (got, "w"), sizes=[count]).clean
        assert torch.equal(got, expected.contiguous().view(torch.int32))
        assert module.stats()["ldmatrix"] == 1


def test_fragments_of_mma_and_ldmatrix_agree(plain):
    """ldmatrix.x4 of A's 8 x 8 blocks at (0, 0) (8, 0) (0, 8) (8, 8) is mma's A fragment; .trans of B's rows is B's."""
    a, b = torch.randn(16, 16).half(), torch.randn(16, 8).half()
    blocks = torch.cat([a[:8, :8], a[8:, :8], a[:8, 8:], a[8:, 8:]])
    got = torch.empty(32, 4, dtype=torch.int32)
    run(plain, "ldmatrix", (blocks.contiguous().view(torch.int32), "r"), (got, "w"), sizes=[4])
    assert torch.equal(got, as_pairs(fragments(a, a_of, 8)))
    rows = torch.zeros(32, 8, dtype=torch.float16)
    rows[:16] = b
    got = torch.empty(32, 2, dtype=torch.int32)
    run(plain, "ldmatrix_trans", (rows.view(torch.int32), "r"), (got, "w"), sizes=[2])
    assert torch.equal(got, as_pairs(fragments(b, b_of, 4)))


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("lazy", [True, False])
def test_copies_fill_with_zeros(plain, checker, size, lazy):
    x = torch.from_numpy(np.random.default_rng(0).integers(1, 256, (32, size), dtype=np.uint8))
    source = torch.arange(32, dtype=torch.int32) % (size // 2 + 1) * 2
    expected = torch.where(torch.arange(size) < source[:, None], x, 0).to(torch.uint8)
    for module in (plain, checker):
        module.configure(lazy_copies=lazy)
        y = torch.empty(32, size, dtype=torch.uint8)
        assert run(module, "copy_bytes", (x, "r"), (source, "r"), (y, "w"), sizes=[size]).clean
        assert torch.equal(y, expected)
        assert module.stats()["cp_async"] == 32


def test_copy_of_more_than_it_has(plain):
    x, y = torch.zeros(32, 4, dtype=torch.uint8), torch.empty(32, 4, dtype=torch.uint8)
    source = torch.full((32,), 5, dtype=torch.int32)
    assert run(plain, "copy_bytes", (x, "r"), (source, "r"), (y, "w"), sizes=[4]).says(
        "cp.async of 4 bytes", "source of 5"
    )
