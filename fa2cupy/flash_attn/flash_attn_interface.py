"""flash_attn.flash_attn_interface: the seven public functions, the functions below them, and the autograd names.

Arguments, their order, defaults and returns are flash_attn 2.8's; what they ask for is computed by fa2cupy, and what
fa2cupy does not have yet is refused with its name. Rows that see no key have log-sum-exp +inf here, as there. What
dropout drops is drawn from torch's generator of the tensors' device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fa2cupy
from fa2cupy.autograd.forms import separate
from fa2cupy.flash_attn import extension as flash_attn_gpu
from fa2cupy.flash_attn.autograd import attend
from fa2cupy.flash_attn.caching import attend_cache, attend_pages
from fa2cupy.flash_attn.dmask import BLOCK_SIZE_N, s_dmask
from fa2cupy.flash_attn.extension import maybe_contiguous, round_multiple
from fa2cupy.flash_attn.translate import keywords, lengths, seeded, seqlens, to_flash_attn_lse

__all__ = [
    "USE_TRITON_ROCM",
    "FlashAttnFunc",
    "FlashAttnKVPackedFunc",
    "FlashAttnQKVPackedFunc",
    "FlashAttnVarlenFunc",
    "FlashAttnVarlenKVPackedFunc",
    "FlashAttnVarlenQKVPackedFunc",
    "flash_attn_func",
    "flash_attn_gpu",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "maybe_contiguous",
    "round_multiple",
]

USE_TRITON_ROCM = False

Window = Sequence[int]


# ----------------------------------------------------------------------------------------------------------------------
# The public functions


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    s_aux: Tensor | None = None,
) -> Any:
    """Exact attention, differentiable; causal is bottom-right aligned.

    q (batch, seqlen_q, heads, head_dim), k and v (batch, seqlen_k, heads_k, head_dim). Returns out, of q's shape; with
    return_attn_probs (out, softmax_lse, S_dmask): softmax_lse (batch, heads, seqlen_q) float32; S_dmask is empty where
    nothing is dropped, else what `dmask.s_dmask` says. alibi_slopes: (heads,) or (batch, heads) float32; softmax_lse
    has them in it. s_aux (heads,), which flash_attn does not have: attention sinks, as transformers passes them.
    """
    sizes = seqlens(q, k)
    options = keywords(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux, sizes=sizes)
    return _dense((q, k, v), options, deterministic, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with k and v in one tensor kv, (batch, seqlen_k, 2, heads_k, head_dim), and so its gradient."""
    sizes = seqlens(q, kv)
    options = keywords(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, sizes=sizes)
    return _dense((q, kv), options, deterministic, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with q, k and v in one tensor qkv, (batch, seqlen, 3, heads, head_dim), and so its gradient."""
    sizes = seqlens(qkv, qkv)
    options = keywords(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, sizes=sizes)
    return _dense((qkv,), options, deterministic, return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    s_aux: Tensor | None = None,
) -> Any:
    """`flash_attn_func` over sequences laid end to end: q (total_q, heads, head_dim), k and v (total_k, heads_k, ...).

    cu_seqlens_* (batch + 1,) int32: where each sequence begins and the last one ends. softmax_lse is (heads, total_q).
    """
    if block_table is not None:
        out, lse = attend_pages(
            q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, dropout_p, softmax_scale=softmax_scale, causal=causal,
            window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes, s_aux=s_aux,
        )  # fmt: skip
        return (out, to_flash_attn_lse(lse), out.new_empty(0)) if return_attn_probs else out
    options = keywords(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux)
    packed = lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _dense((q, k, v), packed | options, deterministic, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with k and v in one tensor kv, (total_k, 2, heads_k, head_dim)."""
    options = keywords(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    packed = lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _dense((q, kv), packed | options, deterministic, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` with q, k and v in one tensor qkv, (total, 3, heads, head_dim)."""
    options = keywords(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    packed = lengths(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return _dense((qkv,), packed | options, deterministic, return_attn_probs)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    s_aux: Tensor | None = None,
) -> Any:
    """Attention over a cache, which k and v are written to. No gradient. Returns out, or (out, softmax_lse).

    k_cache and v_cache are (batch, seqlen_k, heads_k, head_dim), with block_table (pages, page_size, heads_k, head_dim)
    of any page_size. cache_seqlens counts keys before the new ones.
    """
    out, lse = attend_cache(
        q, k_cache, v_cache, k=k, v=v, cache_seqlens=cache_seqlens, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
        cache_batch_idx=cache_batch_idx, leftpad_k=cache_leftpad, block_table=block_table, alibi_slopes=alibi_slopes,
        softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap, s_aux=s_aux,
        rotary_interleaved=rotary_interleaved, num_splits=num_splits,
    )  # fmt: skip
    return (out, to_flash_attn_lse(lse)) if return_softmax_lse else out


def _dense(
    inputs: tuple[Tensor, ...], options: dict[str, Any], deterministic: bool, return_attn_probs: bool
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    options = seeded(options, inputs[0])
    out, lse = attend(inputs, options, deterministic, return_attn_probs)
    if not return_attn_probs or lse is None:
        return out
    q, k, _ = separate(inputs)
    dmask = s_dmask(q, k, options) if "dropout_p" in options else out.new_empty(0)
    return out, to_flash_attn_lse(lse), dmask


# ----------------------------------------------------------------------------------------------------------------------
# Below them: no autograd. Others call these by the names of their parameters.


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, softmax_lse, S_dmask (empty unless return_softmax), rng_state (which means something with dropout only)."""
    out, softmax_lse, dmask, rng_state = flash_attn_gpu.fwd(
        q,
        k,
        v,
        None,
        alibi_slopes,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        return_softmax,
        None,
    )
    return out, softmax_lse, dmask, rng_state


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_flash_attn_forward`, over packed sequences."""
    out, softmax_lse, dmask, rng_state = flash_attn_gpu.varlen_fwd(
        q,
        k,
        v,
        None,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_k,
        leftpad_k,
        block_table,
        alibi_slopes,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        zero_tensors,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        return_softmax,
        None,
        num_splits,
    )
    return out, softmax_lse, dmask, rng_state


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes dq, dk and dv; returns softmax_d, (batch, heads, seqlen_q rounded up to 128) float32. rng_state: the
    forward's, which dropout needs."""
    *_, softmax_d = flash_attn_gpu.bwd(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        alibi_slopes,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        deterministic,
        None,
        rng_state,
    )
    return softmax_d


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """As `_flash_attn_backward`, over packed sequences."""
    *_, softmax_d = flash_attn_gpu.varlen_bwd(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        alibi_slopes,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        zero_tensors,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        deterministic,
        None,
        rng_state,
    )
    return softmax_d


_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward


def _get_block_size_n(device: torch.device, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """Keys between two maxima that S_dmask is relative to: more than there are, so that there is one for a row."""
    return BLOCK_SIZE_N


# ----------------------------------------------------------------------------------------------------------------------
# The autograd functions' names. Their apply takes all arguments by position, and last whether grad mode is on.


def _named_function(name: str, function: Callable[..., Any]) -> type[torch.autograd.Function]:
    # s_aux is ours: flash_attn's own arguments end before it.
    count = sum(parameter != "s_aux" for parameter in inspect.signature(function).parameters)

    def apply(*arguments: Any) -> Any:
        if len(arguments) != count + 1:
            raise fa2cupy.InvalidType(f"{name}.apply() takes {count + 1} arguments, {len(arguments)} were given")
        with torch.set_grad_enabled(bool(arguments[-1]) and torch.is_grad_enabled()):
            return function(*arguments[:-1])

    apply.__doc__ = f"`{function.__name__}` with all its arguments, and last whether grad mode is on."
    return type(name, (torch.autograd.Function,), {"apply": staticmethod(apply), "__module__": __name__})


FlashAttnFunc = _named_function("FlashAttnFunc", flash_attn_func)
FlashAttnKVPackedFunc = _named_function("FlashAttnKVPackedFunc", flash_attn_kvpacked_func)
FlashAttnQKVPackedFunc = _named_function("FlashAttnQKVPackedFunc", flash_attn_qkvpacked_func)
FlashAttnVarlenFunc = _named_function("FlashAttnVarlenFunc", flash_attn_varlen_func)
FlashAttnVarlenKVPackedFunc = _named_function("FlashAttnVarlenKVPackedFunc", flash_attn_varlen_kvpacked_func)
FlashAttnVarlenQKVPackedFunc = _named_function("FlashAttnVarlenQKVPackedFunc", flash_attn_varlen_qkvpacked_func)
