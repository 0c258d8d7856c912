"""The arrays of a BlockMask, as the kernels read them, and what of them a CPU needs.

A query tile walks the key blocks of its row, those of which a part is visible first, and takes the bits of these; a key
tile of the backward walks the query blocks of its row of the transposed lists. Nothing else is known of a mask there:
no causal, no window, no end of a sequence. A block that reaches past the last key is therefore partial; past the last
query it need not be, as nobody reads what is computed there.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "BLOCK",
    "EMPTY",
    "FULL",
    "NAMES",
    "PARTIAL",
    "BlockLists",
    "blocks_of",
    "elements_of",
    "kinds_of",
    "numbers_of",
    "words_of",
]

Array = npt.NDArray[Any]

BLOCK = 128  # queries and keys of a block
EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True, slots=True, eq=False)
class BlockLists:
    """int32, C-contiguous. G: masks, (batch or 1) x (num_heads or 1); M, N: query and key blocks; E: entries; P:
    partial blocks. Where sizes are bounds, what is behind the last one in use holds anything.

    rows_q (G, M, 4): of a query block the first of its entries, how many of them are partial, how many full; and the
        query block that is the m-th if those with most entries come first.
    entries_q (E, 2): key block, and number of its bits, or -1 if it is full. In a row partial ones come first, and
        either kind in ascending order.
    rows_k (G, N, 4), entries_k (E, 2): likewise of a key block, with query blocks.
    ranks (E,): of entries_k: how many key blocks before this one the query block meets, which is whose turn it is when
        parts of dQ are added in order.
    bits (P, 2, 128, 4): a bit for each element, in the order of accumulators. bits[p, 0, r, t]: of query r the keys
        8j + 2t + e in bit 2j + e, for j < 16 and e < 2; bits[p, 1, r, t]: of key r the queries.
    """

    rows_q: Any
    entries_q: Any
    rows_k: Any
    entries_k: Any
    ranks: Any
    bits: Any

    def arrays(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in NAMES)


NAMES = tuple(field.name for field in fields(BlockLists))


def blocks_of(seqlen: int) -> int:
    return -(-seqlen // BLOCK)


def words_of(elements: Array) -> Array:
    """(n, 128, 128) bools, queries x keys, as (n, 2, 128, 4) bits."""
    both = np.stack([elements, elements.swapaxes(1, 2)], axis=1)
    by_lane = both.reshape(-1, 2, BLOCK, 16, 4, 2).transpose(0, 1, 2, 4, 3, 5)  # t before j and e
    packed: Array = np.packbits(by_lane.reshape(-1, 2, BLOCK, 4, 32), axis=-1, bitorder="little")
    return packed.view("<i4")[..., 0].astype(np.int32, copy=False)


def elements_of(words: Array) -> Array:
    """The inverse."""
    plain = np.ascontiguousarray(words[:, 0]).astype("<i4", copy=False)
    by_lane = np.unpackbits(plain.view(np.uint8), axis=-1, bitorder="little").reshape(-1, BLOCK, 4, 16, 2)
    elements: Array = by_lane.transpose(0, 1, 3, 2, 4).reshape(-1, BLOCK, BLOCK).astype(bool)
    return elements


def numbers_of(lists: BlockLists) -> Array:
    """(G, M, N): of each block the number of its bits; -1 if it is full, -2 if it is empty."""
    masks, rows, _ = lists.rows_q.shape
    numbers = np.full((masks, rows, lists.rows_k.shape[1]), -2, np.int32)
    first, partial, full = (lists.rows_q[..., n].ravel().astype(np.int64) for n in range(3))
    counts = partial + full
    total = int(counts.sum())
    row = np.repeat(np.arange(masks * rows), counts)
    within = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    block, number = lists.entries_q[np.repeat(first, counts) + within].T
    numbers[row // rows, row % rows, block] = number
    return numbers


def kinds_of(lists: BlockLists) -> Array:
    """(G, M, N): EMPTY, PARTIAL or FULL."""
    numbers = numbers_of(lists)
    return np.where(numbers >= 0, PARTIAL, np.where(numbers == -1, FULL, EMPTY)).astype(np.uint8)
