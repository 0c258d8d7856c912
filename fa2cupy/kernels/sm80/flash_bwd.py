"""The main kernel of a backward on every GPU: cuda_src/sm80/flash_bwd.cu. Its rows, which of them a problem gets, who
does what, its launch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.kernels import backward, common
from fa2cupy.kernels.backward import Backward, Defines, Order, Work
from fa2cupy.kernels.launch import CompileJob, KernelLaunch
from fa2cupy.kernels.order import heads_per_section
from fa2cupy.kernels.tiles import SHARED_MEMORY, head_dims_of_rows, shared_memory_class, tile_bytes
from fa2cupy.problem import AttentionProblem

__all__ = [
    "BWD_TILES",
    "ROW",
    "BwdTile",
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

_KERNEL = ("sm80/flash_bwd.cu", "flash_bwd")


@dataclass(frozen=True, slots=True)
class BwdTile:
    """A row of the tables below.

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

    family: ClassVar[str] = "sm80"
    cluster: ClassVar[int] = 1
    dq_parts: ClassVar[int] = 1  # all of them add in one turn
    dq_unit: ClassVar[int] = 16  # columns of dQ that no two warps share
    room: ClassVar[bool] = True

    @property
    def dq_warps(self) -> int:
        """Warps that share a tile of dQ."""
        return self.num_warps

    def shared_mem_bytes(self, head_dim: int, head_dim_v: int = 0) -> int:
        """Of `SharedMemory` in sm80/flash_bwd.cu; both are padded."""
        statistics = 2 * self.num_stages * self.block_m * 4
        widths = head_dim, head_dim_v or head_dim
        total = (
            sum(tile_bytes(self.block_n, width) for width in widths)
            + self.num_stages * sum(tile_bytes(self.block_m, width) for width in widths)
            + tile_bytes(self.block_n, self.block_m)
            + tile_bytes(16 if self.split == 1 else self.block_n, self.block_m)
            + statistics
        )
        return -(-total // 128) * 128

    def dq_tile_floats(self, head_dim: int) -> int:
        """kDqTileFloats of common/dq_accum.cuh."""
        warps_d = self.num_warps // self.dq_warps_m
        m_tiles = self.block_m // 16 // self.dq_warps_m
        n_tiles = 2 * -(-(head_dim // 16) // warps_d)
        return self.num_warps * m_tiles * n_tiles * 128


BWD_TILES: dict[int, tuple[BwdTile, ...]] = {
    232448: (
        BwdTile(80, 32, 128, 4, 2, 1, 2, "32 keys per warp, P^T in registers, two blocks an SM; spills on sm_100", 124),
        BwdTile(96, 64, 64, 4, 2, 2, 1, "32 keys x half of head_dim per warp, two blocks per multiprocessor"),
        BwdTile(160, 64, 128, 8, 2, 2, 2, "32 keys x half of head_dim per warp; spills on sm_100", 148),
        BwdTile(192, 64, 96, 8, 2, 4, 1, "48 keys x a quarter of head_dim per warp; spills on sm_100", 20),
        BwdTile(256, 64, 64, 8, 2, 4, 1, "32 keys x a quarter of head_dim per warp, 217 KB", 40),
    ),
    166912: (
        BwdTile(64, 32, 128, 4, 2, 1, 2, "32 keys per warp, P^T in registers, two blocks per multiprocessor", 4),
        BwdTile(128, 64, 128, 8, 2, 1, 2, "16 keys per warp; two warps for 32 keys need 173 KB", 4),
        BwdTile(192, 64, 64, 8, 1, 4, 2, "119 KB; two stages need 169 KB"),
        BwdTile(256, 64, 64, 8, 1, 4, 2, "151 KB; two stages need 217 KB", 124),
    ),
    101376: (
        BwdTile(64, 64, 64, 4, 2, 2, 2, "73 KB; 32x128 spills 112 bytes on sm_120"),
        BwdTile(128, 32, 64, 4, 2, 2, 2, "79 KB; spills on sm_120", 56),
        BwdTile(192, 32, 32, 4, 1, 2, 2, "56 KB"),
        BwdTile(256, 32, 32, 4, 1, 2, 2, "71 KB; spills on sm_120", 4),
    ),
}

ROW = BwdTile


def arch(device: DeviceInfo) -> str:
    """What it is compiled for."""
    return common.arch_of(device)


def objection(problem: AttentionProblem, device: DeviceInfo) -> str:
    """What speaks against it, or the empty string: nothing."""
    return ""


def rows(problem: AttentionProblem, device: DeviceInfo) -> list[BwdTile]:
    """The narrowest first, which is the best."""
    widest = max(problem.head_dim, problem.head_dim_v)
    return [tile for tile in BWD_TILES[shared_memory_class(device.shared_mem_optin)] if widest <= tile.head_dim]


def head_dims(problem: AttentionProblem, tile: BwdTile) -> tuple[int, int]:
    """What is compiled for a problem: its own, padded."""
    return common.padded_head_dims(problem, tile.split)


def cleared(causal: bool, n_blocks: int, deterministic: bool, partial: bool) -> bool:
    """Sums of dQ always begin with zeros."""
    return True


def order(work: Work) -> Order:
    """Query heads are shared out where key blocks are few. Sections of the heads whose queries fit the cache; if dQ is
    added in turn, of as many as keep neighbours apart."""
    problem = work.problem
    splits = backward.splits_of_heads(work)
    shares = work.key_heads * splits
    row_bytes = (2 + 4) * problem.head_dim + 2 * problem.head_dim_v  # Q, float32 dQ, dO
    queries_bytes = work.group // splits * work.rows * row_bytes
    section = shares  # of lists, which have an order of their own
    if not work.lists:
        uneven = problem.causal or problem.mask is not None
        section = heads_per_section(work.device, uneven, shares, work.n_blocks, queries_bytes)
    if work.deterministic:
        most = section if problem.causal else shares
        section = min(most, _section_of_turns(work, work.steps[1] * work.group // splits))
    return Order(splits, section, cleared=True)


def _section_of_turns(work: Work, steps: int) -> int:
    """Heads whose blocks are interleaved if dQ is added in turn; `steps` of a block.

    Neighbouring key blocks are launched that many blocks apart, which is to take as long as two turns: then a block
    finds that its turn has come.
    """
    tile = work.tile
    blocks_at_once = work.device.sm_count * max(1, 8 // tile.num_warps)
    turn_steps = max(1, tile.block_n // tile.block_m)  # kTurnBlocks of sm80/flash_bwd.cu
    return -(-2 * turn_steps * blocks_at_once // steps)


def launch(whole: Backward, tile: BwdTile) -> KernelLaunch:
    """A thread block for each share of a block of keys, or for several short segments."""
    work, order = whole.work, whole.order
    side = whole.side_defines | backward.adding_defines(tile, order.cleared)
    main = _defines(tile, side, *whole.head_dims, work.problem.causal, work.deterministic, order.partial)
    blocks = work.blocks(work.key_tiles * order.splits, tile.num_warps)
    return whole.launch(
        _KERNEL, arch(work.device), main, backward.config(blocks, tile.num_warps, int(main["FA2_SHARED_BYTES"]))
    )


def _defines(
    tile: BwdTile,
    side: Mapping[str, int | str],
    head_dim: int,
    head_dim_v: int,
    causal: bool,
    deterministic: bool,
    partial: bool,
) -> Defines:
    return backward.main_defines(tile, side, causal, deterministic, partial) | {
        "FA2_NUM_STAGES": tile.num_stages,
        "FA2_SPLIT": tile.split,
        "FA2_SHARED_BYTES": tile.shared_mem_bytes(head_dim, head_dim_v),
    }


def rows_ahead(arch: str) -> Iterable[tuple[BwdTile, int, int]]:
    """(row, head_dim, head_dim_v) of what is compiled ahead."""
    return head_dims_of_rows(BWD_TILES[shared_memory_class(SHARED_MEMORY[arch])])


def compile_jobs(
    arch: str, label: str, tile: BwdTile, head_dim: int, head_dim_v: int, side: Defines
) -> list[CompileJob]:
    """Of a row."""

    def defines(clear: bool, deterministic: bool, causal: bool, partial: bool) -> Defines:
        both = side | backward.adding_defines(tile, clear)
        return _defines(tile, both, head_dim, head_dim_v, causal, deterministic, partial)

    return backward.main_jobs(_KERNEL, arch, label, tile, cleared, defines)
