"""flash_attn.ops.triton.rotary: rotary embedding, here in plain torch, in float32 inside and differentiable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fa2cupy.errors import InvalidArgument

__all__ = ["apply_rotary", "rotate_in_place"]

Part = tuple[Callable[[Tensor], Tensor], Tensor, Tensor]  # a view of the whole, and its cos and sin


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """x with the first 2 n dimensions of each head turned by the angles of its position, n = cos.shape[-1].

    x: (batch, seqlen, heads, head_dim), or with cu_seqlens (batch + 1,) packed sequences (total, heads, head_dim).
    cos, sin: (positions, n). seqlen_offsets: position of each sequence's first token, an int or (batch,).
    max_seqlen: needed with cu_seqlens, as in flash_attn. interleaved: pairs are (2i, 2i + 1), else (i, i + n).
    conjugate: turn the other way, which is also the gradient. inplace: x itself is changed and returned; autograd
    follows. Where a position is outside the tables, and in rows of no sequence, x stays as it is.
    """
    options: dict[str, Any] = {
        "seqlen_offsets": seqlen_offsets,
        "cu_seqlens": cu_seqlens,
        "max_seqlen": max_seqlen,
        "interleaved": interleaved,
    }
    if inplace:
        return rotate_in_place(x, [(lambda whole: whole, cos, sin)], options, conjugate)
    return _rotated(x, cos, sin, **options, conjugate=conjugate)


def rotate_in_place(x: Tensor, parts: list[Part], options: dict[str, Any], conjugate: bool = False) -> Tensor:
    """Turn the parts of x where they are and return x. Autograd sees a function of x; for views and leaves too."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _InPlace.apply(x, parts, options, conjugate)
    _turn(x, parts, options, conjugate)
    return x


class _InPlace(torch.autograd.Function):
    """x is not marked as changed, since autograd refuses that for leaves and for the results of unbind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: list[Part], options: dict[str, Any], conjugate: bool) -> Tensor:
        ctx.parts, ctx.options, ctx.conjugate = parts, options, conjugate
        # Behind autograd's back where x is a view, as flash_attn does it: else the results of unbind could not be used
        # any more. For other tensors autograd notices if an earlier operation still needs what is overwritten.
        _turn(x.data if x._is_view() else x, parts, options, conjugate)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return rotate_in_place(gradient.clone(), ctx.parts, ctx.options, not ctx.conjugate), None, None, None


def _turn(x: Tensor, parts: list[Part], options: dict[str, Any], conjugate: bool) -> None:
    with torch.no_grad():
        for view, cos, sin in parts:
            part = view(x)
            part.copy_(_rotated(part, cos, sin, **options, conjugate=conjugate))


def _rotated(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    interleaved: bool,
    conjugate: bool,
) -> Tensor:
    _check(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    n = cos.shape[-1]
    cos, sin = _at_positions(x, cos, sin, seqlen_offsets, cu_seqlens)
    sin = -sin if conjugate else sin
    axis = -1 if interleaved else -2
    a, b = x[..., : 2 * n].to(cos.dtype).unflatten(-1, (n, 2) if interleaved else (2, n)).unbind(axis)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), axis).flatten(-2).to(x.dtype)
    return torch.cat((turned, x[..., 2 * n :]), -1) if 2 * n < x.shape[-1] else turned


def _at_positions(
    x: Tensor, cos: Tensor, sin: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """cos and sin of each token, in x's dtype or float32: x's shape with 1 head, or broadcastable to it."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    length = x.shape[-3]
    if cu_seqlens is None and not isinstance(seqlen_offsets, Tensor):
        rows = slice(seqlen_offsets, seqlen_offsets + length)
        return cos[rows, None].to(dtype), sin[rows, None].to(dtype)
    tokens = torch.arange(length, device=x.device)
    if cu_seqlens is None:
        positions = tokens + seqlen_offsets[:, None]  # type: ignore[index]
        known = torch.ones_like(positions, dtype=torch.bool)
    else:
        sequence = torch.searchsorted(cu_seqlens[1:].long(), tokens, right=True)
        known = sequence < cu_seqlens.numel() - 1
        sequence = sequence.clamp(max=cu_seqlens.numel() - 2)
        positions = tokens - cu_seqlens[sequence]
        positions = positions + (seqlen_offsets[sequence] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets)
    known = (known & (positions >= 0) & (positions < cos.shape[0]))[..., None, None]
    positions = positions.clamp(0, cos.shape[0] - 1)
    at = (table[positions].unsqueeze(-2).to(dtype) for table in (cos, sin))
    return torch.where(known, next(at), 1), torch.where(known, next(at), 0)


def _check(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> None:
    packed = cu_seqlens is not None
    if x.ndim != 4 - packed:
        needed = "(total, heads, head_dim) with cu_seqlens" if packed else "(batch, seqlen, heads, head_dim)"
        raise InvalidArgument(f"x has shape {tuple(x.shape)}: {needed} is needed")
    if packed and max_seqlen is None:
        raise InvalidArgument("max_seqlen is None: with cu_seqlens the longest length is needed")
    if cos.ndim != 2 or sin.shape != cos.shape:
        shapes = f"cos has shape {tuple(cos.shape)} and sin {tuple(sin.shape)}"
        raise InvalidArgument(f"{shapes}: (positions, rotary_dim / 2) is needed for both")
    if 2 * cos.shape[1] > x.shape[-1]:
        raise InvalidArgument(f"cos has shape {tuple(cos.shape)}: rotary_dim is above x's head_dim {x.shape[-1]}")
    longest = max_seqlen if packed else x.shape[1]
    if isinstance(seqlen_offsets, Tensor):
        batch = cu_seqlens.numel() - 1 if cu_seqlens is not None else x.shape[0]
        if seqlen_offsets.shape != (batch,) or seqlen_offsets.dtype not in (torch.int32, torch.int64):
            raise InvalidArgument(
                f"seqlen_offsets has shape {tuple(seqlen_offsets.shape)} and dtype {seqlen_offsets.dtype}: an int, or "
                f"({batch},) int32 or int64, is needed"
            )
    elif longest is not None and not 0 <= seqlen_offsets <= cos.shape[0] - longest:
        raise InvalidArgument(
            f"cos has {cos.shape[0]} positions, but {longest} tokens begin at position {seqlen_offsets}"
        )
