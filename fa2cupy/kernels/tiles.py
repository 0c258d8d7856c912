"""Tiles: how big a piece of the problem a thread block takes, and which row of the table a head_dim gets.

A table per class of shared memory (bytes per block): 99 KiB (sm_86, sm_89, sm_120), 163 KiB (sm_80), 227 KiB (sm_90,
sm_100). Of the rows of the smallest head_dim that is large enough, the forward takes the first whose grid fills the
GPU. The wgmma kernels, which only sm_90 runs, have tables of their own. Rejected rows are in docs/tuning.md with their
numbers.

Rows are found by the larger of head_dim and head_dim_v, unless they say otherwise. A head_dim_v of 0 is the same as
head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

__all__ = [
    "BWD_TILES",
    "BWD_TILES_SM90",
    "FWD_TILES",
    "FWD_TILES_SM90",
    "SHARED_MEMORY",
    "BwdTile",
    "BwdTileSm90",
    "FwdTile",
    "FwdTileSm90",
    "backward_tile",
    "backward_tile_sm90",
    "forward_tile",
    "forward_tile_sm90",
    "head_dims_of_rows",
    "padded_head_dim",
    "postprocess_bytes",
    "shared_memory_class",
]

# Bytes of shared memory that a block may use, by architecture; others go by what their driver says.
SHARED_MEMORY = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_87": 166912,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_103": 232448,
    "sm_120": 101376,
    "sm_121": 101376,
}
_CLASSES = (232448, 166912, 101376)
_ANY_LENGTH = 2**31
# head_dim and head_dim_v of models in use, where they differ: multi-head latent attention.
_HEAD_DIM_PAIRS = ((192, 128),)


def shared_memory_class(shared_mem_optin: int) -> int:
    """The largest class that fits into `shared_mem_optin` bytes."""
    return next((size for size in _CLASSES if size <= shared_mem_optin), _CLASSES[-1])


def padded_head_dim(head_dim: int, split: int = 1) -> int:
    """The width that a kernel is compiled for: `split` times a multiple of 16, tiles being made of 16 x 16 matrices."""
    unit = 16 * split
    return max(unit, -(-head_dim // unit) * unit)


def _tile_bytes(rows: int, columns: int) -> int:
    """A `Tile` of sm80/tile.cuh: rows padded by 16 bytes, aligned to 128."""
    return -(-rows * (columns + 8) * 2 // 128) * 128


@dataclass(frozen=True, slots=True)
class FwdTile:
    """A row of the forward table.

    head_dim: the largest one that this row serves. block_m query rows x block_n keys. q_steps_in_regs: how many of Q's
    blocks of 16 columns stay in registers. spill_bytes: what ptxas is allowed to spill, the most on any architecture.
    """

    head_dim: int
    block_m: int
    block_n: int
    num_warps: int
    q_steps_in_regs: int
    note: str
    spill_bytes: int = 0

    def shared_mem_bytes(self, head_dim: int, head_dim_v: int = 0) -> int:
        """Of `SharedMemory` in sm80/flash_fwd.cu; both are padded."""
        head_dim_v = head_dim_v or head_dim
        q_or_out = _tile_bytes(self.block_m, max(head_dim, head_dim_v))
        return q_or_out + _tile_bytes(self.block_n, head_dim) + _tile_bytes(self.block_n, head_dim_v)


@dataclass(frozen=True, slots=True)
class FwdTileSm90:
    """A row of the forward table of sm_90.

    head_dim and head_dim_v: the largest ones that this row serves, and those that its kernel is compiled for. block_m
    query rows (64 for each warpgroup that computes) x block_n keys. num_q_stages: buffers of Q, and of O; with 2, or
    with own_o, a tile starts beside the end of the one before; with 3, O of short tiles leaves in time. num_kv_stages:
    buffers of K, and as many of V. turns: the warpgroups issue their products in turn. max_seqlen_q: the longest query
    sequence that it serves. own_o: O leaves through a buffer of its own, of 64 rows.
    """

    head_dim: int
    block_m: int
    block_n: int
    num_q_stages: int
    num_kv_stages: int
    turns: bool
    note: str
    spill_bytes: int = 0
    max_seqlen_q: int = _ANY_LENGTH
    head_dim_v: int = 0
    own_o: bool = False

    @property
    def short(self) -> bool:
        """A row for short sequences; another serves the longer ones."""
        return self.max_seqlen_q < _ANY_LENGTH

    @property
    def num_warps(self) -> int:
        """With those of the warpgroup that copies."""
        return 4 * (1 + self.block_m // 64)

    def shared_mem_bytes(self) -> int:
        """Of `SharedMemory` in sm90/flash_fwd.cu: panels of 64 columns, and the barriers."""
        panels, panels_v = -(-self.head_dim // 64), -(-(self.head_dim_v or self.head_dim) // 64)
        q_rows, k_rows = self.num_q_stages * self.block_m, self.num_kv_stages * self.block_n
        o_rows = 64 * self.own_o
        return 128 * (panels * (q_rows + k_rows) + panels_v * (k_rows + o_rows)) + 1024


@dataclass(frozen=True, slots=True)
class BwdTile:
    """A row of the backward table.

    block_m query rows x block_n keys. num_stages: buffers of Q and dO. split: warps that share 16 key rows (2: P^T goes
    through shared memory). dq_warps_m: warps along the rows of dQ.
    """

    head_dim: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    split: int
    dq_warps_m: int
    note: str
    spill_bytes: int = 0

    cluster: ClassVar[int] = 1
    dq_parts: ClassVar[int] = 1  # all of them add in one turn
    dq_unit: ClassVar[int] = 16  # columns of dQ that no two warps share

    @property
    def dq_warps(self) -> int:
        """Warps that share a tile of dQ."""
        return self.num_warps

    def shared_mem_bytes(self, head_dim: int, head_dim_v: int = 0) -> int:
        """Of `SharedMemory` in sm80/flash_bwd.cu; both are padded."""
        statistics = 2 * self.num_stages * self.block_m * 4
        widths = head_dim, head_dim_v or head_dim
        total = (
            sum(_tile_bytes(self.block_n, width) for width in widths)
            + self.num_stages * sum(_tile_bytes(self.block_m, width) for width in widths)
            + _tile_bytes(self.block_n, self.block_m)
            + _tile_bytes(16 if self.split == 1 else self.block_n, self.block_m)
            + statistics
        )
        return -(-total // 128) * 128

    def dq_tile_floats(self, head_dim: int) -> int:
        """kDqTileFloats of common/dq_accum.cuh."""
        warps_d = self.num_warps // self.dq_warps_m
        m_tiles = self.block_m // 16 // self.dq_warps_m
        n_tiles = 2 * -(-(head_dim // 16) // warps_d)
        return self.num_warps * m_tiles * n_tiles * 128


@dataclass(frozen=True, slots=True)
class BwdTileSm90:
    """A row of the backward table of sm_90.

    head_dim and head_dim_v: the largest ones that this row serves, and those that its kernel is compiled for. block_m
    query rows x block_n keys. num_stages: buffers of Q, of dO and of dS. Up to head_dim 128, two warpgroups compute 64
    keys each; above (`wide`), three share 64 keys.
    """

    head_dim: int
    block_m: int
    block_n: int
    num_stages: int
    note: str
    spill_bytes: int = 0
    head_dim_v: int = 0

    dq_unit: ClassVar[int] = 64  # a panel

    @property
    def wide(self) -> bool:
        """Of sm90/flash_bwd_wide.cu."""
        return self.head_dim > 128

    @property
    def cluster(self) -> int:
        """Thread blocks that take neighbouring key blocks together."""
        return 2 if self.wide else 1

    @property
    def num_warps(self) -> int:
        """With those of the warpgroup that copies."""
        return 16 if self.wide else 4 * (1 + self.block_n // 64)

    @property
    def dq_warps(self) -> int:
        """Warps that share a tile of dQ."""
        return 4 if self.wide else self.num_warps - 4

    @property
    def dq_warps_m(self) -> int:
        """Of these, along its rows: a warpgroup computes 64 rows x 64 columns, or all columns."""
        return self.block_m // 16

    def shared_mem_bytes(self) -> int:
        """Of `SharedMemory` in sm90/flash_bwd.cu: panels of 64 columns, dQ, the statistics, and the barriers."""
        if self.wide:
            return self._wide_shared_mem_bytes()
        panels, rows = -(-self.head_dim // 64), self.num_stages * self.block_m
        tiles = 128 * panels * (3 * self.block_n + 2 * rows)  # two of K, one of V
        ds = 2 * rows * self.block_n
        barriers = 8 * (6 + 5 * self.num_stages + 3 * self.dq_parts)
        small = 4 * self.dq_tile_floats() + 8 * rows + barriers
        return tiles + ds + -(-small // 1024) * 1024

    def _wide_shared_mem_bytes(self) -> int:
        """Of `SharedMemory` in sm90/flash_bwd_wide.cu, likewise."""
        panels, panels_v = (-(-width // 64) for width in (self.head_dim, self.head_dim_v or self.head_dim))
        parts, parts_v = 1 + (panels > 3), 1 + (panels_v > 3)
        q_buffers, dout_buffers = self.num_stages * parts, self.num_stages * parts_v - (parts_v > 1)
        p_buffers = 3 - parts
        keys = self.block_n * (panels + panels_v + 2)  # K, V, and two panels of the other block's K
        queries = self.block_m * (panels // parts * q_buffers + panels_v // parts_v * dout_buffers)
        factors = self.block_m * (p_buffers + 3)  # P, dS, the other block's dS
        dq = 4 * self.block_m * (64 + 32) * (panels <= 3)
        barriers = 4 + 2 * (q_buffers + dout_buffers + p_buffers) + 11
        small = 4 * self.block_m * (q_buffers + dout_buffers) + 8 * barriers + 384  # and what aligns dQ behind them
        return 128 * (keys + queries + factors) + dq + -(-small // 1024) * 1024

    def dq_tile_floats(self) -> int:
        """kDqTileFloats of common/dq_accum.cuh."""
        return self.block_m * -(-self.head_dim // self.dq_unit) * self.dq_unit

    @property
    def dq_parts(self) -> int:
        """Parts of a tile of dQ with counters of their own: of warpgroups; or of the thread blocks of a cluster, at 192
        of two warpgroups each."""
        return 4 if self.wide and self.head_dim <= 192 else 2


_FWD_LARGE = (
    FwdTile(64, 128, 128, 4, 0, "32 rows per warp; 512 keys are a multiple of 128, but not of 96 or 112", 168),
    FwdTile(64, 64, 128, 4, 4, "thin grids"),
    FwdTile(96, 128, 96, 4, 0, "32 rows per warp", 68),
    FwdTile(96, 64, 128, 4, 6, "thin grids"),
    FwdTile(128, 128, 64, 4, 0, "32 rows per warp", 48),
    FwdTile(128, 64, 128, 4, 0, "thin grids"),
    FwdTile(160, 128, 48, 4, 0, "32 rows per warp; on sm_90 it spills 44", 332),
    FwdTile(160, 64, 64, 4, 10, "thin grids"),
    FwdTile(192, 64, 64, 4, 12, "16 rows per warp, two blocks per multiprocessor"),
)
FWD_TILES: dict[int, tuple[FwdTile, ...]] = {
    232448: (
        *_FWD_LARGE,
        FwdTile(256, 64, 64, 4, 0, "16 rows per warp, two blocks per multiprocessor"),
    ),
    166912: (
        *_FWD_LARGE,
        FwdTile(256, 128, 64, 8, 8, "of 64x64x4 only one block would fit a multiprocessor", 28),
        FwdTile(256, 64, 64, 4, 0, "thin grids"),
    ),
    101376: (
        FwdTile(64, 128, 64, 4, 4, "36 KB: two blocks per multiprocessor"),
        FwdTile(96, 64, 64, 4, 6, "39 KB: two blocks per multiprocessor; spills on sm_120", 24),
        FwdTile(128, 64, 32, 4, 8, "34 KB: two blocks per multiprocessor; spills on sm_120", 12),
        FwdTile(192, 64, 32, 4, 12, "50 KB; spills with head_dim_v 128", 36),
        FwdTile(256, 64, 64, 4, 0, "99 KB"),
    ),
}

# By whether the problem is causal. With long tiles and no mask, two warpgroups find their turns by themselves.
FWD_TILES_SM90: dict[bool, tuple[FwdTileSm90, ...]] = {
    False: (
        FwdTileSm90(64, 128, 128, 3, 4, True, "177 KB; ends closer to the sequence's end", max_seqlen_q=1024),
        FwdTileSm90(64, 192, 128, 3, 3, True, "169 KB, three warpgroups that compute"),
        FwdTileSm90(96, 192, 112, 2, 2, True, "209 KB, three warpgroups that compute; 128 keys spill"),
        FwdTileSm90(128, 128, 128, 2, 2, False, "193 KB"),
        FwdTileSm90(192, 128, 128, 1, 2, False, "209 KB", head_dim_v=128),
        FwdTileSm90(192, 128, 112, 1, 2, False, "217 KB; 128 keys need 241 KB"),
        FwdTileSm90(256, 128, 64, 1, 2, True, "225 KB; short tiles do not wait for O", max_seqlen_q=2048, own_o=True),
        FwdTileSm90(256, 128, 80, 1, 2, False, "225 KB"),
    ),
    True: (
        FwdTileSm90(64, 128, 128, 3, 4, True, "177 KB; fewer masked scores than with 192 rows", max_seqlen_q=1024),
        FwdTileSm90(64, 192, 128, 3, 3, True, "169 KB, three warpgroups that compute"),
        FwdTileSm90(96, 192, 112, 2, 2, True, "209 KB, three warpgroups that compute; 128 keys spill"),
        FwdTileSm90(128, 128, 128, 3, 2, True, "225 KB; O of short tiles leaves in time", max_seqlen_q=1024),
        FwdTileSm90(128, 128, 128, 2, 2, True, "193 KB"),
        FwdTileSm90(192, 128, 128, 1, 2, True, "209 KB", head_dim_v=128),
        FwdTileSm90(192, 128, 112, 1, 2, True, "217 KB; 128 keys need 241 KB"),
        FwdTileSm90(256, 128, 64, 1, 2, True, "225 KB; short tiles do not wait for O", max_seqlen_q=2048, own_o=True),
        FwdTileSm90(256, 128, 64, 1, 2, False, "225 KB; without turns, against 80 keys", own_o=True),
    ),
}

BWD_TILES: dict[int, tuple[BwdTile, ...]] = {
    232448: (
        BwdTile(80, 32, 128, 4, 2, 1, 2, "32 keys per warp, P^T in registers, two blocks an SM; spills on sm_100", 124),
        BwdTile(96, 64, 64, 4, 2, 2, 1, "32 keys x half of head_dim per warp, two blocks per multiprocessor"),
        BwdTile(160, 64, 128, 8, 2, 2, 2, "32 keys x half of head_dim per warp; spills on sm_100", 148),
        BwdTile(192, 64, 96, 8, 2, 4, 1, "48 keys x a quarter of head_dim per warp; spills on sm_100", 20),
        BwdTile(256, 64, 64, 8, 2, 4, 1, "32 keys x a quarter of head_dim per warp, 222 KB", 40),
    ),
    166912: (
        BwdTile(64, 32, 128, 4, 2, 1, 2, "32 keys per warp, P^T in registers, two blocks per multiprocessor", 4),
        BwdTile(128, 64, 128, 8, 2, 1, 2, "16 keys per warp; two warps for 32 keys need 177 KB", 4),
        BwdTile(192, 64, 64, 8, 1, 4, 2, "117 KB; two stages need 169 KB"),
        BwdTile(256, 64, 64, 8, 1, 4, 2, "151 KB; two stages need 222 KB", 124),
    ),
    101376: (
        BwdTile(64, 64, 64, 4, 2, 2, 2, "73 KB; 32x128 spills 112 bytes on sm_120"),
        BwdTile(128, 32, 64, 4, 2, 2, 2, "79 KB; spills on sm_120", 56),
        BwdTile(192, 32, 32, 4, 1, 2, 2, "56 KB"),
        BwdTile(256, 32, 32, 4, 1, 2, 2, "71 KB; spills on sm_120", 4),
    ),
}

# 128 keys, two warpgroups' worth of dK and dV, up to head_dim 128: 128 queries where registers and shared memory allow,
# else 64. Above, dK and dV of 64 keys fill two warpgroups.
BWD_TILES_SM90: tuple[BwdTileSm90, ...] = (
    BwdTileSm90(64, 128, 128, 2, "211 KB"),
    BwdTileSm90(96, 64, 128, 2, "226 KB: a panel and a half take two"),
    BwdTileSm90(128, 64, 128, 2, "226 KB"),
    BwdTileSm90(192, 64, 64, 2, "202 KB", head_dim_v=128),
    BwdTileSm90(192, 64, 64, 2, "226 KB"),
    BwdTileSm90(256, 64, 64, 2, "227 KB"),
)


_Tile = TypeVar("_Tile", FwdTile, BwdTile)


def _rows_for(table: Sequence[_Tile], head_dim: int) -> list[_Tile]:
    """The rows of the smallest head_dim that is large enough."""
    served = min(tile.head_dim for tile in table if head_dim <= tile.head_dim)
    return [tile for tile in table if tile.head_dim == served]


def head_dims_of_rows(table: Sequence[_Tile]) -> Iterator[tuple[_Tile, int, int]]:
    """(row, head_dim, head_dim_v) of what is compiled ahead: each row at its widest, and pairs that are in use."""
    for tile in table:
        yield tile, tile.head_dim, 0
    for head_dim, head_dim_v in _HEAD_DIM_PAIRS:
        for tile in _rows_for(table, max(head_dim, head_dim_v)):
            yield tile, head_dim, head_dim_v


def forward_tile(shared_mem_optin: int, sm_count: int, head_dim: int, seqlen_q: int, rows_of_blocks: int) -> FwdTile:
    """The row for a head_dim (or a larger head_dim_v) on a GPU with that much shared memory per block: the first with
    more blocks than multiprocessors, or the last. rows_of_blocks: batch x heads."""
    rows = _rows_for(FWD_TILES[shared_memory_class(shared_mem_optin)], head_dim)
    return next((tile for tile in rows if -(-seqlen_q // tile.block_m) * rows_of_blocks > sm_count), rows[-1])


def forward_tile_sm90(head_dim: int, head_dim_v: int, causal: bool, seqlen_q: int) -> FwdTileSm90:
    rows = (tile for tile in FWD_TILES_SM90[causal] if seqlen_q <= tile.max_seqlen_q)
    return next(tile for tile in rows if head_dim <= tile.head_dim and head_dim_v <= (tile.head_dim_v or tile.head_dim))


def postprocess_bytes(block_m: int, head_dim: int) -> int:
    """Of `SharedMemory` in smxx/flash_bwd_postprocess.cu; `head_dim` is padded."""
    return _tile_bytes(block_m, head_dim)


def backward_tile(shared_mem_optin: int, head_dim: int) -> BwdTile:
    """The row for a head_dim (or a larger head_dim_v)."""
    return next(tile for tile in BWD_TILES[shared_memory_class(shared_mem_optin)] if head_dim <= tile.head_dim)


def backward_tile_sm90(head_dim: int, head_dim_v: int) -> BwdTileSm90:
    rows = (tile for tile in BWD_TILES_SM90 if head_dim <= tile.head_dim)
    return next(tile for tile in rows if head_dim_v <= (tile.head_dim_v or tile.head_dim))
