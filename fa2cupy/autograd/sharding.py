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
    options = [None] * (3 + len(rest))
    return [([tensor, statistic], [tensor] * 3 + options) for tensor, statistic in _choices((q, k, v), layout)]


def _backward(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dlse: Any, causal: bool, softmax_scale: Any, layout: str,
    *rest: Any,
) -> Placements:  # fmt: skip
    options = [None] * (3 + len(rest))
    return [
        ([tensor] * 3, [tensor] * 5 + [statistic, statistic if dlse is not None else None] + options)
        for tensor, statistic in _choices((q, k, v), layout)
    ]


def _choices(specs: tuple[Any, ...], layout: str) -> list[tuple[Any, Any]]:
    """(placement of q, k, v, out and their gradients; of lse and dlse) along one dimension of the mesh."""
    from torch.distributed.tensor import Replicate, Shard

    heads = 2 if layout == "bshd" else 1
    choices = [(Replicate(), Replicate()), (Shard(0), Shard(0))]
    if _heads_can_be_split(specs, heads):
        choices.append((Shard(heads), Shard(1)))
    return choices


def _heads_can_be_split(specs: tuple[Any, ...], heads: int) -> bool:
    """Whether every rank would get whole groups: its query heads, and the key heads that these use.

    Along which dimensions of the mesh heads end up split is for DTensor to say; never along one that splits the batch
    of q, k and v already, so all the others must divide the key heads.
    """
    mesh, ways = specs[0].mesh, 1
    for dim in range(mesh.ndim):
        if not all(spec.placements[dim].is_shard(0) for spec in specs):
            ways *= mesh.size(dim)
    return bool(specs[1].shape[heads] % ways == 0)
