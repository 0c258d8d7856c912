"""What a BlockMask can be made of: which elements of a block are visible, and which blocks need not be looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fa2cupy.block_mask.lists import BLOCK, EMPTY, FULL, PARTIAL, BlockLists, blocks_of, elements_of, numbers_of
from fa2cupy.tracing import UserFunction

__all__ = ["Band", "Blocks", "Both", "Dense", "Either", "Listed", "Tiles", "Traced"]

Array = npt.NDArray[Any]
_ALL = slice(None)


class Tiles:
    """A mask of (batch, num_heads, seqlen_q, seqlen_k), of which the first two are 1 for all."""

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        self.shape = shape
        self.blocks = blocks_of(shape[2]), blocks_of(shape[3])

    @property
    def masks(self) -> int:
        return self.shape[0] * self.shape[1]

    def kinds(self) -> Array:
        """(masks, M, N): EMPTY or FULL where that is certain, PARTIAL where `elements` has to say.

        Full means that every query that there is sees all 128 keys.
        """
        kinds = np.empty((self.masks, *self.blocks), np.uint8)
        for mask in range(self.masks):
            for m in range(self.blocks[0]):
                rows = self.rows(mask, slice(m * BLOCK, min((m + 1) * BLOCK, self.shape[2])))
                padded = np.zeros((len(rows), self.blocks[1] * BLOCK), bool)
                padded[:, : rows.shape[1]] = rows
                columns = padded.reshape(len(rows), self.blocks[1], BLOCK)
                seen, whole = columns.any((0, 2)), columns.all((0, 2))
                kinds[mask, m] = np.where(whole, FULL, np.where(seen, PARTIAL, EMPTY))
        return kinds

    def elements(self, mask: Array, m: Array, n: Array) -> Array:
        """(len(m), 128, 128): which elements of block (m[i], n[i]) of mask[i] are visible; False past the ends."""
        found = np.zeros((len(m), BLOCK, BLOCK), bool)
        for i, (which, row, column) in enumerate(zip(mask.tolist(), m.tolist(), n.tolist(), strict=True)):
            queries = slice(row * BLOCK, min((row + 1) * BLOCK, self.shape[2]))
            keys = slice(column * BLOCK, min((column + 1) * BLOCK, self.shape[3]))
            part = self.rows(which, queries, keys)
            found[i, : part.shape[0], : part.shape[1]] = part
        return found

    def rows(self, mask: int, queries: slice, keys: slice = slice(None)) -> Array:
        """Which of the keys each of the queries sees, as bools."""
        raise NotImplementedError


class Dense(Tiles):
    """A bool array of that shape."""

    def __init__(self, array: Array) -> None:
        super().__init__(array.shape)
        self._array = array

    def rows(self, mask: int, queries: slice, keys: slice = slice(None)) -> Array:
        return self._array[mask // self.shape[1], mask % self.shape[1], queries, keys]


class Traced(Tiles):
    """A function of the user's own. arrays: from `UserFunction.on_host`."""

    def __init__(self, shape: tuple[int, int, int, int], function: UserFunction, arrays: dict[str, Any]) -> None:
        super().__init__(shape)
        self._function, self._arrays = function, arrays

    def rows(self, mask: int, queries: slice, keys: slice = slice(None)) -> Array:
        _, heads, seqlen_q, seqlen_k = self.shape
        q_idx = np.arange(*queries.indices(seqlen_q), dtype=np.int32)[:, None]
        kv_idx = np.arange(*keys.indices(seqlen_k), dtype=np.int32)[None, :]
        places = {"b": mask // heads, "h": mask % heads}
        arguments: dict[str, Array] = {name: np.full((1, 1), place, np.int32) for name, place in places.items()}
        arguments |= {"q_idx": q_idx, "kv_idx": kv_idx, "q_pos": q_idx + np.int32(seqlen_k - seqlen_q)}
        found = self._function.evaluate(arguments, self._arrays)
        return np.broadcast_to(found, (q_idx.shape[0], kv_idx.shape[1]))


class Blocks(Tiles):
    """Bools (batch, num_heads, ., .) of blocks of block_q queries x block_k keys, whatever their size."""

    def __init__(self, blocks: Array, block_q: int, block_k: int) -> None:
        batch, heads, rows, columns = blocks.shape
        super().__init__((batch, heads, rows * block_q, columns * block_k))
        self._given, self._size = blocks, (block_q, block_k)

    def kinds(self) -> Array:
        given = self._given.reshape(self.masks, *self._given.shape[2:])
        sums = np.zeros((self.masks, given.shape[1] + 1, given.shape[2] + 1), np.int64)
        sums[:, 1:, 1:] = given.cumsum(1, dtype=np.int64).cumsum(2)
        (top, bottom), (left, right) = (self._range(axis) for axis in (0, 1))
        top, bottom = top[:, None], bottom[:, None]
        seen = sums[:, bottom, right] - sums[:, top, right] - sums[:, bottom, left] + sums[:, top, left]
        whole = seen == (bottom - top) * (right - left)
        return np.where(whole, FULL, np.where(seen > 0, PARTIAL, EMPTY)).astype(np.uint8)

    def _range(self, axis: int) -> tuple[Array, Array]:
        """Of each of our blocks the first of theirs that it reaches into, and the one behind the last."""
        starts = np.arange(self.blocks[axis]) * BLOCK
        last = np.minimum(starts + BLOCK, self.shape[2 + axis]) - 1
        return starts // self._size[axis], last // self._size[axis] + 1

    def rows(self, mask: int, queries: slice, keys: slice = slice(None)) -> Array:
        rows, columns = (
            np.arange(*part.indices(length)) // size
            for part, length, size in zip((queries, keys), self.shape[2:], self._size, strict=True)
        )
        own: Array = self._given[mask // self.shape[1], mask % self.shape[1]]
        return own[rows[:, None], columns]


class Band(Tiles):
    """Of query i the keys from i + off - left to i + off + right, off = seqlen_k - seqlen_q; either may be None."""

    def __init__(self, seqlen_q: int, seqlen_k: int, left: int | None, right: int | None) -> None:
        super().__init__((1, 1, seqlen_q, seqlen_k))
        off, far = seqlen_k - seqlen_q, seqlen_q + seqlen_k
        self._first = off - (far if left is None else left)
        self._last = off + (far if right is None else right)

    def kinds(self) -> Array:
        top, left = (np.arange(blocks) * BLOCK for blocks in self.blocks)
        bottom, right = (
            np.minimum(start + BLOCK, length) - 1 for start, length in zip((top, left), self.shape[2:], strict=True)
        )
        top, bottom = top[:, None], bottom[:, None]
        whole = (right <= top + self._last) & (left >= bottom + self._first)
        seen = (left <= bottom + self._last) & (right >= top + self._first)
        return np.where(whole, FULL, np.where(seen, PARTIAL, EMPTY)).astype(np.uint8)[None]

    def rows(self, mask: int, queries: slice, keys: slice = slice(None)) -> Array:
        row = np.arange(*queries.indices(self.shape[2]))[:, None]
        column = np.arange(*keys.indices(self.shape[3]))
        seen: Array = (column >= row + self._first) & (column <= row + self._last)
        return seen


class Listed(Tiles):
    """A BlockMask's own."""

    def __init__(self, shape: tuple[int, int, int, int], lists: BlockLists) -> None:
        super().__init__(shape)
        self._numbers, self._bits = numbers_of(lists), lists.bits

    def kinds(self) -> Array:
        return np.where(self._numbers >= 0, PARTIAL, np.where(self._numbers == -1, FULL, EMPTY)).astype(np.uint8)

    def elements(self, mask: Array, m: Array, n: Array) -> Array:
        numbers = self._numbers[mask, m, n]
        found: Array = np.repeat(numbers == -1, BLOCK * BLOCK).reshape(-1, BLOCK, BLOCK)
        found[numbers >= 0] = elements_of(self._bits[numbers[numbers >= 0]])
        if rest := self.shape[2] % BLOCK:
            found[m == self.blocks[0] - 1, rest:] = False
        return found


class _Two(Tiles):
    def __init__(self, a: Tiles, b: Tiles) -> None:
        super().__init__((max(a.shape[0], b.shape[0]), max(a.shape[1], b.shape[1]), *a.shape[2:]))
        self._parts = a, b

    def _numbers(self, mask: Array, part: Tiles) -> Array:
        """Those of the part's masks."""
        batch, head = mask // self.shape[1], mask % self.shape[1]
        own: Array = (part.shape[0] > 1) * batch * part.shape[1] + (part.shape[1] > 1) * head
        return own

    def _kinds(self) -> tuple[Array, Array]:
        a, b = (part.kinds()[self._numbers(np.arange(self.masks), part)] for part in self._parts)
        return a, b

    def _elements(self, mask: Array, m: Array, n: Array) -> tuple[Array, Array]:
        a, b = (part.elements(self._numbers(mask, part), m, n) for part in self._parts)
        return a, b


class Both(_Two):
    def kinds(self) -> Array:
        return np.minimum(*self._kinds())

    def elements(self, mask: Array, m: Array, n: Array) -> Array:
        return np.logical_and(*self._elements(mask, m, n))


class Either(_Two):
    def kinds(self) -> Array:
        return np.maximum(*self._kinds())

    def elements(self, mask: Array, m: Array, n: Array) -> Array:
        return np.logical_or(*self._elements(mask, m, n))
