"""flash_attn.bert_padding: padded batches to packed tokens and back, in plain differentiable torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """The rows of input, (rows, ...), at indices."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """A tensor of first_axis_dim rows, zero but for values at indices."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of input at indices, and input once more, so that both uses have one gradient."""
    return input.index_select(0, indices), input.view_as(input)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a padded batch, end to end.

    hidden_states: (batch, seqlen, ...). attention_mask: (batch, seqlen), bool or int, nonzero for a token;
    unused_mask: the same for places that are kept though nothing attends to them.
    Returns the tokens (total, ...), their indices in the flattened batch (total,), cu_seqlens (batch + 1,) int32, the
    longest length as an int (which waits for the device), and the tokens per sequence without the unused ones.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    indices, cu_seqlens, longest = _places(kept, kept.sum(-1, dtype=torch.int32))
    used = attention_mask.sum(-1, dtype=torch.int32)
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest, used


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """`unpad_input` of rows that hold several sequences each: attention_mask_in_length, (batch, seqlen) int, begins
    with their lengths and is 0 after them. Returns tokens, indices, cu_seqlens over all sequences, longest length.
    """
    tokens = torch.arange(attention_mask_in_length.shape[1], device=attention_mask_in_length.device)
    kept = tokens < attention_mask_in_length.sum(-1, keepdim=True)
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    indices, cu_seqlens, longest = _places(kept, lengths)
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The way back: (total, ...) to (batch, seqlen, ...), zeros where there is no token."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def _places(kept: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, int]:
    """Where the tokens are in the flattened batch, cu_seqlens, and the longest length."""
    indices = kept.flatten().nonzero().squeeze(1)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return indices, cu_seqlens, int(lengths.max())


def __getattr__(name: str) -> Any:
    # flash_attn's module has them from einops, and others import them from there.
    if name in ("rearrange", "repeat"):
        import einops

        return getattr(einops, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
