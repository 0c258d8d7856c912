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


def compile_jobs(arch: str, all_rows: bool, wide: bool = False) -> list[CompileJob]:
    """Everything there is to compile for an architecture (`sm_80`); not `all_rows`: head_dim 64 and 128, of the 16-bit
    types bfloat16 alone.

    `sm_90a` is what an H100 runs: its own kernels, and those of `sm_90`. wide: of float32, tf32 and float64 instead.
    UnsupportedDevice for an architecture that has no tiles.
    """
    base = arch.removesuffix("a")
    if base not in SHARED_MEMORY:
        raise UnsupportedDevice(f"{arch} is not supported: one of {', '.join(SHARED_MEMORY)} is needed")
    families = {"sm80": base}
    if arch == tma.ARCH and not wide:
        families = {"sm90": arch} | families
    dtypes = ("float32", "tf32", "float64") if wide else ("bfloat16", "float16") if all_rows else ("bfloat16",)
    jobs: list[CompileJob] = []
    for dtype in dtypes:
        for family, own in families.items():
            for forward in planner.FORWARD:
                if forward.ROW.family == family:
                    jobs += forward.compile_jobs(own, dtype)
            for main in planner.BACKWARD:
                if main.ROW.family == family:
                    jobs += _backward_jobs(main, own, dtype)
        if dtype != "tf32":
            jobs += flash_bwd_sinks.compile_jobs(base, dtype)
        if not wide:
            jobs += merge.compile_jobs(base, dtype)
            jobs += flash_decode.compile_jobs(base, dtype)
            jobs += append_keys.compile_jobs(base, dtype)
    return jobs if all_rows else [job for job in jobs if job.defines["FA2_HEAD_DIM"] in (64, 128)]


def _backward_jobs(main: BackwardKernel, arch: str, dtype: str) -> list[CompileJob]:
    """Of a main kernel, and of those beside it, which of tf32 are those of float32."""
    base = arch.removesuffix("a")
    jobs: list[CompileJob] = []
    for tile, head_dim, head_dim_v in main.rows_ahead(arch, dtype):
        side = backward.side_defines(tile, dtype, head_dim, head_dim_v, True, base)
        label = backward.row_label(dtype, head_dim, head_dim_v, tile)
        jobs += main.compile_jobs(arch, label, tile, head_dim, head_dim_v, side)
        if dtype != "tf32":
            jobs += flash_bwd_preprocess.compile_jobs(base, label, dtype, tile, side, main.cleared)
            jobs += flash_bwd_postprocess.compile_jobs(base, label, side)
    return jobs
