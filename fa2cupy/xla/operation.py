"""One direction of attention with its options, as JAX's transformations pass it on; at last an FFI call."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fa2cupy.options import Options
from fa2cupy.xla import ffi

__all__ = ["Arrays", "Operation", "heads_at"]

Arrays = tuple[Any, ...]


def heads_at(array: Any, layout: str) -> int:
    """The dimension of heads in q, k, v, packed or not."""
    return 2 if layout == "bshd" and array.ndim == 4 else 1


@dataclass(frozen=True)
class Operation:
    """extra: of the inputs those beyond dense attention, the last ones. group: query heads that share a key head."""

    function: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    extra: tuple[str, ...]
    options: Options
    group: int

    @property
    def is_backward(self) -> bool:
        return self.function == "attention_backward"

    @property
    def has_batch(self) -> bool:
        """Whether all arrays have a dimension for it: those of packed sequences have not."""
        return not any(name.startswith("cu_seqlens") for name in self.extra)

    def result_types(self, arrays: Arrays) -> tuple[jax.ShapeDtypeStruct, ...]:
        by_name = dict(zip(self.inputs, arrays, strict=True))
        q, v = by_name["q"], by_name["v"]
        if self.is_backward:
            sources = (by_name[name.removeprefix("d")] for name in self.outputs)
            return tuple(jax.ShapeDtypeStruct(source.shape, source.dtype) for source in sources)
        at = heads_at(q, self.options.layout)
        rows = q.shape[0] if q.ndim == 3 else q.shape[3 - at]
        lse_dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
        return (
            jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), q.dtype),
            jax.ShapeDtypeStruct((*q.shape[: q.ndim - 3], q.shape[at], rows), lse_dtype),
        )

    def run(self, *arrays: Any) -> Arrays:
        """One FFI call. With a workspace as one more result, which nobody gets."""
        types = self.result_types(arrays)
        buffers = tuple((tuple(array.shape), str(array.dtype)) for array in (*arrays, *types))
        options = dataclasses.asdict(self.options)
        call = ffi.Call(self.function, self.inputs, self.outputs, self.extra, buffers, options)
        size = ffi.workspace_bytes(call)
        extra = (jax.ShapeDtypeStruct((size,), jnp.uint8),) if size else ()
        results = jax.ffi.ffi_call(ffi.TARGET, (*types, *extra))(*arrays, call=call.attribute())
        return tuple(results[: len(types)])
