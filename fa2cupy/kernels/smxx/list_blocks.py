"""Lists of blocks from their kinds: cuda_src/smxx/list_blocks.cu."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

from fa2cupy.block_mask.lists import BLOCK
from fa2cupy.jit.kernel import LaunchConfig
from fa2cupy.kernels import common
from fa2cupy.kernels.common import Where
from fa2cupy.kernels.launch import KernelLaunch, Pointer
from fa2cupy.kernels.smxx.classify_blocks import BlockGrid

__all__ = ["STEPS", "launch"]

_KERNEL = ("smxx/list_blocks.cu", "list_blocks")
_WARPS = 8
_THREADS = 32 * _WARPS
_SHARED_BYTES = 4 * 2 * _WARPS  # of `SharedMemory` there
COUNT, SUM_UP, ROWS, COLUMNS = STEPS = range(4)


class ListBlocksParams(ctypes.Structure):
    """The twin of the struct in cuda_src/common/blocks.cuh."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("kinds", "rows_q", "entries_q", "rows_k", "entries_k", "ranks")),
        *((name, ctypes.c_uint64) for name in ("numbers", "first_partial", "counts")),
        ("grid", BlockGrid),
        *((name, ctypes.c_int32) for name in ("max_entries", "max_partial", "step")),
    )


def launch(
    arch: str, grid: tuple[int, int, int], max_entries: int, max_partial: int, step: int, places: Mapping[str, Where]
) -> KernelLaunch:
    """grid: masks, query blocks, key blocks. places: of all pointers."""
    rows, columns = grid[0] * grid[1], grid[0] * grid[2]
    params = ListBlocksParams(grid=BlockGrid(*grid), max_entries=max_entries, max_partial=max_partial, step=step)
    thread_blocks = {
        COUNT: -(-rows // _WARPS) + -(-columns // _THREADS),
        SUM_UP: 2 + -(-(rows + columns) // _THREADS),
        ROWS: -(-rows // _WARPS),
        COLUMNS: -(-columns // _THREADS),
    }
    pointers = tuple(Pointer(getattr(ListBlocksParams, name).offset, *where) for name, where in places.items())
    defines = common.common_defines("float16", 16, 0, True) | {
        "FA2_BLOCK_M": BLOCK,
        "FA2_BLOCK_N": BLOCK,
        "FA2_NUM_WARPS": _WARPS,
        "FA2_PARAMS_BYTES": ctypes.sizeof(ListBlocksParams),
        "FA2_SHARED_BYTES": _SHARED_BYTES,
    }
    config = LaunchConfig((thread_blocks[step], 1, 1), (_THREADS, 1, 1), shared_mem_bytes=_SHARED_BYTES)
    return KernelLaunch(*_KERNEL, arch, defines, config, bytes(params), pointers)
