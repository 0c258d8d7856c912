"""Packed sequences as torch's flash attention operators have them: `varlen_attn`, jagged nested tensors.

Tensors are (total, heads, head_dim), cum_q and cum_k the starts of sequences; results have the strides of `empty_like`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from fa2cupy import dynamo
from fa2cupy.calls import call
from fa2cupy.operations import ASKED, BACKWARD, FORWARD

__all__ = ["backward", "forward"]

Features = tuple[tuple[str, Any], ...]

_FORWARD, _BACKWARD = ASKED[FORWARD], ASKED[BACKWARD]


def forward(
    q: Any, k: Any, v: Any, extra: dict[str, Any], causal: bool, scale: float | None, features: Features
) -> tuple[Any, Any]:
    """out, lse (heads, total_q). extra: arrays of keywords by name, in the table's order, cu_seqlens_q and cu_seqlens_k
    among them."""
    if not dynamo.told and "torch._dynamo" in sys.modules:
        dynamo.tell()
    options = (causal, scale, "bshd", None, False, features)
    out, lse = call(_FORWARD.extended(tuple(extra)), [q, k, v, None, None, *extra.values()], None, options)
    return _like(out, q), lse


def backward(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, extra: dict[str, Any], causal: bool, scale: float | None,
    features: Features,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """dq, dk, dv."""
    if not dynamo.told and "torch._dynamo" in sys.modules:
        dynamo.tell()
    options = (causal, scale, "bshd", None, torch.are_deterministic_algorithms_enabled(), features)
    arrays = [dout, q, k, v, out, lse, None, None, None, *extra.values()]
    dq, dk, dv = call(_BACKWARD.extended(tuple(extra)), arrays, None, options)
    return _like(dq, q), _like(dk, k), _like(dv, v)


def _like(result: Any, model: Any) -> Any:
    if model.is_contiguous():
        return result
    wanted = torch.empty_like(model)
    return result if wanted.stride() == result.stride() else wanted.copy_(result)
