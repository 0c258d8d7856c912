"""Keep torch.compile out of what launches: kernels go by pointer and NumPy computes, neither can be traced.

torch may be imported after fa2cupy, and the first call of all may come from a function that is being compiled. So
`attention`, what looks at its keywords, what decides which way it goes (`torch/dispatch.py`) and flash_attn's
functions above it are traced, as far as the operator that they come to; a function that launches leaves the graph by
the mark that torch.compiler.disable puts on functions; and at the first call under a loaded Dynamo that is not being
traced, Dynamo is told to run every other file as it is.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["constant", "leave", "tell", "told"]

# Functions marked `constant` must be in these too.
_TRACED = frozenset(
    {
        f"fa2cupy.{name}"
        for name in (
            "attention",
            "checks",
            "doors",
            "flash_attn",
            "keywords",
            "kvcache",
            "operations",
            "options",
            "autograd.cached",
            "autograd.dispatch",
            "torch.dot_product",
            "torch.seeds",
            "transformers",
            "autograd.features",
            "autograd.forms",
            "autograd.sharding",
        )
    }
)

_Function = TypeVar("_Function", bound=Callable[..., object])

told = False  # whether Dynamo knows


def leave(function: _Function) -> _Function:
    """Mark a function: torch.compile ends its graph before it, and with fullgraph=True says why."""
    setattr(function, "_torchdynamo_disable", True)  # noqa: B010 - functions have no such attribute for mypy
    setattr(function, "_torchdynamo_disable_msg", "fa2cupy launches its kernels itself")  # noqa: B010
    return function


def constant(function: _Function) -> _Function:
    """Mark a function: torch.compile calls it while it traces, rather than trace it, and goes on with its result."""
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010 - what torch.compiler.assume_constant_result does
    return function


@leave
def tell() -> None:
    """Tell Dynamo, which is loaded, to trace no file of this package but those of `_TRACED`."""
    global told
    add = sys.modules["torch._dynamo"].trace_rules.add
    here, packages = Path(__file__).parent, ("fa2cupy.autograd", "fa2cupy.torch")
    for package in ("fa2cupy", *packages):
        folder = here.joinpath(*package.split(".")[1:])
        for module in pkgutil.iter_modules([str(folder)], f"{package}."):
            if module.name not in _TRACED and module.name not in packages:
                add(module.name)
    told = True
