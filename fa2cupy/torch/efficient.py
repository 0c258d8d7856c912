"""torch's memory-efficient attention, which it chooses for float32 on a GPU, by our kernels.

Its results lie in memory as (batch, seqlen, heads, head_dim), and its lse has a multiple of 32 columns. What else torch
takes it for, 16-bit tensors with a bias most of all, stays its own and is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fa2cupy.autograd.watchers import deterministic_algorithms
from fa2cupy.calls import call
from fa2cupy.operations import ASKED, BACKWARD, FORWARD
from fa2cupy.torch.dot_product import objection, top_left
from fa2cupy.torch.layouts import models

__all__ = ["backward", "forward"]

Native = Callable[..., Any]

_LSE_ROWS = 32
_FORWARD, _BACKWARD = replace(ASKED[FORWARD], swapped=True), replace(ASKED[BACKWARD], swapped=True)


def forward(native: Native, took: Callable[[], None]) -> Callable[..., Any]:
    """The kernel behind _scaled_dot_product_efficient_attention. took: counts a call."""

    def kernel(
        keyset: Any, q: Any, k: Any, v: Any, attn_bias: Any, compute_log_sumexp: bool, dropout_p: float = 0.0,
        is_causal: bool = False, *, scale: float | None = None,
    ) -> Any:  # fmt: skip
        why = _objection(q, k, v, attn_bias, dropout_p)
        if why is not None:
            return native(
                why, keyset, q, k, v, attn_bias, compute_log_sumexp, dropout_p, is_causal, scale=scale
            )  # fmt: skip
        took()
        batch, heads, seqlen_q, _ = q.shape
        if is_causal and seqlen_q < k.shape[2]:
            k, v = k[:, :, :seqlen_q], v[:, :, :seqlen_q]
        causal, features = top_left(is_causal, seqlen_q, k.shape[2])
        rows = -(-seqlen_q // _LSE_ROWS) * _LSE_ROWS
        lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)
        lse[:, :, seqlen_q:] = torch.inf  # as torch's own, whose backward may come next
        options = (causal, scale, "bhsd", None, False, features)
        out, _ = call(_FORWARD, [q, k, v, None, lse[:, :, :seqlen_q]], None, options)
        seed, offset, _ = models(q.device, torch.int64, (), q.dtype)
        lse = lse if compute_log_sumexp else lse.new_empty((batch, heads, 0))
        return out, lse, torch.empty_like(seed), torch.empty_like(offset)

    return kernel


def backward(native: Native, took: Callable[[], None]) -> Callable[..., Any]:
    """The kernel behind _scaled_dot_product_efficient_attention_backward."""

    def kernel(
        keyset: Any, dout: Any, q: Any, k: Any, v: Any, attn_bias: Any, out: Any, lse: Any, seed: Any, offset: Any,
        dropout_p: float, wanted: Any, is_causal: bool = False, *, scale: float | None = None,
    ) -> Any:  # fmt: skip
        why = _objection(q, k, v, attn_bias, dropout_p)
        if why is not None:
            return native(
                why, keyset, dout, q, k, v, attn_bias, out, lse, seed, offset, dropout_p, wanted, is_causal, scale=scale
            )  # fmt: skip
        took()
        seqlen_q, seqlen_k = q.shape[2], k.shape[2]
        seen = min(seqlen_q, seqlen_k) if is_causal else seqlen_k
        causal, features = top_left(is_causal, seqlen_q, seqlen_k)
        gradients = [torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
                     for x in (q, k, v)]  # fmt: skip
        for gradient in gradients[1:]:
            gradient[:, :, seen:].zero_()
        dq, dk, dv = gradients
        options = (causal, scale, "bhsd", None, deterministic_algorithms(), features)
        inputs = [dout, q, k[:, :, :seen], v[:, :, :seen], out, lse[:, :, :seqlen_q]]
        call(_BACKWARD, [*inputs, dq, dk[:, :, :seen], dv[:, :, :seen]], None, options)
        return dq, dk, dv, None

    return kernel


def _objection(q: Any, k: Any, v: Any, attn_bias: Any, dropout_p: float) -> str | None:
    """Why it stays torch's, the empty string where nobody is to hear of it; None if it is ours."""
    if attn_bias is not None or q.dtype != torch.float32:
        return ""
    why = objection(q, k, v, dropout_p, (q.dtype, k.dtype, v.dtype))
    if not why and q.shape[1] != k.shape[1]:
        why = "fewer key heads than query heads are not expected here"  # torch has repeated them
    return why or None
