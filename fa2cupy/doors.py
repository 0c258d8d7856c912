"""What `attention` asks before it launches: whether a framework wants more of this call than a result.

Frameworks are not imported here: an array of theirs cannot exist before its user has imported them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from fa2cupy import dynamo

__all__ = ["has_torch", "torch_attend", "torch_compiles", "torch_extra", "torch_way"]

# `way` of fa2cupy/autograd/dispatch.py as soon as torch is loaded.
torch_way: Callable[[Any, Any, Any], Callable[..., Any] | None] = lambda q, k, v: None  # noqa: E731 - until then
# `with_extra` there, for calls with arrays beyond q, k and v.
torch_extra: Callable[..., Any] = lambda way, q, extra: (way, extra)  # noqa: E731

# `is_compiling` of fa2cupy/autograd/watchers.py and `attend` of fa2cupy/autograd/cached.py likewise.
torch_is_compiling: Callable[[], bool] = lambda: False  # noqa: E731
torch_attend: Callable[..., Any] = lambda *_: None  # noqa: E731

_loaded = False


@dynamo.constant
def has_torch() -> bool:
    """Whether torch is loaded; then `torch_way` is its."""
    global _loaded, torch_way, torch_extra, torch_is_compiling, torch_attend
    if not _loaded and sys.modules.get("torch") is not None:
        from fa2cupy.autograd import cached, dispatch, watchers

        torch_way, torch_extra, _loaded = dispatch.way, dispatch.with_extra, True
        torch_is_compiling, torch_attend = watchers.is_compiling, cached.attend
    return _loaded


def torch_compiles() -> bool:
    """Whether this is being traced by torch.compile or export."""
    return has_torch() and torch_is_compiling()
