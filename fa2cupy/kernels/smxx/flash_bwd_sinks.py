"""After everything else of a backward: cuda_src/smxx/flash_bwd_sinks.cu, the gradient of sinks, a thread block for each
head."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from fa2cupy.kernels import backward, common
from fa2cupy.kernels.backward import PREPROCESS_WARPS, SINK_SUMS, Backward, Work
from fa2cupy.kernels.common import Where
from fa2cupy.kernels.launch import CompileJob, KernelLaunch
from fa2cupy.kernels.params import SinksBwdParams, composed
from fa2cupy.kernels.tiles import ELEMENT_BYTES
from fa2cupy.spec import OF_SINKS, SinksSpec, SoftmaxSpec

__all__ = ["compile_jobs", "launches"]

_KERNEL = (OF_SINKS, "flash_bwd_sinks")
_WARPS = 8


def launches(
    work: Work, names: Sequence[str], whole: Backward | None, shorts: Backward | None
) -> tuple[KernelLaunch, ...]:
    """Nothing to launch where nobody wants it, or there is no head. names: of the call's pointers. whole, and shorts of
    short segments: the backwards whose preprocess leaves sums; None if there is none.
    """
    problem = work.problem
    if not work.has_sink_sums or problem.num_heads == 0:
        return ()
    tiles = 0 if whole is None else work.m_blocks
    params = SinksBwdParams(work.batch, problem.num_heads, tiles, PREPROCESS_WARPS)
    pointers: dict[str, Where] = {} if whole is None else dict(whole.sink_sums)
    if shorts is not None:
        pointers["short_sums"] = shorts.sink_sums[SINK_SUMS]
    return (
        common.kernel_launch(
            problem,
            _KERNEL,
            common.arch_of(work.device),
            _defines(problem.dtype, problem.causal),
            backward.config(problem.num_heads, _WARPS, _shared_bytes(problem.dtype)),
            params,
            pointers,
            names,
            listed=(work.lists, work.segments),
        ),
    )


def _shared_bytes(dtype: str) -> int:
    """Of `SharedMemory` there."""
    return max(4, ELEMENT_BYTES[dtype]) * _WARPS


def _defines(dtype: str, causal: bool) -> dict[str, int | str]:
    """The tile is nobody's: what asks for sequences knows of one."""
    return common.common_defines(dtype, 16, 0, False) | {
        "FA2_BLOCK_M": 16,
        "FA2_BLOCK_N": 16,
        "FA2_NUM_WARPS": _WARPS,
        "FA2_CAUSAL": int(causal),
        "FA2_PARAMS_BYTES": ctypes.sizeof(SinksBwdParams),
        "FA2_SHARED_BYTES": _shared_bytes(dtype),
    }


def compile_jobs(arch: str, dtype: str) -> list[CompileJob]:
    """Of lengths that the host knows, without a gradient of lse and with one."""
    jobs = []
    for dlse in (False, True):
        specs = (SinksSpec(False, True, True), *((SoftmaxSpec((0, 0, 0)),) if dlse else ()))
        defines = _defines(dtype, False)
        for spec in specs:
            defines |= spec.defines()
        blocks = tuple(type(spec.params()) for spec in specs)
        defines["FA2_PARAMS_BYTES"] = ctypes.sizeof(composed(SinksBwdParams, blocks))
        label = f"backward {dtype} sinks" + " dlse" * dlse
        jobs.append(CompileJob(*_KERNEL, arch, defines, label, _shared_bytes(dtype), 0))
    return jobs
