"""The launches below torch's autograd, for the Function and for the operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fa2cupy.autograd.features import NOTHING, Extra
from fa2cupy.autograd.forms import separate
from fa2cupy.autograd.known import NO_KIND, Kind
from fa2cupy.calls import call
from fa2cupy.operations import ASKED, BACKWARD, FORWARD

__all__ = ["launch_backward", "launch_forward"]

# Autograd is above whoever launches here, and has asked or was asked for what `check_call` asks.
_FORWARD, _BACKWARD = ASKED[FORWARD], ASKED[BACKWARD]


def launch_forward(
    q: Any, k: Any, v: Any, options: tuple[Any, ...], extra: Extra = NOTHING, *, kind: Kind = NO_KIND
) -> tuple[Any, Any]:
    """out, lse. options: those of a launch (`RawOptions`). kind: what learns from this call, if it has no `extra`."""
    operation, arrays, launched = _FORWARD, [q, k, v, None, None], (*options[:4], False, options[5])
    if extra:
        operation, arrays = operation.extended(tuple(extra)), [*arrays, *extra.values()]
    out, lse = call(operation, arrays, None, launched)
    if not extra:
        kind.learn(operation, (q, k, v), (out, lse), launched)
    return out, lse


def launch_backward(
    dout: Any, inputs: Sequence[Any], out: Any, lse: Any, dlse: Any, options: tuple[Any, ...],
    extra: Extra = NOTHING, *, kind: Kind = NO_KIND, wanted: tuple[str, ...] = (),
) -> tuple[Any, ...]:  # fmt: skip
    """The gradients of `inputs`, which are of any form (`forms.py`), and those of the `wanted` arrays of `extra`.

    Of what is packed the kernels write dq, dk and dv into one new tensor. Torch's own switch is asked now, so that
    nothing which was compiled before has to know it. kind: what learns from this call, the one of its `deterministic`,
    if it is of q, k and v and has no `extra`.
    """
    deterministic = options[4] or torch.are_deterministic_algorithms_enabled()
    packed = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs] if len(inputs) < 3 else None
    outputs = (None,) * 3 if packed is None else separate(packed)
    operation, arrays = _BACKWARD, [dout, *separate(inputs), out, lse, *outputs]
    if extra:
        arrays = [*arrays, *(None for _ in wanted), *extra.values()]
        operation = operation.extended(tuple(extra), tuple(f"d{name}" for name in wanted))
    if dlse is not None:
        operation, arrays = operation.extended(("dlse",)), [*arrays, dlse]
    launched = (*options[:4], deterministic, options[5])
    dq, dk, dv, *further = call(operation, arrays, None, launched)
    if packed is not None:
        return *packed, *further
    if operation is _BACKWARD:
        kind.learn(operation, (dout, *inputs, out, lse), (dq, dk, dv), launched)
    return dq, dk, dv, *further
