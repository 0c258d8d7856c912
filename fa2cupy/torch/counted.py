"""Who computed what came to torch's SDPA: our kernels, or torch's that were there. `fa2cupy.report()` says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from fa2cupy import counts, dynamo

__all__ = ["DOOR", "DOOR_BACKWARD", "Native", "counted", "took"]

DOOR, DOOR_BACKWARD = "torch's SDPA", "torch's SDPA, backward"
Native = Callable[..., Any]  # (why, keyset, *arguments, **keywords): the kernel that was there, counted


def took(door: str) -> None:
    """A call that is ours."""
    if not dynamo.told and "torch._dynamo" in sys.modules:
        dynamo.tell()
    counts.took(door)


def counted(name: str, kernel: Any) -> Native:
    """torch's kernel of an operator. Nobody hears of calls whose `why` is empty: they never were to be ours."""
    door = DOOR_BACKWARD if "backward" in name else DOOR

    def native(why: str, keyset: Any, *arguments: Any, **keywords: Any) -> Any:
        if why:
            counts.fell_back(door, f"aten::{name}", why)
        return kernel.call_boxed(keyset, *arguments, **keywords)

    return native
