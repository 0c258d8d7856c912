"""torch's memory-efficient attention, which it chooses for float32 on a GPU, by our kernels.

Its results lie in memory as (batch, seqlen, heads, head_dim), and its lse has a multiple of 32 columns. What else torch
takes it for, 16-bit tensors with a bias most of all, stays its own and is not seen. So does float32 on GPUs on which
nobody has measured ours to be the faster one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fa2cupy.autograd.watchers import deterministic_algorithms
from fa2cupy.calls import call
from fa2cupy.operations import ASKED, BACKWARD, FORWARD
from fa2cupy.torch.counted import DOOR, DOOR_BACKWARD, Native, took
from fa2cupy.torch.dot_product import objection, top_left
from fa2cupy.torch.layouts import models
from fa2cupy.torch.seeds import draw, with_dropout, with_seed

__all__ = ["FASTER_ON", "backward", "forward"]

# Compute capabilities on which `bench.py --cases features --only f32` has shown ours to be faster, both ways.
FASTER_ON: frozenset[tuple[int, int]] = frozenset()

_LSE_ROWS = 32
_FORWARD, _BACKWARD = replace(ASKED[FORWARD], swapped=True), replace(ASKED[BACKWARD], swapped=True)


def forward(native: Native) -> Callable[..., Any]:
    """The kernel behind _scaled_dot_product_efficient_attention."""

    def kernel(
        keyset: Any, q: Any, k: Any, v: Any, attn_bias: Any, compute_log_sumexp: bool, dropout_p: float = 0.0,
        is_causal: bool = False, *, scale: float | None = None,
    ) -> Any:  # fmt: skip
        why = _objection(q, k, v, attn_bias, dropout_p)
        if why is not None:
            return native(why, keyset, q, k, v, attn_bias, compute_log_sumexp, dropout_p, is_causal, scale=scale)
        took(DOOR)
        batch, heads, seqlen_q, _ = q.shape
        if is_causal and seqlen_q < k.shape[2]:
            k, v = k[:, :, :seqlen_q], v[:, :, :seqlen_q]
        causal, features = top_left(is_causal, seqlen_q, k.shape[2])
        features = with_dropout(features, dropout_p)
        seed, offset, _ = models(q.device, torch.int64, (), q.dtype)
        seed = draw(q.device, ()) if dict(features).get("dropout_p") else torch.empty_like(seed)
        rows = -(-seqlen_q // _LSE_ROWS) * _LSE_ROWS
        lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)
        lse[:, :, seqlen_q:] = torch.inf  # as torch's own, whose backward may come next
        extra = with_seed(features, seed)
        options = (causal, scale, "bhsd", None, False, features)
        arrays = [q, k, v, None, lse[:, :, :seqlen_q], *extra.values()]
        out, _ = call(_FORWARD.extended(tuple(extra)), arrays, None, options)
        lse = lse if compute_log_sumexp else lse.new_empty((batch, heads, 0))
        return out, lse, seed, torch.empty_like(offset)

    return kernel


def backward(native: Native) -> Callable[..., Any]:
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
        took(DOOR_BACKWARD)
        seqlen_q, seqlen_k = q.shape[2], k.shape[2]
        seen = min(seqlen_q, seqlen_k) if is_causal else seqlen_k
        causal, features = top_left(is_causal, seqlen_q, seqlen_k)
        features = with_dropout(features, dropout_p)
        gradients = [
            torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
            for x in (q, k, v)
        ]
        for gradient in gradients[1:]:
            gradient[:, :, seen:].zero_()
        dq, dk, dv = gradients
        extra = with_seed(features, seed)
        options = (causal, scale, "bhsd", None, deterministic_algorithms(), features)
        arrays = [dout, q, k[:, :, :seen], v[:, :, :seen], out, lse[:, :, :seqlen_q], dq, dk[:, :, :seen]]
        call(_BACKWARD.extended(tuple(extra)), [*arrays, dv[:, :, :seen], *extra.values()], None, options)
        return dq, dk, dv, None

    return kernel


def _objection(q: Any, k: Any, v: Any, attn_bias: Any, dropout_p: float) -> str | None:
    """Why it stays torch's, the empty string where nobody is to hear of it; None if it is ours."""
    if attn_bias is not None or q.dtype != torch.float32:
        return ""
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) not in FASTER_ON:
        return ""
    why = objection(q, k, v, dropout_p, (q.dtype, k.dtype, v.dtype))
    if not why and q.shape[1] != k.shape[1]:
        why = "fewer key heads than query heads are not expected here"  # torch has repeated them
    return why or None
