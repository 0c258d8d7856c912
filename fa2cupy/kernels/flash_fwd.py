"""Plans of the forward: cuda_src/sm80/flash_fwd.cu."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.jit.kernel import LaunchConfig
from fa2cupy.kernels import plan as plans
from fa2cupy.kernels.params import FwdParams, pack_strides
from fa2cupy.kernels.plan import CompileJob, KernelLaunch, Plan
from fa2cupy.kernels.tiles import FWD_TILES, SHARED_MEMORY, FwdTile, forward_tile, padded_head_dim, shared_memory_class
from fa2cupy.problem import AttentionProblem

__all__ = ["ForwardPlan", "compile_jobs", "plan_forward"]

_SOURCE, _NAME = "sm80/flash_fwd.cu", "flash_fwd"
_POINTERS = ("q", "k", "v", "out", "lse")


@dataclass(frozen=True)
class ForwardPlan(Plan):
    """Pointers: q, k, v, out, lse."""

    tile: FwdTile


def plan_forward(problem: AttentionProblem, device: DeviceInfo, tile: FwdTile | None = None) -> ForwardPlan:
    """How to compute `problem` on `device`. Needs no GPU. `tile` overrides the table, for tuning."""
    head_dim = padded_head_dim(problem.head_dim)
    arch = plans.architecture(device)
    empty = plans.empty_rows(problem)
    rows = problem.seqlen_q - empty
    tile = tile or forward_tile(
        device.shared_mem_optin, device.sm_count, head_dim, rows, problem.batch * problem.num_heads
    )
    launches: tuple[KernelLaunch, ...] = ()
    blocks = -(-rows // tile.block_m) * problem.num_heads * problem.batch
    if blocks:
        strides = dict(problem.strides)
        keys_bytes = 4 * problem.seqlen_k * problem.head_dim
        group = problem.num_heads // problem.num_heads_k
        heads_k = problem.batch * problem.num_heads_k
        blocks_k = -(-rows // tile.block_m) * group
        section = plans.heads_per_section(device, problem.causal, heads_k, blocks_k, keys_bytes) * group
        params = FwdParams()
        for name in _POINTERS:
            setattr(params, f"{name}_strides", pack_strides(name, strides[name]))
        params.shape = plans.shape_params(problem, rows, section)
        params.scale_softmax_log2 = problem.softmax_scale * math.log2(math.e)
        row = {"q": 2 * strides["q"][1], "out": 2 * strides["out"][1], "lse": 4 * strides["lse"][2]}
        launches += (
            KernelLaunch(
                _SOURCE,
                _NAME,
                arch,
                _defines(tile, problem.dtype, head_dim, problem.aligned, problem.causal, problem.softmax_scale <= 0),
                LaunchConfig(
                    (blocks, 1, 1), (32 * tile.num_warps, 1, 1), shared_mem_bytes=tile.shared_mem_bytes(head_dim)
                ),
                bytes(params),
                tuple((place, empty * row.get(name, 0)) for place, name in enumerate(_POINTERS)),
            ),
        )
    launches += plans.fill_empty(problem, arch, "out", 3, empty, problem.num_heads, lse_position=4)
    return ForwardPlan(problem, launches, 0, tile)


def _defines(
    tile: FwdTile, dtype: str, head_dim: int, aligned: bool, causal: bool, scale_first: bool
) -> dict[str, int | str]:
    return plans.common_defines(dtype, head_dim, aligned) | {
        "FA2_BLOCK_M": tile.block_m,
        "FA2_BLOCK_N": tile.block_n,
        "FA2_NUM_WARPS": tile.num_warps,
        "FA2_Q_STEPS_IN_REGS": min(tile.q_steps_in_regs, head_dim // 16),
        "FA2_CAUSAL": int(causal),
        "FA2_SCALE_FIRST": int(scale_first),
        "FA2_PARAMS_BYTES": ctypes.sizeof(FwdParams),
        "FA2_SHARED_BYTES": tile.shared_mem_bytes(head_dim),
    }


def compile_jobs(arch: str, dtype: str) -> list[CompileJob]:
    """Every row of the table, at its widest head_dim, causal and not."""
    return [
        CompileJob(
            _SOURCE,
            _NAME,
            arch,
            _defines(tile, dtype, tile.head_dim, True, causal, False),
            f"forward {dtype} head_dim {tile.head_dim} {'causal' if causal else 'full'} "
            f"{tile.block_m}x{tile.block_n}x{tile.num_warps}",
            tile.shared_mem_bytes(tile.head_dim),
            tile.spill_bytes,
        )
        for tile in FWD_TILES[shared_memory_class(SHARED_MEMORY[arch])]
        for causal in (False, True)
    ]
