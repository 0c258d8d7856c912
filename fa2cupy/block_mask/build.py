"""Tiles to lists, in NumPy, in the steps of the kernels (cuda_src/smxx/list_blocks.cu): classify the blocks, count the
entries of rows, sum up where rows begin, write entries and bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fa2cupy.block_mask.lists import BLOCK, EMPTY, FULL, PARTIAL, BlockLists, words_of
from fa2cupy.block_mask.tiles import Tiles
from fa2cupy.errors import InvalidArgument

__all__ = ["build", "check_size", "lists_of"]

Array = npt.NDArray[Any]
_AT_A_TIME = 256  # blocks whose elements are held together: 4 MiB
_MOST_BLOCKS = 2**31 - 1  # entries are counted in 32 bits


def check_size(tiles: Tiles) -> None:
    """InvalidArgument where there are more blocks than numbers."""
    blocks = tiles.masks * tiles.blocks[0] * tiles.blocks[1]
    if blocks > _MOST_BLOCKS:
        raise InvalidArgument(f"a BlockMask of shape {tiles.shape} has {blocks} blocks: at most {_MOST_BLOCKS}")


def build(tiles: Tiles, max_partial: int | None = None) -> BlockLists:
    """max_partial: room for so many partial blocks, and entries for all blocks: sizes then depend on nothing else.
    InvalidArgument if there are more.
    """
    check_size(tiles)
    kinds, bits = classified(tiles)
    if max_partial is not None and len(bits) > max_partial:
        raise InvalidArgument(f"max_partial={max_partial} is too small: {len(bits)} blocks of the mask are partial")
    return lists_of(kinds, bits, max_partial)


def classified(tiles: Tiles) -> tuple[Array, Array]:
    """kinds (G, M, N), and the bits of the partial blocks in the order of masks, query blocks and key blocks."""
    kinds = tiles.kinds()
    if tiles.shape[3] % BLOCK and kinds.size:
        last = kinds[..., -1]
        last[last == FULL] = PARTIAL  # keys past the end are to be hidden
    places = np.argwhere(kinds == PARTIAL)
    parts = [np.empty((0, 2, BLOCK, 4), np.int32)]
    for start in range(0, len(places), _AT_A_TIME):
        mask, m, n = places[start : start + _AT_A_TIME].T
        elements = tiles.elements(mask, m, n)
        there = np.minimum(tiles.shape[2] - m * BLOCK, BLOCK)  # queries
        seen = elements.sum((1, 2))
        kind = np.where(seen == 0, EMPTY, np.where(seen == there * BLOCK, FULL, PARTIAL))
        kinds[mask, m, n] = kind
        parts.append(words_of(elements[kind == PARTIAL]))
    return kinds, np.concatenate(parts)


def lists_of(kinds: Array, bits: Array, max_partial: int | None = None) -> BlockLists:
    """From what `classified` returns."""
    numbers = np.full(kinds.shape, -1, np.int32)
    numbers[kinds == PARTIAL] = np.arange(len(bits), dtype=np.int32)
    visible = kinds != EMPTY
    # Of the key blocks that a query block meets, how many stand before each.
    ranks = visible.cumsum(2, dtype=np.int32) - 1
    room = None if max_partial is None else int(kinds.size)
    rows_q, entries_q, _ = _one_side(kinds, numbers, ranks, room)
    kinds, numbers, ranks = (x.transpose(0, 2, 1) for x in (kinds, numbers, ranks))
    rows_k, entries_k, turns = _one_side(kinds, numbers, ranks, room)
    if max_partial is not None:
        bits = np.concatenate([bits, np.zeros((max_partial - len(bits), *bits.shape[1:]), np.int32)])
    return BlockLists(rows_q, entries_q, rows_k, entries_k, turns, bits)


def _one_side(kinds: Array, numbers: Array, ranks: Array, room: int | None) -> tuple[Array, Array, Array]:
    """rows (G, rows, 4), entries (E, 2) and their ranks, of kinds (G, rows, columns)."""
    masks, rows, _ = kinds.shape
    partial, full = ((kinds == kind).sum(2, dtype=np.int64).ravel() for kind in (PARTIAL, FULL))
    counts = partial + full
    first = np.cumsum(counts) - counts
    table = np.empty((masks * rows, 4), np.int32)
    table[:, 0], table[:, 1], table[:, 2] = first, partial, full
    most_first = np.argsort(-counts.reshape(masks, rows), axis=1, kind="stable")
    table[:, 3] = most_first.ravel()
    total = int(counts.sum())
    entries = np.zeros((total if room is None else room, 2), np.int32)
    turns = np.zeros(len(entries), np.int32)
    for kind, before in ((PARTIAL, first), (FULL, first + partial)):
        mask, row, column = np.nonzero(kinds == kind)
        flat = mask * rows + row
        # Of each its place among those of its kind in its row.
        own = np.bincount(flat, minlength=masks * rows)
        place = before[flat] + np.arange(len(flat)) - (np.cumsum(own) - own)[flat]
        entries[place, 0], entries[place, 1] = column, numbers[mask, row, column]
        turns[place] = ranks[mask, row, column]
    return table.reshape(masks, rows, 4), entries, turns
