"""From flash_attn's arguments to fa2cupy's keywords."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fa2cupy import counts, dynamo
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.torch.seeds import draw, rounded

__all__ = [
    "check_tensors",
    "from_flash_attn_lse",
    "keywords",
    "lengths",
    "refuse",
    "seeded",
    "seqlens",
    "to_flash_attn_lse",
    "took",
]


def keywords(
    dropout_p: float | None = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | None = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    s_aux: Tensor | None = None,
    *,
    sizes: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Keywords of `fa2cupy.attention`, of what is not neutral; dropout_p still without a seed.

    sizes: (seqlen_q, seqlen_k) where every sequence has these; a window that hides nothing is then left out.
    """
    left, right = _window(window_size)
    if isinstance(causal, int):
        causal = bool(causal) or (left < 0 and right == 0)  # flash_attn means causal by this window too
    right = -1 if causal else right
    if sizes is not None:
        left = -1 if left >= sizes[1] - 1 else left
        right = -1 if right >= sizes[0] - 1 else right
    features = {
        "window_size": (left, right) if max(left, right) >= 0 else None,
        "softcap": softcap if softcap is not None and softcap > 0 else None,
        "alibi_slopes": alibi_slopes,
        "sinks": s_aux,
        "dropout_p": _probability(dropout_p),
    }
    asked = {name: value for name, value in features.items() if value is not None}
    return {"causal": causal, "softmax_scale": softmax_scale, **asked}


def _probability(dropout_p: float | None) -> float | None:
    if dropout_p is None or dropout_p <= 0:
        return None
    return (rounded(dropout_p) or None) if dropout_p < 1 else dropout_p


def seeded(options: dict[str, Any], q: Any, generator: Any = None) -> dict[str, Any]:
    """With a dropout_seed if there is dropout: from the generator, or torch's of q's device."""
    if "dropout_p" not in options or not isinstance(q, Tensor):
        return options
    return {**options, "dropout_seed": draw(q.device, generator=generator)}


def _window(window_size: Any) -> tuple[int, int]:
    """(left, right), -1 for unlimited, which every negative number means to flash_attn."""
    if window_size is None:
        return -1, -1
    if isinstance(window_size, int) or len(window_size) != 2:
        raise InvalidArgument(f"window_size={window_size!r} is not supported: (left, right) is needed")
    left, right = window_size
    return max(int(left), -1), max(int(right), -1)


def seqlens(q: Any, k: Any) -> tuple[int, int] | None:
    """(seqlen_q, seqlen_k) of tensors that begin with (batch, seqlen)."""
    if getattr(q, "ndim", 0) < 4 or getattr(k, "ndim", 0) < 4:
        return None  # which is said to be wrong elsewhere
    return q.shape[1], k.shape[1]


def lengths(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int | Tensor, max_seqlen_k: int | Tensor
) -> dict[str, Any]:
    """Keywords of packed sequences. The maxima are hints and may be tensors, which nobody reads back."""
    return {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
    }


def to_flash_attn_lse(lse: Tensor) -> Tensor:
    """Where a row sees no key, flash_attn's log-sum-exp is +inf and fa2cupy's -inf."""
    return lse.nan_to_num(nan=math.nan, posinf=math.inf, neginf=math.inf)


def from_flash_attn_lse(lse: Tensor) -> Tensor:
    """The way back."""
    return lse.nan_to_num(nan=math.nan, posinf=-math.inf, neginf=-math.inf)


def check_tensors(**tensors: object) -> None:
    """Everything here is torch's."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise InvalidType(f"{name} is a {type(value).__name__}: a torch.Tensor is needed")


def refuse(function: str, **arguments: object) -> None:
    """Raise for the first argument that is given (not None) and has no keyword in fa2cupy yet."""
    for name, value in arguments.items():
        if value is not None:
            raise InvalidArgument(f"{function}: {name} is given, which is not supported yet")


@dynamo.constant
def took() -> None:
    """Count a call for `fa2cupy.report()`; while torch.compile traces, once."""
    counts.took("flash_attn")
