"""Eager gradients: one autograd.Function around the launches."""

from __future__ import annotations

import sys
from typing import Any

import torch

from fa2cupy import dynamo
from fa2cupy.autograd.features import NOTHING, Extra, features_text, in_order
from fa2cupy.autograd.known import KINDS, NO_KIND
from fa2cupy.autograd.launching import launch_backward, launch_forward
from fa2cupy.autograd.operators import backward_op
from fa2cupy.autograd.watchers import are_watched, deterministic_algorithms, is_grad_enabled, is_plain
from fa2cupy.spec import DIFFERENTIABLE

__all__ = ["eager"]


class _Attention(torch.autograd.Function):
    """forward(ctx, ...) rather than setup_context, with which torch inspects a signature at every call (15 us)."""

    @staticmethod
    def forward(
        ctx: Any, q: Any, k: Any, v: Any, options: tuple[Any, ...], return_lse: bool, names: tuple[str, ...] = (),
        *arrays: Any,
    ) -> Any:  # fmt: skip
        """names: of the further arrays."""
        try:  # types, since 1 == True
            kind = KINDS[options, type(options[0]), type(options[1]), q.shape, k.shape] if not names else NO_KIND
        except TypeError:  # options that are errors
            kind = NO_KIND
        for run in kind.runs:
            results = run(q, k, v)
            if results is not None:
                out, lse = results
                break
        else:
            out, lse = launch_forward(q, k, v, options, dict(zip(names, arrays, strict=True)), kind=kind)
        ctx.save_for_backward(q, k, v, out, lse, *arrays)
        ctx.options, ctx.names = options, names
        ctx.kind = kind
        ctx.set_materialize_grads(False)
        # An output costs autograd 5 us, whether anybody looks at it or not.
        return (out, lse) if return_lse else out

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any = None) -> tuple[Any, ...]:
        if dout is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        q, k, v, out, lse, *arrays = ctx.saved_tensors
        nothing = (None,) * (2 if not ctx.names else 3)  # for what is no tensor
        options, kind = ctx.options, NO_KIND
        # With grad mode on (create_graph=True) the operator is taken: it says that there is no second derivative.
        watched = is_grad_enabled() or are_watched()
        if dout is None:
            dout = torch.zeros_like(out)
        elif dlse is None and not watched and not arrays:
            kind = ctx.kind.backwards[options[4] or deterministic_algorithms()]
            for run in kind.runs:
                gradients = run(dout, q, k, v, out, lse)
                if gradients is not None:
                    dq, dk, dv = gradients
                    return dq, dk, dv, *nothing
        if watched or not is_plain(dout) or (dlse is not None and not is_plain(dlse)):
            text, extra = features_text(options[5]), dict(zip(ctx.names, arrays, strict=True))
            dq, dk, dv, *further = backward_op(dout, q, k, v, out, lse, dlse, *options[:5], text, *in_order(extra))
            gradients = dict(zip(DIFFERENTIABLE, further, strict=True))
        elif not ctx.names:
            dq, dk, dv = launch_backward(dout, q, k, v, out, lse, dlse, options, kind=kind)
            return dq, dk, dv, *nothing
        else:
            extra = dict(zip(ctx.names, arrays, strict=True))
            wanted = tuple(name for name, needed in _needed(ctx) if needed)
            dq, dk, dv, *further = launch_backward(dout, q, k, v, out, lse, dlse, options, extra, wanted=wanted)
            gradients = dict(zip(wanted, further, strict=True))
        return dq, dk, dv, *nothing, *(gradients.get(name) if needed else None for name, needed in _needed(ctx))


def _needed(ctx: Any) -> list[tuple[str, bool]]:
    """The names of the further arrays, each with whether its gradient is wanted."""
    count = len(ctx.names)
    return list(zip(ctx.names, ctx.needs_input_grad[len(ctx.needs_input_grad) - count :], strict=True)) if count else []


# Past torch's Python `apply`, which looks for torch.func: whoever comes here has looked.
_apply = super(torch.autograd.Function, _Attention).apply
# What autograd's engine calls; torch's own `apply` looks for the function above, once more at every call.
_Attention._backward_cls.apply = _Attention.backward


def eager(q: Any, k: Any, v: Any, options: tuple[Any, ...], return_lse: bool, extra: Extra = NOTHING) -> Any:
    """out or (out, lse), with a graph."""
    if not dynamo.told and "torch._dynamo" in sys.modules:
        dynamo.tell()
    more = (tuple(extra), *extra.values()) if extra else ()
    return _apply(q, k, v, options, return_lse, *more)
