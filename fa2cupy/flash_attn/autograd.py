"""Attention over separate tensors and over packed ones, whose gradient is then one buffer too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fa2cupy
from fa2cupy.autograd.dispatch import cast
from fa2cupy.autograd.features import features_text, in_order, refuse_gradients
from fa2cupy.autograd.watchers import PLAIN, any_autocast, are_watched, is_compiling, is_grad_enabled, is_plain
from fa2cupy.flash_attn.translate import check_tensors, packed_parts, took
from fa2cupy.spec import CARRIED
from fa2cupy.torch import backward_op

__all__ = ["attend", "separate"]

_HINTS = ("max_seqlen_q", "max_seqlen_k")
_NAMES = {1: ("qkv",), 2: ("q", "kv"), 3: ("q", "k", "v")}


def attend(
    inputs: tuple[Tensor, ...], options: dict[str, Any], deterministic: bool, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """(out, lse or None) of (q, k, v), of (q, kv) with kv (batch, seqlen_k, 2, heads_k, head_dim), or of (qkv,)."""
    check_tensors(**dict(zip(_NAMES[len(inputs)], inputs, strict=True)))
    if len(inputs) < 3 and _is_eager(inputs):
        inputs = cast(*inputs) if any_autocast() else inputs
        arrays = {name: options[name] for name in CARRIED if name in options}
        refuse_gradients(arrays)
        rest = {name: value for name, value in options.items() if name not in arrays and name not in _HINTS}
        rest["deterministic"] = deterministic
        result = _Packed.apply(rest, tuple(arrays), *inputs, *arrays.values())
    else:
        q, k, v = separate(inputs)
        result = fa2cupy.attention(q, k, v, return_lse=return_lse, deterministic=deterministic, **options)
    took()
    return result if isinstance(result, tuple) else (result, None)


def _is_eager(inputs: tuple[Tensor, ...]) -> bool:
    """Whether torch wants a gradient of this call, and nothing else watches it."""
    return (
        not is_compiling()
        and is_grad_enabled()
        and any(x.requires_grad for x in inputs)
        and all(type(x) in PLAIN and not x.is_meta for x in inputs)
        and not are_watched()
    )


class _Packed(torch.autograd.Function):
    """Where unpacking would be torch's, its gradient would be stacked from dq, dk and dv: one more copy of each."""

    @staticmethod
    def forward(ctx: Any, options: dict[str, Any], names: tuple[str, ...], *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """tensors: the inputs, and the arrays of keywords by `names`."""
        count = len(tensors) - len(names)
        q, k, v = separate(tensors[:count])
        arrays = dict(zip(names, tensors[count:], strict=True))
        out, lse = fa2cupy.attention(q, k, v, return_lse=True, **options, **arrays)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.options, ctx.names = options, names
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        nothing = (None,) * len(ctx.names)
        inputs = tensors[: len(tensors) - len(nothing)]
        arrays = dict(zip(ctx.names, tensors[len(inputs) :], strict=True))
        if dout is None and dlse is None:
            return None, None, *(None for _ in tensors)
        if dout is None:
            dout = torch.zeros_like(out)
        q, k, v = separate(inputs)
        options = dict(ctx.options)
        if is_grad_enabled() or are_watched() or not is_plain(dout) or (dlse is not None and not is_plain(dlse)):
            # Of pieces, by the operator: with grad mode on it says that there is no second derivative.
            deterministic, causal, scale = (options.pop(name) for name in ("deterministic", "causal", "softmax_scale"))
            features = features_text(tuple(options.items()))
            dq, dk, dv, _ = backward_op(
                dout, q, k, v, out, lse, dlse, causal, scale, "bshd", None, deterministic, features, *in_order(arrays)
            )
            if len(inputs) == 1:
                return None, None, torch.stack((dq, dk, dv), -3), *nothing
            return None, None, dq, torch.stack((dk, dv), -3), *nothing
        gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        dq, dk, dv = separate(gradients)
        options["deterministic"] |= torch.are_deterministic_algorithms_enabled()
        fa2cupy.attention_backward(dout, q, k, v, out, lse, dlse=dlse, dq=dq, dk=dk, dv=dv, **options, **arrays)
        return None, None, *gradients, *nothing


def separate(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, views of `inputs`."""
    if len(inputs) == 3:
        q, k, v = inputs
    elif len(inputs) == 2:
        q, (k, v) = inputs[0], packed_parts("kv", inputs[1], 2)
    else:
        q, k, v = packed_parts("qkv", inputs[0], 3)
    return q, k, v
