"""Attention over separate tensors and over packed ones, whose gradient is then one buffer too."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import fa2cupy
from fa2cupy.autograd.dispatch import packed
from fa2cupy.autograd.forms import FORMS
from fa2cupy.checks import check_flag
from fa2cupy.flash_attn.translate import check_tensors, took
from fa2cupy.options import given

__all__ = ["attend"]


def attend(
    inputs: tuple[Tensor, ...], options: dict[str, Any], deterministic: bool, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """(out, lse or None) of (q, k, v), of (q, kv) with kv (batch, seqlen_k, 2, heads_k, head_dim), or of (qkv,)."""
    check_tensors(**dict(zip(FORMS[len(inputs)], inputs, strict=True)))
    if len(inputs) == 3:
        result = fa2cupy.attention(*inputs, return_lse=return_lse, deterministic=deterministic, **options)
    else:
        result = _packed(inputs, deterministic, return_lse, **options)
    took()
    return result if isinstance(result, tuple) else (result, None)


def _packed(
    inputs: tuple[Tensor, ...], deterministic: bool, return_lse: bool, causal: bool, softmax_scale: float | None,
    **keywords: Any,
) -> Any:  # fmt: skip
    dense = causal, softmax_scale, "bshd", None, check_flag("deterministic", deterministic), ()
    names, arrays, options = given("attention", [], dense, (), keywords)
    return packed(inputs, options, return_lse, dict(zip(names, arrays, strict=True)))
