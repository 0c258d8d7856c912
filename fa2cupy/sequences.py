"""Sequences whose places and lengths arrays say: a table of them, and attention on the CPU, each by itself.

Whatever the arrays, packed or dense, used lengths, left padding or segments, they come to one table: on either side a
row of the batch, a first row there, and a length. Nothing of a row that no sequence has is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fa2cupy import cpu
from fa2cupy.cpu_scores import Place
from fa2cupy.errors import InvalidArgument

Array = npt.NDArray[Any]

__all__ = ["Sequence", "backward", "check", "forward", "sequences"]


class Sequence(NamedTuple):
    """Rows [first, first + length) of row `batch` of the batch, of the queries and of the keys. A packed side is one
    row.

    number: the sequence's, of segments that of their row of the batch. skipped: rows of that sequence, or of that row,
    before the first.
    """

    batch_q: int
    first_q: int
    length_q: int
    batch_k: int
    first_k: int
    length_k: int
    number: int
    skipped_q: int
    skipped_k: int

    @property
    def queries(self) -> tuple[slice, slice]:
        return slice(self.batch_q, self.batch_q + 1), slice(self.first_q, self.first_q + self.length_q)

    @property
    def keys(self) -> tuple[slice, slice]:
        return slice(self.batch_k, self.batch_k + 1), slice(self.first_k, self.first_k + self.length_k)


def sequences(
    lengths: Mapping[str, Array], batch: int, seqlen_q: int, seqlen_k: int, without_keys: bool = False
) -> list[Sequence]:
    """Those that have a query and a key, or, with `without_keys`, a query. Lengths are clamped: whatever the arrays
    hold, no row beyond them is meant.

    lengths: arrays of integers, by the names in `spec.LENGTHS`. batch: number of sequences, of segments of rows of
    them; seqlen: rows of the arrays, of a packed side all.
    """
    rows = _rows(lengths, batch, seqlen_q, seqlen_k)
    if "segment_ids_q" in lengths:
        rows = _segments(lengths["segment_ids_q"], lengths["segment_ids_k"], rows)
    return [row for row in rows if row.length_q and (row.length_k or without_keys)]


def _rows(lengths: Mapping[str, Array], batch: int, seqlen_q: int, seqlen_k: int) -> Iterator[Sequence]:
    """One for each number of a sequence, empty ones too."""
    first_q, end_q = _side(lengths.get("cu_seqlens_q"), lengths.get("seqused_q"), batch, seqlen_q)
    first_k, end_k = _side(lengths.get("cu_seqlens_k"), lengths.get("seqused_k"), batch, seqlen_k)
    numbers, skipped = np.arange(batch), np.zeros(batch, np.int64)
    if "leftpad_k" in lengths:
        skipped = np.clip(lengths["leftpad_k"].astype(np.int64), 0, end_k - first_k)
        first_k = first_k + skipped
    batch_q, batch_k = (numbers * (name not in lengths) for name in ("cu_seqlens_q", "cu_seqlens_k"))
    sides = [batch_q, first_q, end_q - first_q, batch_k, first_k, end_k - first_k]
    table = np.stack([*sides, numbers, np.zeros_like(skipped), skipped], axis=1)
    return (Sequence(*row) for row in table.tolist())


def _side(starts: Array | None, used: Array | None, batch: int, seqlen: int) -> tuple[Array, Array]:
    """First row, and the one behind the last, of every sequence. Starts that fall are raised to those before them."""
    if starts is None:
        first, end = np.zeros(batch, np.int64), np.full(batch, seqlen, np.int64)
    else:
        rising = np.maximum.accumulate(np.clip(starts.astype(np.int64), 0, seqlen))
        first, end = rising[:-1], rising[1:]
    if used is not None:
        end = first + np.clip(used.astype(np.int64), 0, end - first)
    return first, end


def _segments(ids_q: Array, ids_k: Array, rows: Iterator[Sequence]) -> Iterator[Sequence]:
    """In every row of the batch the runs of equal ids. An id is its first run, on either side."""
    for row in rows:
        runs_q = _runs(ids_q[row.batch_q], row.first_q, row.length_q)
        runs_k = _runs(ids_k[row.batch_k], row.first_k, row.length_k)
        for number, (first_q, length_q) in runs_q.items():
            first_k, length_k = runs_k.get(number, (0, 0))
            yield Sequence(row.batch_q, first_q, length_q, row.batch_k, first_k, length_k, row.number, first_q, first_k)


def _runs(ids: Array, first: int, length: int) -> dict[int, tuple[int, int]]:
    """First row and length of the first run of each id; negative ones are padding."""
    if not length:
        return {}
    ids = ids[first : first + length]
    starts = np.flatnonzero(np.diff(ids, prepend=ids[:1] - 1))
    ends = np.append(starts[1:], length)
    found: dict[int, tuple[int, int]] = {}
    for number, start, end in zip(ids[starts].tolist(), starts.tolist(), ends.tolist(), strict=True):
        if number >= 0:
            found.setdefault(number, (first + start, end - start))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Checks


def check(lengths: Mapping[str, Array], batch: int, seqlen_q: int, seqlen_k: int) -> None:
    """InvalidArgument, with the argument and the sequence, for lengths that would be clamped (FA2CUPY_CHECK=1)."""
    held = dict.fromkeys(("q", "k"), np.full(batch, 0, np.int64))
    for side, seqlen in (("q", seqlen_q), ("k", seqlen_k)):
        starts = lengths.get(f"cu_seqlens_{side}")
        held[side] = np.full(batch, seqlen, np.int64)
        if starts is not None:
            starts = starts.astype(np.int64)
            _check_starts(f"cu_seqlens_{side}", starts, seqlen)
            held[side] = np.diff(starts)
        used = lengths.get(f"seqused_{side}")
        if used is not None:
            _check_range(f"seqused_{side}", used.astype(np.int64), held[side], "the rows that it has")
            held[side] = used.astype(np.int64)
    if "leftpad_k" in lengths:
        _check_range("leftpad_k", lengths["leftpad_k"].astype(np.int64), held["k"], "its keys in use")
    for name in ("segment_ids_q", "segment_ids_k"):
        if name in lengths:
            _check_neighbours(name, lengths[name])


def _check_starts(name: str, starts: Array, rows: int) -> None:
    if starts[0] < 0:
        raise InvalidArgument(f"{name} starts sequence 0 at {starts[0]}: at least 0 is needed")
    for wrong in np.flatnonzero(starts[1:] > rows)[:1]:
        raise InvalidArgument(
            f"{name} ends sequence {wrong} at {starts[wrong + 1]}: at most {rows} is possible, the rows of the array"
        )
    for wrong in np.flatnonzero(np.diff(starts) < 0)[:1]:
        raise InvalidArgument(
            f"{name} ends sequence {wrong} at {starts[wrong + 1]}, before its start, {starts[wrong]}: starts must not "
            "fall"
        )


def _check_range(name: str, values: Array, most: Array, what: str) -> None:
    for wrong in np.flatnonzero((values < 0) | (values > most))[:1]:
        raise InvalidArgument(f"{name} of sequence {wrong} is {values[wrong]}: 0 to {most[wrong]} is needed, {what}")


def _check_neighbours(name: str, ids: Array) -> None:
    for row, each in enumerate(ids):
        heads = each[np.flatnonzero(np.diff(each, prepend=each[:1] - 1))] if each.size else each
        numbers, counts = np.unique(heads[heads >= 0], return_counts=True)
        for wrong in numbers[counts > 1][:1]:
            raise InvalidArgument(
                f"{name} has id {wrong} at places apart in batch row {row}: equal ids must be together"
            )


# ----------------------------------------------------------------------------------------------------------------------
# Attention


def forward(
    q: Array, k: Array, v: Array, *, lengths: Mapping[str, Array], out: Array, lse: Array, **options: Any
) -> None:
    """As `cpu.forward` for each sequence. Packed arrays are (total, heads, d), lse then (heads, total) as q is."""
    table = _table(q, k, lengths, options)
    q, out, lse = _with_batch(lengths, "q", q, out, lse)
    k, v = _with_batch(lengths, "k", k, v)
    out[...], lse[...] = 0, -np.inf
    for each in table:
        own, theirs = each.queries, each.keys
        cpu.forward(
            q[own], k[theirs], v[theirs], out=out[own], lse=lse[own[0], :, own[1]], **_options_of(each, options)
        )


def backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    lengths: Mapping[str, Array],
    dq: Array,
    dk: Array,
    dv: Array,
    dlse: Array | None = None,
    dsinks: Array | None = None,
    **options: Any,
) -> None:
    """As `cpu.backward` for each sequence; dsinks over all of them."""
    table = _table(q, k, lengths, options)
    dout, q, out, lse, dq = _with_batch(lengths, "q", dout, q, out, lse, dq)
    k, v, dk, dv = _with_batch(lengths, "k", k, v, dk, dv)
    if dlse is not None:
        (dlse,) = _with_batch(lengths, "q", dlse)
    dq[...], dk[...], dv[...] = 0, 0, 0
    own_dsinks = None if dsinks is None else np.zeros(len(dsinks))
    total = np.zeros(0 if dsinks is None else len(dsinks))
    for each in table:
        own, theirs = each.queries, each.keys
        rows = own[0], slice(None), own[1]
        cpu.backward(
            dout[own], q[own], k[theirs], v[theirs], out[own], lse[rows],
            dq=dq[own], dk=dk[theirs], dv=dv[theirs], dlse=None if dlse is None else dlse[rows], dsinks=own_dsinks,
            **_options_of(each, options),
        )  # fmt: skip
        if own_dsinks is not None:
            total += own_dsinks
    if dsinks is not None:
        cpu.store(total, dsinks)


def _options_of(each: Sequence, options: Mapping[str, Any]) -> dict[str, Any]:
    """What `cpu.py` is told of one sequence."""
    slopes = options.get("alibi_slopes")
    own: dict[str, Any] = {}
    if slopes is not None and slopes.ndim > 1:
        own["alibi_slopes"] = slopes[each.number : each.number + 1]
    mask = options.get("mask")
    if mask is not None:
        own["mask"] = mask.below(each.batch_q, each.first_q, each.first_k)
    return {**options, **own, "place": Place(each.number, each.skipped_q, each.skipped_k)}


def _table(q: Array, k: Array, lengths: Mapping[str, Array], options: Mapping[str, Any]) -> list[Sequence]:
    """With sinks a sequence without keys has a lse too."""
    packed_q, packed_k = (name in lengths for name in ("cu_seqlens_q", "cu_seqlens_k"))
    starts = lengths["cu_seqlens_q" if packed_q else "cu_seqlens_k"] if packed_q or packed_k else None
    batch = len(q) if starts is None else len(starts) - 1
    with_sinks = options.get("sinks") is not None
    return sequences(lengths, batch, q.shape[not packed_q], k.shape[not packed_k], with_sinks)


def _with_batch(lengths: Mapping[str, Array], side: str, *arrays: Array) -> tuple[Array, ...]:
    """Views of the arrays of a packed side with a batch of one."""
    return tuple(x[None] for x in arrays) if f"cu_seqlens_{side}" in lengths else arrays
