"""Twins of the structs in cuda_src/common/params.cuh. Their sizes are compared at compile time.

Tensor maps come first, since they are aligned to 64 bytes; pointers may lie anywhere.

What a `Spec` adds is a block, a struct of its own, behind the kernel's struct. The rule, by which both sides agree on
every offset: a part (the kernel's struct, or a block) is a plain struct, without bases, constructors or default values
of members, and each part starts behind the whole of the one before, the bytes that fill it up to a multiple of its
alignment included. So a composed struct has parts, and never the fields of parts side by side: in CUDA the parts are
its bases, in order (`struct Params : FwdParams, WindowParams`), here its members (`composed`). A part that is absent is
an empty base there, or a base that is not there, and nothing here.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_uint64

__all__ = [
    "MAX_PIECES",
    "BwdParams",
    "BwdTmaParams",
    "FillParams",
    "FindParams",
    "FwdParams",
    "FwdTmaParams",
    "IdRun",
    "ListParams",
    "ListTilesParams",
    "ListedPlace",
    "ListedPosition",
    "MergeBwdParams",
    "MergeParams",
    "SegmentParams",
    "Shape",
    "SinksBwdParams",
    "Strides3",
    "TensorMap",
    "composed",
    "pack_strides",
]


class Strides3(ctypes.Structure):
    """Elements between neighbours along batch, row (seqlen) and head."""

    _fields_ = (("batch", c_int64), ("row", c_int64), ("head", c_int64))


class Shape(ctypes.Structure):
    _fields_ = (
        ("batch", c_int32),
        ("num_heads", c_int32),
        ("num_heads_k", c_int32),
        ("seqlen_q", c_int32),
        ("seqlen_k", c_int32),
        ("head_dim", c_int32),
        ("heads_per_section", c_int32),
    )


class FwdParams(ctypes.Structure):
    _fields_ = (
        *((name, c_uint64) for name in ("q", "k", "v", "out", "lse")),
        *((f"{name}_strides", Strides3) for name in ("q", "k", "v", "out", "lse")),
        ("shape", Shape),
        ("scale_softmax_log2", c_float),
        ("head_dim_v", c_int32),
    )


TensorMap = c_uint64 * 16
_MAP_ALIGNMENT = 64


class FwdTmaParams(ctypes.Structure):
    """In CUDA it is aligned to 64 bytes, and so has a size of a multiple of 64."""

    _fields_ = (
        *((name, TensorMap) for name in ("q", "k", "v", "out")),
        ("lse", c_uint64),
        ("lse_strides", Strides3),
        ("shape", Shape),
        ("scale_softmax_log2", c_float),
    )


class BwdParams(ctypes.Structure):
    _fields_ = (
        *((name, c_uint64) for name in ("dout", "q", "k", "v", "out", "lse", "dq", "dk", "dv")),
        *((name, c_uint64) for name in ("lse_log2", "softmax_d", "dq_accum", "dq_turn", "dk_partial", "dv_partial")),
        *((f"{name}_strides", Strides3) for name in ("dout", "q", "k", "v", "out", "lse", "dq", "dk", "dv")),
        ("shape", Shape),
        ("scale_softmax_log2", c_float),
        ("softmax_scale", c_float),
        ("splits", c_int32),
        ("head_dim_v", c_int32),
    )


class BwdTmaParams(ctypes.Structure):
    """As FwdTmaParams."""

    _fields_ = (
        *((name, TensorMap) for name in ("dout", "q", "k", "v", "lse_log2", "softmax_d")),
        *((name, c_uint64) for name in ("dk", "dv", "dq_accum", "dq_turn", "dk_partial", "dv_partial")),
        *((f"{name}_strides", Strides3) for name in ("dk", "dv")),
        ("shape", Shape),
        ("scale_softmax_log2", c_float),
        ("softmax_scale", c_float),
        ("splits", c_int32),
        ("head_dim_v", c_int32),
        ("_to_a_multiple_of_64", c_int32 * 13),
    )


class FillParams(ctypes.Structure):
    _fields_ = (
        ("rows", c_uint64),
        ("lse", c_uint64),
        ("row_strides", Strides3),
        ("lse_strides", Strides3),
        ("batch", c_int32),
        ("num_rows", c_int32),
        ("num_heads", c_int32),
        ("head_dim", c_int32),
    )


class ListedPlace(ctypes.Structure):
    """What lists in a workspace consist of."""

    _fields_ = tuple(
        (name, c_int32)
        for name in ("first_q", "seqlen_q", "first_k", "seqlen_k", "batch_q", "batch_k", "block", "tile")
    )


class ListedPosition(ctypes.Structure):
    """Or of these, where kernels must know which rows of a sequence they have. In CUDA it is aligned to 16 bytes."""

    _fields_ = (
        *ListedPlace._fields_,
        ("in_front_q", c_int32),
        ("in_front_k", c_int32),
        ("_to_a_multiple_of_16", c_int32 * 2),
    )


class ListParams(ctypes.Structure):
    """The block of kernels that take tiles from lists, behind those of all specs."""

    _fields_ = (
        *((name, c_uint64) for name in ("tiles_q", "tiles_k", "counts")),
        *((name, c_int32) for name in ("rows_q", "rows_k", "tiles_of_head_q", "tiles_of_head_k")),
    )


class IdRun(ctypes.Structure):
    """A run of equal segment ids, in a workspace."""

    _fields_ = (("start", c_int32), ("met", c_int32))


class SegmentParams(ctypes.Structure):
    """The block of those who find segments and list them, behind those of all specs."""

    _fields_ = (
        *((name, c_uint64) for name in ("runs_q", "runs_k", "segments", "found", "shorts", "short_sums")),
        *((name, c_int32) for name in ("batch_rows", "groups", "rows_of_group", "short_keys")),
    )


class FindParams(ctypes.Structure):
    _fields_ = (("rows_q", c_int32), ("rows_k", c_int32))


class ListTilesParams(ctypes.Structure):
    _fields_ = (
        *((name, c_uint64) for name in ("tiles_q", "tiles_k", "counts", "out", "lse", "dk", "dv")),
        *((f"{name}_strides", Strides3) for name in ("out", "lse", "dk", "dv")),
        *((name, c_int32) for name in ("rows_q", "rows_k", "tiles_of_head_q", "tiles_of_head_k")),
        *((name, c_int32) for name in ("num_heads", "num_heads_k", "cols_out", "cols_dk", "cols_dv")),
    )


MAX_PIECES = 32
_Pieces = c_uint64 * MAX_PIECES
_SIZES = tuple((name, c_int32) for name in ("batch", "num_rows", "num_heads", "cols"))


class MergeParams(ctypes.Structure):
    _fields_ = (
        *((name, _Pieces) for name in ("outs", "lses")),
        *((name, c_uint64) for name in ("out", "lse")),
        *((f"{name}_strides", Strides3) for name in ("outs", "lses", "out", "lse")),
        *_SIZES,
    )


class MergeBwdParams(ctypes.Structure):
    _fields_ = (
        *((name, _Pieces) for name in ("outs", "lses", "douts", "dlses")),
        *((name, c_uint64) for name in ("out", "lse", "dout", "dlse")),
        *((f"{name}_strides", Strides3) for name in ("outs", "lses", "douts", "dlses", "out", "lse", "dout", "dlse")),
        *_SIZES,
    )


class SinksBwdParams(ctypes.Structure):
    _fields_ = tuple((name, c_int32) for name in ("batch", "num_heads", "tiles_of_head", "sums_of_tile"))


def pack_strides(name: str, strides: Sequence[int]) -> Strides3:
    """(batch, seqlen, head) strides of a problem, or (batch, head, seqlen) of its lse."""
    if name == "lse":
        batch, head, row = strides
    else:
        batch, row, head = strides
    return Strides3(batch, row, head)


@functools.cache
def composed(base: type[ctypes.Structure], blocks: tuple[type[ctypes.Structure], ...]) -> type[ctypes.Structure]:
    """The struct that has `base` and then each block as a member of the block's name, whose fields are its own too."""
    parts = [(part.__name__, part) for part in (base, *blocks)]
    has_maps = any(kind is TensorMap for _, kind, *_ in base._fields_)

    class Parts(ctypes.Structure):
        _fields_ = parts

    fill = -ctypes.sizeof(Parts) % (_MAP_ALIGNMENT if has_maps else ctypes.alignment(Parts))

    class Composed(ctypes.Structure):
        _anonymous_ = tuple(name for name, _ in parts)
        _fields_ = (*parts, *((("_fill", ctypes.c_uint8 * fill),) if fill else ()))

    return Composed
