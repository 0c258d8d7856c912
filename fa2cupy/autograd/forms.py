"""The forms in which q, k and v come: three tensors, or some of them in one, whose gradient then is one tensor too.

(q, k, v); (q, kv) with kv (batch, seqlen_k, 2, num_heads_k, head_dim); (qkv,), (batch, seqlen, 3, num_heads, head_dim).
Of packed sequences (total, ...). A form is told by the number of its tensors.

torch.compile traces this file: it holds nothing that Dynamo cannot follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fa2cupy.errors import InvalidArgument

__all__ = ["FORMS", "Shape", "separate", "separate_shapes"]

FORMS = {len(names): names for names in (("q", "k", "v"), ("q", "kv"), ("qkv",))}

Shape = tuple[Any, ...]


def separate(tensors: Sequence[Any]) -> tuple[Any, Any, Any]:
    """q, k and v, views of tensors of any form. InvalidArgument if one has no place for its parts."""
    if len(tensors) < 3:
        last = tensors[-1]
        _check(tuple(last.shape), len(tensors))
        tensors = [*tensors[:-1], *last.unbind(-3)]
    q, k, v = tensors
    return q, k, v


def separate_shapes(shapes: Sequence[Shape]) -> tuple[Shape, Shape, Shape]:
    """The shapes of q, k and v, of shapes of any form."""
    if len(shapes) < 3:
        last = tuple(shapes[-1])
        _check(last, len(shapes))
        shapes = [*shapes[:-1], *(last[:-3] + last[-2:] for _ in range(last[-3]))]
    q, k, v = shapes
    return q, k, v


def _check(shape: Shape, count: int) -> None:
    """Whether it is one of the last tensor of so many."""
    parts = 4 - count
    if len(shape) not in (4, 5) or shape[-3] != parts:
        raise InvalidArgument(
            f"{FORMS[count][-1]} has shape {shape}: (batch, seqlen, {parts}, num_heads, head_dim), or with cu_seqlens "
            f"(total, {parts}, num_heads, head_dim), is needed"
        )
