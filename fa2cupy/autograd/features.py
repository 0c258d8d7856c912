"""Options beyond dense attention as a string, which an operator can have: names and numbers, in the table's order."""

from __future__ import annotations

import ast
import functools
from typing import Any

from fa2cupy import dynamo
from fa2cupy.errors import InvalidArgument

__all__ = ["features_of", "features_text"]


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
