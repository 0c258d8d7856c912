"""Which way a call of `fa2cupy.attention` goes whose arrays are torch's.

Straight to the launch where nothing else is wanted; through one autograd.Function where a gradient is; through a
registered operator where something has to see an operator: torch.compile, export, make_fx, dispatch modes (FLOP
counters, selective checkpointing, fake tensors), tensor subclasses (DTensor), torch.func. An operator costs several
times what the Function costs, which is why there are both.

torch.compile traces this file: it holds nothing that Dynamo cannot follow.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from fa2cupy import dynamo
from fa2cupy.autograd import sharding
from fa2cupy.autograd.features import NOTHING, Extra, features_text, in_order, refuse_gradients
from fa2cupy.autograd.forms import separate
from fa2cupy.autograd.function import eager, eager_packed
from fa2cupy.autograd.operators import OPERATORS
from fa2cupy.autograd.watchers import PLAIN, any_autocast, are_watched, is_compiling, is_grad_enabled
from fa2cupy.calls import call
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.operations import FORWARD, FORWARD_OUT, STRAIGHT
from fa2cupy.options import Options
from fa2cupy.spec import DIFFERENTIABLE

__all__ = ["cast", "packed", "way", "with_extra"]

# (q, k, v, options, return_lse, extra) -> out or (out, lse); options: those of a launch, with the deterministic of
# gradients; extra: the arrays of other keywords, by name
Way = Callable[..., Any]


def way(q: Any, k: Any, v: Any) -> Way | None:
    """How a call with these tensors goes on; `STRAIGHT`: to the launch, nothing has to be asked again."""
    if not isinstance(q, torch.Tensor):
        return None
    if is_compiling():
        return _traced
    if type(q) not in PLAIN or type(k) not in PLAIN or type(v) not in PLAIN or are_watched() or q.is_meta:
        return _seen
    if any_autocast():
        return _autocast
    if is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return eager
    straight: Way = STRAIGHT
    return straight


def with_extra(way: Way | None, q: Any, extra: dict[str, Any]) -> tuple[Way | None, dict[str, Any]]:
    """What `way` has found of q, k and v, and the arrays of other keywords, with these looked at as well: a seed of two
    numbers becomes a tensor, and one of them may want a gradient, too."""
    seed = extra.get("dropout_seed")
    if isinstance(seed, tuple):
        numbers = torch.full((2,), seed[0], dtype=torch.int64, device=q.device)  # no copy from the host, which waits
        numbers[1:].fill_(seed[1])
        extra = {**extra, "dropout_seed": numbers}
    if is_grad_enabled() and _wants_gradient(extra) and way is STRAIGHT:
        return eager, extra
    return way, extra


def _wants_gradient(extra: Extra) -> bool:
    refuse_gradients(extra)
    return any(name in extra and extra[name].requires_grad for name in DIFFERENTIABLE)


def _traced(q: Any, k: Any, v: Any, options: tuple[Any, ...], return_lse: bool, extra: Extra = NOTHING) -> Any:
    """Inside torch.compile or export. What is wrong with the options is said by the operator's fake kernel."""
    if q.is_nested:
        return _jagged(q, k, v, options, return_lse, extra)
    return _operate((q, k, v), options, return_lse, extra)


def _seen(q: Any, k: Any, v: Any, options: tuple[Any, ...], return_lse: bool, extra: Extra = NOTHING) -> Any:
    """Somebody is watching: through the operator."""
    for tensor in (q, k, v, *extra.values()):
        if not isinstance(tensor, torch.Tensor):
            return _straight(q, k, v, options, return_lse, extra)  # which says what is wrong with it
        if tensor.is_nested:
            return _jagged(q, k, v, options, return_lse, extra)
    return _operate((q, k, v), _checked(options), return_lse, extra)


def _checked(options: tuple[Any, ...]) -> tuple[Any, ...]:
    checked = Options.checked(*options)
    return (
        checked.causal, checked.softmax_scale, checked.layout, checked.dtype, checked.deterministic, checked.features
    )  # fmt: skip


def _operate(inputs: tuple[Any, ...], options: tuple[Any, ...], return_lse: bool, extra: Extra) -> Any:
    """By the operator of inputs of any form (`forms.py`)."""
    causal, softmax_scale, layout, dtype, deterministic, features = options
    sharding.register()
    scale = None if softmax_scale is None else float(softmax_scale)
    out, lse = OPERATORS[len(inputs)].forward(
        *cast(*inputs), causal, scale, layout, dtype, deterministic, features_text(features), *in_order(extra)
    )
    return (out, lse) if return_lse else out


def packed(inputs: tuple[Any, ...], options: tuple[Any, ...], return_lse: bool, extra: Extra) -> Any:
    """Attention of (qkv,) or (q, kv), as `forms.py` has them: the gradient of a tensor is one tensor."""
    how = way(inputs[0], inputs[-1], inputs[-1])
    if how is _autocast:
        inputs = cast(*inputs)
        how = eager if is_grad_enabled() and any(x.requires_grad for x in inputs) else STRAIGHT
    how, extra = with_extra(how, inputs[0], dict(extra))
    if how is eager:
        return eager_packed(inputs, options, return_lse, extra)
    arrays = all(isinstance(array, torch.Tensor) for array in extra.values())
    if arrays and not inputs[0].is_nested and (how is _traced or how is _seen):
        return _operate(inputs, _checked(options) if how is _seen else options, return_lse, extra)
    if how is STRAIGHT or how is None:
        how = _straight
        if not dynamo.told and "torch._dynamo" in sys.modules:
            dynamo.tell()
    return how(*separate(inputs), options, return_lse, extra)


def _jagged(q: Any, k: Any, v: Any, options: tuple[Any, ...], return_lse: bool, extra: Extra) -> Any:
    """Nested tensors with torch.jagged's layout, (batch, *, heads, head_dim) or as layout says: packed sequences."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not tensor.is_nested or tensor.layout != torch.jagged:
            what = "a nested tensor" if tensor.is_nested else "no nested tensor"
            raise InvalidType(
                f"{name} is {what} of layout {tensor.layout}: q, k and v of layout torch.jagged are needed"
            )
    for name in extra:
        raise InvalidArgument(f"{name} is given beside nested tensors, which have lengths of their own: leave it out")
    swapped = options[2] == "bhsd"
    q, k, v = [tensor.transpose(1, 2) if swapped else tensor for tensor in (q, k, v)]
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4 or tensor._ragged_idx != 1:
            raise InvalidArgument(
                f"{name} has {tensor.dim()} dimensions, of which dimension {tensor._ragged_idx} is ragged (layout="
                "'bshd'): (batch, *, num_heads, head_dim) is needed"
            )
    if k.shape[1] != v.shape[1]:
        raise InvalidArgument("k and v are nested tensors with other offsets: they must share them")
    arrays = {
        "cu_seqlens_q": q.offsets(),
        "cu_seqlens_k": k.offsets(),
        "seqused_q": q.lengths(),
        "seqused_k": k.lengths(),
    }
    given = {name: array for name, array in arrays.items() if array is not None}
    values = q.values(), k.values(), v.values()
    how = way(*values)
    run = _straight if how is STRAIGHT or how is None else how
    result = run(*values, (*options[:2], "bshd", *options[3:]), return_lse, given)
    out = torch.nested.nested_tensor_from_jagged(result[0] if return_lse else result, q.offsets(), q.lengths())
    out = out.transpose(1, 2) if swapped else out
    return (out, result[1]) if return_lse else out


def _autocast(q: Any, k: Any, v: Any, options: tuple[Any, ...], return_lse: bool, extra: Extra = NOTHING) -> Any:
    q, k, v = cast(q, k, v)
    if is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad or _wants_gradient(extra)):
        return eager(q, k, v, options, return_lse, extra)
    return _straight(q, k, v, options, return_lse, extra)


def _straight(q: Any, k: Any, v: Any, options: tuple[Any, ...], return_lse: bool, extra: Extra) -> Any:
    operation = (FORWARD if return_lse else FORWARD_OUT).extended(tuple(extra))
    out, lse = call(operation, [q, k, v, None, None, *extra.values()], None, (*options[:4], False, options[5]))
    return (out, lse) if return_lse else out


def cast(*tensors: Any) -> tuple[Any, ...]:
    """As autocast casts the inputs of torch's SDPA: floating ones on its device, but for float64."""
    device = tensors[0].device.type
    if not _casts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype)
        if tensor.is_floating_point() and tensor.dtype != torch.float64 and tensor.device.type == device
        else tensor
        for tensor in tensors
    )


def _casts(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)
