"""FlashAttention-3's module, whose top-level name is flash_attn_interface: other arguments than flash_attn 2's.

Returned are out, or with return_attn_probs (out, softmax_lse); rows that see no key have softmax_lse -inf, as in
fa2cupy. num_splits, pack_gqa, sm_margin and scheduler_metadata tune FlashAttention-3 and are not looked at, but for
num_splits=1 over a cache, with which no bit depends on the rest of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fa2cupy.errors import InvalidArgument
from fa2cupy.flash_attn import extension as flash_attn_gpu
from fa2cupy.flash_attn.autograd import attend
from fa2cupy.flash_attn.caching import attend_cache
from fa2cupy.flash_attn.extension import maybe_contiguous, round_multiple
from fa2cupy.flash_attn.translate import check_tensors, keywords, lengths, refuse, seqlens

__all__ = [
    "flash_attn_func",
    "flash_attn_gpu",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "maybe_contiguous",
    "round_multiple",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    s_aux: Tensor | None = None,
) -> Any:
    """Exact attention, differentiable; causal is bottom-right aligned.

    q (batch, seqlen_q, heads, head_dim), k (batch, seqlen_k, heads_k, head_dim), v the same with head_dim_v.
    """
    refuse(
        "flash_attn_func",
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        attention_chunk=attention_chunk or None,
    )
    sizes = seqlens(q, k)
    options = keywords(0.0, softmax_scale, causal, window_size, softcap, None, s_aux, sizes=sizes)
    return _attend((q, k, v), options, deterministic, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` with q, k and v in one tensor, and so its gradient: qkv (batch, seqlen, 3, heads, head_dim), or
    (batch, seqlen, num_heads_q + 2 heads_k, head_dim) with num_heads_q."""
    refuse(
        "flash_attn_qkvpacked_func",
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        attention_chunk=attention_chunk or None,
    )
    check_tensors(qkv=qkv)
    sizes = seqlens(qkv, qkv)
    options = keywords(0.0, softmax_scale, causal, window_size, softcap, sizes=sizes)
    inputs: tuple[Tensor, ...] = (qkv,)
    if qkv.ndim == 4:
        if num_heads_q is None or not 0 < num_heads_q < qkv.shape[2] or (qkv.shape[2] - num_heads_q) % 2:
            raise InvalidArgument(
                f"qkv has shape {tuple(qkv.shape)} and num_heads_q is {num_heads_q}: (batch, seqlen, 3, heads, "
                "head_dim), or (batch, seqlen, num_heads_q + 2 heads_k, head_dim) with num_heads_q, is needed"
            )
        heads_k = (qkv.shape[2] - num_heads_q) // 2
        inputs = qkv.split((num_heads_q, heads_k, heads_k), 2)
    return _attend(inputs, options, deterministic, return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    s_aux: Tensor | None = None,
) -> Any:
    """`flash_attn_func` over sequences laid end to end: (total, heads, head_dim), cu_seqlens_* (batch + 1,) int32."""
    refuse(
        "flash_attn_varlen_func",
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        attention_chunk=attention_chunk or None,
    )
    options = keywords(0.0, softmax_scale, causal, window_size, softcap, None, s_aux)
    packed = lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    used = {"seqused_q": seqused_q, "seqused_k": seqused_k}
    packed |= {name: value for name, value in used.items() if value is not None}
    return _attend((q, k, v), packed | options, deterministic, return_attn_probs)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    s_aux: Tensor | None = None,
) -> Any:
    """Attention over a cache, which k and v are written to. No gradient. Returns out, or (out, softmax_lse).

    k_cache and v_cache are (batch, seqlen_k, heads_k, head_dim), with page_table (pages, page_size, heads_k, head_dim)
    of any page_size; v's head_dim may differ. cache_seqlens counts keys before the new ones. With cu_seqlens_q q is
    packed, and k and v are packed alike: cu_seqlens_k_new, if it is given, must be that tensor. k_descale, v_descale:
    (batch, heads_k) float32, of caches of torch.float8_e4m3fn; q has 16 bits.
    """
    same = cu_seqlens_q is not None and cu_seqlens_k_new is cu_seqlens_q
    refuse(
        "flash_attn_with_kvcache",
        qv=qv,
        cu_seqlens_k_new=None if same else cu_seqlens_k_new,
        rotary_seqlens=rotary_seqlens,
        q_descale=q_descale,
        attention_chunk=attention_chunk or None,
    )
    out, lse = attend_cache(
        q, k_cache, v_cache, k=k, v=v, cache_seqlens=cache_seqlens, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
        cache_batch_idx=cache_batch_idx, leftpad_k=cache_leftpad, block_table=page_table, cu_seqlens_q=cu_seqlens_q,
        k_scale=k_descale, v_scale=v_descale, softmax_scale=softmax_scale, causal=causal, window_size=window_size,
        softcap=softcap, s_aux=s_aux, rotary_interleaved=rotary_interleaved, num_splits=num_splits,
    )  # fmt: skip
    return (out, lse) if return_softmax_lse else out


def _attend(inputs: tuple[Tensor, ...], options: dict[str, Any], deterministic: bool, with_lse: bool) -> Any:
    out, lse = attend(inputs, options, deterministic, with_lse)
    return (out, lse) if with_lse else out
