"""What the kernels of sm_90 have in common: what they need of a device and of arrays, and the tensor maps by which bulk
copies reach them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from fa2cupy.jit import tensor_map
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.jit.tensor_map import TensorMapSpec
from fa2cupy.kernels.launch import TensorMapArgument
from fa2cupy.kernels.params import TensorMap
from fa2cupy.problem import AttentionProblem

__all__ = [
    "ARCH",
    "COLUMNS",
    "map_dims",
    "mapped",
    "objection",
    "rows_objection",
    "tensor_maps",
    "without_empty_panels",
]

ARCH = "sm_90a"  # the kernels have wgmma and bulk copies
COLUMNS = 64  # of a box: a panel, 128 bytes


class HeadDims(Protocol):
    """Rows of the tables. head_dim_v: 0 where it is head_dim."""

    @property
    def head_dim(self) -> int: ...
    @property
    def head_dim_v(self) -> int: ...


_Tile = TypeVar("_Tile", bound=HeadDims)


def mapped(struct: type[ctypes.Structure]) -> tuple[str, ...]:
    """The fields of a params struct that are tensor maps, which are called as their arrays."""
    return tuple(name for name, kind, *_ in struct._fields_ if kind is TensorMap)


def objection(problem: AttentionProblem, device: DeviceInfo, names: Sequence[str]) -> str:
    """What speaks against a kernel of sm_90 that has maps of those arrays, or the empty string."""
    if device.cc != (9, 0):
        named = f" ({device.name})" if device.name else ""
        return f"device {device.index}{named} has compute capability {device.cc[0]}.{device.cc[1]}, not 9.0"
    if problem.dtype not in ("float16", "bfloat16"):
        return f"its products are of 16 bits, and the arrays of {problem.dtype}"
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


def empty_panels(problem: AttentionProblem, tile: HeadDims) -> str:
    """What speaks against a row for sequences whose lengths only the device knows, or the empty string. Their maps are
    shifted, and no box may lie outside one wholly (cuda_src/sm90/tile.cuh): none of columns that there are not."""
    widths = {"head_dim": tile.head_dim, "head_dim_v": tile.head_dim_v or tile.head_dim}
    for name, width in widths.items():
        own = getattr(problem, name)
        if problem.lengths is not None and -(-own // COLUMNS) < -(-width // COLUMNS):
            return f"{name} {own} leaves {COLUMNS} columns of a tile of {width} empty"
    return ""


def without_empty_panels(problem: AttentionProblem, tiles: Sequence[_Tile]) -> list[_Tile]:
    """Of rows that serve a problem, those that `empty_panels` has nothing against."""
    return [tile for tile in tiles if not empty_panels(problem, tile)]


def rows_objection(problem: AttentionProblem, tiles: Sequence[HeadDims]) -> str:
    """What speaks against a kernel whose rows serve a problem, but none without empty panels; or the empty string."""
    return empty_panels(problem, tiles[0]) if tiles and not without_empty_panels(problem, tiles) else ""


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
