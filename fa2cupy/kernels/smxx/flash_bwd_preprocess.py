"""Before the main kernel of a backward: cuda_src/smxx/flash_bwd_preprocess.cu, a block for each tile of queries, or for
several short segments."""

from __future__ import annotations

import ctypes
import itertools

from fa2cupy.kernels import backward, common
from fa2cupy.kernels.backward import PREPROCESS_WARPS, Backward, BwdRow, Defines
from fa2cupy.kernels.launch import CompileJob, KernelLaunch
from fa2cupy.kernels.params import BwdParams, composed
from fa2cupy.spec import PREPROCESS, DropoutSpec, SinksSpec, SoftmaxSpec, Spec

__all__ = ["compile_jobs", "launch"]

_KERNEL = (PREPROCESS, "flash_bwd_preprocess")
_SPECS: dict[str, Spec] = {
    "sinks": SinksSpec(False, True, True),
    "dropout": DropoutSpec(threshold=8192, words=4),
    "dlse": SoftmaxSpec((0, 0, 0)),
}


def launch(whole: Backward) -> KernelLaunch:
    work = whole.work
    return whole.launch(
        _KERNEL,
        common.arch_of(work.device),
        _defines(work.tile, whole.side_defines, whole.order.cleared),
        backward.config(work.blocks(work.query_tiles, PREPROCESS_WARPS), PREPROCESS_WARPS),
        whole.sink_sums,
    )


def _defines(tile: BwdRow, side: Defines, cleared: bool) -> Defines:
    return side | backward.adding_defines(tile, cleared) | {"FA2_NUM_WARPS": PREPROCESS_WARPS}


def compile_jobs(arch: str, label: str, tile: BwdRow, side: Defines, cleared: backward.Cleared) -> list[CompileJob]:
    """Beside a main kernel's jobs for a row: for nothing beyond dense attention; a gradient of lse, of sinks, both;
    dropout."""
    clears = sorted({clear for clear, *_ in backward.modes(cleared)})
    jobs = []
    for features, clear in itertools.product(("", " dlse", " sinks", " sinks dlse", " dropout"), clears):
        defines = _defines(tile, side, clear)
        specs = [_SPECS[name] for name in features.split()]
        for spec in specs:
            defines |= spec.defines()
        if specs:
            blocks = tuple(type(spec.params()) for spec in specs)
            defines["FA2_PARAMS_BYTES"] = ctypes.sizeof(composed(BwdParams, blocks))
        kind = f"backward preprocess {label}{features}" + " of zeros" * clear
        jobs.append(CompileJob(*_KERNEL, arch, defines, kind, 0, 0))
    return jobs
