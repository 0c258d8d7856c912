"""DTensor: how the operators may be split over a mesh. Batch and heads may be sharded, sequences are gathered.

Nothing is imported until torch.distributed.tensor is there, which it is when the first DTensor is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fa2cupy import dynamo
from fa2cupy.autograd.features import by_name
from fa2cupy.spec import CARRIED, DIFFERENTIABLE, MASK_ARRAYS

__all__ = ["register"]

_registered = False


@dynamo.constant
def register() -> None:
    """Tell DTensor about the operators, once, if it is loaded; while torch.compile traces, too."""
    global _registered
    if _registered or "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor.experimental import register_sharding

    from fa2cupy.autograd.operators import OPERATORS

    for count, operators in OPERATORS.items():
        register_sharding(operators.forward)(_forward(count))
        register_sharding(operators.backward)(_backward(count))
    _registered = True


Placements = list[tuple[list[Any], list[Any]]]  # (of the outputs, of the inputs), for every way


def _forward(count: int) -> Callable[..., Placements]:
    """count: of the inputs, in any form (`forms.py`)."""

    def placements(*arguments: Any) -> Placements:
        inputs, (_, _, layout, *rest) = arguments[:count], arguments[count:]
        return [
            ([split.queries, split.statistic], [*split.inputs(count)] + [None] * 3 + split.of_rest(rest))
            for split in _splits(inputs, layout, rest)
        ]

    return placements


def _backward(count: int) -> Callable[..., Placements]:
    def placements(dout: Any, *arguments: Any) -> Placements:
        inputs, (_, _, dlse, _, _, layout, *rest) = arguments[:count], arguments[count:]
        found = []
        for split in _splits(inputs, layout, rest):
            like, statistic = split.inputs(count), split.statistic
            tensors = [split.queries, *like, split.queries, statistic, None if dlse is None else statistic]
            found.append(([*like, *split.gradients(rest)], tensors + [None] * 3 + split.of_rest(rest)))
        return found

    return placements


_OPTIONS = 3  # of those behind layout: dtype, deterministic, features; then come the arrays


def _arrays(rest: Sequence[Any]) -> dict[str, Any]:
    return by_name(rest[_OPTIONS:])


class _Split(NamedTuple):
    """Placements along one dimension of the mesh: of q, out and their gradients; of k, v and theirs; of what packs
    these; of lse and dlse; of arrays of the keywords, by whether they are of heads, of both, or of sequences alone.
    """

    queries: Any
    keys: Any
    packed: Any
    statistic: Any
    of_heads: Any  # (num_heads,)
    of_both: Any  # (batch, num_heads)
    lengths: Any

    def inputs(self, count: int) -> list[Any]:
        """Of q, k and v in the form of so many tensors, and of their gradients."""
        return {3: [self.queries, self.keys, self.keys], 2: [self.queries, self.packed], 1: [self.packed]}[count]

    def of_rest(self, rest: Sequence[Any]) -> list[Any]:
        """What stands behind layout."""
        arrays = _arrays(rest)
        places = [self._of(name, arrays[name]) if name in arrays else None for name in CARRIED]
        return [*(None,) * min(_OPTIONS, len(rest)), *places[: max(0, len(rest) - _OPTIONS)]]

    def gradients(self, rest: Sequence[Any]) -> list[Any]:
        """Of `DIFFERENTIABLE`: sums over the batch, where that is split."""
        from torch.distributed.tensor import Partial, Replicate, Shard

        arrays, batch_is_split = _arrays(rest), self.queries == Shard(0) and self.of_both == Shard(0)
        return [
            Replicate() if name not in arrays else Partial() if batch_is_split else self.of_heads
            for name in DIFFERENTIABLE
        ]

    def _of(self, name: str, spec: Any) -> Any:
        if name not in ("alibi_slopes", "sinks"):
            return self.lengths
        return self.of_heads if len(spec.shape) == 1 else self.of_both


def _splits(specs: tuple[Any, ...], layout: str, rest: Sequence[Any]) -> list[_Split]:
    """A packed side has no batch to be split; of dropout nothing is, since it goes by the numbers of sequences and
    heads, which a rank does not know; nor with a mask, which is of all."""
    from torch.distributed.tensor import Replicate, Shard

    arrays = _arrays(rest)
    packed_q, packed_k = (name in arrays for name in ("cu_seqlens_q", "cu_seqlens_k"))
    heads = 2 if layout == "bshd" else 1
    heads_q, heads_k = (1 if packed else heads for packed in (packed_q, packed_k))
    whole = Replicate()
    found = [_Split(*(whole,) * 7)]
    if not {"dropout_seed", "mask", MASK_ARRAYS[0]}.isdisjoint(arrays):
        return found
    if not packed_q and not packed_k:
        found.append(_Split(*(Shard(0),) * 4, whole, Shard(0), Shard(0)))
    if _heads_can_be_split(specs, heads_k if len(specs) == 3 else heads_k + 1, packed_q or packed_k):
        statistic, packed = Shard(0 if packed_q else 1), Shard(heads_k + 1)
        found.append(_Split(Shard(heads_q), Shard(heads_k), packed, statistic, Shard(0), Shard(1), whole))
    return found


def _heads_can_be_split(specs: tuple[Any, ...], heads: int, packed: bool) -> bool:
    """Whether every rank would get whole groups: its query heads, and the key heads that these use.

    Along which dimensions of the mesh heads end up split is for DTensor to say; never along one that splits the batch
    of q, k and v already, so all the others must divide the key heads. heads: their dimension in the last input.
    packed: a dimension of the mesh that splits tokens will not stay so.
    """
    mesh, ways = specs[0].mesh, 1
    for dim in range(mesh.ndim):
        if packed or not all(spec.placements[dim].is_shard(0) for spec in specs):
            ways *= mesh.size(dim)
    return bool(specs[-1].shape[heads] % ways == 0)
