"""Eager gradients: one autograd.Function around the launches."""

from __future__ import annotations

import sys
from typing import Any

import torch

from fa2cupy import dynamo
from fa2cupy.autograd.features import NOTHING, Extra, features_text, in_order
from fa2cupy.autograd.launching import launch_backward, launch_forward
from fa2cupy.autograd.operators import backward_op
from fa2cupy.autograd.watchers import are_watched, is_grad_enabled, is_plain

__all__ = ["eager"]


class _Attention(torch.autograd.Function):
    """forward(ctx, ...) rather than setup_context, with which torch inspects a signature at every call (15 us)."""

    @staticmethod
    def forward(
        ctx: Any, q: Any, k: Any, v: Any, options: tuple[Any, ...], names: tuple[str, ...] = (), *arrays: Any
    ) -> tuple[Any, Any]:
        out, lse = launch_forward(q, k, v, options, dict(zip(names, arrays, strict=True)))
        ctx.save_for_backward(q, k, v, out, lse, *arrays)
        ctx.options, ctx.names = options, names
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any) -> tuple[Any, ...]:
        if dout is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        q, k, v, out, lse, *arrays = ctx.saved_tensors
        extra = dict(zip(ctx.names, arrays, strict=True))
        if dout is None:
            dout = torch.zeros_like(out)
        # With grad mode on (create_graph=True) the operator is taken too: it says that there is no second derivative.
        if is_grad_enabled() or are_watched() or not is_plain(dout) or (dlse is not None and not is_plain(dlse)):
            options = (*ctx.options[:5], features_text(ctx.options[5]))
            dq, dk, dv = backward_op(dout, q, k, v, out, lse, dlse, *options, *in_order(extra))
        else:
            dq, dk, dv = launch_backward(dout, q, k, v, out, lse, dlse, ctx.options, extra)
        return dq, dk, dv, *(None,) * (len(ctx.needs_input_grad) - 3)


# Past torch's Python `apply`, which looks for torch.func: whoever comes here has looked.
_apply = super(torch.autograd.Function, _Attention).apply


def eager(q: Any, k: Any, v: Any, options: tuple[Any, ...], return_lse: bool, extra: Extra = NOTHING) -> Any:
    """out or (out, lse), with a graph."""
    if not dynamo.told and "torch._dynamo" in sys.modules:
        dynamo.tell()
    more = (tuple(extra), *extra.values()) if extra else ()
    out, lse = _apply(q, k, v, options, *more)
    return (out, lse) if return_lse else out
