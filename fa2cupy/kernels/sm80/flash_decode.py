"""Attention on a cache on every GPU: cuda_src/sm80/flash_decode.cu. Its rows, its parameters, its launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fa2cupy.cached.call import ARRAYS
from fa2cupy.cached.problem import CacheProblem, Rotary
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.jit.kernel import LaunchConfig
from fa2cupy.kernels import cache_params, common
from fa2cupy.kernels.cache_params import CacheParams
from fa2cupy.kernels.launch import CompileJob, KernelLaunch, Pointer
from fa2cupy.kernels.tiles import SHARED_MEMORY, padded_head_dim, rows_for, shared_memory_class, tile_bytes

__all__ = [
    "DECODE_TILES",
    "DECODE_TILES_8",
    "ROW",
    "DecodeTile",
    "Parts",
    "compile_jobs",
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
    warp has in its ring. q_steps_in_regs: how many of Q's blocks of 16 columns stay in registers. item_bytes: of an
    element of the cache.
    """

    head_dim: int
    block_m: int
    block_n: int
    num_warps: int
    slots: int
    q_steps_in_regs: int
    note: str
    item_bytes: int = 2
    spill_bytes: int = 0

    family: ClassVar[str] = "sm80"
    room: ClassVar[bool] = True

    def shared_mem_bytes(self, head_dim: int, head_dim_v: int = 0, scale_of_page: bool = False) -> int:
        """Of `SharedMemory` in sm80/flash_decode.cu; both are padded."""
        head_dim_v = head_dim_v or head_dim
        slot = sum(_slot_bytes(self.block_n, width, self.item_bytes) for width in (head_dim, head_dim_v))
        slot += -(-8 * self.block_n * scale_of_page // 128) * 128
        combine = 4 * self.num_warps * (_COMBINED_ROWS * (head_dim_v + 8) + 2 * self.block_m) + 16
        total = self.num_warps * self.slots * slot + tile_bytes(self.block_m, head_dim) + combine
        total += _STREAM_BYTES * self.num_warps + _WORK_BYTES + 4 * (self.block_m if self.item_bytes == 1 else 1)
        return -(-total // 128) * 128


def _slot_bytes(rows: int, columns: int, item_bytes: int) -> int:
    """A `Tile`, or a `ByteTile` of sm80/key_bytes.cuh."""
    return tile_bytes(rows, columns) if item_bytes == 2 else -(-rows * (columns + 16) // 128) * 128


DECODE_TILES: dict[int, tuple[DecodeTile, ...]] = {
    232448: (
        DecodeTile(64, 16, 32, 8, 2, 4, "147 KB of slices"),
        DecodeTile(64, 32, 32, 8, 2, 4, "147 KB of slices"),
        DecodeTile(128, 16, 16, 8, 3, 8, "204 KB of slices"),
        DecodeTile(128, 32, 16, 8, 2, 0, "136 KB of slices; Q would take 64 registers"),
        DecodeTile(256, 16, 16, 4, 3, 0, "198 KB of slices; O takes 128 registers"),
    ),
    166912: (
        DecodeTile(64, 16, 32, 8, 2, 4, "147 KB of slices"),
        DecodeTile(64, 32, 32, 8, 2, 4, "147 KB of slices"),
        DecodeTile(128, 16, 16, 8, 2, 8, "136 KB of slices"),
        DecodeTile(128, 32, 16, 6, 2, 0, "102 KB of slices"),
        DecodeTile(256, 16, 16, 4, 2, 0, "132 KB of slices"),
    ),
    101376: (
        DecodeTile(64, 16, 32, 4, 2, 4, "72 KB of slices"),
        DecodeTile(64, 32, 32, 4, 2, 4, "72 KB of slices"),
        DecodeTile(128, 16, 16, 4, 2, 8, "68 KB of slices"),
        DecodeTile(128, 32, 16, 4, 2, 0, "68 KB of slices"),
        DecodeTile(256, 16, 16, 2, 2, 0, "66 KB of slices"),
    ),
}
# Of caches of 8 bits.
DECODE_TILES_8: dict[int, tuple[DecodeTile, ...]] = {
    232448: (
        DecodeTile(64, 16, 32, 8, 3, 4, "120 KB of slices", 1),
        DecodeTile(64, 32, 32, 8, 3, 4, "120 KB of slices", 1),
        DecodeTile(128, 16, 32, 8, 2, 8, "144 KB of slices", 1),
        DecodeTile(128, 32, 16, 8, 3, 0, "108 KB of slices", 1),
        DecodeTile(256, 16, 16, 4, 4, 0, "136 KB of slices", 1, 48),  # new keys in int8, scales by page
    ),
    166912: (
        DecodeTile(64, 16, 32, 8, 2, 4, "80 KB of slices", 1),
        DecodeTile(64, 32, 32, 8, 2, 4, "80 KB of slices", 1),
        DecodeTile(128, 16, 32, 6, 2, 8, "108 KB of slices", 1),
        DecodeTile(128, 32, 16, 8, 2, 0, "72 KB of slices", 1),
        DecodeTile(256, 16, 16, 4, 3, 0, "102 KB of slices", 1),
    ),
    101376: (
        DecodeTile(64, 16, 32, 4, 2, 4, "40 KB of slices", 1),
        DecodeTile(64, 32, 32, 4, 2, 4, "40 KB of slices", 1),
        DecodeTile(128, 16, 32, 4, 2, 8, "72 KB of slices", 1),
        DecodeTile(128, 32, 16, 4, 2, 0, "36 KB of slices", 1),
        DecodeTile(256, 16, 16, 4, 2, 0, "68 KB of slices", 1),
    ),
}

ROW = DecodeTile


def rows(problem: CacheProblem, device: DeviceInfo) -> list[DecodeTile]:
    """Of the smallest head_dim that is large enough, the best first: the fewest blocks of packed rows, then the fewest
    rows that are none. With split_size the batch has no say in it.
    """
    tables = DECODE_TILES_8 if problem.is_quantised else DECODE_TILES
    table = tables[shared_memory_class(device.shared_mem_optin)]
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
        return cls(count, min(tile.block_m, problem.packed_rows), _padded(tile, problem.head_dim_v))

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
    head_dim, head_dim_v = _padded(tile, problem.head_dim), _padded(tile, problem.head_dim_v)
    arch, blocks = common.arch_of(device), device.sm_count
    params, pointers = cache_params.packed(problem, new_keys=new_keys)
    parts = Parts.of(problem, device, tile)
    setattr(params, "part_rows", parts.rows)  # noqa: B010 - of a part
    setattr(params, "part_slices", (problem.split_size or 0) // tile.block_n)  # noqa: B010 - of a part
    workspace = len(ARRAYS)
    pointers += [
        Pointer(CacheParams.partial_out.offset, workspace, 0),
        Pointer(CacheParams.partial_lse.offset, workspace, parts.lse_offset),
        Pointer(CacheParams.counters.offset, workspace + 1, 0),
    ]
    shared = tile.shared_mem_bytes(head_dim, head_dim_v, problem.has_scale_of_page)
    scattered, scale_first = cache_params.scattered(problem, tile.block_n), problem.softmax_scale <= 0
    defines = _defines(tile, problem.dtype, head_dim, head_dim_v, problem.aligned, scattered, scale_first, shared)
    defines |= cache_params.feature_defines(problem, arch, new_keys=new_keys)
    if problem.split_size is not None:
        defines["FA2_FIXED_PARTS"] = 1
    config = LaunchConfig((blocks, 1, 1), (32 * tile.num_warps, 1, 1), shared_mem_bytes=shared)
    return KernelLaunch(*_KERNEL, arch, defines, config, bytes(params), tuple(pointers))


def _padded(tile: DecodeTile, head_dim: int) -> int:
    """Bytes are widened 32 columns at a time."""
    return padded_head_dim(head_dim, 2 // tile.item_bytes)


def _defines(
    tile: DecodeTile,
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    aligned: bool,
    scattered: int,
    scale_first: bool,
    shared: int,
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
        "FA2_SHARED_BYTES": shared,
    }


_Ways = tuple[tuple[str, int | None, dict[str, Any]], ...]

# What is compiled ahead: caches without pages and with pages of both kinds, and new keys that are turned; of 8 bits
# both kinds, one of them with scales by page.
_AHEAD: _Ways = (
    ("rows", None, {}),
    ("pages", 1, {}),
    ("pages of slices", 128, {}),
    ("pages, new keys", 1, {"seqlen_new": 1, "rotary": Rotary(32, 1, False, True, True)}),
)
_AHEAD_8: _Ways = (
    ("e4m3", 128, {"kv_dtype": "float8_e4m3fn"}),
    ("int8, scales of pages, new keys", 1, {"kv_dtype": "int8", "seqlen_new": 1, "scales": 2 * ((1.0, (1, 0, 1)),)}),
)


def compile_jobs(arch: str, dtype: str) -> list[CompileJob]:
    """Every row of the tables at its widest, in each of the ways of `_AHEAD`."""
    size = shared_memory_class(SHARED_MEMORY[arch])
    device = cache_params.device_of(arch)
    jobs = []
    for tables, ways in ((DECODE_TILES, _AHEAD), (DECODE_TILES_8, _AHEAD_8)):
        for tile in tables[size]:
            for name, page, more in ways:
                problem = cache_params.problem_of(tile.head_dim, dtype, page, more)
                each = launch(problem, device, tile, new_keys=problem.seqlen_new is not None)
                label = f"decode {dtype} head_dim {tile.head_dim} {tile.block_m}x{tile.block_n}x{tile.num_warps} {name}"
                shared = each.config.shared_mem_bytes
                jobs.append(CompileJob(*_KERNEL, arch, each.defines, label, shared, tile.spill_bytes))
    return jobs
