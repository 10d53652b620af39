# SPDX-License-Identifier: Apache-2.0
"""Launch configurations, all in one table. Nothing is tuned at run time: a first step costs a compile, never a search.

A program of the sparse-core kernels owns BLOCK_R rows and BLOCK_T tokens and reads BLOCK_S slots of each row at a time.
The tiles follow from these rules:

* wide: every lane gathers 16 bytes in one load (fp32: in two), and one warp owns one row, so that the token sums of the
  backward are warp shuffles and rows of different lengths do not wait for each other;
* BLOCK_S loads in flight times the warps an SM holds cover the latency of L2 (about 40 KB an SM), while a short row
  wastes few masked slots;
* no configuration spills, not even where T is odd and every element has an address and a mask of its own
  (``tests/sparse_core/test_aot_triton.py``): tiles of several rows stay small for that.

A choice depends on shapes, dtypes and vendor only, so results repeat bit for bit and do not depend on strides.
"""

from typing import Any, NamedTuple


class TileConfig(NamedTuple):
    """Tile of one program: BLOCK_R rows x BLOCK_T tokens, BLOCK_S slots in flight."""

    block_r: int
    block_s: int
    block_t: int
    num_warps: int
    num_stages: int

    def launch(self) -> dict[str, Any]:
        """Keyword arguments of a launch. Fusing is asked for by name: Triton's default for it changes in 3.10."""
        return {
            "BLOCK_R": self.block_r,
            "BLOCK_S": self.block_s,
            "BLOCK_T": self.block_t,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


# kind -> bytes per element of the gathered matrix (8 wherever sums are fp64) -> tile
TILES: dict[str, dict[int, TileConfig]] = {
    "wide": {
        2: TileConfig(block_r=1, block_s=4, block_t=256, num_warps=1, num_stages=1),
        4: TileConfig(block_r=1, block_s=4, block_t=256, num_warps=1, num_stages=1),
        8: TileConfig(block_r=1, block_s=4, block_t=128, num_warps=1, num_stages=1),
    },
    # a few dozen tokens: a shorter row for the warp
    "short": {
        2: TileConfig(block_r=1, block_s=4, block_t=64, num_warps=1, num_stages=1),
        4: TileConfig(block_r=1, block_s=4, block_t=64, num_warps=1, num_stages=1),
        8: TileConfig(block_r=1, block_s=4, block_t=64, num_warps=1, num_stages=1),
    },
    # decoding: latency, not width, is what costs, so more slots in flight and fewer rows a program
    "decode": {
        2: TileConfig(block_r=4, block_s=8, block_t=16, num_warps=1, num_stages=1),
        4: TileConfig(block_r=4, block_s=8, block_t=16, num_warps=1, num_stages=1),
        8: TileConfig(block_r=2, block_s=4, block_t=16, num_warps=1, num_stages=1),
    },
    # token-major output: 16 neighbouring rows make whole 32-byte sectors of the store
    "token_major": {
        2: TileConfig(block_r=16, block_s=4, block_t=32, num_warps=4, num_stages=1),
        4: TileConfig(block_r=16, block_s=4, block_t=32, num_warps=4, num_stages=1),
        8: TileConfig(block_r=8, block_s=2, block_t=32, num_warps=4, num_stages=1),
    },
}

# elements of a one-dimensional pass (gathering values, adding partial sums)
FLAT: dict[str, Any] = {"BLOCK": 512, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}

# backward: a token split is one tile unless that makes more than this many splits; then programs walk several tiles
MIN_SPLITS = 8
MAX_SPLITS = 64
PROGRAMS_WANTED = 8192

# CUDA's limit on the slow grid dimension
MAX_GRID_Y = 65535


def tile_config(itemsize: int, tokens: int, token_major: bool, lanes: int = 32) -> TileConfig:
    """The tile for `tokens` columns of `itemsize` bytes (8 where sums are fp64) on warps of `lanes` lanes."""
    if token_major:
        kind = "token_major"
    elif tokens > 128:
        kind = "wide"
    elif tokens > 16:
        kind = "short"
    else:
        kind = "decode"
    config = TILES[kind][itemsize]
    if kind == "wide" and lanes == 64:  # AMD's wavefronts are twice as wide: keep 16 bytes a lane
        config = config._replace(block_t=2 * config.block_t)
    return config


def token_splits(tiles: int, programs: int) -> tuple[int, int]:
    """(splits, tiles of each split) for the token sums of the backward, given programs per token tile.

    Many splits keep the device busy, few keep the scratch of partial sums (splits x nnz) small. Depends on shapes only.
    """
    wanted = min(max(-(-PROGRAMS_WANTED // max(programs, 1)), MIN_SPLITS), MAX_SPLITS)
    per_split = -(-tiles // wanted)
    return -(-tiles // per_split), per_split


class HouseholderConfig(NamedTuple):
    """Tile of one program of the reflections: BLOCK_T tokens x BLOCK_N features, ranks padded to BLOCK_R."""

    block_t: int
    block_n: int
    block_r: int
    num_warps: int
    num_stages: int

    def launch(self) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_T": self.block_t,
            "BLOCK_N": self.block_n,
            "BLOCK_R": self.block_r,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


MOST_RANKS = 128

# kind and bits of a feature -> largest padded rank -> tokens, features, warps, stages of a tile. 64 tokens are what a
# group of four warps multiplies at once; 64 features of 16 bits are a cache line of a row, and give way to registers
# where ranks are many. In the gradient the roles are exchanged: its rows are features, its sums go over tokens.
HOUSEHOLDER_TILES: dict[str, dict[int, tuple[int, int, int, int]]] = {
    "wide16": {32: (64, 64, 4, 3), 64: (64, 32, 4, 2), 128: (64, 16, 4, 2)},
    "wide32": {32: (64, 32, 4, 3), 64: (64, 16, 4, 2), 128: (32, 16, 4, 2)},
    "decode16": {32: (16, 64, 4, 3), 64: (16, 64, 4, 2), 128: (16, 32, 4, 2)},
    "decode32": {32: (16, 64, 4, 3), 64: (16, 32, 4, 2), 128: (16, 32, 4, 2)},
    "gradient16": {32: (64, 64, 4, 3), 64: (32, 64, 4, 2), 128: (32, 64, 8, 2)},
    "gradient32": {32: (32, 64, 4, 3), 64: (32, 32, 4, 2), 128: (16, 64, 8, 2)},
    "float64": {32: (32, 16, 4, 1), 64: (16, 16, 4, 1), 128: (16, 16, 4, 1)},
}

# From this many tiles of tokens on, every SM of an H100 has a tile, and a program does both products of its own; with
# fewer tiles features are split over programs until there are two for each SM, four in the gradient, which has no more
# than that to fill an SM with.
HOUSEHOLDER_FUSED_TILES = 128
HOUSEHOLDER_PROGRAMS = 256
HOUSEHOLDER_GRADIENT_PROGRAMS = 512
HOUSEHOLDER_SPLITS = 16


def householder_config(kind: str, itemsize: int, rank: int) -> HouseholderConfig:
    """The tile of a `kind` for features of `itemsize` bytes (8 where sums are fp64)."""
    name = "float64" if itemsize == 8 else f"{kind}{8 * itemsize}"
    block_r = max(16, 1 << (rank - 1).bit_length())
    block_t, block_n, warps, stages = next(tile for most, tile in HOUSEHOLDER_TILES[name].items() if block_r <= most)
    return HouseholderConfig(block_t, block_n, block_r, warps, stages)


def householder_kind(tokens: int) -> str:
    """The kind of the forward's tile: few tokens fill no tile of many."""
    return "decode" if tokens <= 16 else "wide"


def householder_splits(programs: int, blocks: int, wanted: int = HOUSEHOLDER_PROGRAMS) -> int:
    """Over how many programs a sum of `blocks` is split where there are `programs` without: a power of two.

    So many that `wanted` programs are not exceeded, and every split has a block of its own. Shapes decide.
    """
    splits = 1
    while splits < HOUSEHOLDER_SPLITS and 2 * splits * programs <= wanted and 2 * splits <= blocks:
        splits *= 2
    return splits


class SampledConfig(NamedTuple):
    """Tile of one program of the tiled sampled product: BLOCK_R groups x BLOCK_N features, BLOCK_T tokens at a time.

    BLOCK_S entries of every row are taken out of a block at a time: more than most rows have in it, and then a block is
    one round. FOLD tiles of tokens make a part of a sum.
    """

    block_r: int
    block_n: int
    block_t: int
    block_s: int
    fold: int
    num_warps: int
    num_stages: int

    def launch(self) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_R": self.block_r,
            "BLOCK_N": self.block_n,
            "BLOCK_T": self.block_t,
            "BLOCK_S": self.block_s,
            "FOLD": self.fold,
            "PROBES": 16,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


# bytes per element (8 wherever sums are fp64) -> tile. Two sums of a block, and a tile's product, are in registers at
# once: eight warps are what holds them. Tiles in fp32 and fp64 are multiplied outside of the tensor cores.
SAMPLED_TILES: dict[int, SampledConfig] = {
    2: SampledConfig(64, 128, 64, 32, fold=8, num_warps=8, num_stages=3),
    4: SampledConfig(64, 64, 16, 16, fold=16, num_warps=8, num_stages=2),
    8: SampledConfig(64, 64, 16, 16, fold=16, num_warps=8, num_stages=2),
}

# Programs that a block of groups is divided into: by ranges of features up to the first number, where there are fewer
# than the second, by tokens too.
SAMPLED_PROGRAMS = 1024
SAMPLED_PROGRAMS_LEAST = 256


def sampled_grid(config: SampledConfig, groups: int, features: int, tokens: int) -> tuple[int, int, int, int, int]:
    """(blocks of groups, ranges of features, token splits, feature blocks of a range, token tiles of a split).

    Shapes decide. No range and no split is empty; ranges are up to SAMPLED_PROGRAMS.
    """
    rows, blocks, tiles = (
        -(-size // block)
        for size, block in ((groups, config.block_r), (features, config.block_n), (tokens, config.block_t))
    )
    per_range = -(-blocks // max(SAMPLED_PROGRAMS // rows, 1))
    ranges = -(-blocks // per_range)
    per_split = -(-tiles // householder_splits(rows * ranges, tiles, SAMPLED_PROGRAMS_LEAST))
    return rows, ranges, -(-tiles // per_split), per_range, per_split


# a scatter's arithmetic is the reference's, operation by operation: it is not fused
SCATTER: dict[str, Any] = FLAT | {"enable_fp_fusion": False}
