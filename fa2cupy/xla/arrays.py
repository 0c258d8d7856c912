"""What the dimensions of every array mean to JAX's transformations: how it is sharded and how it is mapped.

A new keyword with an array needs a line in `ROLES`, and no other code here or beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fa2cupy.spec import LENGTHS

__all__ = ["OF_PLACES", "ROLES", "UnfoldableError", "fold", "passed_on", "roles", "seed_from"]

# By keyword: the dimensions of an array, for each rank that it may have. In the order of layout "bshd" if `_TENSORS`.
# b batch, h query heads, g key heads, s queries, t keys, d and e head dims of k and v, n starts of packed sequences, w
# words of a seed; of these b, h and g may be sharded. A dimension of length 1 where the problem has more is broadcast.
ROLES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("q", "dq"), ("bshd", "shd")),
    **dict.fromkeys(("out", "dout"), ("bshe", "she")),
    **dict.fromkeys(("k", "dk"), ("btgd", "tgd")),
    **dict.fromkeys(("v", "dv"), ("btge", "tge")),
    **dict.fromkeys(("lse", "lse_out", "dlse"), ("bhs", "hs")),
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), ("n",)),
    **dict.fromkeys(("seqused_q", "seqused_k", "leftpad_k"), ("b",)),
    "segment_ids_q": ("bs",),
    "segment_ids_k": ("bt",),
    "alibi_slopes": ("h", "bh"),
    **dict.fromkeys(("sinks", "dsinks"), ("h",)),
    "dropout_seed": ("w",),
}
_TENSORS = frozenset(("q", "k", "v", "out", "dout", "dq", "dk", "dv"))


class UnfoldableError(Exception):
    """An array has no form with a batch dimension of its own, or a problem none."""


def roles(name: str, rank: int, layout: str) -> str:
    """The meaning of each dimension of the array `name`."""
    found = next(form for form in ROLES[name] if len(form) == rank)
    is_swapped = name in _TENSORS and layout == "bhsd" and rank == 4
    return found[0] + found[2] + found[1] + found[3] if is_swapped else found


def passed_on(name: str, array: Any) -> Any:
    """An array of a keyword as the kernels take it: lengths as int32, of which those beyond it become its ends, and a
    seed as its words, which JAX can add to.
    """
    if name in LENGTHS and array.dtype != jnp.int32:
        limits = np.iinfo(np.int32)
        return jnp.clip(array, limits.min, limits.max).astype(jnp.int32)
    if name == "dropout_seed" and array.dtype != jnp.uint32:
        return jax.lax.bitcast_convert_type(array, jnp.uint32).reshape(-1)
    return array


def seed_from(seed: Any, first_sequence: Any, first_head: Any) -> Any:
    """The seed, uint32, of a part of the problem that begins at this sequence and this query head."""
    zero = jnp.uint32(0)
    sequence, head = (jnp.asarray(number).astype(jnp.uint32) for number in (first_sequence, first_head))
    words = jnp.concatenate([seed, jnp.zeros(8 - seed.size, jnp.uint32)])
    return words + jnp.stack([zero, zero, zero, zero, sequence, zero, head, zero])


# Arrays that go by the numbers of sequences and of query heads: (array, the first ones of a part of the problem) ->
# that part's.
OF_PLACES: dict[str, Callable[[Any, Any, Any], Any]] = {"dropout_seed": seed_from}


def fold(name: str, array: Any, is_mapped: bool, size: int, batch: int) -> Any:
    """The array of `size` problems of `batch` sequences each as that of one problem of size * batch sequences.

    is_mapped: its first dimension is `size`; otherwise all problems share it.
    """
    shape = array.shape[1:] if is_mapped else array.shape
    form = next(form for form in ROLES[name] if len(form) == len(shape))
    if not form.startswith("b"):
        if not is_mapped:
            return array
        if "b" + form not in ROLES[name]:
            raise UnfoldableError
        shape = (1, *shape)
        array = array[:, None]
    elif not is_mapped:
        if shape[0] == 1 != batch:
            return array
        array = array[None]
    full: Sequence[int] = (size, batch, *shape[1:])
    return jax.lax.reshape(jnp.broadcast_to(array, full), (size * batch, *shape[1:]))
