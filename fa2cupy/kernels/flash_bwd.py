"""Plans of the backward: cuda_src/sm80/flash_bwd.cu and smxx/flash_bwd_{preprocess,postprocess,combine}.cu."""

from __future__ import annotations

import ctypes
import itertools
import math
from dataclasses import dataclass

from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.jit.kernel import LaunchConfig
from fa2cupy.kernels import plan as plans
from fa2cupy.kernels.params import BwdParams, pack_strides
from fa2cupy.kernels.plan import CompileJob, KernelLaunch, Plan
from fa2cupy.kernels.tiles import (
    BWD_TILES,
    SHARED_MEMORY,
    BwdTile,
    backward_tile,
    head_dims_of_rows,
    shared_memory_class,
)
from fa2cupy.problem import AttentionProblem

__all__ = ["BackwardPlan", "compile_jobs", "plan_backward"]

_PRE = ("smxx/flash_bwd_preprocess.cu", "flash_bwd_preprocess")
_MAIN = ("sm80/flash_bwd.cu", "flash_bwd")
_POST = ("smxx/flash_bwd_postprocess.cu", "flash_bwd_postprocess")
_COMBINE = ("smxx/flash_bwd_combine.cu", "flash_bwd_combine")
_TENSORS = ("dout", "q", "k", "v", "out", "lse", "dq", "dk", "dv")
_DQ, _DK, _DV, _WORKSPACE = 6, 7, 8, 9  # positions among the call's pointers

# Thread blocks per multiprocessor that are enough: a wave and a half. With fewer, the query heads of a key head are
# shared out among several blocks, which costs each of them a float32 part of dK and dV, and a kernel that sums these.
_ENOUGH_WAVES = 1.5


@dataclass(frozen=True)
class BackwardPlan(Plan):
    """Pointers: dout, q, k, v, out, lse, dq, dk, dv, workspace.

    head_splits: thread blocks among which the query heads of a key head are shared out.
    """

    tile: BwdTile
    deterministic: bool
    head_splits: int


def plan_backward(
    problem: AttentionProblem, device: DeviceInfo, deterministic: bool, tile: BwdTile | None = None
) -> BackwardPlan:
    """How to compute the gradients of `problem` on `device`. Needs no GPU. `tile` overrides the table, for tuning."""
    widest = max(problem.head_dim, problem.head_dim_v)
    tile = tile or backward_tile(device.shared_mem_optin, widest)
    head_dim, head_dim_v = plans.padded_head_dims(problem, tile.split)
    arch = plans.architecture(device)
    empty = plans.empty_rows(problem)
    rows = problem.seqlen_q - empty
    launches: tuple[KernelLaunch, ...] = ()
    workspace, head_splits = 0, 1
    m_blocks, n_blocks = -(-rows // tile.block_m), -(-problem.seqlen_k // tile.block_n)
    query_tiles = m_blocks * problem.num_heads * problem.batch
    key_tiles = n_blocks * problem.num_heads_k * problem.batch
    if query_tiles and key_tiles:
        strides = dict(problem.strides)
        group = problem.num_heads // problem.num_heads_k
        head_splits = _head_splits(key_tiles, group, device)
        heads = group // head_splits  # of a thread block
        queries_bytes = heads * rows * ((2 + 4) * problem.head_dim + 2 * problem.head_dim_v)  # Q, float32 dQ, dO
        shares = problem.batch * problem.num_heads_k * head_splits
        section = plans.heads_per_section(device, problem.causal, shares, n_blocks, queries_bytes)
        if deterministic:
            section = _section_of_turns(device, tile, m_blocks * heads, section if problem.causal else shares)
        params = BwdParams()
        for name in _TENSORS:
            setattr(params, f"{name}_strides", pack_strides(name, strides[name]))
        params.shape = plans.shape_params(problem, rows, section)
        params.scale_softmax_log2 = problem.softmax_scale * math.log2(math.e)
        params.softmax_scale = problem.softmax_scale
        params.head_splits = head_splits
        params.head_dim_v = problem.head_dim_v
        row = {name: 2 * strides[name][1] for name in ("dout", "q", "out", "dq")} | {"lse": 4 * strides["lse"][2]}
        partial = head_splits > 1
        partial_tiles = key_tiles * head_splits if partial else 0
        offsets, workspace = _workspace(tile, head_dim, head_dim_v, query_tiles, partial_tiles)
        pointers = tuple((place, empty * row.get(name, 0)) for place, name in enumerate(_TENSORS))
        pointers += tuple((_WORKSPACE, offset) for offset in offsets)
        causal, aligned, vector_red = problem.causal, problem.aligned, device.cc >= (9, 0)
        main, side = _defines(
            tile, problem.dtype, head_dim, head_dim_v, aligned, causal, deterministic, partial, vector_red
        )
        num_threads = 32 * tile.num_warps
        steps = [
            (_PRE, side, (query_tiles, 1, 1), 0),
            (_MAIN, main, (key_tiles * head_splits, 1, 1), tile.shared_mem_bytes(head_dim, head_dim_v)),
            (_POST, side, (query_tiles, 1, 1), tile.postprocess_bytes(head_dim)),
        ]
        if partial:
            chunks = problem.batch * problem.num_heads_k * problem.seqlen_k * -(-widest // 8)
            steps.append((_COMBINE, side, (-(-chunks // num_threads), 2, 1), 0))
        for (source, name), defines, grid, shared in steps:
            config = LaunchConfig(grid, (num_threads, 1, 1), shared_mem_bytes=shared)
            launches += (KernelLaunch(source, name, arch, defines, config, bytes(params), pointers),)
    launches += plans.fill_empty(problem, arch, "dq", _DQ, empty, problem.num_heads)
    if not rows:  # no query sees any key
        for name, position in (("dk", _DK), ("dv", _DV)):
            launches += plans.fill_empty(problem, arch, name, position, problem.seqlen_k, problem.num_heads_k)
    return BackwardPlan(problem, launches, workspace, tile, deterministic, head_splits)


def _head_splits(key_tiles: int, group: int, device: DeviceInfo) -> int:
    """Among how many blocks the `group` query heads of a key head are shared out: as few as are enough."""
    divisors = (n for n in range(1, group + 1) if group % n == 0)
    return next((n for n in divisors if key_tiles * n >= _ENOUGH_WAVES * device.sm_count), group)


def _section_of_turns(device: DeviceInfo, tile: BwdTile, steps: int, most: int) -> int:
    """Heads whose blocks are interleaved if dQ is added in turn; `steps` of a block.

    Neighbouring key blocks are launched that many blocks apart, which is to take as long as two turns: then a block
    finds that its turn has come.
    """
    blocks_at_once = device.sm_count * max(1, 8 // tile.num_warps)
    turn_steps = max(1, tile.block_n // tile.block_m)  # kTurnBlocks of sm80/flash_bwd.cu
    return min(most, -(-2 * turn_steps * blocks_at_once // steps))


def _workspace(
    tile: BwdTile, head_dim: int, head_dim_v: int, query_tiles: int, partial_tiles: int
) -> tuple[tuple[int, ...], int]:
    """Byte offsets of lse_log2, softmax_d, dq_accum, dq_turn, dk_partial and dv_partial, and the size of all."""
    rows = query_tiles * tile.block_m * 4
    dq = query_tiles * tile.dq_tile_floats(head_dim) * 4
    dk, dv = (partial_tiles * tile.block_n * width * 4 for width in (head_dim, head_dim_v or head_dim))
    offsets, end = [], 0
    for size in (rows, rows, dq, query_tiles * 4, dk, dv):
        offsets.append(end)
        end += -(-size // 256) * 256
    return tuple(offsets), end


def _defines(
    tile: BwdTile,
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    aligned: bool,
    causal: bool,
    deterministic: bool,
    partial: bool,
    vector_red: bool,
) -> tuple[dict[str, int | str], dict[str, int | str]]:
    """Of the main kernel, and of those beside it: what they agree on, and no more, so that binaries are shared."""
    side = plans.common_defines(dtype, head_dim, head_dim_v, aligned) | {
        "FA2_BLOCK_M": tile.block_m,
        "FA2_BLOCK_N": tile.block_n,
        "FA2_NUM_WARPS": tile.num_warps,
        "FA2_DQ_WARPS_M": tile.dq_warps_m,
        "FA2_VECTOR_RED": int(vector_red),
        "FA2_PARAMS_BYTES": ctypes.sizeof(BwdParams),
    }
    main = side | {
        "FA2_NUM_STAGES": tile.num_stages,
        "FA2_SPLIT": tile.split,
        "FA2_CAUSAL": int(causal),
        "FA2_DETERMINISTIC": int(deterministic),
        "FA2_PARTIAL_DKV": int(partial),
        "FA2_SHARED_BYTES": tile.shared_mem_bytes(head_dim, head_dim_v),
    }
    return main, side | {"FA2_CAUSAL": 0, "FA2_SHARED_BYTES": tile.postprocess_bytes(head_dim)}


def compile_jobs(arch: str, dtype: str) -> list[CompileJob]:
    """Every row of the table, at its `head_dims_of_rows`: causal and full, deterministic and not, each writing dk and
    dv or its part of them, with the kernels beside it."""
    jobs = []
    kinds = list(itertools.product((False, True), repeat=3))
    for tile, head_dim, head_dim_v in head_dims_of_rows(BWD_TILES[shared_memory_class(SHARED_MEMORY[arch])]):
        shape = f"{tile.block_m}x{tile.block_n}x{tile.num_warps}"
        label = f"{dtype} {plans.head_dim_label(head_dim, head_dim_v)} {shape}"
        vector_red = int(arch.removeprefix("sm_")) >= 90
        for causal, deterministic, partial in kinds:
            widths = (head_dim, head_dim_v)
            main, side = _defines(tile, dtype, *widths, True, causal, deterministic, partial, vector_red)
            kind = ("causal" if causal else "full") + " deterministic" * deterministic + " partial" * partial
            shared = tile.shared_mem_bytes(head_dim, head_dim_v)
            jobs.append(CompileJob(*_MAIN, arch, main, f"backward {label} {kind}", shared, tile.spill_bytes))
        jobs.append(CompileJob(*_PRE, arch, side, f"backward preprocess {label}", 0, 0))
        jobs.append(CompileJob(*_COMBINE, arch, side, f"backward combine {label}", 0, 0))
        shared = tile.postprocess_bytes(head_dim)
        jobs.append(CompileJob(*_POST, arch, side, f"backward postprocess {label}", shared, 0))
    return jobs
