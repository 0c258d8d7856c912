"""What `attention` asks before it launches: whether a framework wants more of this call than a result.

Frameworks are not imported here: an array of theirs cannot exist before its user has imported them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from fa2cupy import dynamo

__all__ = ["STRAIGHT", "has_torch", "torch_way"]

# A way that is no detour: to the launch, which need not ask again what `torch_way` has asked.
STRAIGHT: Any = "straight"


# `way` of fa2cupy/torch/dispatch.py, which puts itself here.
torch_way: Callable[[Any, Any, Any], Callable[..., Any] | None] = lambda q, k, v: None  # noqa: E731 - until then

_loaded = False


@dynamo.constant
def has_torch() -> bool:
    """Whether torch is loaded; then `torch_way` is its."""
    global _loaded
    if not _loaded and sys.modules.get("torch") is not None:
        import fa2cupy.torch.dispatch  # noqa: F401

        _loaded = True
    return _loaded
