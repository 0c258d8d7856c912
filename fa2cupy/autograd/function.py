"""Eager gradients: one autograd.Function around the launches."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from fa2cupy import dynamo
from fa2cupy.autograd.features import NOTHING, Extra, features_text, in_order
from fa2cupy.autograd.forms import separate
from fa2cupy.autograd.known import KINDS, NO_KIND
from fa2cupy.autograd.launching import launch_backward, launch_forward
from fa2cupy.autograd.operators import OPERATORS
from fa2cupy.autograd.watchers import are_watched, deterministic_algorithms, is_grad_enabled, is_plain
from fa2cupy.spec import DIFFERENTIABLE

__all__ = ["eager", "eager_packed"]


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
        if not (watched or ctx.names) and is_plain(dout) and (dlse is None or is_plain(dlse)):
            dq, dk, dv = launch_backward(dout, (q, k, v), out, lse, dlse, options, kind=kind)
            return dq, dk, dv, *nothing
        (dq, dk, dv), further = _gradients(ctx, dout, (q, k, v), out, lse, dlse, arrays)
        return dq, dk, dv, *nothing, *further


class _Packed(torch.autograd.Function):
    """Attention of (qkv,) or (q, kv): were unpacking torch's, their gradient would be stacked from dq, dk and dv."""

    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], return_lse: bool, names: tuple[str, ...], *tensors: Any) -> Any:
        """tensors: the inputs, and the further arrays by `names`."""
        inputs, arrays = tensors[: len(tensors) - len(names)], tensors[len(tensors) - len(names) :]
        out, lse = launch_forward(*separate(inputs), options, dict(zip(names, arrays, strict=True)))
        ctx.save_for_backward(out, lse, *inputs, *arrays)
        ctx.options, ctx.names = options, names
        ctx.set_materialize_grads(False)
        return (out, lse) if return_lse else out

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any = None) -> tuple[Any, ...]:
        if dout is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        out, lse, *tensors = ctx.saved_tensors
        count = len(tensors) - len(ctx.names)
        dout = torch.zeros_like(out) if dout is None else dout
        gradients, further = _gradients(ctx, dout, tensors[:count], out, lse, dlse, tensors[count:])
        return None, None, None, *gradients, *further


def _gradients(
    ctx: Any, dout: Any, inputs: Sequence[Any], out: Any, lse: Any, dlse: Any, arrays: Sequence[Any]
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Of the inputs, in any form, and of the further arrays (None where it is not wanted).

    With grad mode on (create_graph=True) the operator is taken: it says that there is no second derivative.
    """
    options, count = ctx.options, len(inputs)
    extra = dict(zip(ctx.names, arrays, strict=True))
    wanted: tuple[str, ...] = tuple(name for name, needed in _needed(ctx) if needed)
    names = wanted
    if is_grad_enabled() or are_watched() or not is_plain(dout) or (dlse is not None and not is_plain(dlse)):
        operator, text = OPERATORS[count].backward, features_text(options[5])
        gradients = operator(dout, *inputs, out, lse, dlse, *options[:5], text, *in_order(extra))
        names = DIFFERENTIABLE
    else:
        gradients = launch_backward(dout, inputs, out, lse, dlse, options, extra, wanted=wanted)
    found = dict(zip(names, gradients[count:], strict=True))
    return gradients[:count], [found[name] if name in wanted else None for name in ctx.names]


def _needed(ctx: Any) -> list[tuple[str, bool]]:
    """The names of the further arrays, each with whether its gradient is wanted."""
    count = len(ctx.names)
    return list(zip(ctx.names, ctx.needs_input_grad[len(ctx.needs_input_grad) - count :], strict=True)) if count else []


# Past torch's Python `apply`, which looks for torch.func: whoever comes here has looked.
_apply = super(torch.autograd.Function, _Attention).apply
# What autograd's engine calls; torch's own `apply` looks for the function above, once more at every call.
_Attention._backward_cls.apply = _Attention.backward
_apply_packed = super(torch.autograd.Function, _Packed).apply
_Packed._backward_cls.apply = _Packed.backward


def eager(q: Any, k: Any, v: Any, options: tuple[Any, ...], return_lse: bool, extra: Extra = NOTHING) -> Any:
    """out or (out, lse), with a graph."""
    if not dynamo.told and "torch._dynamo" in sys.modules:
        dynamo.tell()
    more = (tuple(extra), *extra.values()) if extra else ()
    return _apply(q, k, v, options, return_lse, *more)


def eager_packed(inputs: Sequence[Any], options: tuple[Any, ...], return_lse: bool, extra: Extra = NOTHING) -> Any:
    """The same of (qkv,) or (q, kv)."""
    if not dynamo.told and "torch._dynamo" in sys.modules:
        dynamo.tell()
    return _apply_packed(options, return_lse, tuple(extra), *inputs, *extra.values())
