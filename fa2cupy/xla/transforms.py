"""JAX's transformations of an attention call; all end in `ffi.py`'s one target.

From the outside in: `jax.jit` (cached per set of options), `custom_vjp`, a `shard_map` under Explicit axes,
`custom_jvp` (which refuses), `custom_vmap` (the mapped axis is folded into the batch: one launch),
`custom_partitioning`, the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from fa2cupy import operations
from fa2cupy.checks import GRADIENTS
from fa2cupy.errors import InvalidArgument, InvalidType, UnsupportedDevice
from fa2cupy.frameworks import JAX
from fa2cupy.frameworks.base import TensorRef
from fa2cupy.frameworks.jax import in_host_memory
from fa2cupy.keywords import arrays_in_order
from fa2cupy.operations import BACKWARD, FORWARD
from fa2cupy.options import Options
from fa2cupy.spec import DIFFERENTIABLE
from fa2cupy.xla import arrays as by_array
from fa2cupy.xla import shardings
from fa2cupy.xla.operation import Arrays, Operation, heads_at

__all__ = ["NO_TANGENTS", "Check", "attention", "attention_backward", "clear_caches"]

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
        _refuse_places(operation.extra)
        try:
            if not operation.has_batch or any(by_array.ROLES[name][0][0] != "b" for name in operation.outputs):
                raise by_array.UnfoldableError
            folded = [by_array.fold(name, array, mapped, size, batch) for name, array, mapped in each]
        except by_array.UnfoldableError:
            results = _one_after_the_other(run, is_mapped, arrays)
        else:
            results = tuple(r.reshape(size, batch, *r.shape[1:]) for r in run(*folded))
        return results, (True,) * len(results)

    run.def_vmap(rule)
    return cast("Callable[..., Arrays]", run)


def _refuse_places(names: Names) -> None:
    for name in names:
        if name in by_array.OF_PLACES:
            raise InvalidArgument(
                f"{name} is not supported under vmap: the problems would have to share a mask, or their order would "
                "decide; make one call with a batch, or use jax.lax.map"
            )


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


def _backward_operation(options: Options, extra: Names, further: Names, group: int) -> Operation:
    outputs = *BACKWARD.outputs, *further
    return Operation("attention_backward", (*BACKWARD.inputs, *extra), outputs, extra, options, group)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(options: Options, extra: Names, q: Any, k: Any, v: Any, *more: Any) -> Arrays:
    return _forward(options, extra, q, k, v, *more)


def _forward(options: Options, extra: Names, q: Any, k: Any, v: Any, *more: Any) -> Arrays:
    out, lse = _first_order(_forward_operation(options, extra, _group(q, k, options.layout)))(q, k, v, *more)
    return checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")


def _attention_fwd(options: Options, extra: Names, *primals: Any) -> tuple[Arrays, Arrays]:
    wanted = {}  # a dict of nothing: its keys are part of what is saved, without being arrays
    for name, primal in zip(extra, primals[3:], strict=True):
        if primal.perturbed and jnp.issubdtype(primal.value.dtype, jnp.floating):
            if name not in DIFFERENTIABLE:
                raise InvalidType(f"{name} has no gradient: pass jax.lax.stop_gradient({name})")
            wanted[name] = ()
    q, k, v, *more = (primal.value for primal in primals)
    out, lse = _forward(options, extra, q, k, v, *more)
    return (out, lse), (wanted, q, k, v, out, lse, *more)


def _attention_bwd(options: Options, extra: Names, saved: Arrays, cotangents: Arrays) -> Arrays:
    wanted, q, k, v, out, lse, *more = saved
    dout, dlse = cotangents
    given = dict(zip(extra, more, strict=True))
    if not isinstance(dlse, SymbolicZero):
        given["dlse"] = dlse
    if isinstance(dout, SymbolicZero):
        dout = jnp.zeros_like(out)
    names, of = in_order(given), in_order(wanted)
    further = tuple(GRADIENTS[name] for name in of)
    run = _first_order(_backward_operation(options, names, further, _group(q, k, options.layout)))
    gradients = run(dout, q, k, v, out, lse, *(given[name] for name in names))
    dense = map(shardings.like, gradients[:3], (q, k, v))
    found = {name: shardings.like(each, given[name]) for name, each in zip(of, gradients[3:], strict=True)}
    return (*dense, *(found[n] if n in found else _no_gradient(x) for n, x in zip(extra, more, strict=True)))


def _no_gradient(array: Any) -> Any:
    """The cotangent of an array that has none."""
    if jnp.issubdtype(array.dtype, jnp.floating):
        return jnp.zeros_like(array)
    return np.zeros(array.shape, jax.dtypes.float0)


def in_order(names: Any) -> Names:
    """As the table of keywords has them, in which order the kernels take their pointers."""
    return tuple(sorted(names, key=arrays_in_order().index))


def _passed_on(names: Names, arrays: Arrays) -> Arrays:
    """The arrays, the last ones called `names`, as the kernels take them."""
    first = len(arrays) - len(names)
    return *arrays[:first], *map(by_array.passed_on, names, arrays[first:])


_attention.defvjp(_attention_fwd, _attention_bwd, symbolic_zeros=True)


# ----------------------------------------------------------------------------------------------------------------------
# The outermost


# Raises where the dtypes or shapes of an operation's arrays, by name, do not fit together.
Check = Callable[[operations.Operation, Mapping[str, TensorRef], Options], object]


def _check(operation: operations.Operation, options: Options, in_host: bool, check: Check, arrays: Arrays) -> None:
    """What a call is checked for that comes to a jitted function directly, with arrays that it has not seen yet."""
    named = zip((*operation.inputs, *operation.extra), arrays, strict=True)
    check(operation, {name: JAX.ref(array, name) for name, array in named}, options)
    if not in_host and any(map(in_host_memory, arrays)):
        raise UnsupportedDevice("an array is in host memory")


@functools.lru_cache(maxsize=1024)
def attention(options: Options, extra: Names, with_lse: bool, in_host: bool, check: Check) -> Callable[..., Any]:
    """The jitted forward: q, k, v and the arrays called `extra` -> out, or out and lse; differentiable.

    in_host: whether an array may be in a GPU's host memory, which only the arrays' own check can allow.
    """
    operation = FORWARD.extended(extra)

    def attention(*arrays: Any) -> Any:
        _check(operation, options, in_host, check, arrays)
        arrays = _passed_on(extra, arrays)
        out, lse = _attention(options, extra, *shardings.uniformly_varying(*arrays))
        return (out, lse) if with_lse else out

    return cast("Callable[..., Any]", jax.jit(attention))


@functools.lru_cache(maxsize=1024)
def attention_backward(
    options: Options, extra: Names, further: Names, in_host: bool, check: Check
) -> Callable[..., Arrays]:
    """The jitted backward: dout, q, k, v, out, lse and the arrays called `extra` -> dq, dk, dv and those gradients."""
    operation = BACKWARD.extended(extra, further)

    def attention_backward(*arrays: Any) -> Arrays:
        _check(operation, options, in_host, check, arrays)
        arrays = _passed_on(extra, arrays)
        _, q, k = arrays[:3]
        run = _first_order(_backward_operation(options, extra, further, _group(q, k, options.layout)))
        return run(*shardings.uniformly_varying(*arrays))

    return cast("Callable[..., Arrays]", jax.jit(attention_backward))


def clear_caches() -> None:
    """Forget every traced function: what an environment variable or a GPU said while it was traced may have changed."""
    for cached in (shardings.partitioned, _mapped, _first_order, attention, attention_backward):
        cached.cache_clear()
