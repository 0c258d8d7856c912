"""Which keys queries see by mask=, on the CPU, tile by tile: a bool array, or the lists of a BlockMask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fa2cupy.block_mask.lists import BLOCK, NAMES, BlockLists, elements_of, numbers_of

Array = npt.NDArray[Any]

__all__ = ["Mask", "mask_of"]


class _Source(Protocol):
    """What the user gave. masks: batch and num_heads, each 1 for all."""

    masks: tuple[int, int]

    def tile(self, batch: Array, head: Array, queries: slice, keys: slice) -> Array | bool:
        """Bools (*batch.shape, queries, keys), or what all of them are."""


class _Dense:
    """A bool array, broadcast."""

    def __init__(self, array: Array, seqlen_q: int, seqlen_k: int) -> None:
        array = array[(None,) * (4 - array.ndim)]
        self.masks: tuple[int, int] = array.shape[:2]
        self._array = np.broadcast_to(array, (*self.masks, seqlen_q, seqlen_k))

    def tile(self, batch: Array, head: Array, queries: slice, keys: slice) -> Array | bool:
        part: Array = self._array[:, :, queries, keys][batch, head]
        return part if part.any() and not part.all() else bool(part.any())


class _Listed:
    """The lists of a BlockMask."""

    def __init__(self, lists: BlockLists, shape: tuple[int, ...]) -> None:
        self.masks: tuple[int, int] = (shape[0], shape[1])
        self._numbers, self._bits = numbers_of(lists), lists.bits

    def tile(self, batch: Array, head: Array, queries: slice, keys: slice) -> Array | bool:
        top, left = (part.start // BLOCK * BLOCK for part in (queries, keys))
        m, n = (slice(part.start // BLOCK, -(-part.stop // BLOCK)) for part in (queries, keys))
        numbers = self._numbers[:, m, n][batch * self.masks[1] + head]
        if not numbers.size:
            return False
        if (numbers == numbers.flat[0]).all() and numbers.flat[0] < 0:
            return bool(numbers.flat[0] == -1)
        elements = np.zeros((*numbers.shape, BLOCK, BLOCK), bool)
        elements[numbers == -1] = True
        elements[numbers >= 0] = elements_of(self._bits[numbers[numbers >= 0]])
        rows, columns = (count * BLOCK for count in numbers.shape[-2:])
        whole: Array = elements.swapaxes(-3, -2).reshape(*numbers.shape[:-2], rows, columns)
        return whole[..., queries.start - top : queries.stop - top, keys.start - left : keys.stop - left]


@dataclass(frozen=True, slots=True)
class Mask:
    """A mask, from a sequence, a query and a key on."""

    source: _Source
    batch: int = 0
    query: int = 0
    key: int = 0

    def below(self, batch: int = 0, query: int = 0, key: int = 0) -> Mask:
        """The same, counted from these on."""
        return replace(self, batch=self.batch + batch, query=self.query + query, key=self.key + key)

    def tile(self, n: slice, i: slice, j: slice, num_heads_k: int, group: int) -> Array | bool:
        """Of a tile (n, g x rows, columns), as `cpu.py` folds it, bools (n or 1, g or 1, rows, columns) of what is
        seen; or True for all, False for nothing.
        """
        batches, heads = self.source.masks
        key_head = np.arange(n.start, n.stop)[:, None]
        batch = self.batch + key_head // num_heads_k if batches > 1 else np.zeros((1, 1), np.intp)
        head = key_head % num_heads_k * group + np.arange(group) if heads > 1 else np.zeros((1, 1), np.intp)
        queries, keys = (slice(at.start + by, at.stop + by) for at, by in ((i, self.query), (j, self.key)))
        batch, head = np.broadcast_arrays(batch, head)
        return self.source.tile(batch, head, queries, keys)


def mask_of(given: Mapping[str, Any], seqlen_q: int, seqlen_k: int) -> Mask:
    """From an array called mask; or from the arrays of a BlockMask, whose shape is called so."""
    if isinstance(given["mask"], np.ndarray):
        return Mask(_Dense(given["mask"], seqlen_q, seqlen_k))
    lists = BlockLists(*(given[f"mask_{name}"] for name in NAMES))
    return Mask(_Listed(lists, given["mask"]))
