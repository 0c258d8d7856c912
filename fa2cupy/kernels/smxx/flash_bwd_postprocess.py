"""After the main kernel of a backward: cuda_src/smxx/flash_bwd_postprocess.cu, a thread block for each tile of dQ, and
some that sum the parts of dK and dV."""

from __future__ import annotations

from fa2cupy.kernels import backward, common
from fa2cupy.kernels.backward import Backward, Defines
from fa2cupy.kernels.launch import CompileJob, KernelLaunch

__all__ = ["compile_jobs", "launch"]

_KERNEL = ("smxx/flash_bwd_postprocess.cu", "flash_bwd_postprocess")
_VECTOR = 8  # elements that a thread sums


def launch(whole: Backward) -> KernelLaunch:
    work, partial = whole.work, whole.order.partial
    problem, warps = work.problem, work.tile.dq_warps
    keys = work.key_heads * work.keys
    widths = (problem.head_dim, problem.head_dim_v)
    sum_blocks = partial * sum(-(-keys * -(-width // _VECTOR) // (32 * warps)) for width in widths)
    defines = _defines(whole.side_defines, partial)
    shared = int(defines["FA2_SHARED_BYTES"])
    return whole.launch(
        _KERNEL,
        common.arch_of(work.device),
        defines,
        backward.config(work.query_tiles + sum_blocks, warps, shared, whole.order.overlap),
    )


def _defines(side: Defines, partial: bool) -> Defines:
    return side | {"FA2_PARTIAL_DKV": int(partial)}


def compile_jobs(arch: str, label: str, side: Defines) -> list[CompileJob]:
    """Beside a main kernel's jobs for a row."""
    shared = int(side["FA2_SHARED_BYTES"])
    return [
        CompileJob(
            *_KERNEL,
            arch,
            _defines(side, partial),
            f"backward postprocess {label}" + " partial" * partial,
            shared,
            0,
        )
        for partial in (False, True)
    ]
