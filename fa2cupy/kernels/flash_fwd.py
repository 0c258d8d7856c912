"""Plans of the forward: cuda_src/sm90/flash_fwd.cu where the GPU and the arrays allow it, else sm80/flash_fwd.cu."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.jit.kernel import LaunchConfig
from fa2cupy.jit.tensor_map import TensorMapSpec
from fa2cupy.kernels import plan as plans
from fa2cupy.kernels.params import FwdParams, FwdTmaParams, Shape, TensorMap, pack_strides
from fa2cupy.kernels.plan import CompileJob, KernelLaunch, Plan, TensorMapArgument
from fa2cupy.kernels.tiles import (
    FWD_TILES,
    FWD_TILES_SM90,
    SHARED_MEMORY,
    FwdTile,
    FwdTileSm90,
    forward_tile,
    forward_tile_sm90,
    head_dims_of_rows,
    shared_memory_class,
)
from fa2cupy.problem import AttentionProblem

__all__ = ["ForwardPlan", "compile_jobs", "compile_jobs_sm90", "plan_forward"]

_SM80 = ("sm80/flash_fwd.cu", "flash_fwd")
_SM90 = ("sm90/flash_fwd.cu", "flash_fwd")
_POINTERS = ("q", "k", "v", "out", "lse")
_OUT, _LSE = 3, 4  # positions among the call's pointers
# Arrays that the sm_90 kernel reaches by bulk copies, and through plain pointers.
_SM90_MAPS = tuple(name for name, kind, *_ in FwdTmaParams._fields_ if kind is TensorMap)
_SM90_POINTERS = tuple(name for name in _POINTERS if name not in _SM90_MAPS)
_WARPGROUP_ROWS = 64  # query rows of a warpgroup, which copies its own


@dataclass(frozen=True)
class ForwardPlan(Plan):
    """Pointers: q, k, v, out, lse."""

    tile: FwdTile | FwdTileSm90


def plan_forward(
    problem: AttentionProblem,
    device: DeviceInfo,
    tile: FwdTile | FwdTileSm90 | None = None,
    family: str | None = None,
    *,
    why_not_sm90: str = "",
) -> ForwardPlan:
    """How to compute `problem` on `device`. Needs no GPU.

    tile: in place of the tables', for tuning. family: 'sm80' or 'sm90' (FA2CUPY_KERNEL), or None for the best;
    InvalidArgument if sm_90 is impossible. why_not_sm90: what speaks against it beside the problem and the device.
    """
    empty = plans.empty_rows(problem)
    rows = problem.seqlen_q - empty
    if tile is None:
        widest, heads = max(problem.head_dim, problem.head_dim_v), problem.batch * problem.num_heads
        tile, why_not_sm90 = plans.choose_tile(
            problem,
            device,
            family,
            forward_tile(device.shared_mem_optin, device.sm_count, widest, rows, heads),
            forward_tile_sm90(problem.head_dim, problem.head_dim_v, problem.causal, rows),
            _SM90_MAPS,
            why_not_sm90,
        )
    launches: tuple[KernelLaunch, ...] = ()
    if rows * problem.num_heads * problem.batch:
        launches += (
            _launch_sm90(problem, device, tile, empty)
            if isinstance(tile, FwdTileSm90)
            else _launch_sm80(problem, device, tile, empty),
        )
    arch = plans.architecture(device)
    launches += plans.fill_empty(problem, arch, "out", _OUT, empty, problem.num_heads, lse_position=_LSE)
    return ForwardPlan(problem, launches, 0, tile, why_not_sm90)


def _row_bytes(problem: AttentionProblem) -> dict[str, int]:
    """Bytes between the query rows of an array."""
    strides = dict(problem.strides)
    return {"q": 2 * strides["q"][1], "out": 2 * strides["out"][1], "lse": 4 * strides["lse"][2]}


def _order(
    problem: AttentionProblem, device: DeviceInfo, rows: int, block_m: int, persistent: bool
) -> tuple[int, Shape]:
    """How many tiles there are, and in which order they are taken (`tile_of` in CUDA)."""
    m_blocks = -(-rows // block_m)
    group = problem.num_heads // problem.num_heads_k
    heads_k = problem.batch * problem.num_heads_k
    if persistent:
        section = plans.heads_per_even_section(device.sm_count, problem.causal, heads_k, m_blocks * group)
    else:
        keys_bytes = 2 * problem.seqlen_k * (problem.head_dim + problem.head_dim_v)
        section = plans.heads_per_section(device, problem.causal, heads_k, m_blocks * group, keys_bytes)
    return m_blocks * problem.num_heads * problem.batch, plans.shape_params(problem, rows, section * group)


def _launch_sm80(problem: AttentionProblem, device: DeviceInfo, tile: FwdTile, empty: int) -> KernelLaunch:
    head_dim, head_dim_v = plans.padded_head_dims(problem)
    shared_mem_bytes = tile.shared_mem_bytes(head_dim, head_dim_v)
    strides = dict(problem.strides)
    params = FwdParams()
    for name in _POINTERS:
        setattr(params, f"{name}_strides", pack_strides(name, strides[name]))
    tiles, params.shape = _order(problem, device, problem.seqlen_q - empty, tile.block_m, False)
    params.scale_softmax_log2 = problem.softmax_scale * math.log2(math.e)
    params.head_dim_v = problem.head_dim_v
    row = _row_bytes(problem)
    return KernelLaunch(
        *_SM80,
        plans.architecture(device),
        _defines(
            tile, problem.dtype, head_dim, head_dim_v, problem.aligned, problem.causal, problem.softmax_scale <= 0
        ),
        LaunchConfig((tiles, 1, 1), (32 * tile.num_warps, 1, 1), shared_mem_bytes=shared_mem_bytes),
        bytes(params),
        tuple((place, empty * row.get(name, 0)) for place, name in enumerate(_POINTERS)),
    )


def _launch_sm90(problem: AttentionProblem, device: DeviceInfo, tile: FwdTileSm90, empty: int) -> KernelLaunch:
    rows = problem.seqlen_q - empty
    strides = dict(problem.strides)
    params = FwdTmaParams()
    for name in _SM90_POINTERS:
        setattr(params, f"{name}_strides", pack_strides(name, strides[name]))
    tiles, params.shape = _order(problem, device, rows, tile.block_m, True)
    params.scale_softmax_log2 = problem.softmax_scale * math.log2(math.e)
    skipped = {name: empty * size for name, size in _row_bytes(problem).items()}
    box_rows = {"q": _WARPGROUP_ROWS, "k": tile.block_n, "v": tile.block_n, "out": _WARPGROUP_ROWS}
    maps = tuple(
        TensorMapArgument(
            getattr(FwdTmaParams, name).offset,
            _POINTERS.index(name),
            skipped.get(name, 0),
            TensorMapSpec.of(*plans.map_dims(problem, name, rows), (64, box_rows[name]), problem.dtype),
        )
        for name in _SM90_MAPS
    )
    blocks = (min(tiles, device.sm_count), 1, 1)  # one for each multiprocessor, which takes tiles from the list
    return KernelLaunch(
        *_SM90,
        plans.SM90_ARCH,
        _defines_sm90(tile, problem.dtype, problem.causal, problem.softmax_scale <= 0),
        LaunchConfig(blocks, (32 * tile.num_warps, 1, 1), shared_mem_bytes=tile.shared_mem_bytes()),
        bytes(params),
        tuple((_POINTERS.index(name), skipped[name]) for name in _SM90_POINTERS),
        maps,
    )


def _defines(
    tile: FwdTile, dtype: str, head_dim: int, head_dim_v: int, aligned: bool, causal: bool, scale_first: bool
) -> dict[str, int | str]:
    return plans.common_defines(dtype, head_dim, head_dim_v, aligned) | {
        "FA2_BLOCK_M": tile.block_m,
        "FA2_BLOCK_N": tile.block_n,
        "FA2_NUM_WARPS": tile.num_warps,
        "FA2_Q_STEPS_IN_REGS": min(tile.q_steps_in_regs, head_dim // 16),
        "FA2_CAUSAL": int(causal),
        "FA2_SCALE_FIRST": int(scale_first),
        "FA2_PARAMS_BYTES": ctypes.sizeof(FwdParams),
        "FA2_SHARED_BYTES": tile.shared_mem_bytes(head_dim, head_dim_v),
    }


def _defines_sm90(tile: FwdTileSm90, dtype: str, causal: bool, scale_first: bool) -> dict[str, int | str]:
    """Of the row's head dims: copies fill up what smaller ones lack with zeros."""
    return plans.common_defines(dtype, tile.head_dim, tile.head_dim_v, True) | {
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


def _label(tile: FwdTile | FwdTileSm90, dtype: str, head_dim: int, head_dim_v: int, causal: bool) -> str:
    kind = "causal" if causal else "full"
    shape = f"{tile.block_m}x{tile.block_n}x{tile.num_warps}"
    if isinstance(tile, FwdTileSm90) and tile.short:
        shape += f" up to {tile.max_seqlen_q} queries"
    return f"forward {dtype} {plans.head_dim_label(head_dim, head_dim_v)} {kind} {shape}"


def compile_jobs(arch: str, dtype: str) -> list[CompileJob]:
    """Every row of the sm_80 kernel's table, at its `head_dims_of_rows`, causal and not."""
    return [
        CompileJob(
            *_SM80,
            arch,
            _defines(tile, dtype, head_dim, head_dim_v, True, causal, False),
            _label(tile, dtype, head_dim, head_dim_v, causal),
            tile.shared_mem_bytes(head_dim, head_dim_v),
            tile.spill_bytes,
        )
        for tile, head_dim, head_dim_v in head_dims_of_rows(FWD_TILES[shared_memory_class(SHARED_MEMORY[arch])])
        for causal in (False, True)
    ]


def compile_jobs_sm90(dtype: str) -> list[CompileJob]:
    """Every row of the sm_90 kernel's tables."""
    return [
        CompileJob(
            *_SM90,
            plans.SM90_ARCH,
            _defines_sm90(tile, dtype, causal, False),
            _label(tile, dtype, tile.head_dim, tile.head_dim_v, causal),
            tile.shared_mem_bytes(),
            tile.spill_bytes,
        )
        for causal, table in FWD_TILES_SM90.items()
        for tile in table
    ]
