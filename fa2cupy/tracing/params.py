"""The struct of a function's captures, as a kernel gets it: the twin of the one in its header."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from typing import Any

from fa2cupy.frameworks.base import TensorRef
from fa2cupy.tracing.function import Capture
from fa2cupy.tracing.operations import BOOL, FLOAT, INT

__all__ = ["captures_of", "struct_of"]

_NUMBERS: dict[str, Any] = {BOOL: ctypes.c_bool, INT: ctypes.c_int32, FLOAT: ctypes.c_float}


@functools.cache
def _array(rank: int) -> type[ctypes.Structure]:
    """`Captured` of cuda_src/common/user.cuh."""

    class Captured(ctypes.Structure):
        _fields_ = (
            ("data", ctypes.c_uint64),
            *((("strides", ctypes.c_int64 * rank), ("sizes", ctypes.c_int32 * rank)) if rank else ()),
        )

    return Captured


@functools.cache
def struct_of(captures: tuple[Capture, ...]) -> type[ctypes.Structure]:
    """An empty struct has a size of its own in C++: a kernel without captures gets none."""

    class Captures(ctypes.Structure):
        _fields_ = tuple(
            (each.name, _NUMBERS[each.dtype] if each.rank is None else _array(each.rank)) for each in captures
        )

    return Captures


def captures_of(captures: tuple[Capture, ...], values: Mapping[str, Any], refs: Mapping[str, TensorRef]) -> bytes:
    """The struct's bytes. values: of the numbers; refs: of the arrays, whose last dimension is contiguous."""
    struct = struct_of(captures)()
    for each in captures:
        if each.rank is None:
            setattr(struct, each.name, values[each.name])
            continue
        ref, field = refs[each.name], getattr(struct, each.name)
        field.data = ref.ptr
        for axis in range(each.rank):
            field.strides[axis], field.sizes[axis] = ref.strides[axis], ref.shape[axis]
    return bytes(struct)
