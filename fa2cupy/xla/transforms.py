"""JAX's transformations of an attention call: gradients, vmap, shardings; all end in `ffi.py`'s one target.

From the outside in: `jax.jit` (cached per set of options), `custom_vjp`, `custom_vmap` (the mapped axis is folded into
the batch: one launch), `custom_partitioning` (batch and heads may be sharded, lengths and head dims may not), the call.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from fa2cupy.errors import InvalidType
from fa2cupy.operations import BACKWARD, FORWARD
from fa2cupy.options import Options
from fa2cupy.xla import ffi

__all__ = ["attention", "attention_backward", "clear_caches"]

Arrays = tuple[Any, ...]


@dataclass(frozen=True)
class _Operation:
    """One direction with its options.

    extra: of the inputs those beyond dense attention, the last ones. group: query heads that share a key head.
    """

    function: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    extra: tuple[str, ...]
    options: Options
    group: int

    def result_types(self, arrays: Arrays) -> tuple[jax.ShapeDtypeStruct, ...]:
        by_name = dict(zip(self.inputs, arrays, strict=True))
        q, v = by_name["q"], by_name["v"]
        if self.function == "attention_backward":
            return tuple(jax.ShapeDtypeStruct(by_name[n].shape, by_name[n].dtype) for n in ("q", "k", "v"))
        batch, heads, rows = _lse_shape(q.shape, self.options.layout)
        lse_dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
        return (
            jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype),
            jax.ShapeDtypeStruct((batch, heads, rows), lse_dtype),
        )

    def run(self, *arrays: Any) -> Arrays:
        """One FFI call. With a workspace as one more result, which nobody gets."""
        types = self.result_types(arrays)
        buffers = tuple((tuple(array.shape), str(array.dtype)) for array in (*arrays, *types))
        options = dataclasses.asdict(self.options)
        call = ffi.Call(self.function, self.inputs, self.outputs, self.extra, options, buffers)
        size = ffi.workspace_bytes(call)
        extra = (jax.ShapeDtypeStruct((size,), jnp.uint8),) if size else ()
        results = jax.ffi.ffi_call(ffi.TARGET, (*types, *extra))(*arrays, call=call.attribute())
        return tuple(results[: len(types)])


def _lse_shape(shape: Sequence[int], layout: str) -> tuple[int, int, int]:
    batch, first, second, _ = shape
    return (batch, second, first) if layout == "bshd" else (batch, first, second)


# ----------------------------------------------------------------------------------------------------------------------
# Shardings: by batch and heads


def _axes(name: str, layout: str, group: int) -> str:
    """The factors of an array's dimensions in the language of Shardy's rules."""
    heads = "h" if group == 1 else ("g" if name in ("k", "v", "dk", "dv") else "(g r)")
    if name in ("lse", "lse_out", "dlse"):
        return f"b {heads} s"
    length = "t" if name in ("k", "v", "dk", "dv") else "s"
    width = "e" if name in ("v", "dv", "out", "dout") else "d"
    return f"b {length} {heads} {width}" if layout == "bshd" else f"b {heads} {length} {width}"


def _rule(operation: _Operation) -> tuple[str, tuple[str, ...]]:
    """(Shardy's rule, the factors that must not be sharded in the order in which the rule names them)."""
    described = [
        ", ".join(_axes(name, operation.options.layout, operation.group) for name in names)
        for names in (operation.inputs, operation.outputs)
    ]
    rule = " -> ".join(described)
    replicated = tuple(sorted("stde", key=rule.index))
    return rule, replicated


def _spec(name: str, layout: str, batch: Any, heads: Any) -> PartitionSpec:
    if name in ("lse", "lse_out", "dlse"):
        return PartitionSpec(batch, heads, None)
    return PartitionSpec(batch, None, heads, None) if layout == "bshd" else PartitionSpec(batch, heads, None, None)


def _specs(operation: _Operation, q_spec: Any) -> tuple[tuple[PartitionSpec, ...], tuple[PartitionSpec, ...]]:
    """Of inputs and outputs, given how q is sharded."""
    layout = operation.options.layout
    axes = (*tuple(q_spec or ()), None, None, None, None)
    batch, heads = axes[0], axes[2 if layout == "bshd" else 1]
    return (
        tuple(_spec(name, layout, batch, heads) for name in operation.inputs),
        tuple(_spec(name, layout, batch, heads) for name in operation.outputs),
    )


@functools.lru_cache(maxsize=1024)
def _partitioned(operation: _Operation) -> Callable[..., Arrays]:
    def run(*arrays: Any) -> Arrays:
        return operation.run(*arrays)

    q_at = operation.inputs.index("q")

    def shardings(mesh: Any, shapes: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        sharding = shapes[q_at].sharding
        specs = _specs(operation, None if sharding is None else sharding.spec)
        inputs, outputs = (tuple(NamedSharding(mesh, spec) for spec in side) for side in specs)
        return inputs, outputs

    def partition(mesh: Any, shapes: Sequence[Any], results: Any) -> tuple[Any, ...]:
        inputs, outputs = shardings(mesh, shapes)
        return mesh, run, outputs, inputs

    def infer(mesh: Any, shapes: Sequence[Any], results: Any) -> tuple[Any, ...]:
        return shardings(mesh, shapes)[1]

    rule, replicated = _rule(operation)
    sizes = {"r": operation.group} if operation.group > 1 else {}
    partitioned: Any = custom_partitioning(run)
    options: dict[str, Any] = {"partition": partition, "sharding_rule": rule}
    options |= {"need_replication_factors": replicated, **sizes}
    try:
        partitioned.def_partition(infer_sharding_from_operands=infer, **options)
    except TypeError:  # a JAX that has Shardy alone
        partitioned.def_partition(**options)
    return cast("Callable[..., Arrays]", partitioned)


def _varying(array: Any) -> frozenset[Any]:
    """The manual axes over which an array varies inside shard_map."""
    kind = jax.typeof(array)
    if hasattr(kind, "vma"):
        return frozenset(kind.vma)
    return frozenset(kind.manual_axis_type.varying)


def _cast(array: Any, axes: frozenset[Any]) -> Any:
    missing = tuple(sorted(axes - _varying(array)))
    if not missing:
        return array
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(array, missing, to="varying")
    return jax.lax.pvary(array, missing)


def _placed(operation: _Operation, *arrays: Any) -> Arrays:
    """The call under whatever mesh there is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.axis_names:
        return _partitioned(operation)(*arrays)
    if mesh.manual_axes:  # inside shard_map: this device's block, nothing to partition
        axes = frozenset[Any]().union(*map(_varying, arrays))
        return tuple(_cast(result, axes) for result in operation.run(*(_cast(array, axes) for array in arrays)))
    if mesh.explicit_axes:  # the types say how; lengths and head dims are gathered
        inputs, outputs = _specs(operation, _explicit_spec(operation, mesh, arrays))
        arrays = tuple(jax.sharding.reshard(array, spec) for array, spec in zip(arrays, inputs, strict=True))
        mapped = jax.shard_map(functools.partial(_placed, operation), in_specs=inputs, out_specs=outputs)
        results: Arrays = mapped(*arrays)
        return results
    return _partitioned(operation)(*arrays)


def _explicit_spec(operation: _Operation, mesh: Any, arrays: Arrays) -> tuple[Any, ...]:
    """How q is to be sharded: as it is, but for heads that the key heads cannot follow."""
    by_name = dict(zip(operation.inputs, arrays, strict=True))
    heads_at = 2 if operation.options.layout == "bshd" else 1
    spec = [*tuple(jax.typeof(by_name["q"]).sharding.spec), None, None, None, None][:4]
    heads = spec[heads_at]
    if heads is not None:
        parts = math.prod(mesh.shape[axis] for axis in ((heads,) if isinstance(heads, str) else heads))
        if by_name["k"].shape[heads_at] % parts:
            spec[heads_at] = None
    return tuple(spec)


# ----------------------------------------------------------------------------------------------------------------------
# vmap, gradients


@functools.lru_cache(maxsize=1024)
def _mapped(operation: _Operation) -> Callable[..., Arrays]:
    run: Any = jax.custom_batching.custom_vmap(functools.partial(_placed, operation))

    def fold(size: int, is_mapped: Sequence[bool], *arrays: Any) -> tuple[Arrays, tuple[bool, ...]]:
        full = [
            array if mapped else jnp.broadcast_to(array, (size, *array.shape))
            for array, mapped in zip(arrays, is_mapped, strict=True)
        ]
        results = run(*(array.reshape(array.shape[0] * array.shape[1], *array.shape[2:]) for array in full))
        batch = full[0].shape[1]
        return tuple(r.reshape(size, batch, *r.shape[1:]) for r in results), (True,) * len(results)

    run.def_vmap(fold)
    return cast("Callable[..., Arrays]", run)


def _group(q: Any, k: Any, layout: str) -> int:
    at = 2 if layout == "bshd" else 1
    return int(q.shape[at] // max(1, k.shape[at])) or 1


_NO_TANGENTS = (
    "forward-mode derivatives (jvp, jacfwd, hessian) of fa2cupy.attention do not exist, only reverse-mode ones of "
    "first order (grad, vjp, jacrev)"
)


@functools.lru_cache(maxsize=1024)
def _first_order(operation: _Operation) -> Callable[..., Arrays]:
    """The operation, with words of our own for whoever wants a derivative that the rule below does not give."""

    def refuse(primals: Any, tangents: Any) -> Any:
        raise InvalidType(_NO_TANGENTS)

    once: Any = jax.custom_jvp(_mapped(operation))
    once.defjvp(refuse)
    return cast("Callable[..., Arrays]", once)


def _forward_operation(options: Options, group: int) -> _Operation:
    return _Operation("attention", FORWARD.inputs, FORWARD.outputs, (), options, group)


def _backward_operation(options: Options, group: int, with_dlse: bool) -> _Operation:
    extra = ("dlse",) if with_dlse else ()
    return _Operation("attention_backward", (*BACKWARD.inputs, *extra), BACKWARD.outputs, extra, options, group)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: Options, q: Any, k: Any, v: Any) -> Arrays:
    return _forward(options, q, k, v)


def _forward(options: Options, q: Any, k: Any, v: Any) -> Arrays:
    out, lse = _first_order(_forward_operation(options, _group(q, k, options.layout)))(q, k, v)
    return checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")


def _attention_fwd(options: Options, q: Any, k: Any, v: Any) -> tuple[Arrays, Arrays]:
    q, k, v = q.value, k.value, v.value
    out, lse = _forward(options, q, k, v)
    return (out, lse), (q, k, v, out, lse)


def _attention_bwd(options: Options, saved: Arrays, cotangents: Arrays) -> Arrays:
    q, k, v, out, lse = saved
    dout, dlse = cotangents
    with_dlse = not isinstance(dlse, SymbolicZero)
    if isinstance(dout, SymbolicZero):
        dout = jnp.zeros_like(out)
    run = _first_order(_backward_operation(options, _group(q, k, options.layout), with_dlse))
    return run(dout, q, k, v, out, lse, *((dlse,) if with_dlse else ()))


_attention.defvjp(_attention_fwd, _attention_bwd, symbolic_zeros=True)


@functools.lru_cache(maxsize=1024)
def _compiled(options: Options) -> Callable[..., Arrays]:
    return cast("Callable[..., Arrays]", jax.jit(functools.partial(_attention, options)))


def attention(options: Options, q: Any, k: Any, v: Any) -> Arrays:
    """out, lse; differentiable."""
    try:
        return _compiled(options)(q, k, v)
    except TypeError as error:
        if "forward-mode" in str(error):
            raise InvalidType(_NO_TANGENTS) from error
        raise


@functools.lru_cache(maxsize=1024)
def _compiled_backward(operation: _Operation) -> Callable[..., Arrays]:
    return cast("Callable[..., Arrays]", jax.jit(_first_order(operation)))


def attention_backward(options: Options, *arrays: Any) -> Arrays:
    """dq, dk, dv of dout, q, k, v, out, lse and, if it is there, dlse."""
    _, q, k = arrays[:3]
    with_dlse = len(arrays) > len(BACKWARD.inputs)
    return _compiled_backward(_backward_operation(options, _group(q, k, options.layout), with_dlse))(*arrays)


def clear_caches() -> None:
    """Forget every traced function: what an environment variable or a GPU said while it was traced may have changed."""
    for cached in (_partitioned, _mapped, _first_order, _compiled, _compiled_backward):
        cached.cache_clear()
