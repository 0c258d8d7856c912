"""Masks for the kernels' tests, drawn by name: (batch, heads, seqlen_q, seqlen_k) bools, batch and heads 1 for all."""

from __future__ import annotations

import functools

import numpy as np

from fa2cupy.block_mask.lists import BlockLists
from fa2cupy.block_mask.mask import BlockMask
from fa2cupy.spec import MASK_ARRAYS

__all__ = ["NAMES", "arrays_of", "drawn", "lists_of"]

Array = np.ndarray
NAMES = ("blocks", "causal", "dots", "full", "none", "rows", "heads", "batches", "both")


@functools.cache
def drawn(name: str, seed: int, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> Array:
    """blocks: some blocks of 128, or of 64 x 32, at random, in part hidden by a diagonal. causal: from the first row
    on. dots: elements at random, few. full, none. rows: only some queries see anything, each a few keys. heads,
    batches, both: blocks of each head's own, of each batch's, of either's.
    """
    rng = np.random.default_rng(seed)
    q, k = np.arange(seqlen_q)[:, None], np.arange(seqlen_k)
    of_batch, of_heads = (batch, 1) if name == "batches" else (1, 1), (1, heads) if name == "heads" else (1, 1)
    own = (batch, heads) if name == "both" else (of_batch[0], of_heads[1])
    if name in ("blocks", "heads", "batches", "both"):
        masks = [_blocks(rng, seqlen_q, seqlen_k) for _ in range(own[0] * own[1])]
        return np.stack(masks).reshape(*own, seqlen_q, seqlen_k)
    mask = {
        "causal": lambda: k <= q,
        "dots": lambda: rng.random((seqlen_q, seqlen_k)) < 0.02,
        "full": lambda: np.ones((seqlen_q, seqlen_k), bool),
        "none": lambda: np.zeros((seqlen_q, seqlen_k), bool),
        "rows": lambda: (q % 7 == 3) & (abs(q - k) < 9),
    }[name]()
    return mask[None, None]


def _blocks(rng: np.random.Generator, seqlen_q: int, seqlen_k: int) -> Array:
    def some(rows: int, columns: int, part: float) -> Array:
        chosen = rng.random((-(-seqlen_q // rows), -(-seqlen_k // columns))) < part
        return chosen.repeat(rows, 0).repeat(columns, 1)[:seqlen_q, :seqlen_k]

    q, k = np.arange(seqlen_q)[:, None], np.arange(seqlen_k)
    return some(128, 128, 0.4) | (some(64, 32, 0.1) & (k <= q + rng.integers(0, 100)))


@functools.cache
def lists_of(name: str, seed: int, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> BlockLists:
    return BlockMask.from_dense(drawn(name, seed, batch, heads, seqlen_q, seqlen_k)).lists


def arrays_of(lists: BlockLists) -> dict[str, Array]:
    return dict(zip(MASK_ARRAYS, lists.arrays(), strict=True))
