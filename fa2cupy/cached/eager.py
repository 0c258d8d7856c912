"""`attention_with_kvcache` for whom it calls itself: torch's operators, which `kvcache.py` comes to by `doors.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["attend"]


def _unset(*arguments: Any, **keywords: Any) -> Any:
    raise RuntimeError("fa2cupy.kvcache has not been imported")


attend: Callable[..., Any] = _unset  # kvcache.py puts its function here
