"""Which way a call of `fa2cupy.attention` goes whose arrays are torch's.

Straight to the launch where nothing else is wanted; through one autograd.Function where a gradient is; through a
registered operator where something has to see an operator: torch.compile, export, make_fx, dispatch modes (FLOP
counters, selective checkpointing, fake tensors), tensor subclasses (DTensor), torch.func. An operator costs several
times what the Function costs, which is why there are both.

torch.compile traces this file: it holds nothing that Dynamo cannot follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fa2cupy.autograd import sharding
from fa2cupy.autograd.features import features_text
from fa2cupy.autograd.function import eager
from fa2cupy.autograd.operators import forward_op
from fa2cupy.autograd.watchers import PLAIN, any_autocast, are_watched, is_compiling, is_grad_enabled
from fa2cupy.calls import call
from fa2cupy.errors import InvalidType
from fa2cupy.operations import FORWARD, FORWARD_OUT, STRAIGHT
from fa2cupy.options import Options

__all__ = ["cast", "way"]

# (q, k, v, options, return_lse) -> out or (out, lse); options: those of a launch, with the deterministic of gradients
Way = Callable[[Any, Any, Any, tuple[Any, ...], bool], Any]


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


def _traced(q: Any, k: Any, v: Any, options: tuple[Any, ...], return_lse: bool) -> Any:
    """Inside torch.compile or export. What is wrong with the options is said by the operator's fake kernel."""
    causal, softmax_scale, layout, dtype, deterministic, features = options
    sharding.register()
    q, k, v = cast(q, k, v)
    scale = None if softmax_scale is None else float(softmax_scale)
    out, lse = forward_op(q, k, v, causal, scale, layout, dtype, deterministic, features_text(features))
    return (out, lse) if return_lse else out


def _seen(q: Any, k: Any, v: Any, options: tuple[Any, ...], return_lse: bool) -> Any:
    """Somebody is watching: through the operator."""
    for name, tensor in zip("qkv", (q, k, v), strict=True):
        if not isinstance(tensor, torch.Tensor):
            return _straight(q, k, v, options, return_lse)  # which says what is wrong with it
        if tensor.is_nested:
            raise InvalidType(f"{name} is a nested tensor: pass a torch.Tensor with one length")
    checked = Options.checked(*options)
    sharding.register()
    q, k, v = cast(q, k, v)
    scale = checked.softmax_scale
    out, lse = forward_op(
        q, k, v, checked.causal, None if scale is None else float(scale), checked.layout, checked.dtype,
        checked.deterministic, features_text(checked.features),
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _autocast(q: Any, k: Any, v: Any, options: tuple[Any, ...], return_lse: bool) -> Any:
    q, k, v = cast(q, k, v)
    if is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return eager(q, k, v, options, return_lse)
    return _straight(q, k, v, options, return_lse)


def _straight(q: Any, k: Any, v: Any, options: tuple[Any, ...], return_lse: bool) -> Any:
    operation = FORWARD if return_lse else FORWARD_OUT
    out, lse = call(operation, [q, k, v, None, None], None, (*options[:4], False, options[5]))
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
