"""Tensors as torch's meta functions for SDPA's operators give them: their strides, and those that nobody reads."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fa2cupy.torch.seeds import draw, rounded

__all__ = ["laid_out", "models", "order", "random_state"]


def order(*tensors: Any) -> str | None:
    """The layout in which new C-contiguous tensors have the strides of `empty_like` these; None if there is none."""
    layout = None
    for tensor in tensors:
        batch, heads, seqlen, head_dim = tensor.stride()
        if head_dim != 1 or heads < 1 or seqlen < 1 or (tensor.shape[0] > 1 and batch < max(heads, seqlen)):
            return None
        this = "bhsd" if heads >= seqlen else "bshd"
        if layout not in (None, this):
            return None
        layout = this
    return layout


def laid_out(result: Any, like: Any, swapped: bool) -> Any:
    """A copy of a result with the strides that torch's meta functions give it: those of `empty_like` the operator's
    tensor, or of its order for another head_dim. Rows that `like` has and the result has not are 0."""
    if swapped:
        like = like.transpose(1, 2)
    if like.shape[3] == result.shape[3]:
        copy = torch.empty_like(like)
    else:
        shape, strides, step = (*like.shape[:3], result.shape[3]), [0] * 4, 1
        for dim in sorted(range(4), key=lambda dim: (like.stride(dim), -dim)):
            strides[dim] = step
            step *= shape[dim]
        copy = torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)
    copy = copy.transpose(1, 2) if swapped else copy
    seen = result.shape[2]
    copy[:, :, :seen].copy_(result)
    copy[:, :, seen:].zero_()
    return copy


def random_state(q: Any, dropout_p: float) -> tuple[Any, Any, Any]:
    """What torch's flash attention returns of its random numbers: ours, seed and offset in one uint64 (2,), drawn if
    there is dropout; one that nobody reads; and the mask for debugging, empty."""
    seed, offset, mask = models(q.device, torch.uint64, (2,), q.dtype)
    drawn = draw(q.device).view(torch.uint64) if rounded(dropout_p) else torch.empty_like(seed)
    return drawn, torch.empty_like(offset), torch.empty_like(mask)


@functools.lru_cache(maxsize=64)
def models(device: Any, integer: Any, seed: tuple[int, ...], dtype: Any) -> tuple[Any, Any, Any]:
    """What `empty_like`, which is faster than `empty`, is given for a seed, an offset and an empty mask."""
    seed_model, offset_model = (torch.empty(shape, dtype=integer, device=device) for shape in (seed, ()))
    return seed_model, offset_model, torch.empty(0, dtype=dtype, device=device)
