"""Which keys a sequence of a call has and where they lie, from the arrays that say so. In NumPy.

Whatever the arrays hold is clamped: wrong numbers give wrong results, and nothing outside the arrays is meant by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fa2cupy.errors import InvalidArgument

Array = npt.NDArray[Any]

__all__ = ["Sequence", "Sizes", "check", "pages_of", "sequences"]


class Sizes(NamedTuple):
    """Numbers of a call. rows: of the cache, pages or sequences. page: keys of one of these. width: most pages of a
    sequence of a table. seqlen_new: 0 without new keys. positions: rows of rotary's tables, 0 without.
    """

    batch: int
    seqlen_q: int
    seqlen_new: int
    rows: int
    page: int
    width: int
    is_packed: bool
    positions: int = 0


class Sequence(NamedTuple):
    """row: of the cache, or of the table of pages; -1 where there is none, and then there are no keys. Its keys are
    [first, end), of which those from `before` on are new, and new key i is key before + i, as far as there is room.
    Queries, and new keys, are rows [first_q, first_q + length_q) of q's row `batch_q`.
    """

    row: int
    before: int
    first: int
    end: int
    batch_q: int
    first_q: int
    length_q: int
    length_new: int


def sequences(lengths: Mapping[str, Array], number: int | None, sizes: Sizes) -> list[Sequence]:
    """All of a call. lengths: its arrays of integers, by name; number: cache_seqlens where that is one number."""
    batch = sizes.batch
    first_q = np.zeros(batch, np.int64)
    length_q, length_new = np.full(batch, sizes.seqlen_q, np.int64), np.full(batch, sizes.seqlen_new, np.int64)
    batch_q = np.arange(batch)
    if sizes.is_packed:
        starts = np.maximum.accumulate(np.clip(lengths["cu_seqlens_q"].astype(np.int64), 0, sizes.seqlen_q))
        first_q, length_q, batch_q = starts[:-1], np.diff(starts), np.zeros(batch, np.int64)
        length_new = length_q if sizes.seqlen_new else np.zeros(batch, np.int64)
    rows = lengths["cache_batch_idx"].astype(np.int64) if "cache_batch_idx" in lengths else np.arange(batch)
    there = (rows >= 0) & (rows < _tables(lengths, sizes))
    rows = np.where(there, rows, -1)
    room = np.where(there, _room(lengths, rows, sizes), 0)
    if "seqused_k" in lengths:
        end = np.clip(lengths["seqused_k"].astype(np.int64), 0, room)
        before = end - length_new
    else:
        before = room
        if number is not None:
            before = np.minimum(number, room)
        elif "cache_seqlens" in lengths:
            before = np.clip(lengths["cache_seqlens"].astype(np.int64), 0, room)
        end = np.minimum(before + length_new, room)
    first = np.zeros(batch, np.int64)
    if "leftpad_k" in lengths:
        first = np.clip(lengths["leftpad_k"].astype(np.int64), 0, end)
    table = np.stack([rows, before, first, end, batch_q, first_q, length_q, length_new], axis=1)
    return [Sequence(*row) for row in table.tolist()]


def _tables(lengths: Mapping[str, Array], sizes: Sizes) -> int:
    """Rows of whatever a sequence has a row of."""
    if "block_table" in lengths:
        return int(lengths["block_table"].shape[0])
    return len(lengths["indptr"]) - 1 if "indptr" in lengths else sizes.rows


def _starts(lengths: Mapping[str, Array]) -> Array:
    return np.maximum.accumulate(np.clip(lengths["indptr"].astype(np.int64), 0, len(lengths["indices"])))


def _room(lengths: Mapping[str, Array], rows: Array, sizes: Sizes) -> Array:
    """The most keys of each sequence; rows may be -1."""
    if sizes.rows == 0:
        return np.zeros(len(rows), np.int64)
    if "indptr" not in lengths:
        return np.full(len(rows), sizes.page * sizes.width, np.int64)
    starts = _starts(lengths)
    return np.diff(starts)[rows] * sizes.page if len(starts) > 1 else np.zeros(len(rows), np.int64)


def pages_of(lengths: Mapping[str, Array], sequence: Sequence, positions: Array, sizes: Sizes) -> Array:
    """The row of the cache in which each of these keys of a sequence is: its own, or that of a page; -1 for a number
    that is no page's. Only entries of pages that these keys are in are read.
    """
    if "block_table" not in lengths and "indptr" not in lengths:
        return np.full(len(positions), sequence.row, np.int64)
    places = positions // sizes.page
    if "indptr" in lengths:
        pages = lengths["indices"][_starts(lengths)[sequence.row] + places].astype(np.int64)
    else:
        pages = lengths["block_table"][sequence.row, places].astype(np.int64)
    return np.where((pages >= 0) & (pages < sizes.rows), pages, -1)


# ----------------------------------------------------------------------------------------------------------------------
# Checks


def check(lengths: Mapping[str, Array], number: int | None, sizes: Sizes) -> None:
    """InvalidArgument, with the argument and the sequence, for what would be clamped (FA2CUPY_CHECK=1)."""
    if sizes.is_packed:
        starts = lengths["cu_seqlens_q"].astype(np.int64)
        if starts[0] < 0 or starts[-1] > sizes.seqlen_q or (np.diff(starts) < 0).any():
            raise InvalidArgument(f"cu_seqlens_q must rise from 0 or more to at most {sizes.seqlen_q}, the rows of q")
    if "indptr" in lengths:
        indptr = lengths["indptr"].astype(np.int64)
        if indptr[0] < 0 or indptr[-1] > len(lengths["indices"]) or (np.diff(indptr) < 0).any():
            raise InvalidArgument(f"indptr must rise from 0 or more to at most {len(lengths['indices'])}, all indices")
    if "cache_batch_idx" in lengths:
        tables = _tables(lengths, sizes)
        _check_range("cache_batch_idx", lengths["cache_batch_idx"], 0, tables - 1, "a row of the cache")
    table = sequences(lengths, number, sizes)
    rows = np.array([sequence.row for sequence in table], np.int64)
    new = np.array([sequence.length_new for sequence in table], np.int64)
    room = _room(lengths, rows, sizes)
    if "seqused_k" in lengths:
        _check_range("seqused_k", lengths["seqused_k"], new, room, "its new keys to the room of the cache")
    elif "cache_seqlens" in lengths or number is not None:
        counted = np.full(sizes.batch, number, np.int64) if number is not None else lengths["cache_seqlens"]
        _check_range("cache_seqlens", counted, 0, room - new, "the room of the cache less the new keys")
    if "leftpad_k" in lengths:
        ends = np.array([sequence.end for sequence in table], np.int64)
        _check_range("leftpad_k", lengths["leftpad_k"], 0, ends, "its keys in use")
    for index, sequence in enumerate(table):
        if sizes.positions and sequence.end > sizes.positions:
            raise InvalidArgument(
                f"rotary has {sizes.positions} positions, and sequence {index} has {sequence.end} keys: as many at "
                "least are needed"
            )
        positions = np.arange(sequence.first // sizes.page, -(-sequence.end // sizes.page)) * sizes.page
        pages = pages_of(lengths, sequence, positions, sizes)
        for wrong in np.flatnonzero(pages < 0)[:1]:
            name = "indices" if "indptr" in lengths else "block_table"
            raise InvalidArgument(
                f"{name} has no page of the cache at place {positions[wrong] // sizes.page} of sequence {index}: 0 to "
                f"{sizes.rows - 1} is needed"
            )


def _check_range(name: str, values: Array, least: Any, most: Any, what: str) -> None:
    values = values.astype(np.int64)
    least, most = np.broadcast_to(least, values.shape), np.broadcast_to(most, values.shape)
    for wrong in np.flatnonzero((values < least) | (values > most))[:1]:
        raise InvalidArgument(
            f"{name} of sequence {wrong} is {values[wrong]}: {least[wrong]} to {most[wrong]} is needed, {what}"
        )
