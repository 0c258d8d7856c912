"""From a problem and a device to a plan: which kernels, which tiles, which launches. Nothing here sees an array."""

from __future__ import annotations

from fa2cupy.errors import UnsupportedDevice
from fa2cupy.kernels import flash_bwd, flash_fwd
from fa2cupy.kernels.flash_bwd import BackwardPlan, plan_backward
from fa2cupy.kernels.flash_fwd import ForwardPlan, plan_forward
from fa2cupy.kernels.plan import CompileJob, KernelLaunch
from fa2cupy.kernels.tiles import SHARED_MEMORY

__all__ = [
    "BackwardPlan",
    "CompileJob",
    "ForwardPlan",
    "KernelLaunch",
    "compile_jobs",
    "plan_backward",
    "plan_forward",
]


def compile_jobs(arch: str, all_rows: bool) -> list[CompileJob]:
    """Everything there is to compile for an architecture (`sm_80`); not `all_rows`: head_dim 64 and 128 in bfloat16.

    `sm_90a` is what an H100 runs: its own kernels, and those of `sm_90`.
    UnsupportedDevice for an architecture that has no tiles.
    """
    base = arch.removesuffix("a")
    if base not in SHARED_MEMORY:
        raise UnsupportedDevice(f"{arch} is not supported: one of {', '.join(SHARED_MEMORY)} is needed")
    jobs: list[CompileJob] = []
    for dtype in ("bfloat16", "float16") if all_rows else ("bfloat16",):
        if arch == "sm_90a":
            jobs += flash_fwd.compile_jobs_sm90(dtype) + flash_bwd.compile_jobs_sm90(dtype)
        jobs += flash_fwd.compile_jobs(base, dtype) + flash_bwd.compile_jobs(base, dtype)
    return jobs if all_rows else [job for job in jobs if job.defines["FA2_HEAD_DIM"] in (64, 128)]
