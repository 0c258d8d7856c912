"""Attention on a cache on every GPU: cuda_src/sm80/flash_decode.cu. Its rows, its parameters, its launch."""

from __future__ import annotations

import ctypes
import math
from ctypes import c_float, c_int32, c_int64, c_uint32, c_uint64
from dataclasses import dataclass
from typing import ClassVar

from fa2cupy.cached.problem import CacheProblem
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.jit.kernel import LaunchConfig
from fa2cupy.kernels import common
from fa2cupy.kernels.launch import CompileJob, KernelLaunch, Pointer
from fa2cupy.kernels.params import Strides3
from fa2cupy.kernels.tiles import SHARED_MEMORY, padded_head_dim, rows_for, shared_memory_class, tile_bytes

__all__ = [
    "DECODE_TILES",
    "ROW",
    "CacheParams",
    "DecodeTile",
    "Divisor",
    "compile_jobs",
    "launch",
    "rows",
    "workspace_bytes",
]

_KERNEL = ("sm80/flash_decode.cu", "flash_decode")
_COMBINED_ROWS = 4  # of combine.cuh
_STREAM_BYTES, _WORK_BYTES = 64, 80  # of a KeyStream, and of Work


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """A row of the tables below.

    head_dim: the largest one that this row serves. block_m: packed rows; block_n: keys of a slice. slots: slices that a
    warp has in its ring.
    """

    head_dim: int
    block_m: int
    block_n: int
    num_warps: int
    slots: int
    q_steps_in_regs: int
    note: str
    spill_bytes: int = 0

    family: ClassVar[str] = "sm80"

    def shared_mem_bytes(self, head_dim: int, head_dim_v: int = 0) -> int:
        """Of `SharedMemory` in sm80/flash_decode.cu; both are padded."""
        head_dim_v = head_dim_v or head_dim
        ring = self.num_warps * self.slots * (tile_bytes(self.block_n, head_dim) + tile_bytes(self.block_n, head_dim_v))
        combine = 4 * self.num_warps * (_COMBINED_ROWS * (head_dim_v + 8) + 2 * self.block_m) + 16
        total = ring + tile_bytes(self.block_m, head_dim) + combine + _STREAM_BYTES * self.num_warps + _WORK_BYTES
        return -(-total // 128) * 128


DECODE_TILES: dict[int, tuple[DecodeTile, ...]] = {
    232448: (
        DecodeTile(64, 16, 32, 8, 2, 4, "147 KB on their way"),
        DecodeTile(64, 32, 32, 8, 2, 4, ""),
        DecodeTile(128, 16, 16, 8, 3, 8, "204 KB on their way"),
        DecodeTile(128, 32, 16, 8, 2, 0, ""),
        DecodeTile(256, 16, 16, 4, 3, 0, "198 KB on their way"),
    ),
    166912: (
        DecodeTile(64, 16, 32, 8, 1, 4, "147 KB"),
        DecodeTile(64, 32, 32, 8, 1, 4, ""),
        DecodeTile(128, 16, 16, 8, 1, 8, ""),
        DecodeTile(128, 32, 16, 8, 1, 0, ""),
        DecodeTile(256, 16, 16, 4, 2, 0, ""),
    ),
    101376: (
        DecodeTile(64, 16, 32, 4, 2, 4, ""),
        DecodeTile(64, 32, 32, 4, 2, 4, ""),
        DecodeTile(128, 16, 16, 4, 2, 8, ""),
        DecodeTile(128, 32, 16, 4, 2, 0, ""),
        DecodeTile(256, 16, 16, 2, 2, 0, ""),
    ),
}

ROW = DecodeTile


class Divisor(ctypes.Structure):
    """The twin of the struct in cuda_src/common/cache.cuh."""

    _fields_ = (("factor", c_uint32), ("shift", c_int32), ("value", c_int32))

    @classmethod
    def by(cls, value: int) -> Divisor:
        """x // value of any x in [0, 2^31) is x * factor >> shift."""
        value = max(1, value)
        shift = 31 + (value - 1).bit_length()
        return cls(-(-(1 << shift) // value), shift, value)


_LENGTHS = (("seqlens", "cache_seqlens"), ("seqused", "seqused_k"), ("batch_idx", "cache_batch_idx"),
            ("leftpad", "leftpad_k"), ("starts_q", "cu_seqlens_q"))  # fmt: skip


class CacheParams(ctypes.Structure):
    """The twin of the struct in cuda_src/common/cache.cuh."""

    _fields_ = (
        *((name, c_uint64) for name in ("q", "k", "v", "out", "lse", "table", "table_starts")),
        *((name, c_uint64) for name, _ in _LENGTHS),
        *((name, c_uint64) for name in ("partial_out", "partial_lse", "counters")),
        ("seqlens_number", c_int64),
        *((f"{name}_strides", Strides3) for name in ("q", "k", "v", "out", "lse")),
        *((name, c_int32) for name in ("batch", "seqlen_q", "num_heads", "num_heads_k", "head_dim", "head_dim_v")),
        *((name, c_int32) for name in ("rows", "table_rows", "table_width", "table_entries")),
        ("page", Divisor),
        ("group", Divisor),
        ("left", c_int32),
        ("right", c_int32),
        ("scale_softmax_log2", c_float),
    )


def rows(problem: CacheProblem, device: DeviceInfo) -> list[DecodeTile]:
    """Of the smallest head_dim that is large enough, the best first: the fewest blocks of packed rows, then the fewest
    rows that are none."""
    table = DECODE_TILES[shared_memory_class(device.shared_mem_optin)]
    served = rows_for(table, max(problem.head_dim, problem.head_dim_v))
    mean = problem.packed_rows // max(1, problem.batch) if problem.is_packed else problem.packed_rows
    return sorted(served, key=lambda tile: (-(-mean // tile.block_m), tile.block_m))


def workspace_bytes(tile: DecodeTile, blocks: int, head_dim_v: int) -> int:
    """Of the parts that thread blocks leave."""
    return 2 * blocks * tile.block_m * (head_dim_v + 1) * 4


def launch(problem: CacheProblem, device: DeviceInfo, tile: DecodeTile) -> KernelLaunch:
    """Pointers: those of `cached.call.ARRAYS`, then the workspace, then the counters, one int for each thread block."""
    head_dim, head_dim_v = padded_head_dim(problem.head_dim), padded_head_dim(problem.head_dim_v)
    blocks = device.sm_count
    names = {name: position for position, name in enumerate(common_arrays())}
    places = {
        "q": ("q", 0), "k": ("k_cache", 0), "v": ("v_cache", 0), "out": ("out", 0), "lse": ("lse_out", 0),
        **{field: (name, 0) for field, name in _LENGTHS if name in problem.arrays},
    }  # fmt: skip
    if "block_table" in problem.arrays:
        places["table"] = "block_table", 0
    elif "indptr" in problem.arrays:
        places |= {"table": ("indices", 0), "table_starts": ("indptr", 0)}
    if problem.by_number:
        places["seqlens_number"] = "cache_seqlens", 0
    pointers = [Pointer(getattr(CacheParams, field).offset, names[name], add) for field, (name, add) in places.items()]
    lse_offset = 2 * blocks * tile.block_m * head_dim_v * 4
    for field, position, add in (
        ("partial_out", len(names), 0), ("partial_lse", len(names), lse_offset), ("counters", len(names) + 1, 0),
    ):  # fmt: skip
        pointers.append(Pointer(getattr(CacheParams, field).offset, position, add))
    params = CacheParams(
        seqlens_number=-1,
        batch=problem.batch,
        seqlen_q=problem.seqlen_q,
        num_heads=problem.num_heads,
        num_heads_k=problem.num_heads_k,
        head_dim=problem.head_dim,
        head_dim_v=problem.head_dim_v,
        rows=problem.rows,
        table_rows=problem.tables,
        table_width=problem.width,
        table_entries=problem.entries,
        page=Divisor.by(problem.page),
        group=Divisor.by(problem.group),
        left=problem.left,
        right=problem.right,
        scale_softmax_log2=problem.softmax_scale * math.log2(math.e),
    )
    strides = dict(problem.strides)
    for field, name in (("q", "q"), ("k", "k_cache"), ("v", "v_cache"), ("out", "out"), ("lse", "lse_out")):
        setattr(params, f"{field}_strides", Strides3(*strides[name]))
    shared = tile.shared_mem_bytes(head_dim, head_dim_v)
    scattered = 0 if not problem.is_paged else 2 if problem.page % tile.block_n == 0 else 1
    return KernelLaunch(
        *_KERNEL,
        common.arch_of(device),
        _defines(tile, problem.dtype, head_dim, head_dim_v, problem.aligned, scattered, problem.softmax_scale <= 0),
        LaunchConfig((blocks, 1, 1), (32 * tile.num_warps, 1, 1), shared_mem_bytes=shared),
        bytes(params),
        tuple(pointers),
    )


def common_arrays() -> tuple[str, ...]:
    """Of a call's pointers."""
    from fa2cupy.cached.call import ARRAYS

    return ARRAYS


def _defines(
    tile: DecodeTile, dtype: str, head_dim: int, head_dim_v: int, aligned: bool, scattered: int, scale_first: bool
) -> dict[str, int | str]:
    own_v = 0 if head_dim_v == head_dim else head_dim_v
    return common.common_defines(dtype, head_dim, own_v, aligned) | {
        "FA2_BLOCK_M": tile.block_m,
        "FA2_BLOCK_N": tile.block_n,
        "FA2_NUM_WARPS": tile.num_warps,
        "FA2_SLOTS": tile.slots,
        "FA2_Q_STEPS_IN_REGS": min(tile.q_steps_in_regs, head_dim // 16),
        "FA2_SCATTERED": scattered,
        "FA2_CAUSAL": 0,  # it is an end of the band
        "FA2_SCALE_FIRST": int(scale_first),
        "FA2_PARAMS_BYTES": ctypes.sizeof(CacheParams),
        "FA2_SHARED_BYTES": tile.shared_mem_bytes(head_dim, head_dim_v),
    }


def compile_jobs(arch: str, dtype: str) -> list[CompileJob]:
    """Every row of the table at its widest, without pages and with pages of both kinds."""
    return [
        CompileJob(
            *_KERNEL,
            arch,
            _defines(tile, dtype, tile.head_dim, tile.head_dim, True, scattered, False),
            f"decode {dtype} head_dim {tile.head_dim} {tile.block_m}x{tile.block_n}x{tile.num_warps} "
            f"{('rows', 'pages', 'pages of slices')[scattered]}",
            tile.shared_mem_bytes(tile.head_dim),
            tile.spill_bytes,
        )
        for tile in DECODE_TILES[shared_memory_class(SHARED_MEMORY[arch])]
        for scattered in (0, 1, 2)
    ]
