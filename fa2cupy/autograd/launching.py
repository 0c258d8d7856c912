"""The launches below torch's autograd, for the Function and for the operators."""

from __future__ import annotations

from typing import Any

import torch

from fa2cupy.autograd.features import NOTHING, Extra
from fa2cupy.calls import call
from fa2cupy.operations import ASKED, BACKWARD, FORWARD

__all__ = ["launch_backward", "launch_forward"]

# Autograd is above whoever launches here, and has asked or was asked for what `check_call` asks.
_FORWARD, _BACKWARD = ASKED[FORWARD], ASKED[BACKWARD]


def launch_forward(q: Any, k: Any, v: Any, options: tuple[Any, ...], extra: Extra = NOTHING) -> tuple[Any, Any]:
    """out, lse. options: those of a launch (`RawOptions`)."""
    operation, arrays = _FORWARD, [q, k, v, None, None]
    if extra:
        operation, arrays = operation.extended(tuple(extra)), [*arrays, *extra.values()]
    out, lse = call(operation, arrays, None, (*options[:4], False, options[5]))
    return out, lse


def launch_backward(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dlse: Any, options: tuple[Any, ...], extra: Extra = NOTHING
) -> tuple[Any, Any, Any]:
    """dq, dk, dv. Torch's own switch is asked now, so that nothing which was compiled before has to know it."""
    deterministic = options[4] or torch.are_deterministic_algorithms_enabled()
    operation, arrays = _BACKWARD, [dout, q, k, v, out, lse, None, None, None]
    if extra:
        operation, arrays = operation.extended(tuple(extra)), [*arrays, *extra.values()]
    if dlse is not None:
        operation, arrays = operation.extended(("dlse",)), [*arrays, dlse]
    dq, dk, dv = call(operation, arrays, None, (*options[:4], deterministic, options[5]))
    return dq, dk, dv
