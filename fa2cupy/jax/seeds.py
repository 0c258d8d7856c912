"""A dropout_seed for a part of a batch."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from fa2cupy.checks import check_seed, shown
from fa2cupy.errors import InvalidType
from fa2cupy.frameworks import JAX
from fa2cupy.frameworks.base import describe
from fa2cupy.xla.arrays import passed_on, seed_from

__all__ = ["dropout_seed"]


def dropout_seed(seed: Any, *, first_sequence: Any = 0, first_head: Any = 0) -> Any:
    """The dropout_seed of the part of a batch that begins at this sequence and this query head.

    For calls of which each computes a part, as each device's inside `jax.shard_map`: with one seed they would all drop
    the same places; with these, what one call for the whole would drop.

    Args:
        seed: what `fa2cupy.attention` takes as dropout_seed: a JAX key, (seed, offset), or an array of them. A seed of
            a part is moved on.
        first_sequence, first_head: integers, also traced ones, as jax.lax.axis_index(name) * q.shape[0].

    Returns: uint32 (8,): seed, offset, first sequence, first head, the low word of each in front.

    Raises: ValueError or TypeError for anything else.
    """
    (found,) = check_seed("dropout_seed", seed)
    words = JAX.seed(found, None) if isinstance(found, tuple) else jnp.asarray(found)
    for name, number in (("first_sequence", first_sequence), ("first_head", first_head)):
        is_integer = hasattr(number, "dtype") and jnp.issubdtype(number.dtype, jnp.integer) and not number.ndim
        if not is_integer and (isinstance(number, bool) or not isinstance(number, int)):
            raise InvalidType(f"{shown(name, number)} is a {describe(number)}: an integer is needed")
    return seed_from(passed_on("dropout_seed", words), first_sequence, first_head)
