"""The forward on every GPU: cuda_src/sm80/flash_fwd.cu. Its rows, which of them a problem gets, its parameters, its
launch."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import ClassVar

from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.jit.kernel import LaunchConfig
from fa2cupy.kernels import common, order
from fa2cupy.kernels.common import FORWARD_ARRAYS
from fa2cupy.kernels.launch import CompileJob, KernelLaunch
from fa2cupy.kernels.listed import Lists
from fa2cupy.kernels.params import FwdParams, pack_strides
from fa2cupy.kernels.tiles import SHARED_MEMORY, head_dims_of_rows, rows_for, shared_memory_class, tile_bytes
from fa2cupy.problem import AttentionProblem
from fa2cupy.spec import MASK_BLOCK

__all__ = ["FWD_TILES", "ROW", "FwdTile", "arch", "compile_jobs", "launch", "objection", "rows"]

_KERNEL = ("sm80/flash_fwd.cu", "flash_fwd")
_USUAL_KEYS = 128  # of segments: if they are shorter, thread blocks may take several tiles


@dataclass(frozen=True, slots=True)
class FwdTile:
    """A row of the tables below.

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

    family: ClassVar[str] = "sm80"

    @property
    def room(self) -> bool:
        """16 rows per warp, or a tile as small."""
        rows = self.block_m // self.num_warps
        return rows == 16 or rows * (self.block_n + self.head_dim) <= 4096

    def shared_mem_bytes(self, head_dim: int, head_dim_v: int = 0) -> int:
        """Of `SharedMemory` in sm80/flash_fwd.cu; both are padded."""
        head_dim_v = head_dim_v or head_dim
        q_or_out = tile_bytes(self.block_m, max(head_dim, head_dim_v))
        return q_or_out + tile_bytes(self.block_n, head_dim) + tile_bytes(self.block_n, head_dim_v)


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

ROW = FwdTile


def arch(device: DeviceInfo) -> str:
    """What it is compiled for."""
    return common.arch_of(device)


def objection(problem: AttentionProblem, device: DeviceInfo) -> str:
    """What speaks against it, or the empty string: nothing."""
    return ""


def rows(problem: AttentionProblem, device: DeviceInfo) -> list[FwdTile]:
    """Of the smallest head_dim that is large enough, the best first: those whose grid fills the GPU, then the rest."""
    table = FWD_TILES[shared_memory_class(device.shared_mem_optin)]
    served = rows_for(table, max(problem.head_dim, problem.head_dim_v))
    seqlen_q = common.mean_seqlen_q(problem)
    heads = problem.batch * problem.num_heads
    filling = [tile for tile in served if -(-seqlen_q // tile.block_m) * heads > device.sm_count]
    return filling + [tile for tile in reversed(served) if tile not in filling]


def launch(
    problem: AttentionProblem, device: DeviceInfo, tile: FwdTile, empty: int, lists: Lists | None
) -> KernelLaunch:
    """Of all query rows but the first `empty`; or of the tiles of a list, the launch before."""
    head_dim, head_dim_v = common.padded_head_dims(problem)
    seqlen_q = problem.seqlen_q - empty
    # The order of tiles: sections of the heads whose keys fit the cache.
    m_blocks = -(-seqlen_q // tile.block_m)
    if problem.mask is not None:  # whole blocks of the mask
        m_blocks = problem.mask.query_blocks * (MASK_BLOCK // tile.block_m)
    group = problem.num_heads // problem.num_heads_k
    keys_bytes = 2 * problem.seqlen_k * (problem.head_dim + problem.head_dim_v)
    heads_k = problem.batch * problem.num_heads_k
    uneven = problem.causal or problem.mask is not None
    section = problem.num_heads_k  # all, of lists, which have an order of their own
    if lists is None:
        section = order.heads_per_section(device, uneven, heads_k, m_blocks * group, keys_bytes)

    strides = dict(problem.strides)
    params = FwdParams()
    for name in FORWARD_ARRAYS:
        setattr(params, f"{name}_strides", pack_strides(name, strides[name]))
    params.shape = common.shape_params(problem, seqlen_q, section * group)
    params.scale_softmax_log2 = problem.softmax_scale * math.log2(math.e)
    params.head_dim_v = problem.head_dim_v

    tiles = m_blocks * problem.batch if lists is None else lists.tiles_of_head_q
    defines = _defines(
        tile, problem.dtype, head_dim, head_dim_v, problem.aligned, problem.causal, problem.softmax_scale <= 0
    )
    if lists is not None and problem.lengths is not None and problem.lengths.segments:
        usual = Lists.of(problem, tile.block_m, tile.block_n, has_keys=False, short_keys=_USUAL_KEYS).tiles_of_head_q
        if usual < tiles:  # of segments of a token each there are so many that even their ends would take long
            tiles, defines = usual, defines | {"FA2_REPEAT": 1}
    skipped = common.skipped_bytes(problem, empty)
    return common.kernel_launch(
        problem,
        _KERNEL,
        arch(device),
        defines,
        LaunchConfig(
            (tiles * problem.num_heads, 1, 1),
            (32 * tile.num_warps, 1, 1),
            shared_mem_bytes=tile.shared_mem_bytes(head_dim, head_dim_v),
            overlaps_previous=lists is not None and device.cc >= (9, 0),
        ),
        params,
        {name: (place, skipped.get(name, 0)) for place, name in enumerate(FORWARD_ARRAYS)},
        common.pointer_names(problem, FORWARD_ARRAYS),
        listed=(lists,),
    )


def _defines(
    tile: FwdTile, dtype: str, head_dim: int, head_dim_v: int, aligned: bool, causal: bool, scale_first: bool
) -> dict[str, int | str]:
    return common.common_defines(dtype, head_dim, head_dim_v, aligned) | {
        "FA2_BLOCK_M": tile.block_m,
        "FA2_BLOCK_N": tile.block_n,
        "FA2_NUM_WARPS": tile.num_warps,
        "FA2_Q_STEPS_IN_REGS": min(tile.q_steps_in_regs, head_dim // 16),
        "FA2_CAUSAL": int(causal),
        "FA2_SCALE_FIRST": int(scale_first),
        "FA2_PARAMS_BYTES": ctypes.sizeof(FwdParams),
        "FA2_SHARED_BYTES": tile.shared_mem_bytes(head_dim, head_dim_v),
    }


def compile_jobs(arch: str, dtype: str) -> list[CompileJob]:
    """Every row of the table, at its `head_dims_of_rows`, causal and not."""
    return [
        CompileJob(
            *_KERNEL,
            arch,
            _defines(tile, dtype, head_dim, head_dim_v, True, causal, False),
            common.forward_label(dtype, head_dim, head_dim_v, causal, tile),
            tile.shared_mem_bytes(head_dim, head_dim_v),
            tile.spill_bytes,
        )
        for tile, head_dim, head_dim_v in head_dims_of_rows(FWD_TILES[shared_memory_class(SHARED_MEMORY[arch])])
        for causal in (False, True)
    ]
