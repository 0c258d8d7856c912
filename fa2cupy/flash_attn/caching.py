"""flash_attn's calls on a KV cache, by `fa2cupy.attention_with_kvcache`. No gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fa2cupy
from fa2cupy.errors import InvalidArgument
from fa2cupy.flash_attn.translate import check_tensors, keywords, took

__all__ = ["attend_cache", "attend_pages"]


def attend_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int] | None,
    softcap: float,
    alibi_slopes: Tensor | None = None,
    s_aux: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    num_splits: int = 0,
    **arrays: Any,
) -> tuple[Tensor, Tensor]:
    """out and lse, this as fa2cupy has it. arrays: of `attention_with_kvcache`, by its names, None for none.

    A window as wide as the cache is none. num_splits=1 asks for bits that do not depend on the rest of the batch, and
    gets them; any other number is a hint, and not looked at.
    """
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache)
    given = {name: array for name, array in arrays.items() if array is not None}
    capacity = _capacity(k_cache, given.get("block_table"))
    options = keywords(0.0, softmax_scale, causal, _narrower(window_size, capacity), softcap, alibi_slopes, s_aux)
    if rotary_cos is not None or rotary_sin is not None:
        if rotary_cos is None or rotary_sin is None:
            raise InvalidArgument("rotary_cos and rotary_sin come together: one of them is not given")
        given["rotary"] = rotary_cos, rotary_sin, "interleaved" if rotary_interleaved else "neox"
    if num_splits == 1:
        given["split_size"] = max(1, -(-capacity // 64)) * 64
    with torch.no_grad():
        out, lse = fa2cupy.attention_with_kvcache(q, k_cache, v_cache, **given, **options, return_lse=True)
    took()
    return out, lse


def attend_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_table: Tensor,
    dropout_p: float,
    num_splits: int = 0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """out and lse of packed queries over keys in pages, as many of each as cu_seqlens_k, or seqused_k, says."""
    check_tensors(q=q, k=k, v=v)
    if dropout_p:
        raise InvalidArgument("dropout_p is given with block_table, which is not supported")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise InvalidArgument("block_table is given where a gradient is wanted: there is none, use torch.no_grad()")
    used = options.pop("seqused_k", None)
    if used is None:
        used = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
    return attend_cache(
        q, k, v, cu_seqlens_q=cu_seqlens_q, seqused_k=used, block_table=block_table, num_splits=num_splits, **options
    )


def _capacity(k_cache: Tensor, block_table: Any) -> int:
    """Keys that there is room for in a sequence; 0 where shapes are wrong, which is said elsewhere."""
    if k_cache.ndim != 4:
        return 0
    pages = 1 if getattr(block_table, "ndim", 0) != 2 else block_table.shape[1]
    return int(pages * k_cache.shape[1])


def _narrower(window_size: Sequence[int] | None, capacity: int) -> Sequence[int] | None:
    """Without the sides that reach over all of a cache: queries are then turned as if there were none, too."""
    if window_size is None or isinstance(window_size, int) or len(window_size) != 2:
        return window_size
    return tuple(-1 if side >= capacity else side for side in window_size)
