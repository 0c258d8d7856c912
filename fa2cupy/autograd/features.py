"""What goes beyond dense attention as an operator can have it: options as a string, names and numbers in the table's
order, and arrays as arguments of their own.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from fa2cupy import dynamo
from fa2cupy.errors import InvalidArgument
from fa2cupy.spec import CARRIED, DIFFERENTIABLE

__all__ = ["NOTHING", "Extra", "by_name", "features_of", "features_text", "in_order", "refuse_gradients"]

# The arrays of keywords beyond q, k and v, by name, in the table's order.
Extra = Mapping[str, Any]
NOTHING: Extra = {}


@dynamo.constant
def features_text(features: tuple[tuple[str, Any], ...]) -> str:
    """(("window_size", (128, 0)),) as text. InvalidArgument for values that have none."""
    if not features:
        return ""
    text = repr(features)
    try:
        if features_of(text) == features:
            return text
    except (SyntaxError, ValueError):
        pass
    names = ", ".join(name for name, _ in features)
    raise InvalidArgument(f"{names}: not supported yet where torch traces or watches; use torch.no_grad() outside")


@functools.lru_cache(maxsize=1024)
def features_of(text: str) -> tuple[tuple[str, Any], ...]:
    """The inverse."""
    features: tuple[tuple[str, Any], ...] = ast.literal_eval(text) if text else ()
    return features


def in_order(extra: Extra) -> tuple[Any, ...]:
    """Arrays as the last arguments of an operator, None for those that are not there."""
    return tuple([extra.get(name) for name in CARRIED]) if extra else ()


def refuse_gradients(extra: Extra) -> None:
    """InvalidArgument if one of these arrays requires a gradient that nobody computes."""
    for name, array in extra.items():
        if name not in DIFFERENTIABLE and array.requires_grad:
            raise InvalidArgument(f"{name} requires grad, and has no gradient here: pass {name}.detach()")


def by_name(arrays: Sequence[Any]) -> dict[str, Any]:
    """The inverse; the dispatcher leaves out those at the end that are None."""
    return {name: array for name, array in zip(CARRIED, arrays, strict=False) if array is not None}
