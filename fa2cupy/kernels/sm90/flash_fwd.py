"""The forward of sm_90: cuda_src/sm90/flash_fwd.cu. Its rows, which of them a problem gets, its parameters, its
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
from fa2cupy.kernels.params import FwdTmaParams, pack_strides
from fa2cupy.kernels.sm90 import tma
from fa2cupy.problem import AttentionProblem

__all__ = ["FWD_TILES_SM90", "ROW", "FwdTileSm90", "arch", "compile_jobs", "launch", "objection", "rows", "rows_for"]

_KERNEL = ("sm90/flash_fwd.cu", "flash_fwd")
_MAPS = tma.mapped(FwdTmaParams)
_PLAIN = tuple(name for name in FORWARD_ARRAYS if name not in _MAPS)
_WARPGROUP_ROWS = 64  # query rows of a warpgroup, which copies its own
_ANY_LENGTH = 2**31


@dataclass(frozen=True, slots=True)
class FwdTileSm90:
    """A row of the tables below.

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

    family: ClassVar[str] = "sm90"

    @property
    def short(self) -> bool:
        """A row for short sequences; another serves the longer ones."""
        return self.max_seqlen_q < _ANY_LENGTH

    @property
    def room(self) -> bool:
        """Three warpgroups share the registers out so that none are left."""
        return self.block_m < 192

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


# By whether there is a mask: causal, or a window. With long tiles and no mask, two warpgroups find their turns alone.
FWD_TILES_SM90: dict[bool, tuple[FwdTileSm90, ...]] = {
    False: (
        FwdTileSm90(64, 128, 128, 3, 4, True, "177 KB; ends closer to the sequence's end", max_seqlen_q=1024),
        FwdTileSm90(64, 192, 128, 3, 3, True, "169 KB, three warpgroups that compute"),
        FwdTileSm90(64, 128, 128, 3, 4, True, "177 KB; has registers left for hooks"),
        FwdTileSm90(96, 192, 112, 2, 2, True, "209 KB, three warpgroups that compute; 128 keys spill"),
        FwdTileSm90(96, 128, 128, 2, 2, True, "193 KB; has registers left for hooks"),
        FwdTileSm90(128, 128, 128, 2, 2, False, "193 KB"),
        FwdTileSm90(192, 128, 128, 1, 2, False, "209 KB", head_dim_v=128),
        FwdTileSm90(192, 128, 112, 1, 2, False, "217 KB; 128 keys need 241 KB"),
        FwdTileSm90(256, 128, 64, 1, 2, True, "225 KB; short tiles do not wait for O", max_seqlen_q=2048, own_o=True),
        FwdTileSm90(256, 128, 80, 1, 2, False, "225 KB"),
    ),
    True: (
        FwdTileSm90(64, 128, 128, 3, 4, True, "177 KB; fewer masked scores than with 192 rows", max_seqlen_q=1024),
        FwdTileSm90(64, 192, 128, 3, 3, True, "169 KB, three warpgroups that compute"),
        FwdTileSm90(64, 128, 128, 3, 4, True, "177 KB; has registers left for hooks"),
        FwdTileSm90(96, 192, 112, 2, 2, True, "209 KB, three warpgroups that compute; 128 keys spill"),
        FwdTileSm90(96, 128, 128, 2, 2, True, "193 KB; has registers left for hooks"),
        FwdTileSm90(128, 128, 128, 3, 2, True, "225 KB; O of short tiles leaves in time", max_seqlen_q=1024),
        FwdTileSm90(128, 128, 128, 2, 2, True, "193 KB"),
        FwdTileSm90(192, 128, 128, 1, 2, True, "209 KB", head_dim_v=128),
        FwdTileSm90(192, 128, 112, 1, 2, True, "217 KB; 128 keys need 241 KB"),
        FwdTileSm90(256, 128, 64, 1, 2, True, "225 KB; short tiles do not wait for O", max_seqlen_q=2048, own_o=True),
        FwdTileSm90(256, 128, 64, 1, 2, False, "225 KB; without turns, against 80 keys", own_o=True),
    ),
}

ROW = FwdTileSm90


def arch(device: DeviceInfo) -> str:
    """What it is compiled for."""
    return tma.ARCH


def objection(problem: AttentionProblem, device: DeviceInfo) -> str:
    """What speaks against it, or the empty string."""
    why = tma.objection(problem, device, _MAPS)
    return why or tma.rows_objection(problem, rows_for(problem.head_dim, problem.head_dim_v, problem.causal, 1))


def rows(problem: AttentionProblem, device: DeviceInfo) -> list[FwdTileSm90]:
    """The best first."""
    seqlen_q = common.mean_seqlen_q(problem)
    banded = not (problem.window is None or problem.window.only_drops)
    masked = problem.causal or banded or problem.mask is not None
    return tma.without_empty_panels(problem, rows_for(problem.head_dim, problem.head_dim_v, masked, seqlen_q))


def rows_for(head_dim: int, head_dim_v: int, masked: bool, seqlen_q: int) -> list[FwdTileSm90]:
    """Of the table all that serve these numbers, the narrowest first."""
    return [
        tile
        for tile in FWD_TILES_SM90[masked]
        if seqlen_q <= tile.max_seqlen_q
        and head_dim <= tile.head_dim
        and head_dim_v <= (tile.head_dim_v or tile.head_dim)
    ]


def launch(
    problem: AttentionProblem, device: DeviceInfo, tile: FwdTileSm90, empty: int, lists: Lists | None
) -> KernelLaunch:
    """Of all query rows but the first `empty`; or of the tiles of a list, the launch before."""
    seqlen_q = problem.seqlen_q - empty
    # The order of tiles, of which each thread block takes several: even sections.
    m_blocks = -(-seqlen_q // tile.block_m)
    group = problem.num_heads // problem.num_heads_k
    heads_k = problem.batch * problem.num_heads_k
    window = problem.window
    if lists is not None:
        blocks, tiles = -(-common.mean_seqlen_q(problem) // tile.block_m), lists.tiles_of_head_q * group
        section = group * order.heads_per_listed_section(device.sm_count, problem.num_heads_k, tiles, blocks)
    elif window is not None and not window.only_drops:
        keys = problem.seqlen_k - problem.empty_keys
        beside = keys - seqlen_q  # the key that query 0 stands beside
        reach = window.left - beside, window.right + beside
        row_bytes = 2 * (problem.head_dim + problem.head_dim_v)
        band = order.Banded(tile.block_m, tile.block_n, seqlen_q, keys, *reach, row_bytes)
        section = order.heads_per_banded_section(device, device.sm_count, heads_k * group, band, group)
    else:
        uneven = problem.causal or problem.mask is not None
        section = group * order.heads_per_even_section(device.sm_count, uneven, heads_k, m_blocks * group)

    strides = dict(problem.strides)
    params = FwdTmaParams()
    for name in _PLAIN:
        setattr(params, f"{name}_strides", pack_strides(name, strides[name]))
    params.shape = common.shape_params(problem, seqlen_q, section)
    params.scale_softmax_log2 = problem.softmax_scale * math.log2(math.e)

    names = common.pointer_names(problem, FORWARD_ARRAYS)
    skipped = common.skipped_bytes(problem, empty)
    box_rows = {"q": _WARPGROUP_ROWS, "k": tile.block_n, "v": tile.block_n, "out": _WARPGROUP_ROWS}
    tiles = (m_blocks * problem.batch if lists is None else lists.tiles_of_head_q) * problem.num_heads
    blocks = min(tiles, device.sm_count)  # one for each multiprocessor, which takes tiles from the list
    return common.kernel_launch(
        problem,
        _KERNEL,
        arch(device),
        _defines(tile, problem.dtype, problem.causal, problem.softmax_scale <= 0),
        LaunchConfig(
            (blocks, 1, 1),
            (32 * tile.num_warps, 1, 1),
            shared_mem_bytes=tile.shared_mem_bytes(),
            overlaps_previous=lists is not None,
        ),
        params,
        {name: (names.index(name), skipped[name]) for name in _PLAIN},
        names,
        tma.tensor_maps(problem, FwdTmaParams, box_rows, seqlen_q, skipped, names),
        (lists,),
    )


def _defines(tile: FwdTileSm90, dtype: str, causal: bool, scale_first: bool) -> dict[str, int | str]:
    """Of the row's head dims: copies fill up what smaller ones lack with zeros."""
    return common.common_defines(dtype, tile.head_dim, tile.head_dim_v, True) | {
        "FA2_BLOCK_M": tile.block_m,
        "FA2_BLOCK_N": tile.block_n,
        "FA2_NUM_WARPS": tile.num_warps,
        "FA2_NUM_Q_STAGES": tile.num_q_stages,
        "FA2_NUM_KV_STAGES": tile.num_kv_stages,
        "FA2_OWN_O": int(tile.own_o),
        "FA2_TURNS": int(tile.turns),
        "FA2_CAUSAL": int(causal),
        "FA2_SCALE_FIRST": int(scale_first),
        "FA2_PARAMS_BYTES": ctypes.sizeof(FwdTmaParams),
        "FA2_SHARED_BYTES": tile.shared_mem_bytes(),
    }


def compile_jobs(arch: str, dtype: str) -> list[CompileJob]:
    """Every row of the tables."""
    return [
        CompileJob(
            *_KERNEL,
            arch,
            _defines(tile, dtype, causal, False),
            common.forward_label(dtype, tile.head_dim, tile.head_dim_v, causal, tile)
            + (f" up to {tile.max_seqlen_q} queries" if tile.short else ""),
            tile.shared_mem_bytes(),
            tile.spill_bytes,
        )
        for causal, table in FWD_TILES_SM90.items()
        for tile in table
    ]
