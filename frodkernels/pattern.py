# SPDX-License-Identifier: Apache-2.0
"""The fixed sparsity pattern of an adapter: checked once, compressed once, shared by every layer that uses it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from frodkernels import _native, _ops

INDEX_LIMIT = 2**31 - 1  # plans hold 32-bit offsets
_NARROW = 2**16  # dimensions up to this many entries are indexed with 16 bits
_EAGER = 2**24  # patterns up to this size are compressed when they are made, larger ones at first use
# What tiles can hold (csrc/tiles/tiles.h): 16-bit features with one number for "none", 12-bit positions.
_TILED_COLUMNS = 2**16 - 1
_TILED_BLOCK, _BLOCK_UNIT = 4096, 128
_TILED_CELLS = 2**24  # groups x feature blocks: bounds what an empty pattern of absurd dimensions costs


class Compressed(NamedTuple):
    """One compressed view of a pattern (CSR or CSC).

    indptr  [groups + 1] int32: the slots of group ``g`` are ``indptr[g] .. indptr[g + 1] - 1``
    indices [nnz] uint16 or int32: the other coordinate of each slot, ascending within a group
    perm    [nnz] int32: where the slot's value stands in the caller's COO order
    """

    indptr: Tensor
    indices: Tensor
    perm: Tensor


Tiles = tuple[Tensor, ...]


class _TileStore:
    """The tiles of one pattern, shared by its copies on all devices: built once, moved once to each device."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[tuple[bool, int], dict[torch.device, Tiles]] = {}
        self.last: dict[tuple[bool, torch.device], Tiles] = {}

    def get(self, pattern: SparsePattern, transpose: bool, block: int) -> Tiles:
        made = self._made.get((transpose, block), {}).get(pattern.device)
        if made is not None:
            return made
        with self._lock, torch.inference_mode(False):  # they outlive any inference_mode block they are first used in
            copies = self._made.setdefault((transpose, block), {})
            if pattern.device not in copies:  # no other thread has made them meanwhile
                made = next(iter(copies.values()), None)
                if made is None:
                    made = _build_tiles(pattern.to("cpu"), transpose, block)
                copies[pattern.device] = tuple(t.to(pattern.device) for t in made)
            self.last[transpose, pattern.device] = copies[pattern.device]
            return copies[pattern.device]


def _build_tiles(pattern: SparsePattern, transpose: bool, block: int) -> Tiles:
    rows, columns = reversed(pattern.shape) if transpose else pattern.shape
    cells = -(-rows // 8) * -(-columns // block)
    if columns > _TILED_COLUMNS or cells > _TILED_CELLS or pattern.nnz + rows > INDEX_LIMIT or not _native.load():
        return ()
    view = pattern.csc if transpose else pattern.csr
    return tuple(_ops.native("tiles")(*view, columns, rows == columns, block))


def _check_shape(shape: Sequence[int]) -> tuple[int, int]:
    if isinstance(shape, Tensor):
        if shape.is_meta:
            raise ValueError("shape is a meta tensor: a pattern needs its data")
        shape = shape.tolist()
    try:
        sizes = tuple(shape)
    except TypeError:
        raise ValueError(f"shape must be a pair of sizes (m, n), got {shape!r}") from None
    if len(sizes) != 2 or not all(isinstance(s, int) and not isinstance(s, bool) for s in sizes):
        raise ValueError(f"shape must be a pair of integers (m, n), got {shape!r}")
    for axis, size in zip("mn", sizes, strict=True):
        if size < 0:
            raise ValueError(f"shape: {axis} = {size} is negative")
        if size > INDEX_LIMIT:
            raise ValueError(f"shape: {axis} = {size} exceeds the largest pattern dimension, 2^31 - 1")
    return sizes[0], sizes[1]


def _check_index(index: Tensor, name: str, size: int) -> Tensor:
    """``index`` as a private int64 copy, or a ValueError that names the first bad entry."""
    if not isinstance(index, Tensor):
        raise ValueError(f"{name} must be a 1-D integer tensor, got {type(index).__name__}")
    if index.is_nested:  # has no sizes to report
        raise ValueError(f"{name} must be a dense 1-D tensor, got a nested one")
    if index.dtype == torch.bool or index.is_floating_point() or index.is_complex() or index.is_quantized:
        raise ValueError(f"{name} must hold integers, got dtype {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"{name} must be 1-D, got shape {list(index.shape)}")
    if index.layout != torch.strided:
        raise ValueError(f"{name} must be a dense (strided) tensor, got {index.layout}")
    if index.is_meta:
        raise ValueError(f"{name} is a meta tensor: a pattern needs its data")
    if index.numel() > INDEX_LIMIT:
        raise ValueError(f"{name} has {index.numel()} entries; a pattern holds at most 2^31 - 1")
    unsigned = index.dtype == torch.uint64
    index = index.detach().to(torch.int64, copy=True)
    bad = (index < 0) | (index >= size)
    if bool(bad.any()):
        k = int(bad.nonzero()[0])
        value = int(index[k]) % 2**64 if unsigned else int(index[k])
        why = "negative" if value < 0 else f"out of range for size {size}"
        raise ValueError(f"{name}[{k}] = {value} is {why}")
    return index


def _sorted_keys(major: Tensor, minor: Tensor, n_minor: int) -> tuple[Tensor, int | None]:
    """The order that sorts entries by (major, minor), and the COO position of a duplicate, if there is one."""
    key, perm = torch.sort(major * max(n_minor, 1) + minor)  # < 2^62
    twin = (key[1:] == key[:-1]).nonzero()
    return perm, int(torch.maximum(perm[twin[0]], perm[twin[0] + 1])) if twin.numel() else None


def _compress(groups: Tensor, others: Tensor, n_groups: int, n_others: int) -> tuple[Compressed, int | None]:
    """Group the entries by ``groups``, ascending; also the COO position of a duplicate, if there is one."""
    perm, duplicate = _sorted_keys(groups, others, n_others)
    counts = torch.bincount(groups, minlength=n_groups)
    indptr = torch.zeros(n_groups + 1, dtype=torch.int32, device=groups.device)
    indptr[1:] = counts.cumsum(0)
    index_dtype = torch.uint16 if n_others <= _NARROW else torch.int32
    return Compressed(indptr, others[perm].to(index_dtype), perm.to(torch.int32)), duplicate


class SparsePattern:
    """Where the nonzeros of an ``m x n`` matrix stand. Immutable; make it once and share it between layers.

    Construction checks every entry and builds the two compressed views that the kernels walk (CSR for products with
    the matrix, CSC for products with its transpose and for gradients), so that no later call sorts, checks or copies
    an index. ``values`` given to any function stay in the caller's COO order.

    Args:
        rows, cols: [nnz] integer tensors on one device, any integer dtype. Copied.
        shape: ``(m, n)``, each at most 2^31 - 1.

    Raises:
        ValueError: not integers, unequal lengths, negative or out-of-range entries, duplicates, bad shape. The
            message names the argument and the entry.
    """

    __slots__ = ("_csc", "_csr", "_device", "_moved", "_nnz", "_pending", "_shape", "_tiles")

    _csr: Compressed | None
    _csc: Compressed | None

    def __init__(self, rows: Tensor, cols: Tensor, shape: Sequence[int]) -> None:
        m, n = _check_shape(shape)
        rows = _check_index(rows, "rows", m)
        cols = _check_index(cols, "cols", n)
        if rows.numel() != cols.numel():
            raise ValueError(f"rows and cols must have equal lengths, got {rows.numel()} and {cols.numel()}")
        if rows.device != cols.device:
            raise ValueError(f"rows and cols must be on one device, got {rows.device} and {cols.device}")
        self._shape = (m, n)
        self._nnz = rows.numel()
        self._device = rows.device
        self._moved: dict[torch.device, SparsePattern] = {}
        self._tiles = _TileStore()
        self._csr = self._csc = None
        self._pending: tuple[Tensor, Tensor] | None = (rows, cols)
        if max(m, n) <= _EAGER:
            self._plan()
        else:  # a huge, nearly empty pattern: no O(m + n) allocation before anything needs it
            _, duplicate = _sorted_keys(rows, cols, n)
            if duplicate is not None:
                self._raise_duplicate(duplicate)

    @classmethod
    def from_coo(cls, indices: Tensor, shape: Sequence[int]) -> SparsePattern:
        """From ``indices`` [2, nnz], rows first, as ``torch.sparse_coo_tensor`` and PEFT store them."""
        if not isinstance(indices, Tensor) or indices.dim() != 2 or indices.shape[0] != 2:
            got = list(indices.shape) if isinstance(indices, Tensor) else type(indices).__name__
            raise ValueError(f"indices must be a [2, nnz] integer tensor, got {got}")
        return cls(indices[0], indices[1], shape)

    def _raise_duplicate(self, k: int) -> None:
        rows, cols = self.coo()
        raise ValueError(f"rows, cols: entry {k} duplicates position ({int(rows[k])}, {int(cols[k])})")

    def _plan(self) -> None:
        pending = self._pending
        if pending is None:  # another thread has planned it since the caller looked
            return
        rows, cols = pending
        m, n = self._shape
        csr, duplicate = _compress(rows, cols, m, n)
        if duplicate is not None:
            self._raise_duplicate(duplicate)
        self._csc, _ = _compress(cols, rows, n, m)
        self._csr = csr
        self._pending = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return self._shape

    @property
    def nnz(self) -> int:
        """How many entries the pattern has."""
        return self._nnz

    @property
    def device(self) -> torch.device:
        """Where the compressed views are."""
        return self._device

    @property
    def density(self) -> float:
        """The fraction of the matrix that may be nonzero."""
        size = self._shape[0] * self._shape[1]
        return self.nnz / size if size else 0.0

    @property
    def csr(self) -> Compressed:
        """Grouped by row; ``indices`` are columns."""
        if self._csr is None:
            self._plan()
        assert self._csr is not None
        return self._csr

    @property
    def csc(self) -> Compressed:
        """Grouped by column; ``indices`` are rows."""
        if self._csc is None:
            self._plan()
        assert self._csc is not None
        return self._csc

    def coo(self) -> tuple[Tensor, Tensor]:
        """``(rows, cols)``, [nnz] int64 each, in the caller's order."""
        pending = self._pending
        if pending is not None:
            return pending[0].clone(), pending[1].clone()
        indptr, indices, perm = self.csr
        groups = torch.arange(self._shape[0], device=self.device)
        by_row = torch.repeat_interleave(groups, indptr.diff().to(torch.int64), output_size=self.nnz)
        order = perm.to(torch.int64)
        rows = torch.empty_like(by_row).scatter_(0, order, by_row)
        cols = torch.empty_like(by_row).scatter_(0, order, indices.to(torch.int64))
        return rows, cols

    def to(self, device: torch.device | str | int) -> SparsePattern:
        """The same pattern on ``device``. Made once per device and remembered, so every layer shares one copy."""
        if device == self.device:
            return self
        device = torch.empty(0, device=device).device  # "cuda" -> the current CUDA device, with its index
        if device == self.device:
            return self
        if device not in self._moved:
            other = object.__new__(SparsePattern)
            other._shape, other._nnz, other._device, other._pending = self._shape, self._nnz, device, None
            with torch.inference_mode(False):  # the copy outlives any inference_mode block it is first used in
                other._csr = Compressed(*(t.to(device) for t in self.csr))
                other._csc = Compressed(*(t.to(device) for t in self.csc))
            other._moved, other._tiles = self._moved, self._tiles
            self._moved[self.device] = self
            self._moved[device] = other
        return self._moved[device]

    def tiles(self, transpose: bool, block: int) -> tuple[Tensor, ...]:
        """The plan of the tensor-core kernels: one view cut into feature blocks and groups of 8 output rows.

        Built on the CPU when it is first asked for (about 2 us an entry), moved to this pattern's device, and
        remembered for the pattern on all devices. ``csrc/tiles/tiles.h`` describes the format.

        Args:
            transpose: of the CSC view (products with the transpose), not the CSR view. Square patterns include the
                diagonal, as entries nnz .. nnz + n - 1.
            block: features of a feature block, a multiple of 128 up to 4096.

        Returns:
            ``(row_order, feature_order, step_ptr, words, source, jobs, job_ptr)`` on this pattern's device; ``()``
            where the pattern is too large for the format (more than 65535 columns of the view, 2^24 cells, or
            2^31 - 1 entries with the diagonal) or the native library is not there.

        Raises:
            ValueError: a block that is no multiple of 128 up to 4096.
        """
        if not 0 < block <= _TILED_BLOCK or block % _BLOCK_UNIT:
            raise ValueError(f"block must be a multiple of {_BLOCK_UNIT} up to {_TILED_BLOCK}, got {block}")
        return self._tiles.get(self, bool(transpose), block)

    def ready_tiles(self, transpose: bool) -> tuple[Tensor, ...]:
        """What :meth:`tiles` returned last for this view and device, or ``()``. Builds nothing: it can be traced."""
        return self._tiles.last.get((transpose, self._device), ())

    def __deepcopy__(self, memo: dict) -> SparsePattern:
        return self  # immutable: copies of a model go on sharing it

    def __reduce__(self) -> tuple:
        return SparsePattern, (*self.coo(), self._shape)

    def __repr__(self) -> str:
        m, n = self._shape
        return f"SparsePattern({m} x {n}, nnz={self.nnz}, density={self.density:.4g}, device='{self.device}')"
