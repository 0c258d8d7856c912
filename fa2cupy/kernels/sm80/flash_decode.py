"""Attention on a cache on every GPU: cuda_src/sm80/flash_decode.cu. Its rows, its parameters, its launch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import ClassVar

from fa2cupy.cached.call import ARRAYS
from fa2cupy.cached.problem import CacheProblem
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.jit.kernel import LaunchConfig
from fa2cupy.kernels import cache_params, common
from fa2cupy.kernels.cache_params import CacheParams, NewKeysParams, TurnParams
from fa2cupy.kernels.launch import CompileJob, KernelLaunch, Pointer
from fa2cupy.kernels.params import composed
from fa2cupy.kernels.tiles import SHARED_MEMORY, padded_head_dim, rows_for, shared_memory_class, tile_bytes

__all__ = [
    "DECODE_TILES",
    "ROW",
    "DecodeTile",
    "Parts",
    "compile_jobs",
    "feature_defines",
    "launch",
    "rows",
]

_KERNEL = ("sm80/flash_decode.cu", "flash_decode")
_COMBINED_ROWS = 4  # of combine.cuh
_STREAM_BYTES, _WORK_BYTES = 64, 96  # of a KeyStream, and of Work


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


def rows(problem: CacheProblem, device: DeviceInfo) -> list[DecodeTile]:
    """Of the smallest head_dim that is large enough, the best first: the fewest blocks of packed rows, then the fewest
    rows that are none. With split_size the batch has no say in it.
    """
    table = DECODE_TILES[shared_memory_class(device.shared_mem_optin)]
    served = rows_for(table, max(problem.head_dim, problem.head_dim_v))
    wanted = problem.packed_rows
    if problem.is_packed:
        wanted = problem.group if problem.split_size else wanted // max(1, problem.batch)
    return sorted(served, key=lambda tile: (-(-wanted // tile.block_m), tile.block_m))


@dataclass(frozen=True, slots=True)
class Parts:
    """What thread blocks leave of tiles in the workspace: parts of so many rows of O, then their lse."""

    count: int
    rows: int
    head_dim_v: int

    @classmethod
    def of(cls, problem: CacheProblem, device: DeviceInfo, tile: DecodeTile) -> Parts:
        count = 2 * device.sm_count
        if problem.split_size is not None:
            blocks = -(-problem.packed_rows // tile.block_m)
            blocks = blocks + problem.batch if problem.is_packed else blocks * problem.batch
            count = blocks * problem.num_heads_k * max(1, -(-problem.page * problem.width // problem.split_size))
        return cls(count, min(tile.block_m, problem.packed_rows), padded_head_dim(problem.head_dim_v))

    @property
    def lse_offset(self) -> int:
        return 4 * self.count * self.rows * self.head_dim_v

    @property
    def bytes(self) -> int:
        return self.lse_offset + 4 * self.count * self.rows


def launch(problem: CacheProblem, device: DeviceInfo, tile: DecodeTile, *, new_keys: bool) -> KernelLaunch:
    """Pointers: those of `cached.call.ARRAYS`, then the workspace, then the counters, one int for each thread block.
    new_keys: whether it writes new keys to the cache.
    """
    head_dim, head_dim_v = padded_head_dim(problem.head_dim), padded_head_dim(problem.head_dim_v)
    blocks, turned = device.sm_count, problem.rotary is not None
    params, pointers = cache_params.packed(problem, new_keys=new_keys, turned=turned)
    parts = Parts.of(problem, device, tile)
    setattr(params, "part_rows", parts.rows)  # noqa: B010 - of a part
    setattr(params, "part_slices", (problem.split_size or 0) // tile.block_n)  # noqa: B010 - of a part
    workspace = len(ARRAYS)
    pointers += [
        Pointer(CacheParams.partial_out.offset, workspace, 0),
        Pointer(CacheParams.partial_lse.offset, workspace, parts.lse_offset),
        Pointer(CacheParams.counters.offset, workspace + 1, 0),
    ]
    scattered = cache_params.scattered(problem, tile.block_n)
    defines = _defines(
        tile, problem.dtype, head_dim, head_dim_v, problem.aligned, scattered, problem.softmax_scale <= 0
    )
    defines |= feature_defines(new_keys, turned)
    if problem.split_size is not None:
        defines["FA2_FIXED_PARTS"] = 1
    return KernelLaunch(
        *_KERNEL,
        common.arch_of(device),
        defines,
        LaunchConfig(
            (blocks, 1, 1),
            (32 * tile.num_warps, 1, 1),
            shared_mem_bytes=tile.shared_mem_bytes(head_dim, head_dim_v),
        ),
        bytes(params),
        tuple(pointers),
    )


def feature_defines(new_keys: bool, turned: bool) -> dict[str, int | str]:
    """Of what is there."""
    blocks = (NewKeysParams,) * new_keys + (TurnParams,) * turned
    defines: dict[str, int | str] = {"FA2_NEW_KEYS": 1} if new_keys else {}
    if turned:
        defines["FA2_TURNED"] = 1
    return defines | {"FA2_PARAMS_BYTES": ctypes.sizeof(composed(CacheParams, blocks) if blocks else CacheParams)}


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
        "FA2_SHARED_BYTES": tile.shared_mem_bytes(head_dim, head_dim_v),
    }


def compile_jobs(arch: str, dtype: str) -> list[CompileJob]:
    """Every row of the table at its widest, without pages and with pages of both kinds."""
    return [
        CompileJob(
            *_KERNEL,
            arch,
            _defines(tile, dtype, tile.head_dim, tile.head_dim, True, scattered, False) | feature_defines(new, turned),
            f"decode {dtype} head_dim {tile.head_dim} {tile.block_m}x{tile.block_n}x{tile.num_warps} "
            f"{('rows', 'pages', 'pages of slices')[scattered]}" + " new" * new + " turned" * turned,
            tile.shared_mem_bytes(tile.head_dim),
            tile.spill_bytes,
        )
        for tile in DECODE_TILES[shared_memory_class(SHARED_MEMORY[arch])]
        for scattered, new, turned in ((0, False, False), (1, False, False), (2, False, False), (1, True, True))
    ]
