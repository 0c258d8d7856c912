"""What the kernels of one backward agree on: how its work is counted and shared out, its parameters and workspace, and
the defines that binaries have in common.

Three kernels: smxx/flash_bwd_preprocess.cu, the main one (flash_bwd of sm80 or sm90), smxx/flash_bwd_postprocess.cu.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.jit.kernel import LaunchConfig
from fa2cupy.kernels import common
from fa2cupy.kernels.common import Where
from fa2cupy.kernels.launch import CompileJob, KernelLaunch
from fa2cupy.kernels.listed import Lists, Segments, Shorts
from fa2cupy.kernels.params import BwdParams, pack_strides
from fa2cupy.kernels.tiles import tile_bytes
from fa2cupy.problem import AttentionProblem
from fa2cupy.spec import MASK_BLOCK, Row, WindowSpec

__all__ = [
    "ARRAYS",
    "PREPROCESS_WARPS",
    "SINK_SUMS",
    "WORKSPACES",
    "Backward",
    "BwdRow",
    "Defines",
    "Order",
    "Work",
    "adding_defines",
    "config",
    "main_defines",
    "main_jobs",
    "modes",
    "row_label",
    "side_defines",
    "splits_of_heads",
]

ARRAYS = ("dout", "q", "k", "v", "out", "lse", "dq", "dk", "dv")
WORKSPACES = ("lse_log2", "softmax_d", "dq_accum", "dq_turn", "dk_partial", "dv_partial")  # as they lie there
# Behind them where there are sinks; their gradient need not be wanted, which `backward_workspace_bytes` does not know.
SINK_SUMS = "sink_sums"
PREPROCESS_WARPS = 8  # each leaves one of those sums
_ALIGNMENT = 256  # bytes, of each

# Where key blocks are few, several thread blocks share each: a wave and a half of them is enough.
_ENOUGH_WAVES = 1.5
_WARPS_OF_SHORTS = 16  # on a multiprocessor

Defines = dict[str, int | str]
# (causal, blocks of keys, deterministic, partial) -> whether sums of dQ begin with zeros
Cleared = Callable[[bool, int, bool, bool], bool]


class BwdRow(Row, Protocol):
    """A row of the backward's tables.

    cluster: thread blocks that take neighbouring key blocks together. dq_parts: parts of a tile of dQ that count their
    turns by themselves. dq_unit: columns of dQ that no two warps share. dq_warps: warps that share a tile of dQ,
    dq_warps_m of them along its rows.
    """

    @property
    def cluster(self) -> int: ...
    @property
    def dq_parts(self) -> int: ...
    @property
    def dq_unit(self) -> int: ...
    @property
    def dq_warps(self) -> int: ...
    @property
    def dq_warps_m(self) -> int: ...
    @property
    def spill_bytes(self) -> int: ...
    def dq_tile_floats(self, head_dim: int) -> int: ...


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to do, counted in tiles of a row. empty: leading queries that see no key, and are left out, as
    leading keys are that no query sees.

    Where tiles come from lists, their numbers are the most that there can be, of all sequences together.

    short_keys: of segments, see `listed.Segments`. shorts: what is to be done is those in this list.
    """

    problem: AttentionProblem
    device: DeviceInfo
    deterministic: bool
    tile: BwdRow
    empty: int
    short_keys: int = 0
    shorts: Shorts | None = None

    @property
    def rows(self) -> int:
        return self.problem.seqlen_q - self.empty

    @property
    def keys(self) -> int:
        return self.problem.seqlen_k - self.problem.empty_keys

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.problem.num_heads // self.problem.num_heads_k

    @property
    def wide(self) -> int:
        """Keys of a block, of all of a cluster."""
        return self.tile.cluster * self.tile.block_n

    @property
    def lists(self) -> Lists | Shorts | None:
        """Where tiles come from, if not from the shape."""
        return self.shorts or self.tile_lists

    @property
    def tile_lists(self) -> Lists | None:
        """Those of the main kernel."""
        if self.problem.lengths is None:
            return None
        return Lists.of(self.problem, self.tile.block_m, self.wide, has_keys=True, short_keys=self.short_keys)

    @property
    def segments(self) -> Segments | None:
        """Behind the lists in the workspace."""
        lists, lengths = self.tile_lists, self.problem.lengths
        if lists is None or lengths is None or not lengths.segments:
            return None
        return Segments(self.problem.batch, lists, self.short_keys)

    @property
    def end_of_lists(self) -> int:
        """Bytes of the workspace that lists, of tiles or of blocks, and segments take."""
        if self.problem.mask is not None:
            return self.problem.mask.offsets["end"]
        last = self.shorts.segments if self.shorts else self.segments or self.tile_lists
        return last.end if last else 0

    def blocks(self, tiles: int, warps: int) -> int:
        """For so many tiles. Those that take one after the other, of a list of short segments, are as many as run at
        once."""
        return min(tiles, self.device.sm_count * max(1, _WARPS_OF_SHORTS // warps)) if self.shorts else tiles

    @property
    def batch(self) -> int:
        """Rows of the batch, each with tiles of its own."""
        return 1 if self.lists else self.problem.batch

    @property
    def m_blocks(self) -> int:
        """Of a mask's blocks all parts, behind the last query too."""
        if self.problem.mask is not None:
            return self.problem.mask.query_blocks * (MASK_BLOCK // self.tile.block_m)
        return self.lists.tiles_of_head_q if self.lists else -(-self.rows // self.tile.block_m)

    @property
    def n_blocks(self) -> int:
        """Of a cluster each."""
        if self.problem.mask is not None:
            return self.problem.mask.key_blocks * (MASK_BLOCK // self.wide)
        return self.lists.tiles_of_head_k if self.lists else -(-self.keys // self.wide)

    @property
    def blocks_of_a_sequence(self) -> tuple[int, int]:
        """m_blocks and n_blocks of one; where only the device knows its lengths, of one of average length."""
        lengths = self.problem.lengths
        if lengths is None:
            return self.m_blocks, self.n_blocks
        rows = -(-self.rows // max(1, lengths.sequences)) if lengths.packed_q else self.rows
        keys = -(-self.keys // max(1, lengths.sequences)) if lengths.packed_k else self.keys
        return -(-rows // self.tile.block_m), -(-keys // self.wide)

    @property
    def band(self) -> WindowSpec | None:
        """The window, if a kernel has to know it."""
        window = self.problem.window
        return None if window is None or window.only_drops else window

    @property
    def has_sink_sums(self) -> bool:
        """Whether the gradient of sinks is wanted."""
        return self.problem.sinks is not None and self.problem.sinks.gradient

    @property
    def adding_blocks(self) -> int:
        """Of a cluster each, the most of them that meet a tile of queries."""
        _, n_blocks = self.blocks_of_a_sequence
        if self.band is None:
            return n_blocks
        return min(n_blocks, 1 + -(-(self.tile.block_m + self.band.left + self.band.right) // self.wide))

    @property
    def steps(self) -> tuple[int, int]:
        """The fewest and the most tiles of a head's queries that a key block (of a cluster) meets.

        1 and about the most, where only the device knows.
        """
        wide, block_m, band = self.wide, self.tile.block_m, self.band
        if self.lists:
            m_blocks, _ = self.blocks_of_a_sequence
            most = 1 + -(-(wide + band.left + band.right) // block_m) if band else m_blocks
            return 1, max(1, min(m_blocks, most))
        beside = self.keys - self.rows  # the key that query 0 stands beside
        last_key = (self.n_blocks - 1) * wide  # of the last block, the first
        if band is not None:  # the first block's queries and the last one's are cut off
            most = min(self.m_blocks, 1 + -(-(wide + band.left + band.right) // block_m))
            of_first = -(-min(self.rows, min(wide, self.keys) - beside + band.left) // block_m)
            of_last = self.m_blocks - max(0, last_key - beside - band.right) // block_m
            return min(of_first, of_last, max(1, most - 1)), most
        first_query = last_key - beside if self.problem.causal else 0
        return self.m_blocks - max(0, first_query) // block_m, self.m_blocks

    @property
    def query_tiles(self) -> int:
        return self.m_blocks * self.problem.num_heads * self.batch

    @property
    def key_heads(self) -> int:
        return self.problem.num_heads_k * self.batch

    @property
    def key_tiles(self) -> int:
        """Of a cluster each."""
        return self.n_blocks * self.key_heads

    @property
    def clusters(self) -> int:
        """That run at once, one thread block on a multiprocessor."""
        return self.device.sm_count // self.tile.cluster


@dataclass(frozen=True, slots=True)
class Order:
    """Who does what, and when.

    splits: thread blocks (clusters) among which the queries that meet a key block, of all its query heads, are shared
    out; each beyond the first costs a float32 part of dK and dV, which the postprocess sums. section: heads whose key
    blocks are interleaved. cleared: sums of dQ begin with zeros; else the first key block writes, and all others wait
    for it. overlap: the main kernel, and the one after it, start beside the one before.
    """

    splits: int
    section: int
    cleared: bool
    overlap: bool = False

    @property
    def partial(self) -> bool:
        return self.splits > 1


@dataclass(frozen=True)
class Backward:
    """Work and order, the struct that all of its kernels are given (the main one of sm_90 a part of it), and pointers.

    head_dims: what the kernels are compiled for, head_dim_v 0 where it is the same. pointers: by the fields of params.
    sink_sums: where these lie, by the field of their block, if the gradient of sinks is wanted.
    """

    work: Work
    order: Order
    head_dims: tuple[int, int]
    params: BwdParams
    names: tuple[str, ...]
    pointers: Mapping[str, Where]
    sink_sums: Mapping[str, Where]
    skipped: Mapping[str, int]
    workspace_bytes: int

    @classmethod
    def of(cls, work: Work, order: Order, head_dims: tuple[int, int]) -> Backward:
        """Of a list of short segments the statistics lie where the workspaces do that nobody needs any more."""
        problem = work.problem
        strides = dict(problem.strides)
        params = BwdParams()
        for name in ARRAYS:
            setattr(params, f"{name}_strides", pack_strides(name, strides[name]))
        params.shape = common.shape_params(problem, work.rows, order.section)
        params.shape.batch = work.batch
        params.scale_softmax_log2 = problem.softmax_scale * math.log2(math.e)
        kept = problem.dropout.kept if problem.dropout else 1.0  # of what dK and dQ are summed from
        params.softmax_scale = problem.softmax_scale / kept
        params.splits = order.splits
        params.head_dim_v = problem.head_dim_v
        names = common.pointer_names(problem, ARRAYS)
        skipped = common.skipped_bytes(problem, work.empty)
        offsets, workspace_bytes = _workspace(work, order, head_dims)
        pointers = {name: (names.index(name), skipped.get(name, 0)) for name in ARRAYS}
        pointers |= {name: (len(names), offsets[name]) for name in WORKSPACES}
        sums = {SINK_SUMS: (len(names), offsets[SINK_SUMS])} if work.has_sink_sums else {}
        return cls(work, order, head_dims, params, names, pointers, sums, skipped, workspace_bytes)

    @property
    def side_defines(self) -> Defines:
        work = self.work
        side = side_defines(
            work.tile, work.problem.dtype, *self.head_dims, work.problem.aligned, work.device.cc >= (9, 0)
        )
        return side if work.problem.mask is None else {**side, "FA2_WHOLE_QUERIES": 1}

    def launch(
        self,
        kernel: tuple[str, str],
        arch: str,
        defines: Defines,
        config: LaunchConfig,
        more: Mapping[str, Where] | None = None,
    ) -> KernelLaunch:
        """Of a kernel that gets the whole struct. more: pointers into blocks behind it."""
        return common.kernel_launch(
            self.work.problem,
            kernel,
            arch,
            defines,
            config,
            self.params,
            {**self.pointers, **(more or {})},
            self.names,
            listed=(self.work.lists,),
        )


def config(blocks: int, warps: int, shared_mem_bytes: int = 0, overlap: bool = False) -> LaunchConfig:
    return LaunchConfig((blocks, 1, 1), (32 * warps, 1, 1), (1, 1, 1), shared_mem_bytes, overlap)


def splits_of_heads(work: Work) -> int:
    """Among how many blocks the query heads of a key head are shared out: as few as are enough.

    sm_80, and deterministic ones: parts of a head would wait for each other's turns.
    """
    if work.lists or work.problem.mask is not None:  # no kernel sums parts of keys that have a place of their own
        return 1
    divisors = (n for n in range(1, work.group + 1) if work.group % n == 0)
    return next((n for n in divisors if work.key_tiles * n >= _ENOUGH_WAVES * work.clusters), work.group)


def _workspace(work: Work, order: Order, head_dims: tuple[int, int]) -> tuple[dict[str, int], int]:
    """Byte offsets of `WORKSPACES`, and of `SINK_SUMS` where there are any, behind the lists, and the size of all.

    Of short segments, which come when the others are done, statistics and sums only, where those others' tiles were.
    """
    tile, (head_dim, head_dim_v) = work.tile, head_dims
    statistics = work.query_tiles * (1 if work.shorts else tile.block_m) * 4
    dq = 0 if work.shorts else work.query_tiles * tile.dq_tile_floats(head_dim) * 4
    turns = 0 if work.shorts else work.query_tiles * tile.dq_parts * 4
    partial_rows = work.key_tiles * order.splits * tile.cluster * tile.block_n if order.partial else 0
    dk, dv = (partial_rows * width * 4 for width in (head_dim, head_dim_v or head_dim))
    offsets, end = {}, work.end_of_lists
    sizes = dict(zip(WORKSPACES, (statistics, statistics, dq, turns, dk, dv), strict=True))
    if work.problem.sinks is not None:
        sums = work.shorts.tiles_of_head_k * work.problem.num_heads if work.shorts else work.query_tiles
        sizes[SINK_SUMS] = sums * PREPROCESS_WARPS * 4
    for name, size in sizes.items():
        offsets[name] = end
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def adding_defines(tile: BwdRow, cleared: bool) -> Defines:
    """Of those who begin sums of dQ."""
    return {"FA2_DQ_PARTS": tile.dq_parts, "FA2_CLEAR_DQ": int(cleared)}


def side_defines(tile: BwdRow, dtype: str, head_dim: int, head_dim_v: int, aligned: bool, vector_red: bool) -> Defines:
    """Of the kernels beside the main one: what all of them agree on, and no more, so that binaries are shared.

    FA2_SHARED_BYTES are those of `SharedMemory` in smxx/flash_bwd_postprocess.cu.
    """
    return common.common_defines(dtype, head_dim, head_dim_v, aligned) | {
        "FA2_BLOCK_M": tile.block_m,
        "FA2_BLOCK_N": tile.cluster * tile.block_n,
        "FA2_NUM_WARPS": tile.dq_warps,
        "FA2_DQ_WARPS": tile.dq_warps,
        "FA2_DQ_WARPS_M": tile.dq_warps_m,
        "FA2_DQ_UNIT": tile.dq_unit,
        "FA2_VECTOR_RED": int(vector_red),
        "FA2_CAUSAL": 0,
        "FA2_PARAMS_BYTES": ctypes.sizeof(BwdParams),
        "FA2_SHARED_BYTES": tile_bytes(tile.block_m, head_dim),
    }


def main_defines(
    tile: BwdRow, side: Mapping[str, int | str], causal: bool, deterministic: bool, partial: bool
) -> Defines:
    """Of main kernels, with those of both `side_defines` and `adding_defines`."""
    return dict(side) | {
        "FA2_NUM_WARPS": tile.num_warps,
        "FA2_CAUSAL": int(causal),
        "FA2_DETERMINISTIC": int(deterministic),
        "FA2_PARTIAL_DKV": int(partial),
    }


def row_label(dtype: str, head_dim: int, head_dim_v: int, tile: BwdRow) -> str:
    """Of the jobs of a row."""
    shape = f"{tile.block_m}x{tile.block_n}x{tile.num_warps}"
    return f"{dtype} {common.head_dim_label(head_dim, head_dim_v)} {shape}"


def modes(cleared: Cleared) -> list[tuple[bool, bool, bool, bool]]:
    """All (cleared, deterministic, causal, partial) that occur, with few blocks of keys and with many."""
    both = (False, True)
    return sorted(
        {
            (cleared(causal, n_blocks, deterministic, partial), deterministic, causal, partial)
            for n_blocks, deterministic, causal, partial in itertools.product((1, 99), both, both, both)
        }
    )


def main_jobs(
    kernel: tuple[str, str],
    arch: str,
    label: str,
    tile: BwdRow,
    cleared: Cleared,
    defines: Callable[[bool, bool, bool, bool], Defines],
) -> list[CompileJob]:
    """A main kernel for a row: causal and full, deterministic and not, writing dk and dv or a part of them.

    defines: of (cleared, deterministic, causal, partial).
    """
    jobs = []
    for mode in modes(cleared):
        clear, deterministic, causal, partial = mode
        kind = ("causal" if causal else "full") + " deterministic" * deterministic + " partial" * partial
        kind += " from zeros" * clear
        main = defines(*mode)
        shared = int(main["FA2_SHARED_BYTES"])
        jobs.append(CompileJob(*kernel, arch, main, f"backward {label} {kind}", shared, tile.spill_bytes))
    return jobs
