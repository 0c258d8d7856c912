"""Many new keys and values into a cache: cuda_src/smxx/append_keys.cu, a warp for each of them."""

from __future__ import annotations

from typing import Any

from fa2cupy.cached.problem import CacheProblem, Rotary
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.jit.kernel import LaunchConfig
from fa2cupy.kernels import cache_params, common
from fa2cupy.kernels.launch import CompileJob, KernelLaunch

__all__ = ["compile_jobs", "launch"]

_KERNEL = ("smxx/append_keys.cu", "append_keys")
_WARPS = 8
_BLOCKS = 4  # of a multiprocessor, at most


# What is compiled ahead, whatever the head_dim: name, keys of a page, fields of the problem.
_AHEAD: tuple[tuple[str, int | None, dict[str, Any]], ...] = (
    ("rows", None, {}),
    ("pages, turned", 16, {"rotary": Rotary(32, 1, False, True, True)}),
    ("pages, e4m3", 16, {"kv_dtype": "float8_e4m3fn"}),
    ("pages, int8, turned", 16, {"kv_dtype": "int8", "rotary": Rotary(32, 1, False, True, True)}),
)


def launch(problem: CacheProblem, device: DeviceInfo) -> KernelLaunch:
    """Before the kernel that computes with them."""
    arch = common.arch_of(device)
    params, pointers = cache_params.packed(problem, new_keys=True, scores=False)
    keys = (problem.seqlen_new or 0) * problem.num_heads_k * (1 if problem.is_packed else problem.batch)
    defines = common.common_defines(problem.dtype, 16, 0, problem.aligned) | {
        "FA2_BLOCK_M": 16,
        "FA2_BLOCK_N": 16,
        "FA2_NUM_WARPS": _WARPS,
        "FA2_SLOTS": 1,
        "FA2_SCATTERED": min(1, cache_params.scattered(problem, 1)),
        "FA2_CAUSAL": 0,
    }
    return KernelLaunch(
        *_KERNEL,
        arch,
        defines | cache_params.feature_defines(problem, arch, new_keys=True, scores=False),
        LaunchConfig((max(1, min(-(-keys // _WARPS), _BLOCKS * device.sm_count)), 1, 1), (32 * _WARPS, 1, 1)),
        bytes(params),
        tuple(pointers),
    )


def compile_jobs(arch: str, dtype: str) -> list[CompileJob]:
    jobs = []
    for name, page, more in _AHEAD:
        problem = cache_params.problem_of(64, dtype, page, {"seqlen_new": 512, **more})
        each = launch(problem, cache_params.device_of(arch))
        jobs.append(CompileJob(*_KERNEL, arch, each.defines, f"append {dtype} {name}", 0, 0))
    return jobs
