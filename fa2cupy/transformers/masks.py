"""transformers' masks as what the kernels take: causal, a window, key ranges, starts of packed sequences.

transformers calls `mask` once a forward, for each kind of layer, and gives what it returns to the layers' attention: a
tensor, which may pass through torch.compile, checkpoints and device hooks on the way. Ours are of int32 and of four
dimensions, since transformers reads two as padding and leaves four as they are. What the host knows is in the shape,
(batch, rows, length, code), so that nobody has to read a tensor; what only the device knows is in the elements, which
are the same for every code (stride 0):

    rows 0    nothing beside the code
    rows 1    (1, 1, sequences + 1, code): starts of packed sequences, the last is their end
    rows 2    (batch, 2, 1, code): keys in use of each row, [first, last)

torch.compile traces this file: it holds nothing that Dynamo cannot follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from fa2cupy.transformers.assertion import asserted

__all__ = ["Keys", "Pattern", "dense", "is_ours", "mask", "may_wait", "pattern_of", "read"]

may_wait = True  # `register`'s

# Where transformers' functions are made. (The Dynamo of torch 2.11 knows no `__module__` of a function inside another.)
_THEIRS = causal_mask_function.__code__.co_filename

_GAPS = "fa2cupy.transformers: a padding mask has gaps; without waiting for it only padding at the ends is supported"
_BLOCKS = (
    "fa2cupy.transformers: under torch.compile, without an attention_mask and without a cache, only packed causal "
    "attention is supported: pass attention_mask"
)


class Pattern(NamedTuple):
    """What a mask function lets a query at position p see, beside padding: keys from p - left on (-1: from the first
    on), to p if causal, else to p + left; packed: of its own sequence."""

    causal: bool
    left: int = -1
    packed: bool = False


class Keys(NamedTuple):
    """What a layer is told. first, last: int32 (batch,), the keys in use; starts_q, starts_k: int32 (sequences + 1,).

    Queries are aligned with the end of the keys in use (of their sequence).
    """

    causal: bool
    left: int = -1
    first: Any = None
    last: Any = None
    starts_q: Any = None
    starts_k: Any = None

    @property
    def window(self) -> tuple[int, int] | None:
        """window_size of `fa2cupy.attention`."""
        return None if self.left < 0 else (self.left, 0 if self.causal else self.left)


# ----------------------------------------------------------------------------------------------------------------------
# Between `mask` and the layers


def _packed_up(pattern: Pattern, batch: int, device: Any, data: Any = None) -> Any:
    """The tensor for the layers. data: (batch or 1, rows, length), int32."""
    if data is None:
        data = torch.empty(batch, 0, 1, dtype=torch.int32, device=device)
    code = 1 + 2 * (pattern.left + 1) + int(pattern.causal)
    return data.unsqueeze(3).expand(-1, -1, -1, code)


def is_ours(attention_mask: Any) -> bool:
    """Whether it is a tensor of ours, rather than a mask."""
    return attention_mask is not None and attention_mask.dtype == torch.int32 and attention_mask.dim() == 4


def read(attention_mask: Any) -> Keys:
    """The inverse of `_packed_up`."""
    code = attention_mask.shape[3] - 1
    keys = Keys(code % 2 == 1, code // 2 - 1)
    rows = attention_mask.shape[1]
    if rows == 1:
        starts = attention_mask[0, 0, :, 0]
        return keys._replace(starts_q=starts, starts_k=starts)
    if rows == 2:
        first, last = attention_mask[:, :, 0, 0].unbind(1)
        return keys._replace(first=first, last=last)
    return keys


def dense(keys: Keys, seqlen_q: int, seqlen_k: int, device: Any) -> Any:
    """The same as torch's SDPA takes it: bool (batch or 1, 1, seqlen_q, seqlen_k), or None if every key is seen."""
    q, k = torch.arange(seqlen_q, device=device)[None, :, None], torch.arange(seqlen_k, device=device)[None, None]
    seen = None
    if keys.starts_q is not None:  # each position as its distance from the end of its sequence
        (q, of_q), (k, of_k) = _in_sequences(keys.starts_q, q), _in_sequences(keys.starts_k, k)
        seen = (of_q == of_k) & (of_q < keys.starts_q.shape[0] - 1)
    elif keys.last is not None:
        first, last = keys.first[:, None, None], keys.last[:, None, None]
        seen = (k >= first) & (k < last)
        q, k = q - seqlen_q, k - last
        if not keys.causal and keys.left >= 0:
            q = q + seqlen_q - last
    else:
        q, k = q - seqlen_q, k - seqlen_k
    limits = [k <= q] if keys.causal and seqlen_q > 0 else []
    if keys.left >= 0:
        limits += [k >= q - keys.left] if keys.causal else [k >= q - keys.left, k <= q + keys.left]
    for limit in limits:
        seen = limit if seen is None else seen & limit
    return None if seen is None else seen.unsqueeze(1)


def _in_sequences(starts: Any, index: Any) -> tuple[Any, Any]:
    """Of rows of packed sequences: their places, counted back from the end of their sequence, and its number."""
    ends = starts[1:].contiguous()
    number = torch.searchsorted(ends, index.to(ends.dtype), right=True)
    return index - ends[number.clamp(max=ends.shape[0] - 1)], number


# ----------------------------------------------------------------------------------------------------------------------
# Mask functions


def pattern_of(function: Any) -> Pattern | None:
    """What a mask function of transformers' says; None: something else. Looks into closures, so not for Dynamo."""
    if function is causal_mask_function:
        return Pattern(True)
    if function is bidirectional_mask_function:
        return Pattern(False)
    if _maker(function) != "and_masks":
        return None
    parts = _closure(function).get("mask_functions", ())
    if len(parts) != 2:
        return None
    first, second = parts
    makers = _maker(first), _maker(second)
    size = _closure(first).get("sliding_window") if makers[0].startswith("sliding_window") else None
    if makers[0] == "sliding_window_overlay" and second is causal_mask_function and isinstance(size, int):
        return Pattern(True, size - 1)
    bidirectional = second is bidirectional_mask_function
    if makers[0] == "sliding_window_bidirectional_overlay" and bidirectional and isinstance(size, int):
        return Pattern(False, size)
    if "packed_sequence_mask_function" in makers:  # versions differ in the order, and in whether positions start anew
        other = first if makers[1] == "packed_sequence_mask_function" else second
        if _maker(other) == "remap_positions_for_packed_sequence":
            other = _closure(other).get("mask_function")
        inner = pattern_of(other)
        if inner is not None and inner.causal and not inner.packed:
            return inner._replace(packed=True)
    return None


def _maker(function: Any) -> str:
    """The function of transformers' masking_utils that made this one."""
    if getattr(function, "__module__", "") != "transformers.masking_utils":
        return ""
    return str(function.__qualname__.partition(".<locals>")[0])


def _closure(function: Any) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


def _traced_pattern(
    function: Any, local_size: int | None, bidirectional: bool, has_chunks: bool, may_be_packed: bool
) -> Pattern | None:
    """`pattern_of` without closures, which Dynamo cannot open.

    An and_mask is a window, with which its size comes, or packed sequences (then of causal attention), or attention in
    chunks, of which the config knows. Packed sequences are looked for by transformers where there is neither padding
    nor a cache, and under torch.compile always found; SDPA's own shortcuts are forbidden then.
    """
    if function is causal_mask_function:
        return Pattern(True)
    if function is bidirectional_mask_function:
        return Pattern(False)
    if function.__name__ != "and_mask" or function.__code__.co_filename != _THEIRS or has_chunks:
        return None
    if bidirectional:
        return None if local_size is None else Pattern(False, local_size)
    if may_be_packed:
        return Pattern(True, -1 if local_size is None else local_size - 1, True)
    return None if local_size is None else Pattern(True, local_size - 1)


# ----------------------------------------------------------------------------------------------------------------------
# The interface


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Any = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    config: Any = None,
    device: Any = "cpu",
    **more: Any,
) -> Any:
    """transformers' mask interface: None for plain attention, a tensor of ours, or the bool mask that SDPA would get.

    Keys stand at positions kv_offset to kv_offset + kv_length, queries at q_offset (a tensor with a static cache, whose
    buffer is longer than what it holds) to q_offset + q_length; attention_mask is bool (batch, positions).
    """
    whole = not isinstance(q_offset, torch.Tensor) and q_offset == kv_offset and q_length == kv_length
    compiling = torch.compiler.is_compiling()
    if use_vmap or _must_be_a_mask(allow_is_causal_skip, q_length, q_offset, local_size, mask_function, more):
        pattern = None
    elif compiling:
        pattern = _traced_pattern(
            mask_function, local_size, "allow_is_bidirectional_skip" in more,
            getattr(config, "attention_chunk_size", None) is not None,
            whole and attention_mask is None and not allow_is_causal_skip,
        )  # fmt: skip
    else:
        pattern = pattern_of(mask_function)
    waits = may_wait and not compiling and not _is_capturing(device)
    keys = _OfKeys(batch_size, kv_length, kv_offset, attention_mask, device, waits)
    result: Any = _NOT_OURS
    if pattern is not None and pattern.packed:
        if whole and attention_mask is None:
            starts = _starts(mask_function, batch_size, q_length, device, waits)
            result = _packed_up(pattern, 1, device, starts[None, None])
    elif pattern is not None and pattern.causal:
        result = _causal(pattern, keys, q_offset + q_length - kv_offset)
    elif pattern is not None and (pattern.left < 0 or whole):
        result = _bidirectional(pattern, keys)
    if result is not _NOT_OURS:
        return result
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, local_size=local_size, allow_is_causal_skip=False,
        use_vmap=use_vmap, device=device,
    )  # fmt: skip


_NOT_OURS = "not ours"


class _OfKeys(NamedTuple):
    """What `mask` was given that concerns the keys. waits: whether the host may read what is on the device."""

    batch: int
    length: int
    offset: int
    attention_mask: Any
    device: Any
    waits: bool


def _must_be_a_mask(
    allow_is_causal_skip: bool, q_length: int, q_offset: Any, local_size: Any, function: Any, more: dict[str, Any]
) -> bool:
    """Whether the model has asked for a mask in any case, to work with it.

    allow_is_causal_skip is False for packed sequences and for the steps of compiled decoding too, where it need not be.
    """
    if "allow_is_bidirectional_skip" in more:
        return not more["allow_is_bidirectional_skip"]
    if allow_is_causal_skip or (q_length == 1 and (isinstance(q_offset, torch.Tensor) or local_size is not None)):
        return False
    return function is causal_mask_function or (not torch.compiler.is_compiling() and not _is_packed(function))


def _is_packed(function: Any) -> bool:
    pattern = pattern_of(function)
    return pattern is not None and pattern.packed


def _is_capturing(device: Any) -> bool:
    return bool(torch.device(device).type == "cuda" and torch.cuda.is_current_stream_capturing())


def _starts(function: Any, batch: int, length: int, device: Any, waits: bool) -> Any:
    """Where packed sequences start, counted through all rows: a token starts one that does not see the one before it.

    Without waiting nobody knows how many there are: as many as tokens, the last ones empty.
    """
    row, head = torch.arange(batch, device=device)[:, None], torch.zeros((), dtype=torch.int64, device=device)
    index = torch.arange(length, device=device)[None]
    sees_previous = function(row, head, index[:, 1:], index[:, :-1]).expand(batch, -1)
    is_start = torch.cat([sees_previous.new_ones(batch, 1), ~sees_previous], 1).flatten()
    if waits:
        end = torch.full((1,), batch * length, dtype=torch.int64, device=device)
        return torch.cat([is_start.nonzero().flatten(), end]).to(torch.int32)
    sees_next = function(row, head, index[:, :-1], index[:, 1:])
    sequence = is_start.cumsum(0)  # from 1
    number = torch.arange(batch * length + 1, device=device)
    starts = torch.searchsorted(sequence, number, right=True).to(torch.int32)
    return asserted(starts, ~sees_next.any(), _BLOCKS)


def _causal(pattern: Pattern, keys: _OfKeys, end: Any) -> Any:
    """end: how many of the keys the last query sees."""
    if not isinstance(end, torch.Tensor) and end > keys.length:
        return _NOT_OURS
    first = None
    if keys.attention_mask is not None:
        padding = _padding(keys)
        if not keys.waits:
            first = asserted(_first(padding), _has_no_gaps(padding), _GAPS)
        else:
            without_gaps, from_the_first = torch.stack([_has_no_gaps(padding), padding[:, 0].all()]).tolist()
            if not without_gaps:
                return _NOT_OURS
            # Padding behind the tokens is seen by nobody but padding.
            first = None if from_the_first else _first(padding)
    if first is None:
        if not isinstance(end, torch.Tensor) and end == keys.length:
            return None if pattern.left < 0 else _packed_up(pattern, keys.batch, keys.device)
        first = torch.zeros(keys.batch, dtype=torch.int32, device=keys.device)
    if isinstance(end, torch.Tensor):
        last = end.reshape(1).to(device=keys.device, dtype=torch.int32).expand(keys.batch)
    else:
        last = torch.full((keys.batch,), end, dtype=torch.int32, device=keys.device)
    return _ranges(pattern, keys, first, last)


def _bidirectional(pattern: Pattern, keys: _OfKeys) -> Any:
    plain = None if pattern.left < 0 else _packed_up(pattern, keys.batch, keys.device)
    if keys.attention_mask is None:
        return plain
    padding = _padding(keys)
    first = _first(padding)
    if not keys.waits:
        first = asserted(first, _has_no_gaps(padding), _GAPS)
    else:
        without_gaps, is_full = torch.stack([_has_no_gaps(padding), padding.all()]).tolist()
        if is_full:
            return plain
        if not without_gaps:
            return _NOT_OURS
    last = keys.length - padding.flip(1).to(torch.int32).argmax(1)
    return _ranges(pattern, keys, first, last.to(torch.int32))


def _ranges(pattern: Pattern, keys: _OfKeys, first: Any, last: Any) -> Any:
    """first and last each contiguous for the kernels, and in order: a row may have no token yet."""
    data = torch.stack([torch.minimum(first, last), last])
    return _packed_up(pattern, keys.batch, keys.device, data.t().unsqueeze(2))


def _padding(keys: _OfKeys) -> Any:
    """bool (batch, keys): which of them are tokens. What is behind the end of attention_mask is padding."""
    padding = keys.attention_mask[:, keys.offset : keys.offset + keys.length].to(torch.bool)
    missing = keys.length - padding.shape[1]
    if missing > 0:
        padding = torch.nn.functional.pad(padding, (0, missing))
    return padding.expand(keys.batch, -1)


def _has_no_gaps(padding: Any) -> Any:
    """Whether the tokens of every row are beside each other: a bool on the device."""
    begins = padding[:, :1].sum(1) + (padding[:, 1:] & ~padding[:, :-1]).sum(1)
    return (begins <= 1).all()


def _first(padding: Any) -> Any:
    """int32 (batch,): the first token of each row; the length where there is none."""
    first = padding.to(torch.int32).argmax(1)
    return torch.where(padding.any(1), first, padding.shape[1]).to(torch.int32)
