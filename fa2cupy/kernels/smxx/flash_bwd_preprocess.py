"""Before the main kernel of a backward: cuda_src/smxx/flash_bwd_preprocess.cu, a block for each tile of queries, or for
several short segments."""

from __future__ import annotations

import ctypes
import itertools

from fa2cupy.kernels import backward, common
from fa2cupy.kernels.backward import Backward, BwdRow, Defines
from fa2cupy.kernels.launch import CompileJob, KernelLaunch
from fa2cupy.kernels.params import BwdParams, composed
from fa2cupy.spec import DlseParams, SoftmaxSpec

__all__ = ["compile_jobs", "launch"]

_KERNEL = ("smxx/flash_bwd_preprocess.cu", "flash_bwd_preprocess")
_WARPS = 8


def launch(whole: Backward) -> KernelLaunch:
    work = whole.work
    return whole.launch(
        _KERNEL,
        common.arch_of(work.device),
        _defines(work.tile, whole.side_defines, whole.order.cleared),
        backward.config(work.blocks(work.query_tiles, _WARPS), _WARPS),
    )


def _defines(tile: BwdRow, side: Defines, cleared: bool) -> Defines:
    return side | backward.adding_defines(tile, cleared) | {"FA2_NUM_WARPS": _WARPS}


def compile_jobs(arch: str, label: str, tile: BwdRow, side: Defines, cleared: backward.Cleared) -> list[CompileJob]:
    """Beside a main kernel's jobs for a row: without a gradient of lse, and with one."""
    size = ctypes.sizeof(composed(BwdParams, (DlseParams,)))
    dlse = SoftmaxSpec((0, 0, 0)).defines() | {"FA2_PARAMS_BYTES": size}
    clears = sorted({clear for clear, *_ in backward.modes(cleared)})
    return [
        CompileJob(
            *_KERNEL,
            arch,
            _defines(tile, side, clear) | (dlse if given else {}),
            f"backward preprocess {label}" + " dlse" * given + " of zeros" * clear,
            0,
            0,
        )
        for given, clear in itertools.product((False, True), clears)
    ]
