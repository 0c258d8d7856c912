"""The main kernel of a backward on sm_90 up to head_dim 128: cuda_src/sm90/flash_bwd.cu. Its rows, and what it decides
by itself; the rest is in backward.py."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.kernels.backward import Backward, Defines, Order, Work
from fa2cupy.kernels.launch import CompileJob, KernelLaunch
from fa2cupy.kernels.sm90 import backward as sm90
from fa2cupy.kernels.sm90 import tma
from fa2cupy.kernels.sm90.backward import BwdTileSm90, head_dims
from fa2cupy.problem import AttentionProblem

__all__ = [
    "BWD_TILES_SM90",
    "ROW",
    "BwdTileNarrow",
    "arch",
    "cleared",
    "compile_jobs",
    "head_dims",
    "launch",
    "objection",
    "order",
    "rows",
    "rows_ahead",
]

_KERNEL = ("sm90/flash_bwd.cu", "flash_bwd")
# Key blocks that add to a dQ, on average, up to which it pays that the first of them writes and nobody clears the sum.
_FEW_ADDERS = 16


@dataclass(frozen=True, slots=True)
class BwdTileNarrow(BwdTileSm90):
    """A row of the table below: warpgroups compute 64 keys each."""

    cluster: ClassVar[int] = 1
    dq_parts: ClassVar[int] = 2  # of warpgroups

    @property
    def num_warps(self) -> int:
        return 4 * (1 + self.block_n // 64)

    @property
    def dq_warps(self) -> int:
        return self.num_warps - 4

    @property
    def dq_unit(self) -> int:
        """Columns of a warpgroup's dQ: a panel, or half of the only one."""
        return 32 if self.head_dim <= 64 and self.block_m == 64 else 64

    def shared_mem_bytes(self) -> int:
        """Panels of 64 columns, dQ, the statistics, and the barriers."""
        panels, rows = -(-self.head_dim // 64), self.num_stages * self.block_m
        tiles = 128 * panels * (3 * self.block_n + 2 * rows)  # two of K, one of V
        ds = 2 * rows * self.block_n
        barriers = 8 * (6 + 5 * self.num_stages + 3 * self.dq_parts)
        small = 4 * self.dq_tile_floats(self.head_dim) + 8 * rows + barriers
        return tiles + ds + -(-small // 1024) * 1024


# 128 keys, two warpgroups' worth of dK and dV: 128 queries where registers and shared memory allow, else 64.
BWD_TILES_SM90: tuple[BwdTileNarrow, ...] = (
    BwdTileNarrow(64, 128, 128, 2, "211 KB"),
    BwdTileNarrow(64, 64, 128, 2, "130 KB; has registers left for hooks"),
    BwdTileNarrow(96, 64, 128, 2, "226 KB: a panel and a half take two"),
    BwdTileNarrow(128, 64, 128, 2, "226 KB"),
)

ROW = BwdTileNarrow


def arch(device: DeviceInfo) -> str:
    """What it is compiled for."""
    return tma.ARCH


def objection(problem: AttentionProblem, device: DeviceInfo) -> str:
    """What speaks against it, or the empty string."""
    return sm90.objection(problem, device) or tma.rows_objection(problem, _serving(problem))


def _serving(problem: AttentionProblem) -> list[BwdTileNarrow]:
    return [tile for tile in BWD_TILES_SM90 if tile.serves(problem)]


def rows(problem: AttentionProblem, device: DeviceInfo) -> list[BwdTileNarrow]:
    """The narrowest first, which is the best; none for wider heads, which are flash_bwd_wide's."""
    return tma.without_empty_panels(problem, _serving(problem))


def cleared(causal: bool, n_blocks: int, deterministic: bool, partial: bool) -> bool:
    """Whether sums of dQ begin with zeros: where many add, and where parts of full key blocks would begin with the same
    queries and wait for each other."""
    adders = (n_blocks + 1) / 2 if causal else n_blocks
    return not deterministic and ((partial and not causal) or adders > _FEW_ADDERS)


def order(work: Work) -> Order:
    return sm90.order(work, cleared, _causal_turns)


def _causal_turns(steps: int) -> float:
    return 1 / math.sqrt(steps)


def launch(whole: Backward, tile: BwdTileNarrow) -> KernelLaunch:
    return sm90.launch(_KERNEL, whole, tile)


def rows_ahead(arch: str, dtype: str) -> Iterable[tuple[BwdTileNarrow, int, int]]:
    """(row, head_dim, head_dim_v) of what is compiled ahead."""
    return [(tile, tile.head_dim, tile.head_dim_v) for tile in BWD_TILES_SM90]


def compile_jobs(
    arch: str, label: str, tile: BwdTileNarrow, head_dim: int, head_dim_v: int, side: Defines
) -> list[CompileJob]:
    """Of a row."""
    return sm90.compile_jobs(_KERNEL, arch, label, tile, side, cleared)
