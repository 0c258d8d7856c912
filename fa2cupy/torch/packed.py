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

_STARTS = ("cu_seqlens_q", "cu_seqlens_k")
_FORWARD, _BACKWARD = (ASKED[operation].extended(_STARTS) for operation in (FORWARD, BACKWARD))
_FORWARD_USED = _FORWARD.extended(("seqused_k",))


def forward(
    q: Any, k: Any, v: Any, starts: tuple[Any, Any], used_k: Any, causal: bool, scale: float | None, features: Features
) -> tuple[Any, Any]:
    """out, lse (heads, total_q). used_k: keys in use of each sequence, or None."""
    if not dynamo.told and "torch._dynamo" in sys.modules:
        dynamo.tell()
    operation, extra = (_FORWARD, starts) if used_k is None else (_FORWARD_USED, (*starts, used_k))
    options = (causal, scale, "bshd", None, False, features)
    out, lse = call(operation, [q, k, v, None, None, *extra], None, options)
    return _like(out, q), lse


def backward(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, starts: tuple[Any, Any], causal: bool, scale: float | None,
    features: Features,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """dq, dk, dv."""
    if not dynamo.told and "torch._dynamo" in sys.modules:
        dynamo.tell()
    options = (causal, scale, "bshd", None, torch.are_deterministic_algorithms_enabled(), features)
    dq, dk, dv = call(_BACKWARD, [dout, q, k, v, out, lse, None, None, None, *starts], None, options)
    return _like(dq, q), _like(dk, k), _like(dv, v)


def _like(result: Any, model: Any) -> Any:
    if model.is_contiguous():
        return result
    wanted = torch.empty_like(model)
    return result if wanted.stride() == result.stride() else wanted.copy_(result)
