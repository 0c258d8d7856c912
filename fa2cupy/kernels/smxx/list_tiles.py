"""The lists of tiles that other kernels go by, and the rows that no tile comes to: cuda_src/smxx/list_tiles.cu."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.jit.kernel import LaunchConfig
from fa2cupy.kernels import common
from fa2cupy.kernels.launch import KernelLaunch
from fa2cupy.kernels.listed import Lists, Segments
from fa2cupy.kernels.params import ListTilesParams, composed, pack_strides
from fa2cupy.problem import AttentionProblem
from fa2cupy.spec import LISTING, LengthsParams

__all__ = ["launch"]

_KERNEL = (LISTING, "list_tiles")
_WARPS = 32
_THREADS = 32 * _WARPS  # sequences that are looked at together
_ROWS = 16 * _WARPS  # that a thread block looks after at a time


def _shared_bytes(lists: Lists) -> int:
    """Of `SharedMemory` there."""
    return 4 * ((12 if lists.positioned else 10) * _THREADS + 2 * _WARPS + 4)


def launch(
    problem: AttentionProblem,
    device: DeviceInfo,
    lists: Lists,
    results: Sequence[str],
    names: Sequence[str],
    *,
    in_order: bool = False,
    segments: Segments | None = None,
) -> KernelLaunch:
    """The first launch of a plan. results: ("out", "lse"), or ("dq", "dk", "dv"). names: of the call's pointers.

    segments: what the launch before this one has found. in_order: lists go by the numbers of the sequences and of
    their blocks, instead of with the longest first.
    """
    strides = dict(problem.strides)
    of_queries = results[0]
    params = ListTilesParams(
        rows_q=lists.rows_q,
        rows_k=lists.rows_k,
        tiles_of_head_q=lists.tiles_of_head_q,
        tiles_of_head_k=lists.tiles_of_head_k,
        num_heads=problem.num_heads,
        num_heads_k=problem.num_heads_k,
        cols_out=problem.head_dim_v if of_queries == "out" else problem.head_dim,
        cols_dk=problem.head_dim,
        cols_dv=problem.head_dim_v,
    )
    pointers = {field: (len(names), offset) for field, offset in lists.offsets.items()}
    for name in results:
        field = "out" if name == of_queries else name
        setattr(params, f"{field}_strides", pack_strides(name, strides[name]))
        pointers[field] = names.index(name), 0
    assert problem.lengths is not None
    rows = common.query_rows(problem)
    if "dk" in results:
        rows = max(rows, problem.seqlen_k * (1 if problem.lengths.packed_k else problem.batch))
    clearing = min(-(-rows // _ROWS), max(1, device.sm_count - 1))  # all run at once
    return common.kernel_launch(
        problem,
        _KERNEL,
        common.arch_of(device),
        _defines(problem.dtype, problem.aligned, lists, problem.causal, in_order),
        LaunchConfig(
            (1 + clearing, 1, 1),
            (_THREADS, 1, 1),
            shared_mem_bytes=_shared_bytes(lists),
            overlaps_previous=segments is not None and device.cc >= (9, 0),
        ),
        params,
        pointers,
        names,
        listed=(segments,),
    )


def _defines(dtype: str, aligned: bool, lists: Lists, causal: bool, in_order: bool) -> dict[str, int | str]:
    return (
        common.common_defines(dtype, 16, 0, aligned)
        | lists.defines()
        | {
            "FA2_BLOCK_M": lists.block_m,
            "FA2_BLOCK_N": lists.block_n,
            "FA2_NUM_WARPS": _WARPS,
            "FA2_CAUSAL": int(causal),
            "FA2_IN_ORDER": int(in_order),
            "FA2_PARAMS_BYTES": ctypes.sizeof(composed(ListTilesParams, (LengthsParams,))),
            "FA2_SHARED_BYTES": _shared_bytes(lists),
        }
    )
