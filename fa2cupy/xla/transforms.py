"""JAX's transformations of an attention call; all end in `ffi.py`'s one target.

From the outside in: `jax.jit` (cached per set of options), `custom_vjp`, a `shard_map` under Explicit axes,
`custom_jvp` (which refuses), `custom_vmap` (the mapped axis is folded into the batch: one launch),
`custom_partitioning`, the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from fa2cupy.errors import InvalidType
from fa2cupy.keywords import arrays_in_order
from fa2cupy.operations import BACKWARD, FORWARD
from fa2cupy.options import Options
from fa2cupy.spec import LENGTHS
from fa2cupy.xla import arrays as by_array
from fa2cupy.xla import shardings
from fa2cupy.xla.operation import Arrays, Operation, heads_at

__all__ = ["NO_TANGENTS", "attention", "attention_backward", "clear_caches"]

Names = tuple[str, ...]


# ----------------------------------------------------------------------------------------------------------------------
# vmap


@functools.lru_cache(maxsize=1024)
def _mapped(operation: Operation) -> Callable[..., Arrays]:
    run: Any = jax.custom_batching.custom_vmap(functools.partial(shardings.placed, operation))
    q_at = operation.inputs.index("q")

    def rule(size: int, is_mapped: Sequence[bool], *arrays: Any) -> tuple[Arrays, tuple[bool, ...]]:
        batch = arrays[q_at].shape[1 if is_mapped[q_at] else 0]
        each = zip(operation.inputs, arrays, is_mapped, strict=True)
        try:
            if not operation.has_batch:
                raise by_array.UnfoldableError
            folded = [by_array.fold(name, array, mapped, size, batch) for name, array, mapped in each]
        except by_array.UnfoldableError:
            results = _one_after_the_other(run, is_mapped, arrays)
        else:
            results = tuple(r.reshape(size, batch, *r.shape[1:]) for r in run(*folded))
        return results, (True,) * len(results)

    run.def_vmap(rule)
    return cast("Callable[..., Arrays]", run)


def _one_after_the_other(run: Callable[..., Arrays], is_mapped: Sequence[bool], arrays: Arrays) -> Arrays:
    """The results of every element of the mapped axis, stacked."""

    def one(mapped: Arrays) -> Arrays:
        rest = iter(mapped)
        return run(*(next(rest) if m else array for array, m in zip(arrays, is_mapped, strict=True)))

    results = jax.lax.map(one, tuple(array for array, m in zip(arrays, is_mapped, strict=True) if m))
    return cast("Arrays", results)


# ----------------------------------------------------------------------------------------------------------------------
# Gradients

NO_TANGENTS = (
    "forward-mode derivatives (jvp, jacfwd, hessian) of fa2cupy.attention do not exist, only reverse-mode ones of "
    "first order (grad, vjp, jacrev)"
)


@functools.lru_cache(maxsize=1024)
def _first_order(operation: Operation) -> Callable[..., Arrays]:
    """The operation, with words of our own for whoever wants a derivative that the rule below does not give."""

    def refuse(primals: Any, tangents: Any) -> Any:
        raise InvalidType(NO_TANGENTS)

    once: Any = jax.custom_jvp(_mapped(operation))
    once.defjvp(refuse)
    return functools.partial(shardings.explicitly, operation, once)


def _group(q: Any, k: Any, layout: str) -> int:
    return int(q.shape[heads_at(q, layout)] // max(1, k.shape[heads_at(k, layout)])) or 1


def _forward_operation(options: Options, extra: Names, group: int) -> Operation:
    return Operation("attention", (*FORWARD.inputs, *extra), FORWARD.outputs, extra, options, group)


def _backward_operation(options: Options, extra: Names, group: int) -> Operation:
    return Operation("attention_backward", (*BACKWARD.inputs, *extra), BACKWARD.outputs, extra, options, group)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(options: Options, extra: Names, q: Any, k: Any, v: Any, *more: Any) -> Arrays:
    return _forward(options, extra, q, k, v, *more)


def _forward(options: Options, extra: Names, q: Any, k: Any, v: Any, *more: Any) -> Arrays:
    out, lse = _first_order(_forward_operation(options, extra, _group(q, k, options.layout)))(q, k, v, *more)
    return checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")


def _attention_fwd(options: Options, extra: Names, *primals: Any) -> tuple[Arrays, Arrays]:
    for name, primal in zip(extra, primals[3:], strict=True):
        if primal.perturbed and jnp.issubdtype(primal.value.dtype, jnp.floating):
            raise InvalidType(f"{name} has no gradient yet: pass jax.lax.stop_gradient({name})")
    q, k, v, *more = (primal.value for primal in primals)
    out, lse = _forward(options, extra, q, k, v, *more)
    return (out, lse), (q, k, v, out, lse, *more)


def _attention_bwd(options: Options, extra: Names, saved: Arrays, cotangents: Arrays) -> Arrays:
    q, k, v, out, lse, *more = saved
    dout, dlse = cotangents
    given = dict(zip(extra, more, strict=True))
    if not isinstance(dlse, SymbolicZero):
        given["dlse"] = dlse
    if isinstance(dout, SymbolicZero):
        dout = jnp.zeros_like(out)
    names = in_order(given)
    run = _first_order(_backward_operation(options, names, _group(q, k, options.layout)))
    gradients = run(dout, q, k, v, out, lse, *(given[name] for name in names))
    return (*map(shardings.like, gradients, (q, k, v)), *map(_no_gradient, more))


def _no_gradient(array: Any) -> Any:
    """The cotangent of an array that has none."""
    if jnp.issubdtype(array.dtype, jnp.floating):
        return jnp.zeros_like(array)
    return np.zeros(array.shape, jax.dtypes.float0)


def in_order(names: Any) -> Names:
    """As the table of keywords has them, in which order the kernels take their pointers."""
    return tuple(sorted(names, key=arrays_in_order().index))


def _as_int32(names: Names, arrays: Arrays) -> Arrays:
    """With lengths as the kernels take them; those beyond int32 become its ends."""
    first = len(arrays) - len(names)
    limits = np.iinfo(np.int32)
    return tuple(
        jnp.clip(array, limits.min, limits.max).astype(jnp.int32)
        if n >= first and names[n - first] in LENGTHS and array.dtype != jnp.int32
        else array
        for n, array in enumerate(arrays)
    )


_attention.defvjp(_attention_fwd, _attention_bwd, symbolic_zeros=True)


# ----------------------------------------------------------------------------------------------------------------------
# The outermost


@functools.lru_cache(maxsize=1024)
def attention(options: Options, extra: Names, with_lse: bool) -> Callable[..., Arrays]:
    """The jitted forward: q, k, v and the arrays called `extra` -> out and, if asked for, lse; differentiable."""

    def attention(*arrays: Any) -> Arrays:
        arrays = _as_int32(extra, arrays)
        results: Arrays = _attention(options, extra, *shardings.uniformly_varying(*arrays))
        return results if with_lse else results[:1]

    return cast("Callable[..., Arrays]", jax.jit(attention))


@functools.lru_cache(maxsize=1024)
def attention_backward(options: Options, extra: Names) -> Callable[..., Arrays]:
    """The jitted backward: dout, q, k, v, out, lse and the arrays called `extra` -> dq, dk, dv."""

    def attention_backward(*arrays: Any) -> Arrays:
        arrays = _as_int32(extra, arrays)
        _, q, k = arrays[:3]
        run = _first_order(_backward_operation(options, extra, _group(q, k, options.layout)))
        return run(*shardings.uniformly_varying(*arrays))

    return cast("Callable[..., Arrays]", jax.jit(attention_backward))


def clear_caches() -> None:
    """Forget every traced function: what an environment variable or a GPU said while it was traced may have changed."""
    for cached in (shardings.partitioned, _mapped, _first_order, attention, attention_backward):
        cached.cache_clear()
