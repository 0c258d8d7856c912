"""Plans of the backward: cuda_src/sm90/flash_bwd.cu (flash_bwd_wide.cu above head_dim 128) where the GPU and the arrays
allow it, else sm80/flash_bwd.cu; with smxx/flash_bwd_{preprocess,postprocess}.cu beside them."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.jit.kernel import LaunchConfig
from fa2cupy.jit.tensor_map import TensorMapSpec
from fa2cupy.kernels import plan as plans
from fa2cupy.kernels.params import BwdParams, BwdTmaParams, TensorMap, pack_strides
from fa2cupy.kernels.plan import CompileJob, KernelLaunch, Plan, TensorMapArgument
from fa2cupy.kernels.tiles import (
    BWD_TILES,
    BWD_TILES_SM90,
    SHARED_MEMORY,
    BwdTile,
    BwdTileSm90,
    backward_tile,
    backward_tile_sm90,
    head_dims_of_rows,
    postprocess_bytes,
    shared_memory_class,
)
from fa2cupy.problem import AttentionProblem

__all__ = ["BackwardPlan", "compile_jobs", "compile_jobs_sm90", "plan_backward"]

_PRE = ("smxx/flash_bwd_preprocess.cu", "flash_bwd_preprocess")
_SM80 = ("sm80/flash_bwd.cu", "flash_bwd")
_SM90 = ("sm90/flash_bwd.cu", "flash_bwd")
_SM90_WIDE = ("sm90/flash_bwd_wide.cu", "flash_bwd")
_POST = ("smxx/flash_bwd_postprocess.cu", "flash_bwd_postprocess")
_TENSORS = ("dout", "q", "k", "v", "out", "lse", "dq", "dk", "dv")
_DQ, _DK, _DV, _WORKSPACE = 6, 7, 8, 9  # positions among the call's pointers
# What the sm_90 kernel reaches by bulk copies: the first two parts of the workspace, and arrays of the caller. It has
# pointers to dk, dv and the rest of the workspace.
_SM90_STATISTICS = ("lse_log2", "softmax_d")
_SM90_MAPS = tuple(
    name for name, kind, *_ in BwdTmaParams._fields_ if kind is TensorMap and name not in _SM90_STATISTICS
)

# Where key blocks are few, several thread blocks share each. That costs each of them a float32 part of dK and dV, which
# the kernel after it sums. By heads: a wave and a half is enough. By steps: what a part costs, and sharing at all.
_ENOUGH_WAVES = 1.5
_PART_STEPS, _SHARING_STEPS = 4.5, 3

_PRE_WARPS = 8
# Key blocks that add to a dQ, on average, up to which it pays that the first of them writes and nobody clears the sum.
_FEW_ADDERS = 16


@dataclass(frozen=True)
class BackwardPlan(Plan):
    """Pointers: dout, q, k, v, out, lse, dq, dk, dv, workspace.

    splits: thread blocks among which the queries that meet a key block, of all its query heads, are shared out.
    """

    tile: BwdTile | BwdTileSm90
    deterministic: bool
    splits: int


def plan_backward(
    problem: AttentionProblem,
    device: DeviceInfo,
    deterministic: bool,
    tile: BwdTile | BwdTileSm90 | None = None,
    family: str | None = None,
    *,
    why_not_sm90: str = "",
) -> BackwardPlan:
    """How to compute the gradients of `problem` on `device`. Needs no GPU.

    tile: in place of the tables', for tuning. family: 'sm80' or 'sm90' (FA2CUPY_KERNEL), or None for the best;
    InvalidArgument if sm_90 is impossible. why_not_sm90: what speaks against it beside the problem and the device.
    """
    if tile is None:
        tile, why_not_sm90 = plans.choose_tile(
            problem,
            device,
            family,
            backward_tile(device.shared_mem_optin, max(problem.head_dim, problem.head_dim_v)),
            backward_tile_sm90(problem.head_dim, problem.head_dim_v),
            _SM90_MAPS,
            why_not_sm90,
        )
    launches, workspace, splits = _launches(problem, device, deterministic, tile)
    return BackwardPlan(problem, launches, workspace, tile, why_not_sm90, deterministic, splits)


def _launches(
    problem: AttentionProblem, device: DeviceInfo, deterministic: bool, tile: BwdTile | BwdTileSm90
) -> tuple[tuple[KernelLaunch, ...], int, int]:
    """The kernels, bytes of workspace, and splits."""
    arch = plans.architecture(device)
    empty = plans.empty_rows(problem)
    rows = problem.seqlen_q - empty
    launches: tuple[KernelLaunch, ...] = ()
    workspace, splits = 0, 1
    m_blocks, n_blocks = -(-rows // tile.block_m), -(-problem.seqlen_k // (tile.cluster * tile.block_n))
    query_tiles = m_blocks * problem.num_heads * problem.batch
    key_tiles = n_blocks * problem.num_heads_k * problem.batch  # of a cluster each
    clusters = device.sm_count // tile.cluster
    if query_tiles and key_tiles:
        strides = dict(problem.strides)
        group = problem.num_heads // problem.num_heads_k
        if isinstance(tile, BwdTile) or deterministic:
            splits = _splits_of_heads(key_tiles, group, clusters)
        else:
            splits = _splits_of_steps(problem, tile, rows, clusters)
        partial = splits > 1
        shares = problem.batch * problem.num_heads_k * splits
        steps = m_blocks * group // splits
        if isinstance(tile, BwdTile):
            row_bytes = (2 + 4) * problem.head_dim + 2 * problem.head_dim_v  # Q, float32 dQ, dO
            queries_bytes = group // splits * rows * row_bytes
            section = plans.heads_per_section(device, problem.causal, shares, n_blocks, queries_bytes)
            if deterministic:
                section = _section_of_turns(device, tile, steps, section if problem.causal else shares)
        elif deterministic:
            section = _section_of_turns_sm90(clusters, tile, steps, shares, problem.causal)
        else:
            section = plans.heads_per_even_section(clusters, problem.causal, shares, n_blocks)
        params = BwdParams()
        for name in _TENSORS:
            setattr(params, f"{name}_strides", pack_strides(name, strides[name]))
        params.shape = plans.shape_params(problem, rows, section)
        params.scale_softmax_log2 = problem.softmax_scale * math.log2(math.e)
        params.softmax_scale = problem.softmax_scale
        params.splits = splits
        params.head_dim_v = problem.head_dim_v
        row = {name: 2 * strides[name][1] for name in ("dout", "q", "out", "dq")} | {"lse": 4 * strides["lse"][2]}
        skipped = {name: empty * size for name, size in row.items()}
        head_dim, head_dim_v = _compiled_head_dims(tile, problem)
        partial_tiles = key_tiles * splits if partial else 0
        offsets, workspace = _workspace(tile, head_dim, head_dim_v, query_tiles, partial_tiles)
        workspaces = tuple((_WORKSPACE, offset) for offset in offsets)
        pointers = tuple((place, skipped.get(name, 0)) for place, name in enumerate(_TENSORS)) + workspaces
        side, post_bytes = _side_defines(
            tile, problem.dtype, head_dim, head_dim_v, problem.aligned, device.cc >= (9, 0)
        )
        keys = problem.batch * problem.num_heads_k * problem.seqlen_k
        widths = (problem.head_dim, problem.head_dim_v)
        sum_blocks = partial * sum(-(-keys * -(-width // 8) // (32 * tile.dq_warps)) for width in widths)
        adding = _adding_defines(tile, _is_cleared(tile, problem.causal, n_blocks, deterministic, partial))

        main = _main_defines(tile, side | adding, head_dim, head_dim_v, problem.causal, deterministic, partial)
        tiles = key_tiles * splits
        overlap = isinstance(tile, BwdTileSm90) and _overlaps(problem.causal, deterministic, tiles, clusters)

        def config(blocks: int, warps: int, shared_mem_bytes: int, overlaps_previous: bool) -> LaunchConfig:
            return LaunchConfig((blocks, 1, 1), (32 * warps, 1, 1), (1, 1, 1), shared_mem_bytes, overlaps_previous)

        def beside(kernel: tuple[str, str], defines: dict[str, int | str], config: LaunchConfig) -> KernelLaunch:
            return KernelLaunch(*kernel, arch, defines, config, bytes(params), pointers)

        shared = int(main["FA2_SHARED_BYTES"])
        if isinstance(tile, BwdTileSm90):
            # One for each multiprocessor, which takes tiles from the list. Deterministic, one for each tile: whoever is
            # waited for must be running, which is certain only of thread blocks that started before.
            blocks = tile.cluster * (tiles if deterministic else min(tiles, clusters))
            flash_bwd = KernelLaunch(
                *(_SM90_WIDE if tile.wide else _SM90),
                plans.SM90_ARCH,
                main,
                config(blocks, tile.num_warps, shared, overlap),
                _tma_params(params),
                pointers[_DK : _DV + 1] + workspaces[len(_SM90_STATISTICS) :],
                _tensor_maps(problem, tile, rows, skipped) + _statistics_maps(tile, query_tiles, offsets),
            )
        else:
            flash_bwd = beside(_SM80, main, config(tiles, tile.num_warps, shared, overlap))
        pre = side | adding | {"FA2_NUM_WARPS": _PRE_WARPS}
        post = side | {"FA2_PARTIAL_DKV": int(partial)}
        launches = (
            beside(_PRE, pre, config(query_tiles, _PRE_WARPS, 0, False)),
            flash_bwd,
            beside(_POST, post, config(query_tiles + sum_blocks, tile.dq_warps, post_bytes, overlap)),
        )
    launches += plans.fill_empty(problem, arch, "dq", _DQ, empty, problem.num_heads)
    if not rows:  # no query sees any key
        for name, position in (("dk", _DK), ("dv", _DV)):
            launches += plans.fill_empty(problem, arch, name, position, problem.seqlen_k, problem.num_heads_k)
    return launches, workspace, splits


def _tma_params(params: BwdParams) -> bytes:
    """The same for the sm_90 kernel, less its maps and pointers."""
    packed = BwdTmaParams()
    for name in (
        "dk_strides",
        "dv_strides",
        "shape",
        "scale_softmax_log2",
        "softmax_scale",
        "splits",
        "head_dim_v",
    ):
        setattr(packed, name, getattr(params, name))
    return bytes(packed)


def _tensor_maps(
    problem: AttentionProblem, tile: BwdTileSm90, rows: int, skipped: Mapping[str, int]
) -> tuple[TensorMapArgument, ...]:
    box_rows = {"dout": tile.block_m, "q": tile.block_m, "k": tile.block_n, "v": tile.block_n}
    return tuple(
        TensorMapArgument(
            getattr(BwdTmaParams, name).offset,
            _TENSORS.index(name),
            skipped.get(name, 0),
            TensorMapSpec.of(*plans.map_dims(problem, name, rows), (64, box_rows[name]), problem.dtype),
        )
        for name in _SM90_MAPS
    )


def _statistics_maps(tile: BwdTileSm90, query_tiles: int, offsets: tuple[int, ...]) -> tuple[TensorMapArgument, ...]:
    """Of `_SM90_STATISTICS`, at the start of the workspace: a row for each block of queries."""
    spec = TensorMapSpec.of((tile.block_m, query_tiles, 1, 1), (tile.block_m, 0, 0), (tile.block_m, 1), "float32")
    return tuple(
        TensorMapArgument(getattr(BwdTmaParams, name).offset, _WORKSPACE, offset, spec)
        for name, offset in zip(_SM90_STATISTICS, offsets[:2], strict=True)
    )


def _compiled_head_dims(tile: BwdTile | BwdTileSm90, problem: AttentionProblem) -> tuple[int, int]:
    """As `padded_head_dims`; of a row of sm_90 those of the row: copies fill up what smaller ones lack with zeros."""
    if isinstance(tile, BwdTile):
        return plans.padded_head_dims(problem, tile.split)
    return tile.head_dim, 0 if problem.head_dim_v == problem.head_dim else tile.head_dim_v or tile.head_dim


def _splits_of_heads(key_tiles: int, group: int, clusters: int) -> int:
    """Among how many blocks the `group` query heads of a key head are shared out: as few as are enough.

    sm_80, and deterministic ones: parts of a head would wait for each other's turns.
    """
    divisors = (n for n in range(1, group + 1) if group % n == 0)
    return next((n for n in divisors if key_tiles * n >= _ENOUGH_WAVES * clusters), group)


def _splits_of_steps(problem: AttentionProblem, tile: BwdTileSm90, rows: int, clusters: int) -> int:
    """Among how many blocks (clusters) of sm_90 the steps of a key block are shared out: the fastest by this count.

    It takes as long as the longest part, or as all steps evenly shared out; full ones in whole waves. No part is empty.
    """
    group = problem.num_heads // problem.num_heads_k
    keys = tile.cluster * tile.block_n
    m_blocks, n_blocks = -(-rows // tile.block_m), -(-problem.seqlen_k // keys)
    first_query = (n_blocks - 1) * keys - (problem.seqlen_k - rows) if problem.causal else 0  # of the last key block
    fewest, most = group * (m_blocks - max(0, first_query) // tile.block_m), group * m_blocks
    key_tiles = n_blocks * problem.num_heads_k * problem.batch
    mean = (fewest + most) / 2

    def steps(splits: int) -> float:
        parts, longest = key_tiles * splits, -(-most // splits)
        evenly = parts * mean / splits / clusters
        waves = -(-parts // clusters) * longest
        time = max(longest, evenly) if problem.causal else waves
        return time + (splits > 1) * (_SHARING_STEPS + _PART_STEPS * parts / clusters)

    # More than four waves of parts gain nothing; the kernel multiplies steps by splits.
    return min(range(1, max(1, min(fewest, 4 * clusters // key_tiles, (2**31 - 1) // most)) + 1), key=steps)


def _overlaps(causal: bool, deterministic: bool, tiles: int, clusters: int) -> bool:
    """Whether flash_bwd, and the kernel after it, start beside the one before.

    With few tiles. With many that gains nothing, and full ones lose: thread blocks that take neighbouring tiles are not
    neighbours any more.
    """
    return not deterministic and tiles <= (8 if causal else 2) * clusters


def _section_of_turns(device: DeviceInfo, tile: BwdTile, steps: int, most: int) -> int:
    """Heads whose blocks are interleaved if dQ is added in turn; `steps` of a block.

    Neighbouring key blocks are launched that many blocks apart, which is to take as long as two turns: then a block
    finds that its turn has come.
    """
    blocks_at_once = device.sm_count * max(1, 8 // tile.num_warps)
    turn_steps = max(1, tile.block_n // tile.block_m)  # kTurnBlocks of sm80/flash_bwd.cu
    return min(most, -(-2 * turn_steps * blocks_at_once // steps))


def _section_of_turns_sm90(clusters: int, tile: BwdTileSm90, steps: int, heads: int, causal: bool) -> int:
    """The same for sm_90, where turns cost less. A causal block comes to its first turn before the block in front of it
    does, so that more heads are best. All sections are of one size if possible. Measured: docs/tuning.md."""
    if not causal:
        share = 0.18 / math.sqrt(steps)
    elif not tile.wide:
        share = 1 / math.sqrt(steps)
    else:
        share = 1.1 / min(16, max(4, steps / 4))
    least = clusters * share
    even = (n for n in range(math.ceil(least), math.ceil(2 * least) + 1) if heads % n == 0)
    return next(even, min(heads, math.ceil(1.4 * least)))


def _workspace(
    tile: BwdTile | BwdTileSm90, head_dim: int, head_dim_v: int, query_tiles: int, partial_tiles: int
) -> tuple[tuple[int, ...], int]:
    """Byte offsets of lse_log2, softmax_d, dq_accum, dq_turn, dk_partial and dv_partial, and the size of all."""
    rows = query_tiles * tile.block_m * 4
    dq_floats = tile.dq_tile_floats() if isinstance(tile, BwdTileSm90) else tile.dq_tile_floats(head_dim)
    turns = query_tiles * tile.dq_parts * 4
    dk, dv = (partial_tiles * tile.cluster * tile.block_n * width * 4 for width in (head_dim, head_dim_v or head_dim))
    offsets, end = [], 0
    for size in (rows, rows, query_tiles * dq_floats * 4, turns, dk, dv):
        offsets.append(end)
        end += -(-size // 256) * 256
    return tuple(offsets), end


def _is_cleared(tile: BwdTile | BwdTileSm90, causal: bool, n_blocks: int, deterministic: bool, partial: bool) -> bool:
    """Whether sums of dQ begin with zeros; else the first key block writes, and all others wait for it."""
    if isinstance(tile, BwdTile):
        return True
    adders = (n_blocks + 1) / 2 if causal else n_blocks
    return not deterministic and (tile.wide or (partial and not causal) or adders > _FEW_ADDERS)


def _adding_defines(tile: BwdTile | BwdTileSm90, clear: bool) -> dict[str, int | str]:
    """Of those who begin sums of dQ."""
    return {"FA2_DQ_PARTS": tile.dq_parts, "FA2_CLEAR_DQ": int(clear)}


def _side_defines(
    tile: BwdTile | BwdTileSm90, dtype: str, head_dim: int, head_dim_v: int, aligned: bool, vector_red: bool
) -> tuple[dict[str, int | str], int]:
    """Of the kernels beside the main one, with the shared memory of the postprocess: what all of them agree on, and no
    more, so that binaries are shared."""
    post_bytes = postprocess_bytes(tile.block_m, head_dim)
    return plans.common_defines(dtype, head_dim, head_dim_v, aligned) | {
        "FA2_BLOCK_M": tile.block_m,
        "FA2_BLOCK_N": tile.cluster * tile.block_n,
        "FA2_NUM_WARPS": tile.dq_warps,
        "FA2_DQ_WARPS": tile.dq_warps,
        "FA2_DQ_WARPS_M": tile.dq_warps_m,
        "FA2_DQ_UNIT": tile.dq_unit,
        "FA2_VECTOR_RED": int(vector_red),
        "FA2_CAUSAL": 0,
        "FA2_PARAMS_BYTES": ctypes.sizeof(BwdParams),
        "FA2_SHARED_BYTES": post_bytes,
    }, post_bytes


def _main_defines(
    tile: BwdTile | BwdTileSm90,
    side: Mapping[str, int | str],
    head_dim: int,
    head_dim_v: int,
    causal: bool,
    deterministic: bool,
    partial: bool,
) -> dict[str, int | str]:
    main = dict(side) | {
        "FA2_NUM_WARPS": tile.num_warps,
        "FA2_CAUSAL": int(causal),
        "FA2_DETERMINISTIC": int(deterministic),
        "FA2_PARTIAL_DKV": int(partial),
    }
    if isinstance(tile, BwdTileSm90):
        return main | {
            "FA2_ALIGNED": 1,
            "FA2_BLOCK_N": tile.block_n,
            "FA2_CLUSTER": tile.cluster,
            "FA2_NUM_STAGES": tile.num_stages,
            "FA2_PARAMS_BYTES": ctypes.sizeof(BwdTmaParams),
            "FA2_SHARED_BYTES": tile.shared_mem_bytes(),
        }
    return main | {
        "FA2_NUM_STAGES": tile.num_stages,
        "FA2_SPLIT": tile.split,
        "FA2_SHARED_BYTES": tile.shared_mem_bytes(head_dim, head_dim_v),
    }


def _jobs(tile: BwdTile | BwdTileSm90, head_dim: int, head_dim_v: int, arch: str, dtype: str) -> list[CompileJob]:
    """Causal and full, deterministic and not, writing dk and dv or a part of them, with the kernels beside it."""
    base = arch.removesuffix("a")
    vector_red = int(base.removeprefix("sm_")) >= 90
    side, post_bytes = _side_defines(tile, dtype, head_dim, head_dim_v, True, vector_red)
    shape = f"{tile.block_m}x{tile.block_n}x{tile.num_warps}"
    label = f"{dtype} {plans.head_dim_label(head_dim, head_dim_v)} {shape}"
    kernel = _SM80 if isinstance(tile, BwdTile) else _SM90_WIDE if tile.wide else _SM90
    jobs = []
    both = (False, True)
    modes = sorted(
        {
            (_is_cleared(tile, causal, n_blocks, deterministic, partial), deterministic, causal, partial)
            for n_blocks, deterministic, causal, partial in itertools.product((1, 99), both, both, both)
        }
    )
    for clear, deterministic, causal, partial in modes:
        adding = _adding_defines(tile, clear)
        main = _main_defines(tile, side | adding, head_dim, head_dim_v, causal, deterministic, partial)
        kind = ("causal" if causal else "full") + " deterministic" * deterministic + " partial" * partial
        kind += " from zeros" * clear
        shared = int(main["FA2_SHARED_BYTES"])
        jobs.append(CompileJob(*kernel, arch, main, f"backward {label} {kind}", shared, tile.spill_bytes))
    for clear in sorted({clear for clear, *_ in modes}):
        pre = side | _adding_defines(tile, clear) | {"FA2_NUM_WARPS": _PRE_WARPS}
        jobs.append(CompileJob(*_PRE, base, pre, f"backward preprocess {label}" + " of zeros" * clear, 0, 0))
    for partial in both:
        post = side | {"FA2_PARTIAL_DKV": int(partial)}
        what = f"backward postprocess {label}" + " partial" * partial
        jobs.append(CompileJob(*_POST, base, post, what, post_bytes, 0))
    return jobs


def compile_jobs(arch: str, dtype: str) -> list[CompileJob]:
    """Every row of the sm_80 kernel's table, at its `head_dims_of_rows`."""
    rows = head_dims_of_rows(BWD_TILES[shared_memory_class(SHARED_MEMORY[arch])])
    return [job for row in rows for job in _jobs(*row, arch, dtype)]


def compile_jobs_sm90(dtype: str) -> list[CompileJob]:
    """Every row of the sm_90 kernel's table."""
    return [
        job for tile in BWD_TILES_SM90 for job in _jobs(tile, tile.head_dim, tile.head_dim_v, plans.SM90_ARCH, dtype)
    ]
