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
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.frameworks import JAX
from fa2cupy.frameworks.jax import immutable, in_host_memory, is_traced
from fa2cupy.keywords import asked
from fa2cupy.operations import FORWARD, FORWARD_OUT, Operation
from fa2cupy.options import Options, RawOptions
from fa2cupy.prepared import remember, remember_plain, signature_key
from fa2cupy.problem import Sizes
from fa2cupy.spec import LENGTHS
from fa2cupy.xla import arrays as by_array
from fa2cupy.xla import ffi, transforms

__all__ = ["first_call"]

ffi.register()


def first_call(
    operation: Operation,
    arrays: Mapping[str, Any],
    options: Options,
    raw_options: RawOptions,
    checks: tuple[transforms.Check, Callable[..., list[Any]]],
) -> list[Any]:
    """The outputs of `operation` for its inputs by name, which are JAX's and checked.

    checks: what checks arrays as numbers; what has checked these, and more.

    Concrete arrays leave a `_Prepared` for the next calls with these options. Its jitted function checks what it has
    not seen yet, but not on which devices and in which memory arrays are; that is left to JAX.
    """
    for name in operation.extra:
        if name not in by_array.ROLES:
            raise InvalidArgument(f"{asked(name)} is not supported yet for JAX arrays: leave it out")
    inputs = [arrays[name] for name in (*operation.inputs, *operation.extra)]
    in_host = any(map(in_host_memory, inputs))
    check, from_the_start = checks
    prepared = _Prepared(operation, raw_options, _function(operation, options, in_host, check), from_the_start)
    seeds = [arrays[name] for name in operation.extra if name in by_array.OF_PLACES]
    is_wide = any(array.dtype == np.float64 for array in inputs) or any(seed.dtype.itemsize == 8 for seed in seeds)
    try:
        with _x64() if is_wide else contextlib.nullcontext():
            results = prepared.results(inputs)
    except TypeError as error:
        if "forward-mode" in str(error):
            raise InvalidType(transforms.NO_TANGENTS) from error
        raise
    if not is_wide and not in_host and not any(map(is_traced, inputs)):
        kind = type(inputs[0])
        ordered = [arrays.get(name) for name in operation.names()]
        remember(signature_key(operation, JAX.signature(ordered)[0], raw_options), kind, JAX, prepared)
        if operation in (FORWARD, FORWARD_OUT) and not raw_options[5] and all(type(array) is kind for array in inputs):
            remember_plain(arrays["q"], operation is FORWARD, raw_options, prepared.function)
    return results


def _function(operation: Operation, options: Options, in_host: bool, check: transforms.Check) -> Callable[..., Any]:
    if operation.is_backward:
        return transforms.attention_backward(options, operation.extra, operation.further, in_host, check)
    return transforms.attention(options, operation.extra, "lse_out" not in operation.scratch, in_host, check)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A call that has passed all checks, and the jitted function that computes it."""

    operation: Operation
    options: RawOptions
    function: Callable[..., Any]
    from_the_start: Callable[..., list[Any]]

    def run(self, arrays: list[Any], pointers: list[int], workspace: Any) -> list[Any]:
        """`arrays`: inputs, a None for each output, further inputs."""
        if workspace is not None:
            raise immutable("workspace")
        dense = len(self.operation.inputs)
        inputs = arrays[:dense] + arrays[dense + len(self.operation.outputs) :]
        with contextlib.suppress(Exception):
            return self.results(inputs)
        return self._again(arrays)

    def _again(self, arrays: list[Any]) -> list[Any]:
        """What was wrong, in our words: every check, of the arrays themselves in place of traced ones."""
        return self.from_the_start(self.operation, arrays, None, self.options)

    def results(self, inputs: Sequence[Any]) -> list[Any]:
        """One for each output, None for what nobody asked for."""
        if self.operation.extra and env.check():
            self._check(inputs)
        results = self.function(*inputs)
        return [results, None] if self.operation.scratch else list(results)

    def _check(self, inputs: Sequence[Any]) -> None:
        """FA2CUPY_CHECK=1, of concrete arrays; of traced ones the CPU's target does it, and nobody on a GPU."""
        operation = self.operation
        arrays = dict(zip((*operation.inputs, *operation.extra), inputs, strict=True))
        lengths = {name: array for name, array in arrays.items() if name in LENGTHS}
        if lengths and not any(map(is_traced, lengths.values())):
            refs = {name: JAX.ref(array, name) for name, array in arrays.items()}
            sizes = Sizes.of(refs, str(self.options[2]))
            held = {name: np.asarray(array) for name, array in lengths.items()}
            sequences.check(held, sizes.batch, sizes.seqlen_q, sizes.seqlen_k)


def _x64() -> contextlib.AbstractContextManager[Any]:
    """float64 arrays may have left the scope that made them: without x64, JAX would compute them in float32. Of a seed
    it would lose words."""
    scope = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    return scope(True)  # type: ignore[no-any-return]
