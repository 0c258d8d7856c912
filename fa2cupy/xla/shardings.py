"""An attention call on a mesh: batch and heads may be sharded, lengths and head dims may not, nor packed sequences.

Auto axes: a rule for Shardy and a partition for XLA (`custom_partitioning`). Explicit axes: `jax.shard_map` by the
types of the arrays. Inside a shard_map of the user's: this device's block, as it is.

Heads are sharded over mesh axes in their order, queries' and keys' alike. Once every key head has a device of its own
(one key head: at once), further axes shard the query heads only; dk and dv are then summed over those. Axes that fit
neither way, like four devices for two key heads in one axis, are given up: the arrays are gathered along them.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from fa2cupy.errors import InvalidArgument
from fa2cupy.xla.arrays import OF_PLACES, roles
from fa2cupy.xla.operation import Arrays, Operation, heads_at

__all__ = ["explicitly", "like", "partitioned", "placed", "uniformly_varying"]

Axes = tuple[str, ...]
Specs = tuple[PartitionSpec, ...]


@dataclass(frozen=True)
class Split:
    """The mesh axes of the batch, of the query heads and of the key heads, which are the first of these."""

    batch: Axes
    heads: Axes
    key_heads: Axes

    def summed(self, form: str) -> Axes:
        """The axes over which each device has only a part of a result of that form."""
        batch = () if "b" in form else self.batch
        return batch if "h" in form else batch + self.heads[len(self.key_heads) if "g" in form else 0 :]

    def spec(self, operation: Operation, name: str, shape: Sequence[int]) -> PartitionSpec:
        axes = {"b": self.batch, "h": self.heads, "g": self.key_heads}
        form = roles(name, len(shape), operation.options.layout)
        # A dimension of length 1 is whole on every device, whether it is broadcast or all there is.
        return PartitionSpec(*(axes.get(role) or None if n != 1 else None for role, n in zip(form, shape, strict=True)))

    def specs(self, operation: Operation, arrays: Sequence[Any]) -> tuple[Specs, Specs]:
        """Of the inputs and of the outputs."""
        results = operation.result_types(tuple(arrays))
        return (
            tuple(self.spec(operation, name, x.shape) for name, x in zip(operation.inputs, arrays, strict=True)),
            tuple(self.spec(operation, name, x.shape) for name, x in zip(operation.outputs, results, strict=True)),
        )

    def block(self, operation: Operation, run: Callable[..., Arrays], *arrays: Any) -> Arrays:
        """The results of one device's block."""
        results = run(*self._from_here(operation, arrays))
        forms = (
            roles(name, result.ndim, operation.options.layout)
            for name, result in zip(operation.outputs, results, strict=True)
        )
        axes = map(self.summed, forms)
        return tuple(jax.lax.psum(result, over) if over else result for result, over in zip(results, axes, strict=True))

    def _from_here(self, operation: Operation, arrays: Arrays) -> Arrays:
        """With arrays that go by the numbers of sequences and heads counting from the first ones of this block."""
        if not (self.batch or self.heads) or not any(name in OF_PLACES for name in operation.extra):
            return arrays
        q = arrays[operation.inputs.index("q")]
        sides = (self.batch, q.shape[0]), (self.heads, q.shape[heads_at(q, operation.options.layout)])
        first = [jax.lax.axis_index(axes) * length if axes else 0 for axes, length in sides]
        return tuple(
            OF_PLACES[name](array, *first) if name in OF_PLACES else array
            for name, array in zip(operation.inputs, arrays, strict=True)
        )


def _split(operation: Operation, sizes: Mapping[str, int], spec: Any, arrays: Sequence[Any]) -> Split:
    """How a call is split whose q has the partition spec `spec` on a mesh with axes of these sizes."""
    by_name = dict(zip(operation.inputs, arrays, strict=True))
    at_q, at_k = (heads_at(by_name[name], operation.options.layout) for name in "qk")
    heads, key_heads = by_name["q"].shape[at_q], by_name["k"].shape[at_k]
    batch = _fitting(_axes(spec, 0), sizes, by_name["q"].shape[0]) if operation.has_batch else ()
    wanted = _axes(spec, at_q)
    shared = _fitting(wanted, sizes, key_heads)
    if math.prod(sizes[axis] for axis in shared) == key_heads:
        return Split(batch, _fitting(wanted, sizes, heads), shared)
    return Split(batch, shared, shared)


def _axes(spec: Any, dimension: int) -> Axes:
    entries = tuple(spec or ())
    entry = entries[dimension] if dimension < len(entries) else None
    if isinstance(entry, str):
        return (entry,)
    return tuple(entry) if isinstance(entry, tuple) else ()  # None, and PartitionSpec.UNCONSTRAINED


def _fitting(axes: Axes, sizes: Mapping[str, int], length: int) -> Axes:
    """The longest beginning of the axes that cuts `length` evenly."""
    parts = 1
    for i, axis in enumerate(axes):
        parts *= sizes[axis]
        if length % parts:
            return axes[:i]
    return axes


# ----------------------------------------------------------------------------------------------------------------------
# Auto


def _rule(operation: Operation, ranks: Sequence[Sequence[int]]) -> tuple[str, tuple[str, ...]]:
    """(Shardy's rule, the factors that must not be sharded in the order in which the rule names them).

    Key heads are a factor of their own: with factors of grouped heads Shardy cuts mesh axes into pieces, which no
    PartitionSpec can say. `ranks`: the shapes of inputs and outputs, 1 where a dimension may be broadcast.
    """
    grouped = operation.group > 1
    split = ("b", "h", "g") if operation.has_batch else ("h", "g")
    named = {"b", "h", "g", "s", "t", "d", "e"}
    whole: list[str] = []

    def factors(name: str, shape: Sequence[int], position: int) -> str:
        form = roles(name, len(shape), operation.options.layout)
        found = []
        for i, role in enumerate(form):
            factor = "h" if role == "g" and not grouped else role
            if role not in named or (name in operation.extra and shape[i] == 1):
                factor = f"x{position}y{i}"
            if factor not in split and factor not in whole:
                whole.append(factor)
            found.append(factor)
        return " ".join(found)

    names = (*operation.inputs, *operation.outputs)
    described = [factors(name, shape, i) for i, (name, shape) in enumerate(zip(names, ranks, strict=True))]
    inputs, outputs = described[: len(operation.inputs)], described[len(operation.inputs) :]
    return f"{', '.join(inputs)} -> {', '.join(outputs)}", tuple(whole)


@functools.lru_cache(maxsize=1024)
def partitioned(operation: Operation, shapes: tuple[tuple[int, ...], ...]) -> Callable[..., Arrays]:
    """`shapes`: of the inputs and the outputs."""

    def run(*arrays: Any) -> Arrays:
        return operation.run(*arrays)

    q_at = operation.inputs.index("q")

    def split(mesh: Any, arrays: Sequence[Any]) -> Split:
        sharding = arrays[q_at].sharding
        return _split(operation, mesh.shape, None if sharding is None else sharding.spec, arrays)

    def shardings(mesh: Any, arrays: Sequence[Any]) -> list[tuple[NamedSharding, ...]]:
        specs = split(mesh, arrays).specs(operation, arrays)
        return [tuple(NamedSharding(mesh, spec) for spec in side) for side in specs]

    def partition(mesh: Any, arrays: Sequence[Any], results: Any) -> tuple[Any, ...]:
        inputs, outputs = shardings(mesh, arrays)
        block = split(mesh, arrays).block

        def of_block(*arrays: Any) -> Arrays:
            return block(operation, run, *arrays)

        return mesh, of_block, outputs, inputs

    def infer(mesh: Any, arrays: Sequence[Any], results: Any) -> tuple[Any, ...]:
        return shardings(mesh, arrays)[1]

    rule, whole = _rule(operation, shapes)
    partitioned: Any = custom_partitioning(run)
    options = {
        "partition": partition,
        "sharding_rule": rule,
        "infer_sharding_from_operands": infer,  # of GSPMD, which was before Shardy
        "need_replication_factors": whole,  # not before JAX 0.7
    }
    known = inspect.signature(partitioned.def_partition).parameters
    partitioned.def_partition(**{name: value for name, value in options.items() if name in known})
    return cast("Callable[..., Arrays]", partitioned)


def placed(operation: Operation, *arrays: Any) -> Arrays:
    """The call under Auto axes, if there are any, or as this device's block."""
    mesh = _mesh(arrays)
    if not mesh.empty and mesh.manual_axes:  # nothing to partition
        if mesh.auto_axes and not getattr(jax.config, "jax_use_shardy_partitioner", True):  # XLA would end the process
            raise InvalidArgument(
                f"fa2cupy.attention inside a shard_map over {', '.join(mesh.manual_axes)} alone, of the mesh's axes "
                f"{', '.join(mesh.axis_names)}, needs Shardy: JAX 0.7 or newer, or all axes in the shard_map"
            )
        axes = _all_varying(arrays)
        results = operation.run(*(_cast(array, axes) for array in arrays))
        return tuple(_cast(result, axes) for result in results)
    shapes = tuple(tuple(array.shape) for array in (*arrays, *operation.result_types(arrays)))
    return partitioned(operation, shapes)(*arrays)


# ----------------------------------------------------------------------------------------------------------------------
# Explicit, Manual


def _mesh(arrays: Arrays) -> Any:
    """The mesh that the arrays' types name, else the context's."""
    for array in arrays:
        mesh = getattr(getattr(jax.typeof(array), "sharding", None), "mesh", None)
        if mesh is not None and not mesh.empty:
            return mesh
    return jax.sharding.get_abstract_mesh()


def explicitly(operation: Operation, run: Callable[..., Arrays], *arrays: Any) -> Arrays:
    """`run`, on blocks of the arrays where their types say how they are sharded."""
    mesh = _mesh(arrays)
    if mesh.empty or not mesh.explicit_axes:
        return run(*arrays)
    q = arrays[operation.inputs.index("q")]
    split = _split(operation, mesh.shape, jax.typeof(q).sharding.spec, arrays)
    inputs, outputs = split.specs(operation, arrays)
    arrays = tuple(_reshard(array, NamedSharding(mesh, spec)) for array, spec in zip(arrays, inputs, strict=True))
    mapped = jax.shard_map(
        functools.partial(split.block, operation, run),
        mesh=mesh,
        in_specs=inputs,
        out_specs=outputs,
        axis_names=set(mesh.explicit_axes),
    )
    return cast("Arrays", mapped(*arrays))


def _reshard(array: Any, sharding: NamedSharding) -> Any:
    if hasattr(jax.sharding, "reshard"):
        return jax.sharding.reshard(array, sharding)
    from jax.experimental.shard import reshard  # type: ignore[import-not-found,unused-ignore]

    return reshard(array, sharding)


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


def uniformly_varying(*arrays: Any) -> Arrays:
    """The arrays, all of them varying over every axis over which one does: a gradient of a cast is a sum."""
    axes = _all_varying(arrays)
    return tuple(_cast(array, axes) for array in arrays)


def _all_varying(arrays: Arrays) -> frozenset[Any]:
    return frozenset[Any]().union(*map(_varying, arrays))


def like(array: Any, other: Any) -> Any:
    """The array, sharded over Explicit axes as `other` is."""
    mesh = _mesh((other,))
    if mesh.empty or not mesh.explicit_axes:
        return array
    return _reshard(array, NamedSharding(mesh, jax.typeof(other).sharding.spec))
