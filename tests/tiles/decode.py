# SPDX-License-Identifier: Apache-2.0
"""Reads tiles back as the kernel does (csrc/tiles/tiles.h has the format), checks their rules, counts their cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NO_FEATURE = 65535
ROWS, OCTETS, SLOTS, LANES, CLASSES = 8, 4, 8, 32, 8


def features_by_position(feature_order: Tensor) -> Tensor:
    """[blocks, block] int64: the feature at each position of the block, -1: none."""
    at = feature_order.to(torch.int64)
    return torch.where(at == NO_FEATURE, -1, at)


def by_step(words: Tensor, source: Tensor) -> Tensor:
    """[steps, 32]: the builder's 16-bit meta of each step, from the words that the kernels read (csrc/tiles/words.h).

    Raises AssertionError where two lanes disagree on a slot, or a unit is not where a feature begins.
    """
    assert words.shape == (source.shape[0], LANES) and words.dtype == torch.int32
    words = words.to(torch.int64) & 0xFFFFFFFF
    units = torch.stack([words & 0x3FFF, (words >> 14) & 0x3FFF])  # [2, steps, lanes]
    position = units // 4
    assert torch.equal(units, position * 4 + (position // 2) % 4)
    by_slot = position.reshape(2, -1, 2, 2, SLOTS)  # [half, steps, octet in the half, copy, slot]
    assert torch.equal(by_slot[:, :, :, 0], by_slot[:, :, :, 1])
    return by_slot[:, :, :, 0].permute(1, 0, 2, 3).reshape(-1, LANES) | (words >> 28) << 12


def cells_of_steps(step_ptr: Tensor) -> tuple[Tensor, Tensor]:
    """(block, group) of each step, [steps] int64 each."""
    blocks, groups = step_ptr.shape[0], step_ptr.shape[1] - 1
    counts = step_ptr.to(torch.int64).diff(dim=1).reshape(-1)
    cell = torch.repeat_interleave(torch.arange(blocks * groups), counts)
    return cell // max(groups, 1), cell % max(groups, 1)


def fragments(meta: Tensor, source: Tensor) -> Tensor:
    """[steps, octet, k, n] int64: what the lanes' B fragments hold of each step, -1 for a zero.

    Lane l = 4 n + q holds (k, n) for k = 2 q and 2 q + 1 of each octet: `lo` where the octet is its p1 and `hi` where
    it is its p2, else nothing.
    """
    steps = meta.shape[0]
    b = torch.full((steps, OCTETS, SLOTS, ROWS), -1, dtype=torch.int64)
    meta, source = meta.to(torch.int64), source.to(torch.int64)
    for lane in range(LANES):
        n, q = lane >> 2, lane & 3
        p1, p2 = (meta[:, lane] >> 12) & 3, (meta[:, lane] >> 14) & 3
        for octet in range(OCTETS):
            b[:, octet, 2 * q, n] = torch.where(p1 == octet, source[:, lane, 0], -1)
            b[:, octet, 2 * q + 1, n] = torch.where(p2 == octet, source[:, lane, 1], -1)
    return b


def decode(tiles: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(row, column, source) of every product that the kernel forms, in no particular order."""
    row_order, feature_order, step_ptr, meta, source = tiles[:5]
    meta = by_step(meta, source)
    block_of, group_of = cells_of_steps(step_ptr)
    gathered = features_by_position(feature_order)[block_of[:, None], meta.to(torch.int64) & 4095]  # [steps, 32]
    held = fragments(meta, source)
    step, octet, k, n = (held >= 0).nonzero(as_tuple=True)
    return row_order.to(torch.int64)[group_of[step], n], gathered[step, 8 * octet + k], held[step, octet, k, n]


@dataclass
class Cost:
    """What tiles cost. ``ideal`` wavefronts would gather every entry by itself with no bank conflict."""

    entries: int
    steps: int
    wavefronts: int

    @property
    def ideal(self) -> float:
        return self.entries / SLOTS

    @property
    def conflicts(self) -> float:
        """Wavefronts over ideal ones."""
        return self.wavefronts / self.ideal if self.entries else 1.0

    @property
    def padding(self) -> float:
        """Slots over entries."""
        return self.steps * LANES / self.entries if self.entries else 1.0


def wavefronts_of_steps(meta: Tensor) -> Tensor:
    """[steps] int64: an octet takes as many wavefronts as it has different positions in one bank class, at the most."""
    position = (meta.to(torch.int64) & 4095).reshape(-1, OCTETS, SLOTS).sort(dim=-1).values
    fresh = torch.ones_like(position, dtype=torch.bool)
    fresh[..., 1:] = position[..., 1:] != position[..., :-1]
    counts = torch.zeros(*position.shape[:2], CLASSES, dtype=torch.int64)
    counts.scatter_add_(2, position & 7, fresh.to(torch.int64))
    return counts.amax(-1).sum(-1)


def tiles_cost(tiles: tuple[Tensor, ...]) -> Cost:
    """Steps and shared-memory wavefronts (per 8 tokens), counted from the tensors."""
    meta, source = by_step(*tiles[3:5]), tiles[4]
    return Cost(int((source >= 0).sum()), meta.shape[0], int(wavefronts_of_steps(meta).sum()))


def check_tiles(tiles: tuple[Tensor, ...], view: tuple[Tensor, ...], columns: int, diagonal: bool, block: int) -> None:
    """Every rule of the format, and that the tiles hold each entry (and diagonal entry) once and nothing else."""
    indptr, indices, perm = (t.to(torch.int64) for t in view)
    rows, nnz = indptr.numel() - 1, indices.numel()
    row_order, feature_order, step_ptr, meta, source = tiles[:5]
    meta = by_step(meta, source)
    groups, blocks = -(-rows // ROWS), -(-columns // block)
    steps = meta.shape[0]
    assert [t.dtype for t in tiles[:5]] == [torch.int32, torch.uint16, torch.int32, torch.int32, torch.int32]
    assert row_order.shape == (groups, ROWS) and feature_order.shape == (blocks, block)
    assert step_ptr.shape == (blocks, groups + 1) and meta.shape == (steps, LANES)
    assert source.shape == (steps, LANES, 2)
    assert all(t.is_contiguous() for t in tiles)

    flat = row_order.reshape(-1).to(torch.int64)
    assert torch.equal(flat[flat >= 0].sort().values, torch.arange(rows)) and (flat >= -1).all()

    at = features_by_position(feature_order)
    assert torch.equal(at[at >= 0].sort().values, torch.arange(columns))
    per_block = -(-columns // blocks) if blocks else 1
    assert torch.equal(at.clamp_min(0) // per_block * (at >= 0), torch.arange(blocks)[:, None] * (at >= 0))

    pointers = step_ptr.to(torch.int64)
    assert (pointers.diff(dim=1) >= 0).all()
    if blocks:
        assert pointers[0, 0] == 0 and pointers[-1, -1] == steps
        assert torch.equal(pointers[1:, 0], pointers[:-1, -1])
    else:
        assert steps == 0

    check_steps(tiles, at)
    check_jobs(step_ptr, *tiles[5:])

    got = torch.stack(decode(tiles), 1)
    owner = torch.repeat_interleave(torch.arange(rows), indptr.diff())
    want = [torch.stack([owner, indices, perm], 1)]
    if diagonal:
        own = torch.arange(rows)
        want.append(torch.stack([own, own, nnz + own], 1))
    wanted = torch.cat(want)
    assert got.shape == wanted.shape, f"{got.shape[0]} entries, should be {wanted.shape[0]}"
    by_source = [t[t[:, 2].argsort()] for t in (got, wanted)]
    assert torch.equal(*by_source)


def check_steps(tiles: tuple[Tensor, ...], at: Tensor) -> None:
    """The rules inside steps; ``at`` [blocks, block] is the feature at each position."""
    feature_order, step_ptr, meta, source = tiles[1:5]
    meta = by_step(meta, source)
    block_of, _ = cells_of_steps(step_ptr)
    wide = meta.to(torch.int64)
    position = wide & 4095
    assert (position < feature_order.shape[1]).all()
    assert (at[block_of[:, None], position] >= 0).all(), "a slot names a position without a feature"
    held = fragments(meta, source) >= 0
    assert (held.sum(1) <= 1).all(), "two octets hold an entry for one (k, row)"
    # Decoding must find each source once: a value that no octet takes, or that two take, would show here.
    assert int(held.sum()) == int((source >= 0).sum())
    assert (source >= -1).all()
    for shift, half in ((12, 0), (14, 1)):
        assert (((wide >> shift) & 3)[source[:, :, half] < 0] == 0).all(), "p1 or p2 of a lane without an entry"
    used = held.any(-1)  # [steps, octet, k]
    assert used.reshape(-1, LANES).any(1).all(), "a step without an entry"
    octets = position.reshape(-1, OCTETS, SLOTS)
    in_octet = ((octets[..., :, None] == octets[..., None, :]) & used[..., None, :]).any(-1)  # names a used position
    in_step = ((position[:, :, None] == position[:, None, :]) & used.reshape(-1, 1, LANES)).any(-1)
    idle = ~used.any(-1)
    assert (in_octet | idle[..., None]).all(), "an unused slot names no used position of its octet"
    assert in_step.all(), "an unused octet names no used position of its step"
    assert torch.equal(octets[idle], octets[idle][:, :1].expand(-1, SLOTS)), "an unused octet names several positions"


def check_jobs(step_ptr: Tensor, jobs: Tensor, job_ptr: Tensor) -> None:
    """Each step is in one job of its cell, in order, and no job has more than 4 (csrc/tiles/jobs.h)."""
    first, count, group, block = jobs.to(torch.int64).unbind(1)
    assert jobs.dtype == job_ptr.dtype == torch.int32
    assert ((count >= 1) & (count <= 4)).all()
    assert torch.equal(first, torch.cat([torch.zeros(1, dtype=torch.int64), count.cumsum(0)])[:-1])
    block_of, group_of = cells_of_steps(step_ptr)
    assert torch.equal(block.repeat_interleave(count), block_of)
    assert torch.equal(group.repeat_interleave(count), group_of)
    assert torch.equal(block.bincount(minlength=step_ptr.shape[0]), job_ptr.to(torch.int64).diff())
    assert job_ptr[0] == 0
