"""What both main kernels of a backward on sm_90 share (cuda_src/sm90/backward.cuh): who does what, and the launch."""

from __future__ import annotations

import abc
import ctypes
import math
from collections.abc import Callable, Mapping
from ctypes import c_uint64
from dataclasses import dataclass
from typing import ClassVar

from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.jit.tensor_map import TensorMapSpec
from fa2cupy.kernels import backward, common
from fa2cupy.kernels.backward import ARRAYS, WORKSPACES, Backward, Cleared, Defines, Order, Work
from fa2cupy.kernels.launch import CompileJob, KernelLaunch, TensorMapArgument
from fa2cupy.kernels.order import (
    Banded,
    heads_per_banded_section,
    heads_per_even_section,
    heads_per_listed_section,
    heads_per_turn_section,
)
from fa2cupy.kernels.params import BwdTmaParams
from fa2cupy.kernels.sm90 import tma
from fa2cupy.problem import AttentionProblem

__all__ = ["BwdTileSm90", "compile_jobs", "defines", "head_dims", "launch", "objection", "order"]

_MAPS = tuple(name for name in tma.mapped(BwdTmaParams) if name in ARRAYS)
_STATISTICS = tuple(name for name in tma.mapped(BwdTmaParams) if name in WORKSPACES)
_PLAIN = tuple(name for name, kind, *_ in BwdTmaParams._fields_ if kind is c_uint64)
_NUMBERS = ("dk_strides", "dv_strides", "shape", "scale_softmax_log2", "softmax_scale", "splits", "head_dim_v")

# What sharing a key block's steps costs, in steps: each part, and sharing at all.
_PART_STEPS, _SHARING_STEPS = 4.5, 3


@dataclass(frozen=True, slots=True)
class BwdTileSm90(abc.ABC):
    """A row of the tables of sm_90.

    head_dim and head_dim_v: the largest ones that this row serves, and those that its kernel is compiled for. block_m
    query rows x block_n keys. num_stages: buffers of Q, of dO and of dS.
    """

    head_dim: int
    block_m: int
    block_n: int
    num_stages: int
    note: str
    spill_bytes: int = 0
    head_dim_v: int = 0

    family: ClassVar[str] = "sm90"
    cluster: ClassVar[int]

    @property
    def dq_unit(self) -> int:
        """Columns of dQ that no two warps share: a panel."""
        return 64

    @property
    def room(self) -> bool:
        """Scores of 128 queries leave no registers."""
        return self.block_m < 128

    @property
    @abc.abstractmethod
    def num_warps(self) -> int:
        """With those of the warpgroup that copies."""

    @property
    @abc.abstractmethod
    def dq_warps(self) -> int:
        """Warps that share a tile of dQ."""

    @property
    @abc.abstractmethod
    def dq_parts(self) -> int:
        """Parts of a tile of dQ with counters of their own."""

    @abc.abstractmethod
    def shared_mem_bytes(self) -> int:
        """Of `SharedMemory` in the kernel's source."""

    def serves(self, problem: AttentionProblem) -> bool:
        return problem.head_dim <= self.head_dim and problem.head_dim_v <= (self.head_dim_v or self.head_dim)

    @property
    def dq_warps_m(self) -> int:
        """A warpgroup computes 64 rows x 64 columns of dQ, or all columns."""
        return self.block_m // 16

    def dq_tile_floats(self, head_dim: int) -> int:
        """kDqTileFloats of common/dq_accum.cuh."""
        return self.block_m * -(-head_dim // self.dq_unit) * self.dq_unit


def objection(problem: AttentionProblem, device: DeviceInfo) -> str:
    """What speaks against a kernel of sm_90, or the empty string."""
    return tma.objection(problem, device, _MAPS)


def head_dims(problem: AttentionProblem, tile: BwdTileSm90) -> tuple[int, int]:
    """What is compiled for a problem: those of the row. Copies fill up what smaller ones lack with zeros."""
    return tile.head_dim, 0 if problem.head_dim_v == problem.head_dim else tile.head_dim_v or tile.head_dim


def order(work: Work, cleared: Cleared, causal_turns: Callable[[int], float]) -> Order:
    """Steps are shared out where key blocks are few. Even sections; if dQ is added in turn, of as many heads as keep
    neighbours apart.

    causal_turns: of the steps of a block, the heads for each cluster that runs that this takes.
    """
    causal, deterministic, banded = work.problem.causal, work.deterministic, work.band is not None
    masked = work.problem.mask is not None
    splits = backward.splits_of_heads(work) if deterministic else _splits_of_steps(work)
    shares = work.key_heads * splits
    if deterministic:
        steps = work.steps[1] * work.group // splits
        section = _section_of_turns(work.clusters, steps, shares, causal_turns if causal or banded else _full_turns)
    elif work.lists:
        section = heads_per_listed_section(work.clusters, shares, work.n_blocks, work.blocks_of_a_sequence[1])
    elif work.band is not None:
        beside = work.keys - work.rows  # the key that query 0 stands beside
        reach = beside + work.band.right, work.band.left - beside
        row_bytes = (
            work.group // splits * (6 * work.problem.head_dim + 2 * work.problem.head_dim_v)
        )  # Q, sums of dQ, dO
        band = Banded(work.wide, work.tile.block_m, work.keys, work.rows, *reach, row_bytes)
        section = heads_per_banded_section(work.device, work.clusters, shares, band)
    else:
        section = heads_per_even_section(work.clusters, causal or masked, shares, work.n_blocks)
    # With many tiles, starting beside the kernel before gains nothing, and full ones lose: thread blocks that take
    # neighbouring tiles are not neighbours any more.
    overlap = not deterministic and work.key_tiles * splits <= (8 if causal else 2) * work.clusters
    clear = masked or cleared(causal, work.adding_blocks, deterministic, splits > 1)  # some queries no tile may meet
    return Order(splits, section, clear, overlap)


def _full_turns(steps: int) -> float:
    return 0.18 / math.sqrt(steps)


def _section_of_turns(clusters: int, steps: int, heads: int, turns: Callable[[int], float]) -> int:
    """Heads whose blocks are interleaved if dQ is added in turn; `steps` of a block; `turns`: as in `order`.

    Turns cost less than in sm_80. A causal block comes to its first turn before the block in front of it does, so that
    more heads are best. Measured: docs/lab/hopper_backward.md.
    """
    return heads_per_turn_section(clusters * turns(steps), heads)


def _splits_of_steps(work: Work) -> int:
    """Among how many blocks (clusters) of sm_90 the steps of a key block are shared out: the fastest by this count.

    It takes as long as the longest part, or as all steps evenly shared out; full ones in whole waves. No part is empty.
    """
    if work.lists or work.problem.mask is not None:  # as `backward.splits_of_heads`
        return 1
    problem, group, clusters, key_tiles = work.problem, work.group, work.clusters, work.key_tiles
    fewest, most = (group * steps for steps in work.steps)
    mean = (fewest + most) / 2

    def steps(splits: int) -> float:
        parts, longest = key_tiles * splits, -(-most // splits)
        evenly = parts * mean / splits / clusters
        waves = -(-parts // clusters) * longest
        time = max(longest, evenly) if problem.causal else waves
        return time + (splits > 1) * (_SHARING_STEPS + _PART_STEPS * parts / clusters)

    # More than four waves of parts gain nothing; the kernel multiplies steps by splits.
    return min(range(1, max(1, min(fewest, 4 * clusters // key_tiles, (2**31 - 1) // most)) + 1), key=steps)


def launch(kernel: tuple[str, str], whole: Backward, tile: BwdTileSm90) -> KernelLaunch:
    """A cluster for each that runs at once, which takes tiles from the list.

    Deterministic, one for each tile: whoever is waited for must be running, which is certain only of thread blocks that
    started before.
    """
    work, order = whole.work, whole.order
    causal, deterministic = work.problem.causal, work.deterministic
    params = BwdTmaParams()
    for name in _NUMBERS:
        setattr(params, name, getattr(whole.params, name))
    box_rows = {"dout": tile.block_m, "q": tile.block_m, "k": tile.block_n, "v": tile.block_n}
    maps = tma.tensor_maps(work.problem, BwdTmaParams, box_rows, work.rows, whole.skipped, whole.names)
    tiles = work.key_tiles * order.splits
    clusters = tiles if deterministic else min(tiles, work.clusters)
    return common.kernel_launch(
        work.problem,
        kernel,
        tma.ARCH,
        defines(tile, whole.side_defines, order.cleared, deterministic, causal, order.partial),
        backward.config(tile.cluster * clusters, tile.num_warps, tile.shared_mem_bytes(), order.overlap),
        params,
        {name: whole.pointers[name] for name in _PLAIN},
        whole.names,
        maps + _statistics_maps(whole),
        (work.lists,),
    )


def _statistics_maps(whole: Backward) -> tuple[TensorMapArgument, ...]:
    """Of the first two workspaces: a row for each block of queries."""
    block_m, tiles = whole.work.tile.block_m, whole.work.query_tiles
    spec = TensorMapSpec.of((block_m, tiles, 1, 1), (block_m, 0, 0), (block_m, 1), "float32")
    return tuple(
        TensorMapArgument(getattr(BwdTmaParams, name).offset, *whole.pointers[name], spec) for name in _STATISTICS
    )


def defines(
    tile: BwdTileSm90,
    side: Mapping[str, int | str],
    cleared: bool,
    deterministic: bool,
    causal: bool,
    partial: bool,
) -> Defines:
    """Of a main kernel; side: `backward.side_defines`."""
    both = dict(side) | backward.adding_defines(tile, cleared)
    return backward.main_defines(tile, both, causal, deterministic, partial) | {
        "FA2_ALIGNED": 1,
        "FA2_BLOCK_N": tile.block_n,
        "FA2_CLUSTER": tile.cluster,
        "FA2_NUM_STAGES": tile.num_stages,
        "FA2_PARAMS_BYTES": ctypes.sizeof(BwdTmaParams),
        "FA2_SHARED_BYTES": tile.shared_mem_bytes(),
    }


def compile_jobs(
    kernel: tuple[str, str], arch: str, label: str, tile: BwdTileSm90, side: Defines, cleared: Cleared
) -> list[CompileJob]:
    """Of a row."""
    return backward.main_jobs(kernel, arch, label, tile, cleared, lambda *mode: defines(tile, side, *mode))
