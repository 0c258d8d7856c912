"""The main kernel of a backward on sm_90 above head_dim 128: cuda_src/sm90/flash_bwd_wide.cu. Its rows, and what it
decides by itself; the rest is in backward.py."""

from __future__ import annotations

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
    "BWD_TILES_SM90_WIDE",
    "ROW",
    "BwdTileWide",
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

_KERNEL = ("sm90/flash_bwd_wide.cu", "flash_bwd")


@dataclass(frozen=True, slots=True)
class BwdTileWide(BwdTileSm90):
    """A row of the table below: three warpgroups share 64 keys, and two thread blocks are a cluster."""

    cluster: ClassVar[int] = 2
    num_warps: ClassVar[int] = 16
    dq_warps: ClassVar[int] = 4

    @property
    def dq_parts(self) -> int:
        """Of the thread blocks of a cluster, at 192 of two warpgroups each."""
        return 4 if self.head_dim <= 192 else 2

    def shared_mem_bytes(self) -> int:
        """Panels of 64 columns, dQ, the statistics, and the barriers."""
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


# dK and dV of 64 keys fill two warpgroups.
BWD_TILES_SM90_WIDE: tuple[BwdTileWide, ...] = (
    BwdTileWide(192, 64, 64, 2, "202 KB", head_dim_v=128),
    BwdTileWide(192, 64, 64, 2, "226 KB"),
    BwdTileWide(256, 64, 64, 2, "227 KB"),
)

ROW = BwdTileWide


def arch(device: DeviceInfo) -> str:
    """What it is compiled for."""
    return tma.ARCH


def objection(problem: AttentionProblem, device: DeviceInfo) -> str:
    """What speaks against it, or the empty string."""
    return sm90.objection(problem, device) or tma.rows_objection(problem, _serving(problem))


def _serving(problem: AttentionProblem) -> list[BwdTileWide]:
    return [tile for tile in BWD_TILES_SM90_WIDE if tile.serves(problem)]


def rows(problem: AttentionProblem, device: DeviceInfo) -> list[BwdTileWide]:
    """The narrowest first, which is the best."""
    return tma.without_empty_panels(problem, _serving(problem))


def cleared(causal: bool, n_blocks: int, deterministic: bool, partial: bool) -> bool:
    """Whether sums of dQ begin with zeros: unless they are added in turn."""
    return not deterministic


def order(work: Work) -> Order:
    return sm90.order(work, cleared, _causal_turns)


def _causal_turns(steps: int) -> float:
    return 1.1 / min(16, max(4, steps / 4))


def launch(whole: Backward, tile: BwdTileWide) -> KernelLaunch:
    return sm90.launch(_KERNEL, whole, tile)


def rows_ahead(arch: str, dtype: str) -> Iterable[tuple[BwdTileWide, int, int]]:
    """(row, head_dim, head_dim_v) of what is compiled ahead."""
    return [(tile, tile.head_dim, tile.head_dim_v) for tile in BWD_TILES_SM90_WIDE]


def compile_jobs(
    arch: str, label: str, tile: BwdTileWide, head_dim: int, head_dim_v: int, side: Defines
) -> list[CompileJob]:
    """Of a row."""
    return sm90.compile_jobs(_KERNEL, arch, label, tile, side, cleared)
