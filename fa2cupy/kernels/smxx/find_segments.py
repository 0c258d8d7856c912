"""Which segments there are, before their tiles are listed: cuda_src/smxx/find_segments.cu."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.jit.kernel import LaunchConfig
from fa2cupy.kernels import common
from fa2cupy.kernels.launch import KernelLaunch
from fa2cupy.kernels.listed import Segments
from fa2cupy.kernels.params import FindParams
from fa2cupy.problem import AttentionProblem
from fa2cupy.spec import FINDING

__all__ = ["launch"]

_KERNEL = (FINDING, "find_segments")
_WARPS = 32
_THREADS = 32 * _WARPS  # runs of equal ids that are looked up together
_SHARED_BYTES = 4 * (5 * _THREADS + 2 * _WARPS + 2)  # of `SharedMemory` there
# One binary for all: it looks at ids only.
_DEFINES: dict[str, int | str] = {
    **common.common_defines("bfloat16", 16, 0, True),
    "FA2_BLOCK_M": 16,
    "FA2_BLOCK_N": 16,
    "FA2_NUM_WARPS": _WARPS,
    "FA2_CAUSAL": 0,
    "FA2_PARAMS_BYTES": ctypes.sizeof(FindParams),
    "FA2_SHARED_BYTES": _SHARED_BYTES,
}


def launch(problem: AttentionProblem, device: DeviceInfo, segments: Segments, names: Sequence[str]) -> KernelLaunch:
    """The first launch of a plan with segments. names: of the call's pointers."""
    return common.kernel_launch(
        problem,
        _KERNEL,
        common.arch_of(device),
        _DEFINES,
        LaunchConfig((segments.groups, 1, 1), (_THREADS, 1, 1), shared_mem_bytes=_SHARED_BYTES),
        FindParams(segments.lists.rows_q, segments.lists.rows_k),
        {},
        names,
        listed=(segments,),
    )
