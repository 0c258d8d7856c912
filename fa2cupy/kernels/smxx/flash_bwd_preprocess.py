"""Before the main kernel of a backward: cuda_src/smxx/flash_bwd_preprocess.cu, a block for each tile of queries."""

from __future__ import annotations

from fa2cupy.kernels import backward, common
from fa2cupy.kernels.backward import Backward, BwdRow, Defines
from fa2cupy.kernels.launch import CompileJob, KernelLaunch

__all__ = ["compile_jobs", "launch"]

_KERNEL = ("smxx/flash_bwd_preprocess.cu", "flash_bwd_preprocess")
_WARPS = 8


def launch(whole: Backward) -> KernelLaunch:
    work = whole.work
    return whole.launch(
        _KERNEL,
        common.arch_of(work.device),
        _defines(work.tile, whole.side_defines, whole.order.cleared),
        backward.config(work.query_tiles, _WARPS),
    )


def _defines(tile: BwdRow, side: Defines, cleared: bool) -> Defines:
    return side | backward.adding_defines(tile, cleared) | {"FA2_NUM_WARPS": _WARPS}


def compile_jobs(arch: str, label: str, tile: BwdRow, side: Defines, cleared: backward.Cleared) -> list[CompileJob]:
    """Beside a main kernel's jobs for a row."""
    return [
        CompileJob(
            *_KERNEL, arch, _defines(tile, side, clear), f"backward preprocess {label}" + " of zeros" * clear, 0, 0
        )
        for clear in sorted({clear for clear, *_ in backward.modes(cleared)})
    ]
