"""What there is to compile ahead of time: every row of every table, for an architecture."""

from __future__ import annotations

from fa2cupy.errors import UnsupportedDevice
from fa2cupy.kernels import backward, planner
from fa2cupy.kernels.launch import CompileJob
from fa2cupy.kernels.planner import BackwardKernel
from fa2cupy.kernels.sm80 import flash_decode
from fa2cupy.kernels.sm90 import tma
from fa2cupy.kernels.smxx import append_keys, flash_bwd_postprocess, flash_bwd_preprocess, flash_bwd_sinks, merge
from fa2cupy.kernels.tiles import SHARED_MEMORY

__all__ = ["compile_jobs"]


def compile_jobs(arch: str, all_rows: bool) -> list[CompileJob]:
    """Everything there is to compile for an architecture (`sm_80`); not `all_rows`: head_dim 64 and 128 in bfloat16.

    `sm_90a` is what an H100 runs: its own kernels, and those of `sm_90`.
    UnsupportedDevice for an architecture that has no tiles.
    """
    base = arch.removesuffix("a")
    if base not in SHARED_MEMORY:
        raise UnsupportedDevice(f"{arch} is not supported: one of {', '.join(SHARED_MEMORY)} is needed")
    families = {"sm80": base}
    if arch == tma.ARCH:
        families = {"sm90": arch} | families
    jobs: list[CompileJob] = []
    for dtype in ("bfloat16", "float16") if all_rows else ("bfloat16",):
        for family, own in families.items():
            for forward in planner.FORWARD:
                if forward.ROW.family == family:
                    jobs += forward.compile_jobs(own, dtype)
            for main in planner.BACKWARD:
                if main.ROW.family == family:
                    jobs += _backward_jobs(main, own, dtype)
        jobs += flash_bwd_sinks.compile_jobs(base, dtype)
        jobs += merge.compile_jobs(base, dtype)
        jobs += flash_decode.compile_jobs(base, dtype)
        jobs += append_keys.compile_jobs(base, dtype)
    return jobs if all_rows else [job for job in jobs if job.defines["FA2_HEAD_DIM"] in (64, 128)]


def _backward_jobs(main: BackwardKernel, arch: str, dtype: str) -> list[CompileJob]:
    """Of a main kernel, and of those beside it."""
    base = arch.removesuffix("a")
    vector_red = int(base.removeprefix("sm_")) >= 90
    jobs: list[CompileJob] = []
    for tile, head_dim, head_dim_v in main.rows_ahead(arch):
        side = backward.side_defines(tile, dtype, head_dim, head_dim_v, True, vector_red)
        label = backward.row_label(dtype, head_dim, head_dim_v, tile)
        jobs += main.compile_jobs(arch, label, tile, head_dim, head_dim_v, side)
        jobs += flash_bwd_preprocess.compile_jobs(base, label, tile, side, main.cleared)
        jobs += flash_bwd_postprocess.compile_jobs(base, label, side)
    return jobs
