"""Attention over a sequence that is sharded: keys and values travel around a ring, the pieces are merged."""

from __future__ import annotations

from typing import Any

import jax

from fa2cupy.attention import attention
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.merge import merge_attention

__all__ = ["ring_attention"]


def ring_attention(q: Any, k: Any, v: Any, axis_name: str, *, causal: bool = False, **options: Any) -> Any:
    """Attention of this device's queries to the keys of all devices along a mesh axis; inside `jax.shard_map`.
    Layout "bshd": q, k, v are this device's (batch, seqlen / devices, heads, head_dim); causal counts over the whole.

    In as many steps as there are devices each computes with the keys that it has and passes them on (`ppermute`); the
    pieces are merged by their log-sum-exps. Differentiable: JAX turns the ring around for the gradients.

    Args:
        axis_name: the mesh axis along which the sequence is sharded, in order and evenly.
        causal: device i's queries see the keys of the devices before it and, of its own, those not after the query.
            Lengths of queries and keys must then be equal.
        options: softmax_scale and deterministic, as `fa2cupy.attention` has them.

    Returns: out, (batch, seqlen / devices, num_heads, head_dim_v). Raises: ValueError or TypeError, as it does.
    """
    for name in options:
        if name not in ("softmax_scale", "deterministic"):  # what others mean depends on where a piece of keys stands
            raise InvalidType(
                f"ring_attention() has no keyword {name!r}: it takes causal, softmax_scale, deterministic, and "
                "arrays of layout 'bshd'"
            )
    if causal and q.shape[1] != k.shape[1]:
        raise InvalidArgument(
            f"{q.shape[1]} queries and {k.shape[1]} keys on a device: causal=True needs as many of each"
        )
    size, rank = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    onward = [(i, (i + 1) % size) for i in range(size)]
    outs, lses = [], []
    for step in range(size):
        out, lse = attention(q, k, v, causal=causal and step == 0, return_lse=True, **options)
        if causal and step:  # keys of device rank - step: all of them are seen, or none
            lse = jax.numpy.where(rank >= step, lse, -jax.numpy.inf)
        outs.append(out)
        lses.append(lse)
        if step + 1 < size:
            k, v = (jax.lax.ppermute(x, axis_name, onward) for x in (k, v))
    return merge_attention(outs, lses)[0]
