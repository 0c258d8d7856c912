"""flash_attn_2_cuda: the functions of flash_attn's compiled module, which are called by position. No autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fa2cupy
from fa2cupy.errors import InvalidArgument
from fa2cupy.flash_attn.caching import attend_cache, attend_pages
from fa2cupy.flash_attn.dmask import s_dmask
from fa2cupy.flash_attn.translate import (
    check_tensors,
    from_flash_attn_lse,
    keywords,
    lengths,
    seeded,
    seqlens,
    to_flash_attn_lse,
    took,
)

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]

_ROWS = 4096  # of softmax_d at a time: the products are float32, and dout and out may be large


def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    generator: object = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state) of (batch, seqlen, heads, head_dim) tensors.

    S_dmask (`dmask.py`) is empty unless return_softmax asks for it, which needs dropout; rng_state, int64 (2,), is what
    was drawn from generator, or from torch's own, and means nothing without dropout.
    """
    window = window_size_left, window_size_right
    options = keywords(dropout_p, softmax_scale, causal, window, softcap, alibi_slopes, sizes=seqlens(q, k))
    return _forward(q, k, v, out, options, return_softmax, generator)


def varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    zero_tensors: bool,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    generator: object = None,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `fwd`, of packed (total, heads, head_dim) tensors; with block_table k and v are pages."""
    window = window_size_left, window_size_right
    if block_table is not None:
        out, lse = attend_pages(
            q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, dropout_p, num_splits, seqused_k=seqused_k,
            leftpad_k=leftpad_k, out=out, softmax_scale=softmax_scale, causal=causal, window_size=window,
            softcap=softcap, alibi_slopes=alibi_slopes,
        )  # fmt: skip
        return out, to_flash_attn_lse(lse), q.new_empty(0), q.new_empty(2, dtype=torch.int64)
    options = keywords(dropout_p, softmax_scale, causal, window, softcap, alibi_slopes)
    packed = lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    used = {"seqused_k": seqused_k, "leftpad_k": leftpad_k}
    packed |= {name: value for name, value in used.items() if value is not None}
    return _forward(q, k, v, out, packed | options, return_softmax, generator)


def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    generator: object = None,
    rng_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, softmax_d), the first three into what is given; softmax_d: rowsum(dout * out), times 1 - dropout_p,
    (batch, heads, rows) float32, rows being seqlen_q rounded up to a multiple of 128. rng_state: the forward's."""
    window = window_size_left, window_size_right
    options = keywords(dropout_p, softmax_scale, causal, window, softcap, alibi_slopes, sizes=seqlens(q, k))
    gradients = _backward(dout, q, k, v, out, softmax_lse, (dq, dk, dv), deterministic, options, rng_state)
    batch, seqlen_q = q.shape[:2]
    softmax_d = _softmax_d(dout.flatten(0, 1), out.flatten(0, 1), options).unflatten(1, (batch, seqlen_q))
    padding = round_multiple(seqlen_q, 128) - seqlen_q
    return *gradients, torch.nn.functional.pad(softmax_d.transpose(0, 1), (0, padding))


def varlen_bwd(
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
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    zero_tensors: bool,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    generator: object = None,
    rng_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `bwd`, of packed tensors. softmax_d is (heads, total_q + 128 * batch), 128 unused after each sequence."""
    window = window_size_left, window_size_right
    options = keywords(dropout_p, softmax_scale, causal, window, softcap, alibi_slopes)
    packed = lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    gradients = _backward(dout, q, k, v, out, softmax_lse, (dq, dk, dv), deterministic, packed | options, rng_state)
    rows = torch.arange(q.shape[0], device=q.device, dtype=torch.int32)
    sequence = torch.searchsorted(cu_seqlens_q[1:-1], rows, right=True)
    softmax_d = q.new_zeros(q.shape[1], q.shape[0] + 128 * (cu_seqlens_q.numel() - 1), dtype=torch.float32)
    softmax_d[:, rows + 128 * sequence] = _softmax_d(dout, out, options)
    return *gradients, softmax_d


def fwd_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: int | Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_batch_idx: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    out: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    rotary_interleaved: bool,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse) over a cache, which k and v are written to."""
    out, lse = attend_cache(
        q, k_cache, v_cache, k=k, v=v, cache_seqlens=cache_seqlens, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
        cache_batch_idx=cache_batch_idx, leftpad_k=leftpad_k, block_table=block_table, alibi_slopes=alibi_slopes,
        out=out, softmax_scale=softmax_scale, causal=causal, window_size=(window_size_left, window_size_right),
        softcap=softcap, rotary_interleaved=rotary_interleaved, num_splits=num_splits,
    )  # fmt: skip
    return out, to_flash_attn_lse(lse)


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """x with a contiguous last dimension."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def round_multiple(x: int, m: int) -> int:
    """x rounded up to a multiple of m."""
    return -(-x // m) * m


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    options: dict[str, Any],
    return_softmax: bool = False,
    generator: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_tensors(q=q, k=k, v=v)
    if return_softmax and "dropout_p" not in options:
        raise InvalidArgument("return_softmax=True without dropout_p: S_dmask belongs to dropout")
    with torch.no_grad():
        options = seeded(options, q, generator)
        out, lse = fa2cupy.attention(q, k, v, out=out, return_lse=True, **options)
        took()
        dmask = s_dmask(q, k, options) if return_softmax else q.new_empty(0)
        drawn = options.get("dropout_seed")
        return out, to_flash_attn_lse(lse), dmask, q.new_empty(2, dtype=torch.int64) if drawn is None else drawn


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    deterministic: bool,
    options: dict[str, Any],
    rng_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = gradients
    if "dropout_p" in options:
        if rng_state is None:
            raise InvalidArgument("dropout_p is given without rng_state: what the forward returned is needed")
        options = {**options, "dropout_seed": rng_state}
    check_tensors(dout=dout, q=q, k=k, v=v, out=out, lse=lse)
    with torch.no_grad():
        lse = from_flash_attn_lse(lse)
        return fa2cupy.attention_backward(
            dout, q, k, v, out, lse, deterministic=deterministic, dq=dq, dk=dk, dv=dv, **options
        )


def _softmax_d(dout: Tensor, out: Tensor, options: dict[str, Any]) -> Tensor:
    """rowsum(dout * out) of (rows, heads, head_dim) tensors, times 1 - dropout_p: (heads, rows) float32, some rows at a
    time."""
    dout, out = dout.detach(), out.detach()
    sums = [(x.float() * y.float()).sum(-1) for x, y in zip(dout.split(_ROWS), out.split(_ROWS), strict=True)]
    return torch.cat(sums).T * (1 - options.get("dropout_p", 0.0))
