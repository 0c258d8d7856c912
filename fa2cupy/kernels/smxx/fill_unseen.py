"""Rows that no key, or no query, has to do with: cuda_src/smxx/fill_unseen.cu writes zeros, and -inf into their lse."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.jit.kernel import LaunchConfig
from fa2cupy.kernels import common
from fa2cupy.kernels.launch import KernelLaunch
from fa2cupy.kernels.params import FillParams, pack_strides
from fa2cupy.problem import AttentionProblem

__all__ = ["launches"]

_KERNEL = ("smxx/fill_unseen.cu", "fill_unseen")
_THREADS = 256
_COLUMNS = 16  # that a thread fills


def launches(
    problem: AttentionProblem, device: DeviceInfo, name: str, rows: int, names: Sequence[str], *, with_lse: bool = False
) -> tuple[KernelLaunch, ...]:
    """Of the first `rows` rows of a result; nothing to launch where there are none. names: of the call's pointers.

    With a mask, of those of all rows that are in a block which meets no other.
    """
    if problem.mask is not None:
        rows = problem.seqlen_k if name in ("dk", "dv") else problem.seqlen_q
    of_keys, of_v = name in ("dk", "dv"), name in ("out", "dv")
    heads = problem.num_heads_k if of_keys else problem.num_heads
    head_dim = problem.head_dim_v if of_v else problem.head_dim
    threads = problem.batch * rows * heads * -(-head_dim // _COLUMNS)
    if threads == 0:
        return ()
    strides = dict(problem.strides)
    params = FillParams(
        0,
        0,
        pack_strides(name, strides[name]),
        pack_strides("lse", strides["lse"]),
        problem.batch,
        rows,
        heads,
        head_dim,
    )
    defines = common.common_defines(problem.dtype, 16, 0, False)
    defines |= {"FA2_FILL_THREADS": _THREADS, "FA2_PARAMS_BYTES": ctypes.sizeof(FillParams)}
    if problem.mask is not None and of_keys:
        defines["FA2_OF_KEYS"] = 1
    config = LaunchConfig((-(-threads // _THREADS), 1, 1), (_THREADS, 1, 1))
    pointers = {"rows": (names.index(name), 0)} | ({"lse": (names.index("lse"), 0)} if with_lse else {})
    arch = common.arch_of(device)
    return (common.kernel_launch(problem, _KERNEL, arch, defines, config, params, pointers, names),)
