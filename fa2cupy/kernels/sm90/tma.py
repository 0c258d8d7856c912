"""What the kernels of sm_90 have in common: what they need of a device and of arrays, and the tensor maps by which bulk
copies reach them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

from fa2cupy.jit import tensor_map
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.jit.tensor_map import TensorMapSpec
from fa2cupy.kernels.launch import TensorMapArgument
from fa2cupy.kernels.params import TensorMap
from fa2cupy.problem import AttentionProblem

__all__ = ["ARCH", "COLUMNS", "map_dims", "mapped", "objection", "tensor_maps"]

ARCH = "sm_90a"  # the kernels have wgmma and bulk copies
COLUMNS = 64  # of a box: a panel, 128 bytes


def mapped(struct: type[ctypes.Structure]) -> tuple[str, ...]:
    """The fields of a params struct that are tensor maps, which are called as their arrays."""
    return tuple(name for name, kind, *_ in struct._fields_ if kind is TensorMap)


def objection(problem: AttentionProblem, device: DeviceInfo, names: Sequence[str]) -> str:
    """What speaks against a kernel of sm_90 that has maps of those arrays, or the empty string."""
    if device.cc != (9, 0):
        named = f" ({device.name})" if device.name else ""
        return f"device {device.index}{named} has compute capability {device.cc[0]}.{device.cc[1]}, not 9.0"
    if problem.head_dim % 8:
        return f"head_dim {problem.head_dim} is not a multiple of 8"
    if problem.head_dim_v % 8:
        return f"head_dim_v {problem.head_dim_v} is not a multiple of 8"
    for name in names:
        dims, strides = map_dims(problem, name, problem.seqlen_q)
        why = tensor_map.objection(dims, strides, shifted=problem.lengths is not None)
        if why:
            return f"{name}'s {why}"
    if not problem.aligned:  # head dims and strides are
        return f"an array starts at an address that is not a multiple of {tensor_map.ALIGNMENT} bytes"
    return ""


def map_dims(problem: AttentionProblem, name: str, rows: int) -> tuple[tuple[int, int, int, int], tuple[int, int, int]]:
    """(columns, rows, heads, batch) of an array and the strides of its rows, heads and batches, as `TensorMapSpec.of`
    takes them; of the queries the last `rows`, of the keys those that a query sees."""
    p = problem
    columns = p.head_dim_v if name in ("v", "dv", "out", "dout") else p.head_dim
    length, heads = (
        (p.seqlen_k - p.empty_keys, p.num_heads_k) if name in ("k", "v", "dk", "dv") else (rows, p.num_heads)
    )
    batch, row, head = dict(p.strides)[name]
    return (columns, length, heads, p.batch), (row, head, batch)


def tensor_maps(
    problem: AttentionProblem,
    struct: type[ctypes.Structure],
    box_rows: Mapping[str, int],
    rows: int,
    skipped: Mapping[str, int],
    names: Sequence[str],
) -> tuple[TensorMapArgument, ...]:
    """The maps of a struct whose boxes are COLUMNS x `box_rows` of an array, shifted where the device alone knows
    lengths; `skipped`: bytes in front of those rows; `names`: of the call's pointers."""
    found = []
    for name in mapped(struct):
        if name in box_rows:
            spec = TensorMapSpec.of(*map_dims(problem, name, rows), (COLUMNS, box_rows[name]), problem.dtype)
            if problem.lengths is not None:
                spec = spec.shifted
            place = skipped.get(name, 0) - spec.shift_bytes
            found.append(TensorMapArgument(getattr(struct, name).offset, names.index(name), place, spec))
    return tuple(found)
