"""A call with JAX arrays, concrete or traced: one jitted function per set of options, which JAX differentiates, maps,
shards and compiles."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from fa2cupy import env, sequences
from fa2cupy.errors import InvalidType
from fa2cupy.frameworks import JAX
from fa2cupy.frameworks.jax import immutable, is_traced
from fa2cupy.operations import Operation
from fa2cupy.options import Options, RawOptions
from fa2cupy.prepared import remember, signature_key
from fa2cupy.problem import Sizes
from fa2cupy.spec import LENGTHS
from fa2cupy.xla import ffi, transforms

__all__ = ["first_call"]

ffi.register()


def first_call(
    operation: Operation, arrays: Mapping[str, Any], sizes: Sizes, options: Options, raw_options: RawOptions
) -> list[Any]:
    """The outputs of `operation` for its inputs by name, which are JAX's and checked.

    Concrete arrays leave a `_Prepared` for the next call of this signature.
    """
    inputs = [arrays[name] for name in (*operation.inputs, *operation.extra)]
    lengths_of = sizes if any(name in LENGTHS for name in operation.extra) else None
    function, dense = _function(operation, options), len(operation.inputs)
    prepared = _Prepared(operation, function, dense, len(operation.outputs), lengths_of)
    is_float64 = any(array.dtype == np.float64 for array in inputs)
    try:
        with _x64() if is_float64 else contextlib.nullcontext():
            results = prepared.results(inputs)
    except TypeError as error:
        if "forward-mode" in str(error):
            raise InvalidType(transforms.NO_TANGENTS) from error
        raise
    if not is_float64 and not any(map(is_traced, inputs)):
        ordered = [arrays.get(name) for name in operation.names()]
        key = signature_key(operation, JAX.signature(ordered)[0], raw_options)
        remember(key, type(inputs[0]), JAX, prepared)
    return results


def _function(operation: Operation, options: Options) -> Callable[..., tuple[Any, ...]]:
    if operation.is_backward:
        return transforms.attention_backward(options, operation.extra)
    return transforms.attention(options, operation.extra, "lse_out" not in operation.scratch)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A checked call: the jitted function that computes it, how many dense inputs and outputs it has, and, where
    arrays say where sequences lie, the sizes that these must keep to.
    """

    operation: Operation
    function: Callable[..., tuple[Any, ...]]
    dense: int
    outputs: int
    lengths_of: Sizes | None

    def run(self, arrays: list[Any], pointers: list[int], workspace: Any) -> list[Any]:
        """`arrays`: inputs, a None for each output, further inputs."""
        if workspace is not None:
            raise immutable("workspace")
        inputs = arrays[: self.dense] + arrays[self.dense + self.outputs :]
        try:
            return self.results(inputs)
        except Exception:
            for name, array in zip((*self.operation.inputs, *self.operation.extra), inputs, strict=True):
                JAX.check(array, name)  # what can differ between calls of one signature: it was deleted
            raise

    def results(self, inputs: Sequence[Any]) -> list[Any]:
        """One for each output, None for what nobody asked for."""
        if self.lengths_of is not None and env.check():
            self._check(inputs)
        results = list(self.function(*inputs))
        if len(results) < self.outputs:
            results.append(None)
        return results

    def _check(self, inputs: Sequence[Any]) -> None:
        """FA2CUPY_CHECK=1, of concrete arrays; of traced ones the CPU's target does it, and nobody on a GPU."""
        sizes = self.lengths_of
        assert sizes is not None
        named = zip(self.operation.extra, inputs[self.dense :], strict=True)
        lengths = {name: array for name, array in named if name in LENGTHS}
        if not any(map(is_traced, lengths.values())):
            held = {name: np.asarray(array) for name, array in lengths.items()}
            sequences.check(held, sizes.batch, sizes.seqlen_q, sizes.seqlen_k)


def _x64() -> contextlib.AbstractContextManager[Any]:
    """float64 arrays may have left the scope that made them: without x64, JAX would compute them in float32."""
    scope = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    return scope(True)  # type: ignore[no-any-return]
