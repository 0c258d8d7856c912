"""Keep torch.compile out of this package: kernels are launched by pointer, NumPy computes, neither can be traced.

torch may be imported after fa2cupy, and the first call of all may come from a function that is being compiled. So a
public function leaves the graph by the mark that torch.compiler.disable puts on functions, and at its first call under
a loaded Dynamo tells it to run everything else here as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

__all__ = ["leave", "tell", "told"]

_Function = TypeVar("_Function", bound=Callable[..., object])

told = False  # whether Dynamo knows


def leave(function: _Function) -> _Function:
    """Mark a function: torch.compile ends its graph before it, and with fullgraph=True says why."""
    setattr(function, "_torchdynamo_disable", True)  # noqa: B010 - functions have no such attribute for mypy
    setattr(function, "_torchdynamo_disable_msg", "fa2cupy launches its kernels itself")  # noqa: B010
    return function


@leave
def tell() -> None:
    """Tell Dynamo, which is loaded, to trace no file of this package."""
    global told
    sys.modules["torch._dynamo"].trace_rules.add("fa2cupy")
    told = True
