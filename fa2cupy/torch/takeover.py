"""torch's own SDPA taken over: our kernels in the place of its flash, cuDNN and memory-efficient attention in the
dispatcher.

cuDNN is what SDPA takes on Hopper unless it is told otherwise, and memory-efficient attention what it takes for
float32, so all are replaced. Everything above stays torch's: the choice of a backend, autograd, torch.compile and what
it compiled and cached before, DTensor, ring attention. What we do not compute goes on to the kernels that were there;
`fa2cupy.report()` counts both.

Results have the shapes and strides of torch's meta functions, which Inductor asserts: out and gradients as
`empty_like` of what they belong to, lse contiguous. In aten, causal is aligned bottom-right for the flash operators
and top-left for cuDNN's.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.attention

from fa2cupy import counts
from fa2cupy.autograd.known import KINDS, NO_KIND, Kind
from fa2cupy.autograd.watchers import deterministic_algorithms
from fa2cupy.calls import call
from fa2cupy.errors import InvalidArgument, MissingDependency
from fa2cupy.operations import ASKED, BACKWARD, FORWARD
from fa2cupy.torch import efficient, packed
from fa2cupy.torch.counted import DOOR, DOOR_BACKWARD, Native, counted, took
from fa2cupy.torch.dot_product import Features, objection, top_left
from fa2cupy.torch.layouts import laid_out, models, order, random_state
from fa2cupy.torch.seeds import draw, rounded, with_dropout, with_seed

__all__ = ["disable_sdpa", "enable_sdpa", "sdpa"]

Kernel = Callable[..., Any]


def enable_sdpa(*, device: str = "cuda") -> None:
    """Compute torch.nn.functional.scaled_dot_product_attention with our kernels, in this process from now on.

    Where torch chooses flash or cuDNN attention, that is: float16 and bfloat16 without a mask; and float32 without one
    on GPUs on which ours was measured to be faster. Other choices of torch's (float64, masks) stay its own and are not
    seen; of what comes, cuDNN's packed sequences go on to torch's kernels, which `fa2cupy.report()` counts and the
    logger "fa2cupy" tells the first time. With FA2CUPY_STRICT=1 they raise `fa2cupy.NotTaken`. Flash attention's packed
    sequences and windows are computed here: those of `torch.nn.attention.varlen.varlen_attn` and of jagged nested
    tensors. What dropout drops is drawn from torch's generator: other numbers than torch's kernels draw from it,
    repeated in the same way. Compiled functions need no compiling again. Enabling twice is once.

    device: "cuda"; "cpu" replaces the CPU's flash attention by NumPy, which is slow: for tests.

    Raises MissingDependency for a torch that cannot keep its own kernels (before 2.9) or was built without CUDA.
    """
    if device not in _OPERATORS:
        raise InvalidArgument(f"device={device!r} is not supported: 'cuda' or 'cpu' is needed")
    with _lock:
        if device not in _enabled:
            _enabled[device] = _install(device)


def disable_sdpa(*, device: str = "cuda") -> None:
    """torch's kernels again. Without `enable_sdpa` before, nothing happens."""
    with _lock:
        _enabled.pop(device, None)  # a library that nobody holds takes its kernels back


@contextmanager
def sdpa(*, device: str = "cuda") -> Iterator[None]:
    """`enable_sdpa` for a block of code, in all threads; a backward that runs after it is torch's own, and right."""
    before = device in _enabled
    enable_sdpa(device=device)
    try:
        yield
    finally:
        if not before:
            disable_sdpa(device=device)


class _Handle:
    """What torch.nn.attention.activate_flash_attention_impl("fa2cupy") keeps, for restore_flash_attention_impl."""

    def __init__(self) -> None:
        enable_sdpa()

    def remove(self) -> None:
        disable_sdpa()


def _offer_to_torch() -> None:
    """Where torch has a register of flash attentions, ours is in it under our name."""
    register = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if register is not None:
        register("fa2cupy", register_fn=_Handle)


_offer_to_torch()
_lock = threading.Lock()
_enabled: dict[str, Any] = {}  # device -> the torch.library.Library that holds our kernels


def _install(device: str) -> Any:
    get_kernel = getattr(torch.library, "get_kernel", None)
    if get_kernel is None:
        raise MissingDependency(
            f"torch {torch.__version__} cannot keep its own SDPA behind ours: torch 2.9 or newer is needed"
        )
    key = device.upper()
    library = torch.library.Library("aten", "IMPL", key)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        for name, make in _OPERATORS[device].items():
            if not hasattr(torch.ops.aten, name):
                continue
            try:
                native = get_kernel(f"aten::{name}", key)
            except RuntimeError as error:
                raise MissingDependency(f"this torch has no kernel aten::{name} for {key}: {error}") from error
            library.impl(name, make(counted(name, native)), key, with_keyset=True)
    return library


# ----------------------------------------------------------------------------------------------------------------------
# Launching: (batch, heads, seqlen, head_dim) tensors in whatever order of memory


def _swapped(*tensors: Any) -> tuple[Any, ...]:
    return tuple([tensor.transpose(1, 2) for tensor in tensors])


# By the layout that new outputs lie in memory as; autograd is above us, and asked.
_FORWARDS = {"bhsd": ASKED[FORWARD], "bshd": replace(ASKED[FORWARD], swapped=True)}
_BACKWARDS = {"bhsd": ASKED[BACKWARD], "bshd": replace(ASKED[BACKWARD], swapped=True)}


def _forward(
    q: Any, k: Any, v: Any, causal: bool, scale: float | None, *,
    features: Features = (), seed: Any = None, swapped: bool = False, lse_dims: int = 3, kind: Kind = NO_KIND,
    more: tuple[Any, ...] = (),
) -> tuple[Any, Any]:  # fmt: skip
    """out, lse (contiguous). swapped: the tensors are views of those that the operator was given, as are results.

    seed: what dropout goes by, if features have it. kind: what learns from a call with the operator's tensors, and of
    new ones like `more` that go with the results.
    """
    took(DOOR)
    layout = order(q)
    operation, options = _FORWARDS[layout or "bhsd"], (causal, scale, "bhsd", None, False, features)
    extra = with_seed(features, seed)
    operation = operation.extended(tuple(extra))
    out, lse = call(operation, [q, k, v, None, None, *extra.values()], None, options)
    lse = lse.unsqueeze(3) if lse_dims == 4 else lse
    if not layout:
        return laid_out(out, q, swapped), lse
    kind.learn(operation, (q, k, v), (out, lse, *more), options)
    return out, lse


def _backward(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, causal: bool, scale: float | None, *,
    features: Features = (), seed: Any = None, unseen: int = 0, swapped: bool = False, kind: Kind = NO_KIND,
    given: tuple[Any, ...] | None = None,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """dq, dk, dv. seed: the forward's. unseen: so many keys at the end, which have gradient 0. swapped: as there.

    kind: what learns from it, the one of `deterministic_algorithms()`. given: as for `Kind.learn`.
    """
    took(DOOR_BACKWARD)
    layout = None if unseen else order(q, k, v)
    options = (causal, scale, "bhsd", None, deterministic_algorithms(), features)
    seen_k, seen_v = (x[:, :, : x.shape[2] - unseen] for x in (k, v)) if unseen else (k, v)
    extra = with_seed(features, seed)
    operation = _BACKWARDS[layout or "bhsd"].extended(tuple(extra))
    dq, dk, dv = call(operation, [dout, q, seen_k, seen_v, out, lse, None, None, None, *extra.values()], None, options)
    if layout:
        kind.learn(operation, (dout, q, k, v, out, lse), (dq, dk, dv), options, given)
        return dq, dk, dv
    return laid_out(dq, q, swapped), laid_out(dk, k, swapped), laid_out(dv, v, swapped)


# ----------------------------------------------------------------------------------------------------------------------
# Operators: each function makes a kernel from the one that was there


def _sdpa_flash(native: Native) -> Kernel:
    def kernel(
        keyset: Any, q: Any, k: Any, v: Any, dropout_p: float = 0.0, is_causal: bool = False,
        return_debug_mask: bool = False, *, scale: float | None = None,
    ) -> Any:  # fmt: skip
        kind = KINDS["flash", dropout_p, is_causal, return_debug_mask, scale, q.shape, k.shape]
        known = kind.find(q, k, v)
        if known is not None:
            took(DOOR)
            out, lse, seed, offset, mask = known
            return out, lse, None, None, q.shape[2], k.shape[2], seed, offset, mask
        why = (
            "a debug mask is not supported"
            if return_debug_mask
            else objection(q, k, v, dropout_p, (q.dtype, k.dtype, v.dtype))
        )
        if not why and q.shape[3] != v.shape[3]:
            why = "a head_dim of v of its own is not expected here"
        if why:
            return native(why, keyset, q, k, v, dropout_p, is_causal, return_debug_mask, scale=scale)
        seed, offset, mask = more = random_state(q, dropout_p)
        features = with_dropout((), dropout_p)
        out, lse = _forward(q, k, v, is_causal, scale, features=features, seed=seed, kind=kind, more=more)
        return out, lse, None, None, q.shape[2], k.shape[2], seed, offset, mask

    return kernel


def _sdpa_flash_backward(native: Native) -> Kernel:
    def kernel(
        keyset: Any, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, cum_q: Any, cum_k: Any, max_q: int,
        max_k: int, dropout_p: float, is_causal: bool, seed: Any, offset: Any, *, scale: float | None = None,
    ) -> Any:  # fmt: skip
        kind = KINDS["flash backward", dropout_p, is_causal, deterministic_algorithms(), scale, q.shape, k.shape]
        known = kind.find(dout, q, k, v, out, lse)
        if known is not None:
            took(DOOR_BACKWARD)
            return known
        why = objection(q, k, v, dropout_p, (q.dtype, k.dtype, v.dtype))
        if why:
            return native(
                why, keyset, dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, seed, offset,
                scale=scale,
            )  # fmt: skip
        features = with_dropout((), dropout_p)
        return _backward(dout, q, k, v, out, lse, is_causal, scale, features=features, seed=seed, kind=kind)

    return kernel


def _cudnn(native: Native) -> Kernel:
    def kernel(
        keyset: Any, q: Any, k: Any, v: Any, attn_bias: Any, compute_log_sumexp: bool, dropout_p: float = 0.0,
        is_causal: bool = False, return_debug_mask: bool = False, *, scale: float | None = None,
    ) -> Any:  # fmt: skip
        kind = KINDS["cudnn", attn_bias is None, dropout_p, is_causal, return_debug_mask, scale, q.shape, k.shape]
        known = kind.find(q, k, v)
        if known is not None:
            took(DOOR)
            out, lse, seed, offset = known
            return out, lse, None, None, q.shape[2], k.shape[2], seed, offset, None
        why = _cudnn_objection(q, k, v, attn_bias, dropout_p)
        if return_debug_mask:
            why = "a debug mask is not supported"
        if why:
            return native(
                why, keyset, q, k, v, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask,
                scale=scale,
            )  # fmt: skip
        seqlen_q, seqlen_k = q.shape[2], k.shape[2]
        if is_causal and seqlen_q < seqlen_k:
            k, v, kind = k[:, :, :seqlen_q], v[:, :, :seqlen_q], NO_KIND
        causal, features = top_left(is_causal, seqlen_q, seqlen_k)
        seed, offset, _ = models(q.device, torch.int64, (), q.dtype)
        seed = draw(q.device, ()) if rounded(dropout_p) else torch.empty_like(seed)
        offset = torch.empty_like(offset)
        features = with_dropout(features, dropout_p)
        out, lse = _forward(
            q, k, v, causal, scale, features=features, seed=seed, lse_dims=_cudnn_lse_dims(), kind=kind,
            more=(seed, offset),
        )  # fmt: skip
        return out, lse, None, None, seqlen_q, seqlen_k, seed, offset, None

    return kernel


def _cudnn_backward(native: Native) -> Kernel:
    def kernel(
        keyset: Any, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, seed: Any, offset: Any, attn_bias: Any,
        cum_q: Any, cum_k: Any, max_q: int, max_k: int, dropout_p: float, is_causal: bool, *,
        scale: float | None = None,
    ) -> Any:  # fmt: skip
        options = attn_bias is None, dropout_p, is_causal, deterministic_algorithms(), scale
        kind = KINDS["cudnn backward", options, q.shape, k.shape]
        given = dout, q, k, v, out, lse
        known = kind.find(*given)
        if known is not None:
            took(DOOR_BACKWARD)
            return known
        why = _cudnn_objection(q, k, v, attn_bias, dropout_p)
        if why:
            return native(
                why, keyset, dout, q, k, v, out, lse, seed, offset, attn_bias, cum_q, cum_k, max_q, max_k, dropout_p,
                is_causal, scale=scale,
            )  # fmt: skip
        lse = lse.squeeze(3) if lse.dim() == 4 else lse
        unseen = max(0, k.shape[2] - q.shape[2]) if is_causal else 0
        causal, features = top_left(is_causal, q.shape[2], k.shape[2])
        features = with_dropout(features, dropout_p)
        return _backward(
            dout, q, k, v, out, lse, causal, scale, features=features, seed=seed, unseen=unseen, kind=kind, given=given
        )  # fmt: skip

    return kernel


@functools.cache
def _cudnn_lse_dims() -> int:
    """Whether lse has a last dimension of 1, which depends on the version of torch."""
    q = torch.empty(1, 1, 1, 8, dtype=torch.float16, device="meta")
    return int(torch.ops.aten._scaled_dot_product_cudnn_attention(q, q, q, None, True)[1].dim())


def _cudnn_objection(q: Any, k: Any, v: Any, attn_bias: Any, dropout_p: float) -> str:
    if attn_bias is not None:
        return "a bias is not supported yet"
    return objection(q, k, v, dropout_p, (q.dtype, k.dtype, v.dtype))


def _flash(native: Native) -> Kernel:
    """What flash attention itself takes: (batch, seqlen, heads, head_dim), or packed."""

    def kernel(
        keyset: Any, q: Any, k: Any, v: Any, cum_q: Any, cum_k: Any, max_q: int, max_k: int, dropout_p: float,
        is_causal: bool, return_debug_mask: bool, *, scale: float | None = None, **more: Any,
    ) -> Any:  # fmt: skip
        why = _flash_objection(q, k, v, cum_q, cum_k, dropout_p, more)
        if return_debug_mask:
            why = "a debug mask is not supported"
        if why:
            return native(
                why, keyset, q, k, v, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, scale=scale,
                **more,
            )  # fmt: skip
        causal, features = _features(is_causal, dropout_p, more)
        seed, *rest = random_state(q, dropout_p)
        if cum_q is not None:
            counts.took(DOOR)
            extra = with_seed(features, seed, cu_seqlens_q=cum_q, cu_seqlens_k=cum_k, seqused_k=more.get("seqused_k"))
            out, lse = packed.forward(q, k, v, extra, causal, scale, features)
            return out, lse, seed, *rest
        q, k, v = _swapped(q, k, v)
        out, lse = _forward(q, k, v, causal, scale, features=features, seed=seed, swapped=True)
        return out.transpose(1, 2), lse, seed, *rest

    return kernel


def _flash_backward(native: Native) -> Kernel:
    def kernel(
        keyset: Any, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, cum_q: Any, cum_k: Any, max_q: int,
        max_k: int, dropout_p: float, is_causal: bool, seed: Any, offset: Any, *, scale: float | None = None,
        **more: Any,
    ) -> Any:  # fmt: skip
        why = _flash_objection(q, k, v, cum_q, cum_k, dropout_p, more)
        if why:
            return native(
                why, keyset, dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, seed, offset,
                scale=scale, **more,
            )  # fmt: skip
        causal, features = _features(is_causal, dropout_p, more)
        if cum_q is not None:
            counts.took(DOOR_BACKWARD)
            extra = with_seed(features, seed, cu_seqlens_q=cum_q, cu_seqlens_k=cum_k)
            return packed.backward(dout, q, k, v, out, lse, extra, causal, scale, features)
        dout, q, k, v, out = _swapped(dout, q, k, v, out)
        return _swapped(*_backward(dout, q, k, v, out, lse, causal, scale, features=features, seed=seed, swapped=True))

    return kernel


def _flash_objection(q: Any, k: Any, v: Any, cum_q: Any, cum_k: Any, dropout_p: float, more: dict[str, Any]) -> str:
    """more: window_size_left, window_size_right, seqused_k, alibi_slopes, ..."""
    if (cum_q is None) != (cum_k is None):
        return "one packed side alone is not expected here"
    for name, value in more.items():
        if value is not None and not name.startswith("window_size") and (name != "seqused_k" or cum_q is None):
            return f"{name} is not supported yet"
    if cum_q is not None:
        q, k, v = (x[None] for x in (q, k, v))
    q, k, v = _swapped(q, k, v)
    return objection(q, k, v, dropout_p, (q.dtype, k.dtype, v.dtype))


def _features(is_causal: bool, dropout_p: float, more: dict[str, Any]) -> tuple[bool, Features]:
    """causal and the options of the operators' windows, of which None and negative ends are unlimited, and dropout."""
    left, right = (more.get(f"window_size_{side}") for side in ("left", "right"))
    left, right = (-1 if end is None else max(int(end), -1) for end in (left, right))
    right = -1 if is_causal else right
    window = (("window_size", (left, right)),) if max(left, right) >= 0 else ()
    return is_causal, with_dropout(window, dropout_p)


def _cpu(native: Native) -> Kernel:
    def kernel(
        keyset: Any, q: Any, k: Any, v: Any, dropout_p: float = 0.0, is_causal: bool = False, *,
        attn_mask: Any = None, scale: float | None = None,
    ) -> Any:  # fmt: skip
        why = _cpu_objection(q, k, v, attn_mask, dropout_p)
        if why:
            return native(why, keyset, q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
        if is_causal and q.shape[2] < k.shape[2]:
            k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
        causal, features = top_left(is_causal, q.shape[2], k.shape[2])
        out, lse = _forward(q, k, v, causal, scale, features=features)
        return out, lse.transpose(1, 2).contiguous().transpose(1, 2)

    return kernel


def _cpu_backward(native: Native) -> Kernel:
    def kernel(
        keyset: Any, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dropout_p: float, is_causal: bool, *,
        attn_mask: Any = None, scale: float | None = None,
    ) -> Any:  # fmt: skip
        why = _cpu_objection(q, k, v, attn_mask, dropout_p)
        if why:
            return native(why, keyset, dout, q, k, v, out, lse, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
        unseen = max(0, k.shape[2] - q.shape[2]) if is_causal else 0
        causal, features = top_left(is_causal, q.shape[2], k.shape[2])
        gradients = _backward(dout, q, k, v, out, lse, causal, scale, features=features, unseen=unseen)
        return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in gradients)

    return kernel


def _cpu_objection(q: Any, k: Any, v: Any, attn_mask: Any, dropout_p: float) -> str:
    if attn_mask is not None:
        return "attn_mask is not supported yet"
    if dropout_p:
        return "dropout is not supported by an operator that returns no seed"
    return _cudnn_objection(q, k, v, None, dropout_p)


_OPERATORS: dict[str, dict[str, Callable[[Native], Kernel]]] = {
    "cuda": {
        "_scaled_dot_product_flash_attention": _sdpa_flash,
        "_scaled_dot_product_flash_attention_backward": _sdpa_flash_backward,
        "_scaled_dot_product_cudnn_attention": _cudnn,
        "_scaled_dot_product_cudnn_attention_backward": _cudnn_backward,
        "_scaled_dot_product_efficient_attention": efficient.forward,
        "_scaled_dot_product_efficient_attention_backward": efficient.backward,
        "_flash_attention_forward": _flash,
        "_flash_attention_backward": _flash_backward,
    },
    "cpu": {
        "_scaled_dot_product_flash_attention_for_cpu": _cpu,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _cpu_backward,
    },
}
