"""DTensor: how the operators may be split over a mesh. Batch and heads may be sharded, sequences are gathered.

Nothing is imported until torch.distributed.tensor is there, which it is when the first DTensor is.
"""

from __future__ import annotations

import sys
from typing import Any

from fa2cupy import dynamo

__all__ = ["register"]

_registered = False


@dynamo.constant
def register() -> None:
    """Tell DTensor about the operators, once, if it is loaded; while torch.compile traces, too."""
    global _registered
    if _registered or "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor.experimental import register_sharding

    from fa2cupy.autograd.operators import backward_op, forward_op

    register_sharding(forward_op)(_forward)
    register_sharding(backward_op)(_backward)
    _registered = True


Placements = list[tuple[list[Any], list[Any]]]  # (of the outputs, of the inputs), for every way


def _forward(q: Any, k: Any, v: Any, causal: bool, softmax_scale: Any, layout: str, *rest: Any) -> Placements:
    return [
        ([queries, statistic], [queries, keys, keys] + [None] * 3 + _of_rest(rest, lengths))
        for queries, keys, statistic, lengths in _choices((q, k, v), layout, rest)
    ]


def _backward(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dlse: Any, causal: bool, softmax_scale: Any, layout: str,
    *rest: Any,
) -> Placements:  # fmt: skip
    return [
        (
            [queries, keys, keys],
            [queries, queries, keys, keys, queries, statistic, statistic if dlse is not None else None]
            + [None] * 3
            + _of_rest(rest, lengths),
        )
        for queries, keys, statistic, lengths in _choices((q, k, v), layout, rest)
    ]


_OPTIONS = 3  # of those behind layout: dtype, deterministic, features; then come arrays, cu_seqlens_q and _k first


def _of_rest(rest: tuple[Any, ...], lengths: Any) -> list[Any]:
    """Placements of what stands behind layout."""
    return [None if n < _OPTIONS or x is None else lengths for n, x in enumerate(rest)]


def _choices(specs: tuple[Any, ...], layout: str, rest: tuple[Any, ...]) -> list[tuple[Any, Any, Any, Any]]:
    """(placement of q, out and their gradients; of k, v and theirs; of lse and dlse; of lengths) along one dimension of
    the mesh. A packed side has no batch to be split.
    """
    from torch.distributed.tensor import Replicate, Shard

    packed_q, packed_k = (len(rest) > n and rest[n] is not None for n in (_OPTIONS, _OPTIONS + 1))
    heads = 2 if layout == "bshd" else 1
    heads_q, heads_k = (1 if packed else heads for packed in (packed_q, packed_k))
    choices: list[tuple[Any, Any, Any, Any]] = [(Replicate(),) * 4]
    if not packed_q and not packed_k:
        choices.append((Shard(0),) * 4)
    if _heads_can_be_split(specs, heads_k, packed_q or packed_k):
        choices.append((Shard(heads_q), Shard(heads_k), Shard(0 if packed_q else 1), Replicate()))
    return choices


def _heads_can_be_split(specs: tuple[Any, ...], heads: int, packed: bool) -> bool:
    """Whether every rank would get whole groups: its query heads, and the key heads that these use.

    Along which dimensions of the mesh heads end up split is for DTensor to say; never along one that splits the batch
    of q, k and v already, so all the others must divide the key heads. heads: that dimension of k. packed: one that
    splits tokens will not stay so.
    """
    mesh, ways = specs[0].mesh, 1
    for dim in range(mesh.ndim):
        if packed or not all(spec.placements[dim].is_shard(0) for spec in specs):
            ways *= mesh.size(dim)
    return bool(specs[1].shape[heads] % ways == 0)
