"""Tiles: how big a piece of the problem a thread block takes, and which row of the table a head_dim gets.

A table per class of shared memory (bytes per block): 99 KiB (sm_86, sm_89, sm_120), 163 KiB (sm_80), 227 KiB (sm_90,
sm_100). The first row whose head_dim is large enough is taken. Rejected rows are in docs/tuning.md with their numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "BWD_TILES",
    "FWD_TILES",
    "SHARED_MEMORY",
    "BwdTile",
    "FwdTile",
    "backward_tile",
    "forward_tile",
    "padded_head_dim",
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
    blocks of 16 columns stay in registers. rescale_on_demand: a vote decides whether O is multiplied (softmax.cuh);
    else it always is. spill_bytes: what ptxas is allowed to spill, the most on any architecture. max_seqlen_q: the
    longest query sequence it serves.
    """

    head_dim: int
    block_m: int
    block_n: int
    num_warps: int
    q_steps_in_regs: int
    rescale_on_demand: bool
    note: str
    spill_bytes: int = 0
    max_seqlen_q: int = 2**31

    def shared_mem_bytes(self, head_dim: int) -> int:
        """Of `SharedMemory` in sm80/flash_fwd.cu; `head_dim` is padded."""
        return _tile_bytes(self.block_m, head_dim) + 2 * _tile_bytes(self.block_n, head_dim)


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

    def shared_mem_bytes(self, head_dim: int) -> int:
        """Of `SharedMemory` in sm80/flash_bwd.cu; `head_dim` is padded."""
        statistics = 2 * self.num_stages * self.block_m * 4
        total = (
            2 * _tile_bytes(self.block_n, head_dim)
            + 2 * self.num_stages * _tile_bytes(self.block_m, head_dim)
            + _tile_bytes(self.block_n, self.block_m)
            + _tile_bytes(16 if self.split == 1 else self.block_n, self.block_m)
            + statistics
        )
        return -(-total // 128) * 128

    def postprocess_bytes(self, head_dim: int) -> int:
        """Of `SharedMemory` in smxx/flash_bwd_postprocess.cu."""
        return _tile_bytes(self.block_m, head_dim)

    def dq_tile_floats(self, head_dim: int) -> int:
        """kDqTileFloats of common/dq_accum.cuh."""
        warps_d = self.num_warps // self.dq_warps_m
        m_tiles = self.block_m // 16 // self.dq_warps_m
        n_tiles = 2 * -(-(head_dim // 16) // warps_d)
        return self.num_warps * m_tiles * n_tiles * 128


_FWD_LARGE = (
    FwdTile(64, 128, 96, 4, 4, True, "32 rows per warp; without spill, 128x64x4 is 5% slower", 40),
    FwdTile(96, 128, 64, 4, 0, False, "32 rows per warp; Q's fragments would spill"),
    FwdTile(128, 128, 64, 4, 0, True, "32 rows per warp; without spill, 128x32x4 is 11% slower", 48),
    FwdTile(160, 128, 32, 4, 0, False, "32 rows per warp; without spill, 64x64x4 is 15% slower", 48),
    FwdTile(192, 64, 64, 4, 12, False, "16 rows per warp, two blocks per multiprocessor"),
    FwdTile(256, 64, 64, 4, 0, False, "two blocks an SM: short sequences are all prologue", max_seqlen_q=1024),
    FwdTile(256, 128, 64, 8, 8, False, "16 rows per warp, O alone takes 128 registers; 64x64x4 is 5% slower", 16),
)
FWD_TILES: dict[int, tuple[FwdTile, ...]] = {
    232448: _FWD_LARGE,
    166912: _FWD_LARGE,
    101376: (
        FwdTile(64, 128, 64, 4, 4, False, "36 KB at head_dim 64: two blocks per multiprocessor"),
        FwdTile(96, 128, 32, 4, 0, False, "39 KB at head_dim 96: two blocks per multiprocessor"),
        FwdTile(128, 64, 32, 4, 8, False, "34 KB at head_dim 128: two blocks an SM; spills on sm_120 only", 36),
        FwdTile(192, 64, 32, 4, 12, False, "50 KB at head_dim 192"),
        FwdTile(256, 64, 64, 4, 0, False, "99 KB at head_dim 256"),
    ),
}

BWD_TILES: dict[int, tuple[BwdTile, ...]] = {
    232448: (
        BwdTile(64, 32, 128, 4, 2, 1, 2, "32 keys per warp, P^T in registers, two blocks an SM; spills on sm_100", 40),
        BwdTile(160, 64, 128, 8, 2, 2, 2, "32 keys x half of head_dim per warp; spills on sm_100", 44),
        BwdTile(192, 64, 96, 8, 2, 4, 1, "48 keys x a quarter of head_dim per warp; spills on sm_100", 8),
        BwdTile(256, 64, 64, 8, 2, 4, 1, "32 keys x a quarter of head_dim per warp, 222 KB; spills on sm_100", 4),
    ),
    166912: (
        BwdTile(64, 32, 128, 4, 2, 1, 2, "32 keys per warp, P^T in registers, two blocks per multiprocessor"),
        BwdTile(128, 64, 128, 8, 2, 1, 2, "16 keys per warp; two warps for 32 keys need 177 KB"),
        BwdTile(192, 64, 64, 8, 1, 4, 2, "117 KB; two stages need 169 KB"),
        BwdTile(256, 64, 64, 8, 1, 4, 2, "151 KB; two stages need 222 KB"),
    ),
    101376: (
        BwdTile(64, 64, 64, 4, 2, 2, 2, "73 KB; spills on sm_120 only; 32x128 spills 112 bytes there", 4),
        BwdTile(128, 32, 64, 4, 2, 2, 2, "79 KB; 64x64 with one stage spills 52 bytes on sm_120"),
        BwdTile(192, 32, 32, 4, 1, 2, 2, "56 KB"),
        BwdTile(256, 32, 32, 4, 1, 2, 2, "71 KB; spills on sm_120 only", spill_bytes=24),
    ),
}


def forward_tile(shared_mem_optin: int, head_dim: int, seqlen_q: int) -> FwdTile:
    """The row for a head_dim and a length, on a GPU with that much shared memory per block."""
    rows = FWD_TILES[shared_memory_class(shared_mem_optin)]
    return next(tile for tile in rows if head_dim <= tile.head_dim and seqlen_q <= tile.max_seqlen_q)


def backward_tile(shared_mem_optin: int, head_dim: int) -> BwdTile:
    return next(tile for tile in BWD_TILES[shared_memory_class(shared_mem_optin)] if head_dim <= tile.head_dim)
