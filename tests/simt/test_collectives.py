# SPDX-License-Identifier: Apache-2.0
"""Warp collectives, counting barriers and device functions against their definitions; the orders of execution."""

from functools import reduce

import pytest
import torch

from tests.simt.planted import run

ORDERS = [dict(order="forward"), dict(order="reverse"), dict(order="random", seed=3), dict(order="random", seed=4)]
U32 = 0xFFFFFFFF


def signed(v):
    return v - 2**32 if v >= 2**31 else v


def shuffled(v, source_of, width=32):
    """Lane i reads source_of(i % width) of its segment, or itself where that is outside."""
    out = []
    for i in range(32):
        source = source_of(i % width)
        out.append(v[i - i % width + source] if 0 <= source < width else v[i])
    return out


def mask_of(bits):
    return signed(sum(1 << i for i, bit in enumerate(bits) if bit))


def expected_collectives(v):
    u = [x & U32 for x in v]
    return [
        [v[i * 5 % 32] for i in range(32)],
        shuffled(v, lambda i: i - 3),
        shuffled(v, lambda i: i + 3),
        shuffled(v, lambda i: i ^ 9),
        [v[i - i % 8 + 3] for i in range(32)],
        shuffled(v, lambda i: i - 3, 8),
        shuffled(v, lambda i: i + 3, 8),
        # CUDA: a source in a segment above reads itself, one in a segment below is read
        [v[i ^ 9] if (i ^ 9) // 8 <= i // 8 else v[i] for i in range(32)],
        [mask_of([x > 0 for x in v])] * 32,
        [1] * 32,
        [int(all(x > 0 for x in v))] * 32,
        [mask_of([(y & 3) == (x & 3) for y in v]) for x in v],
        [signed(sum(u) & U32)] * 32,
        [min(v)] * 32,
        [max(v)] * 32,
        [signed(max(u))] * 32,
        [signed(reduce(lambda a, b: a & b, u))] * 32,
        [signed(reduce(lambda a, b: a | b, u))] * 32,
        [signed(reduce(lambda a, b: a ^ b, u))] * 32,
    ]


@pytest.mark.parametrize("schedule", ORDERS)
@pytest.mark.parametrize("low", [-(2**31), 1])
def test_collectives(plain, checker, schedule, low):
    x = torch.randint(low, 2**31 - 1, (32,), dtype=torch.int32)
    expected = torch.tensor(expected_collectives(x.tolist()), dtype=torch.int32).T
    for module in (plain, checker):
        module.configure(**schedule)
        y = torch.empty(32, 19, dtype=torch.int32)
        assert run(module, "collectives", (x, "r"), (y, "w")).clean
        assert torch.equal(y, expected)


@pytest.mark.parametrize("schedule", ORDERS)
@pytest.mark.parametrize("threads", [1, 33, 70, 256])
def test_counting_barriers(plain, schedule, threads):
    plain.configure(**schedule)
    for x in (torch.randint(-1, 2, (threads,)).int(), torch.ones(threads).int(), torch.zeros(threads).int()):
        y = torch.empty(threads, 3, dtype=torch.int32)
        assert run(plain, "counting_barriers", (x, "r"), (y, "w"), sizes=[threads]).clean
        positive = x > 0
        expected = torch.tensor([positive.sum(), positive.all(), positive.any()], dtype=torch.int32)
        assert torch.equal(y, expected.expand(threads, 3))
    assert plain.stats()["barriers"] == 9


@pytest.mark.parametrize("a, b", [(0x89ABCDEF, 0x01234567), (0, 0xFFFFFFFF), (1, 0x80000000), (0x7FC12345, 3)])
def test_bit_functions(plain, a, b):
    def permuted(selector):
        data = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
        out = []
        for i in range(4):
            pick = selector >> (4 * i) & 15
            byte = data[pick & 7]
            out.append((0xFF if byte & 0x80 else 0) if pick & 8 else byte)
        return int.from_bytes(bytes(out), "little")

    wide = b << 32 | a
    expected = [
        bin(a).count("1"),
        (a & -a).bit_length(),
        32 - a.bit_length(),
        int(f"{a:032b}"[::-1], 2),
        permuted(0x5410),
        permuted(0xF862),
        wide << 7 >> 32 & U32,
        wide >> 7 & U32,
        a * b >> 32,
        signed(a) * signed(b) >> 32 & U32,
        a,
        0x41200000,  # 10.0f
        min(signed(a), 3) & U32,
        1,  # one thread
    ]
    x = torch.tensor([signed(a), signed(b)], dtype=torch.int32)
    y = torch.empty(14, dtype=torch.int32)
    assert run(plain, "bit_functions", (x, "r"), (y, "w")).clean
    assert [v & U32 for v in y.tolist()] == expected


@pytest.mark.parametrize("dtype, kernel", [(torch.float16, "paired_half"), (torch.bfloat16, "paired_bfloat16")])
def test_paired_arithmetic(plain, dtype, kernel):
    x = torch.tensor([1.3, -2.7], dtype=dtype)
    y = torch.empty(6, dtype=dtype)
    assert run(plain, kernel, (x, "r"), (y, "w")).clean
    fused = (x.double() * x.double() + x.double()).to(dtype)  # one rounding
    assert torch.equal(y, torch.cat([fused, x + x, x + x * x]))


def test_seeds_give_different_orders_and_repeat(checker):
    """The order is seen through a race: who writes last."""

    def winner(**schedule):
        checker.configure(**schedule)
        y = torch.zeros(7, dtype=torch.int32)
        x = torch.arange(0, 997, dtype=torch.int32) % 7
        run(checker, "histogram", (x, "r"), (y, "rw"), sizes=[997, 7], bug=1)
        return tuple(y.tolist())

    random = {seed: winner(order="random", seed=seed, yield_permille=300) for seed in range(1, 6)}
    assert len(set(random.values())) > 1
    assert all(winner(order="random", seed=seed, yield_permille=300) == result for seed, result in random.items())


def test_yields_show_lost_updates(checker):
    """Without yields a thread runs to its next barrier, and += passes for an atomic; with them updates are lost."""
    x = torch.zeros(1000, dtype=torch.int32)
    results = {}
    for permille in (0, 300):
        checker.configure(yield_permille=permille)
        y = torch.zeros(1, dtype=torch.int32)
        run(checker, "histogram", (x, "r"), (y, "rw"), sizes=[1000, 1], bug=1)
        results[permille] = y.item()
    assert results[0] == 1000 and results[300] < 1000


def test_os_threads(plain):
    x = torch.randint(0, 50, (20000,), dtype=torch.int32)
    for threads in (1, 2, 5):
        plain.configure(threads=threads)
        y = torch.zeros(50, dtype=torch.int32)
        assert run(plain, "histogram", (x, "r"), (y, "rw"), sizes=[20000, 50]).clean
        assert torch.equal(y, torch.bincount(x, minlength=50).int())


def test_settings_that_make_no_sense(plain, checker):
    for bad in (dict(order="sideways"), dict(threads=0), dict(yield_permille=1001)):
        with pytest.raises(ValueError):
            plain.configure(**bad)
    with pytest.raises(ValueError, match="one OS thread"):
        checker.configure(threads=2)


@pytest.mark.parametrize("blocks", [1, 2, 7, 64, 97])
def test_every_block_runs_once_in_any_order(plain, blocks):
    """last_block: each block writes 1 to a place of its own, and the last to finish sums them."""
    for schedule in (*ORDERS, *(dict(order="random", seed=seed) for seed in range(5, 15))):
        plain.configure(**schedule)
        y, finished = torch.zeros(1 + blocks), torch.zeros(1, dtype=torch.int32)
        assert run(plain, "last_block", (y, "rw"), (finished, "rw"), sizes=[blocks]).clean
        assert y.tolist() == [blocks] + [1] * blocks and finished.item() == blocks
