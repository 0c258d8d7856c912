"""What dropout drops: Philox by Salmon et al. (2011), as the kernels draw it, in NumPy.

Everything is in uint32. Of a sequence b, a query head h, a query i and a key j (from the sequence's first stored row):

    t0, t1  the first two words of Philox4x32-10, key (seed lo, seed hi), counter (offset lo, offset hi, b, h)
    x, y    Philox2x32-7 of (uq ^ t0, uk ^ t1), round keys constant, with uq = i // 16 * 8 + i % 8, uk likewise of j

x is for queries with i % 16 < 8, y for the others; bits 0 to 14 for keys with j % 16 < 8, bits 16 to 30 for the others.
The four P that share a call are those that a thread of a tensor core's accumulator holds, whichever way round.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fa2cupy.checks import DROPOUT_STEPS

Array = npt.NDArray[Any]

__all__ = ["KEY_STEPS", "MULTIPLIER", "MULTIPLIERS", "kept", "philox2x32", "philox4x32", "tweaks", "words"]

KEY_STEPS = _KEY_STEP, _ = 0x9E3779B9, 0xBB67AE85
MULTIPLIER = 0xD256D193  # of 2x32
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57  # of 4x32
_LOW = np.uint64(0xFFFFFFFF)


def _mul(factor: int, x: Array) -> tuple[Array, Array]:
    """The high and the low word of a product."""
    product = x.astype(np.uint64) * np.uint64(factor)
    return (product >> np.uint64(32)).astype(np.uint32), (product & _LOW).astype(np.uint32)


def philox2x32(c0: Array, c1: Array, key: int, rounds: int) -> tuple[Array, Array]:
    for number in range(rounds):
        high, low = _mul(MULTIPLIER, c0)
        c0, c1 = high ^ np.uint32((key + number * _KEY_STEP) % 2**32) ^ c1, low
    return c0, c1


def philox4x32(counter: tuple[Array, Array, Array, Array], key: tuple[int, int], rounds: int = 10) -> tuple[Array, ...]:
    c0, c1, c2, c3 = counter
    for number in range(rounds):
        keys = [np.uint32((k + number * step) % 2**32) for k, step in zip(key, KEY_STEPS, strict=True)]
        (high0, low0), (high2, low2) = _mul(MULTIPLIERS[0], c0), _mul(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ keys[0], low2, high0 ^ c3 ^ keys[1], low0
    return c0, c1, c2, c3


def words(seed: Array) -> tuple[int, ...]:
    """(seed lo, seed hi, offset lo, offset hi, first batch, first head) of a dropout_seed: `checks.SEED_SHAPES`."""
    numbers = np.ascontiguousarray(seed).view(np.uint32).tolist()
    numbers += [0] * (8 - len(numbers))
    return *numbers[:4], numbers[4], numbers[6]


def tweaks(seed: Array, batches: Array, heads: Array) -> tuple[Array, Array]:
    """t0, t1 of sequences and query heads by number, (len(batches), len(heads))."""
    key_lo, key_hi, offset_lo, offset_hi, first_batch, first_head = words(seed)
    b = ((batches.astype(np.int64) + first_batch) & 0xFFFFFFFF).astype(np.uint32)[:, None]
    h = ((heads.astype(np.int64) + first_head) & 0xFFFFFFFF).astype(np.uint32)[None, :]
    low, high = (np.full(b.shape, word, np.uint32) for word in (offset_lo, offset_hi))
    t0, t1, *_ = np.broadcast_arrays(*philox4x32((low, high, b, h), (key_lo, key_hi)))
    return t0, t1


def kept(tweak: tuple[Array, Array], queries: slice, keys: slice, dropout_p: float) -> Array:
    """Whether P of these queries and keys is kept: bool, (*t0.shape, queries, keys)."""
    units = []
    for side in (queries, keys):
        sixteens = np.arange(side.start // 16, -(-side.stop // 16))
        units.append((sixteens[:, None] * 8 + np.arange(8)).astype(np.uint32).ravel())
    t0, t1 = (t[..., None, None] for t in tweak)
    uq, uk = np.broadcast_arrays(units[0][:, None] ^ t0, units[1] ^ t1)
    threshold = round(dropout_p * DROPOUT_STEPS)
    rows = np.stack(philox2x32(uq, uk, _KEY_STEP, 7), axis=-1)  # (..., units of queries, units of keys, x or y)
    bits = np.stack([rows & 0x7FFF, (rows >> 16) & 0x7FFF], axis=-1)  # (..., low or high)
    shape = bits.shape[:-4]
    bits = bits.reshape(*shape, len(units[0]) // 8, 8, len(units[1]) // 8, 8, 2, 2)
    at = len(shape)
    order = (*range(at), at, at + 4, at + 1, at + 2, at + 5, at + 3)  # sixteens, half, eighth: of queries, of keys
    tile = (bits >= threshold).transpose(order).reshape(*shape, 2 * len(units[0]), 2 * len(units[1]))
    i, j = queries.start // 16 * 16, keys.start // 16 * 16
    result: Array = tile[..., queries.start - i : queries.stop - i, keys.start - j : keys.stop - j]
    return result
