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
from fa2cupy.spec import MASK_BLOCK, of_dtype

__all__ = [
    "FWD_TILES",
    "FWD_TILES_F32",
    "FWD_TILES_F64",
    "FWD_TILES_TF32",
    "ROW",
    "FwdTile",
    "arch",
    "compile_jobs",
    "launch",
    "objection",
    "rows",
]

_KERNEL = ("sm80/flash_fwd.cu", "flash_fwd")
_USUAL_KEYS = 128  # of segments: if they are shorter, thread blocks may take several tiles


@dataclass(frozen=True, slots=True)
class FwdTile:
    """A row of the tables below.

    head_dim: the largest one that this row serves. block_m query rows x block_n keys. q_steps_in_regs: how many of Q's
    blocks of 16 columns stay in registers. spill_bytes: what ptxas is allowed to spill, the most on any architecture.
    row_warps: warps that share query rows. promote, of float32: sums of products begin anew with every 16 terms.
    """

    head_dim: int
    block_m: int
    block_n: int
    num_warps: int
    q_steps_in_regs: int
    note: str
    spill_bytes: int = 0
    element_bytes: int = 2
    row_warps: int = 1
    promote: bool = True

    family: ClassVar[str] = "sm80"

    @property
    def room(self) -> bool:
        """16 rows per warp, or a tile as small."""
        rows = self.block_m * self.row_warps // self.num_warps
        return rows == 16 or (self.element_bytes == 2 and rows * (self.block_n + self.head_dim) <= 4096)

    def shared_mem_bytes(self, head_dim: int, head_dim_v: int = 0) -> int:
        """Of `SharedMemory` in sm80/flash_fwd.cu; both are padded."""
        head_dim_v = head_dim_v or head_dim
        tiles = (self.block_m, max(head_dim, head_dim_v)), (self.block_n, head_dim), (self.block_n, head_dim_v)
        return sum(tile_bytes(rows, width, self.element_bytes) for rows, width in tiles)


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


def _f32(head_dim: int, block_m: int, block_n: int, num_warps: int, note: str, spill_bytes: int = 0) -> FwdTile:
    return FwdTile(head_dim, block_m, block_n, num_warps, 0, note, spill_bytes, 4)


def _f64(
    head_dim: int, block_m: int, block_n: int, num_warps: int, row_warps: int, note: str, spill_bytes: int = 0
) -> FwdTile:
    return FwdTile(head_dim, block_m, block_n, num_warps, 0, note, spill_bytes, 8, row_warps)


# The rows of the wider types were chosen by what they compile to: none was measured.
# Of float32, by three products of tf32.
FWD_TILES_F32: dict[int, tuple[FwdTile, ...]] = {
    232448: (
        _f32(64, 64, 64, 4, "51 KB; 128x32 spills 16 to 48 bytes"),
        _f32(128, 64, 64, 4, "99 KB: two blocks per multiprocessor"),
        _f32(192, 64, 32, 4, "98 KB: two blocks per multiprocessor", 32),
        _f32(256, 64, 16, 4, "98 KB: two blocks per multiprocessor; 64x32 spills 1152 bytes", 80),
    ),
    166912: (
        _f32(64, 64, 64, 4, "51 KB; 128x32 spills 48 bytes"),
        _f32(128, 64, 32, 4, "66 KB: two blocks per multiprocessor"),
        _f32(192, 64, 32, 4, "98 KB", 40),
        _f32(256, 64, 16, 4, "98 KB", 80),
    ),
    101376: (
        _f32(64, 64, 32, 4, "34 KB: two blocks per multiprocessor"),
        _f32(128, 64, 32, 4, "66 KB; 64x64 spills 580 bytes on sm_120"),
        _f32(192, 64, 32, 4, "98 KB", 40),
        _f32(256, 64, 16, 4, "98 KB", 80),
    ),
}
# By single products: fewer registers, and more of what is read from shared memory for each product.
FWD_TILES_TF32: dict[int, tuple[FwdTile, ...]] = {
    232448: (
        _f32(64, 128, 64, 4, "68 KB: 32 rows per warp"),
        _f32(128, 128, 32, 4, "99 KB: 32 rows per warp"),
        _f32(256, 64, 32, 4, "130 KB", 12),
    ),
    166912: (
        _f32(64, 128, 64, 4, "68 KB: 32 rows per warp"),
        _f32(128, 128, 32, 4, "99 KB: 32 rows per warp"),
        _f32(256, 64, 32, 4, "130 KB", 20),
    ),
    101376: (
        _f32(64, 128, 32, 4, "51 KB: 32 rows per warp"),
        _f32(128, 64, 32, 4, "66 KB", 8),
        _f32(192, 64, 32, 4, "98 KB"),
        _f32(256, 64, 16, 4, "98 KB"),
    ),
}
# Of float64. Above head_dim 128 the columns of O of 16 rows do not fit a warp's registers: two warps share the rows.
FWD_TILES_F64: dict[int, tuple[FwdTile, ...]] = {
    232448: (
        _f64(64, 64, 32, 4, 1, "68 KB: two blocks per multiprocessor"),
        _f64(128, 64, 16, 4, 1, "99 KB: two blocks per multiprocessor; 64x32 spills 360 bytes"),
        _f64(256, 32, 16, 4, 2, "130 KB; spills with head_dim_v 128", 136),
    ),
    166912: (
        _f64(64, 64, 32, 4, 1, "68 KB: two blocks per multiprocessor"),
        _f64(128, 64, 32, 4, 1, "132 KB"),
        _f64(256, 32, 16, 4, 2, "130 KB"),
    ),
    101376: (
        _f64(64, 64, 32, 4, 1, "68 KB"),
        _f64(128, 64, 16, 4, 1, "99 KB"),
        _f64(256, 16, 16, 2, 2, "98 KB", 20),
    ),
}
_TABLES = {"float32": FWD_TILES_F32, "tf32": FWD_TILES_TF32, "float64": FWD_TILES_F64}

ROW = FwdTile


def arch(device: DeviceInfo) -> str:
    """What it is compiled for."""
    return common.arch_of(device)


def objection(problem: AttentionProblem, device: DeviceInfo) -> str:
    """What speaks against it, or the empty string: nothing."""
    return ""


def table(arithmetic: str, shared_mem: int) -> tuple[FwdTile, ...]:
    """The rows of a dtype or 'tf32', for GPUs with so many bytes of shared memory."""
    return _TABLES.get(arithmetic, FWD_TILES)[shared_memory_class(shared_mem)]


def rows(problem: AttentionProblem, device: DeviceInfo) -> list[FwdTile]:
    """Of the smallest head_dim that is large enough, the best first: those whose grid fills the GPU, then the rest."""
    served = rows_for(table(problem.arithmetic, device.shared_mem_optin), max(problem.head_dim, problem.head_dim_v))
    seqlen_q = common.mean_seqlen_q(problem)
    heads = problem.batch * problem.num_heads
    filling = [tile for tile in served if -(-seqlen_q // tile.block_m) * heads > device.sm_count]
    return filling + [tile for tile in reversed(served) if tile not in filling]


def launch(
    problem: AttentionProblem, device: DeviceInfo, tile: FwdTile, empty: int, lists: Lists | None
) -> KernelLaunch:
    """Of all query rows but the first `empty`; or of the tiles of a list, the launch before."""
    head_dim, head_dim_v = common.padded_head_dims(problem, tile.row_warps)
    seqlen_q = problem.seqlen_q - empty
    # The order of tiles: sections of the heads whose keys fit the cache.
    m_blocks = -(-seqlen_q // tile.block_m)
    if problem.mask is not None:  # whole blocks of the mask
        m_blocks = problem.mask.query_blocks * (MASK_BLOCK // tile.block_m)
    group = problem.num_heads // problem.num_heads_k
    keys_bytes = tile.element_bytes * problem.seqlen_k * (problem.head_dim + problem.head_dim_v)
    heads_k = problem.batch * problem.num_heads_k
    uneven = problem.causal or problem.mask is not None
    section = problem.num_heads_k  # all, of lists, which have an order of their own
    if lists is None:
        section = order.heads_per_section(device, uneven, heads_k, m_blocks * group, keys_bytes)

    strides = dict(problem.strides)
    params = of_dtype(FwdParams, problem.dtype)()
    for name in FORWARD_ARRAYS:
        setattr(params, f"{name}_strides", pack_strides(name, strides[name]))
    params.shape = common.shape_params(problem, seqlen_q, section * group)
    params.scale_softmax_log2 = problem.softmax_scale * math.log2(math.e)
    params.head_dim_v = problem.head_dim_v

    tiles = m_blocks * problem.batch if lists is None else lists.tiles_of_head_q
    scale_first = problem.softmax_scale <= 0
    defines = _defines(
        tile, arch(device), problem.dtype, head_dim, head_dim_v, problem.aligned, problem.causal, scale_first
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
    tile: FwdTile,
    arch: str,
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    aligned: bool,
    causal: bool,
    scale_first: bool,
) -> dict[str, int | str]:
    defines = common.common_defines(dtype, head_dim, head_dim_v, aligned) | common.product_defines(
        dtype, arch, tile.promote
    )
    if tile.row_warps > 1:
        defines["FA2_ROW_WARPS"] = tile.row_warps
    return defines | {
        "FA2_BLOCK_M": tile.block_m,
        "FA2_BLOCK_N": tile.block_n,
        "FA2_NUM_WARPS": tile.num_warps,
        "FA2_Q_STEPS_IN_REGS": min(tile.q_steps_in_regs, head_dim // 16),
        "FA2_CAUSAL": int(causal),
        "FA2_SCALE_FIRST": int(scale_first),
        "FA2_PARAMS_BYTES": ctypes.sizeof(of_dtype(FwdParams, dtype)),
        "FA2_SHARED_BYTES": tile.shared_mem_bytes(head_dim, head_dim_v),
    }


def compile_jobs(arch: str, dtype: str) -> list[CompileJob]:
    """Every row of the table, at its `head_dims_of_rows`, causal and not."""
    return [
        CompileJob(
            *_KERNEL,
            arch,
            _defines(tile, arch, dtype, head_dim, head_dim_v, True, causal, False),
            common.forward_label(dtype, head_dim, head_dim_v, causal, tile),
            tile.shared_mem_bytes(head_dim, head_dim_v),
            tile.spill_bytes,
        )
        for tile, head_dim, head_dim_v in head_dims_of_rows(table(dtype, SHARED_MEMORY[arch]))
        for causal in (False, True)
    ]
