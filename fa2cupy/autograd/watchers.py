"""What may have to see a call on torch tensors: cheap questions, each answered by C in under 0.1 microseconds.

Some of these functions are torch's own and not documented. One that a torch does not have counts as a yes: the call
then goes through an operator, which is slower and right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from fa2cupy.frameworks.torch import fx_tracing

__all__ = [
    "PLAIN",
    "any_autocast",
    "are_watched",
    "deterministic_algorithms",
    "in_forward_mode",
    "is_compiling",
    "is_grad_enabled",
    "is_plain",
]

PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})  # types that dispatch nowhere but to a kernel

is_compiling: Callable[[], bool] = torch.compiler.is_compiling
is_grad_enabled: Callable[[], bool] = torch.is_grad_enabled
deterministic_algorithms: Callable[[], bool] = getattr(
    torch._C, "_get_deterministic_algorithms", torch.are_deterministic_algorithms_enabled
)
any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)

_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_is_batched: Callable[[Any], bool] = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: False)
_is_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", lambda: True)  # torch.jit.trace, older exports
_is_fx_tracing = fx_tracing()
_functorch: Callable[[], Any] = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: True)


def is_plain(gradient: Any) -> bool:
    """Whether a gradient has memory of its own, as those of torch.autograd.grad(is_grads_batched=True) have not."""
    return type(gradient) in PLAIN and not _is_batched(gradient)


def in_forward_mode() -> bool:
    """Whether tangents may be around (torch.func.jvp too)."""
    return bool(getattr(forward_ad, "_current_level", 0) >= 0)


def are_watched() -> bool:
    """Whether a dispatch mode, torch.func, forward-mode autograd, torch.jit.trace or torch.fx is at work."""
    return (
        _dispatch_modes() > 0
        or _functorch() is not None
        or getattr(forward_ad, "_current_level", 0) >= 0
        or _is_tracing()
        or _is_fx_tracing()
    )
