"""A traced function computed by NumPy, with the types and the rules of its CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fa2cupy.errors import InvalidArgument
from fa2cupy.tracing.graph import Graph, Node
from fa2cupy.tracing.operations import BOOL, FLOAT, INT, OPERATIONS

__all__ = ["evaluate", "held"]

Array = npt.NDArray[Any]
_INT32 = np.iinfo(np.int32)


def held(array: Array, is_bfloat16: bool, real: npt.DTypeLike) -> Array:
    """A captured array as it is read: bool, int32 (those beyond become its ends), or `real`."""
    if is_bfloat16:
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(real)
    if array.dtype == np.bool_:
        return array
    if array.dtype.kind in "iu":
        return array if array.dtype == np.int32 else array.clip(_INT32.min, _INT32.max).astype(np.int32)
    with np.errstate(over="ignore"):
        return array.astype(real, copy=False)


def evaluate(
    graph: Graph,
    arguments: Mapping[str, Array],
    captured: Mapping[str, Any],
    real: npt.DTypeLike = np.float32,
    *,
    check: bool = False,
) -> Array:
    """The result for arguments by name, arrays that are broadcast against each other.

    captured: numbers, and arrays as `held` makes them. real: the type of floats. check: an index outside of an array is
    InvalidArgument; otherwise the last element is read.
    """
    types = {BOOL: np.dtype(np.bool_), INT: np.dtype(np.int32), FLOAT: np.dtype(real)}
    nodes = list(graph.used())
    last_use = {arg.number: node.number for node in nodes for arg in node.args}
    values: dict[int, Any] = {}
    with np.errstate(all="ignore"):
        for node in nodes:
            args = [values[arg.number] for arg in node.args]
            values[node.number] = _value(node, args, arguments, captured, types, check)
            for arg in node.args:
                if last_use[arg.number] == node.number:
                    values.pop(arg.number, None)
    assert graph.result is not None
    return np.asarray(values[graph.result.number])


def _value(
    node: Node,
    args: list[Any],
    arguments: Mapping[str, Array],
    captured: Mapping[str, Any],
    types: Mapping[str, np.dtype],
    check: bool,
) -> Any:
    dtype = types[node.type]
    if node.op == "literal":
        return dtype.type(node.payload)
    if node.op == "argument":
        return arguments[str(node.payload)].astype(dtype, copy=False)
    if node.op == "number":
        return dtype.type(captured[str(node.payload)])
    if node.op == "size":
        assert isinstance(node.payload, tuple)
        name, axis = node.payload
        return np.int32(captured[name].shape[axis])
    if node.op == "read":
        return _read(str(node.payload), captured[str(node.payload)], args, check)
    if node.op == "where":
        return np.where(args[0], args[1], args[2])
    if node.op == "convert":
        return np.asarray(args[0]).astype(dtype)
    return np.asarray(OPERATIONS[node.op].function(node.args[0].type)(*args)).astype(dtype, copy=False)


def _read(name: str, array: Array, indices: list[Any], check: bool) -> Any:
    """As on a GPU: an index outside, negative ones too, is that of the last element."""
    places = []
    for axis, (index, size) in enumerate(zip(indices, array.shape, strict=True)):
        index = np.asarray(index, np.int32)
        if check:
            wrong = index[(index < 0) | (index >= size)]
            if wrong.size:
                where = f" of dimension {axis}" if array.ndim > 1 else ""
                raise InvalidArgument(f"{name} is read at index {wrong.flat[0]}{where}: 0 to {size - 1} are there")
        places.append(np.minimum(index.view(np.uint32), np.uint32(size - 1)).astype(np.intp))
    return array[tuple(places)]
