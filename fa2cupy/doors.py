"""What `attention` asks before it launches: whether a framework wants more of this call than a result.

Frameworks are not imported here: an array of theirs cannot exist before its user has imported them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from fa2cupy import dynamo

__all__ = ["has_torch", "torch_extra", "torch_way"]

# `way` of fa2cupy/autograd/dispatch.py as soon as torch is loaded.
torch_way: Callable[[Any, Any, Any], Callable[..., Any] | None] = lambda q, k, v: None  # noqa: E731 - until then
# `with_extra` there, for calls with arrays beyond q, k and v.
torch_extra: Callable[..., Any] = lambda way, q, extra: (way, extra)  # noqa: E731

_loaded = False


@dynamo.constant
def has_torch() -> bool:
    """Whether torch is loaded; then `torch_way` is its."""
    global _loaded, torch_way, torch_extra
    if not _loaded and sys.modules.get("torch") is not None:
        from fa2cupy.autograd import dispatch

        torch_way, torch_extra, _loaded = dispatch.way, dispatch.with_extra, True
    return _loaded
