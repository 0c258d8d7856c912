"""A call with JAX arrays, concrete or traced: one jitted function per set of options, which JAX differentiates, maps,
shards and compiles."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from fa2cupy.operations import Operation
from fa2cupy.options import Options
from fa2cupy.xla import ffi, transforms

__all__ = ["call"]

ffi.register()


def call(operation: Operation, arrays: Mapping[str, Any], options: Options) -> list[Any]:
    """The outputs of `operation` for its inputs by name, which are JAX's and checked."""
    ordered = tuple(arrays[name] for name in (*operation.inputs, *operation.extra))
    with _x64_where_needed(ordered):
        if operation.is_backward:
            return list(transforms.attention_backward(options, operation.extra, *ordered))
        with_lse = "lse_out" not in operation.scratch
        out, *lse = transforms.attention(options, operation.extra, with_lse, *ordered)
        return [out, *(lse or [None])]


def _x64_where_needed(arrays: tuple[Any, ...]) -> contextlib.AbstractContextManager[Any]:
    """float64 arrays may have left the scope that made them: without x64, JAX would compute them in float32."""
    if jax.config.jax_enable_x64 or not any(array.dtype == np.float64 for array in arrays):
        return contextlib.nullcontext()
    scope = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    return scope(True)  # type: ignore[no-any-return]
