"""What becomes of a tile of scores, and of its P, on the CPU: softcap, ALiBi, dropout. `cpu.py` has the algorithm.

Tiles are (n, g x rows, columns), as `cpu.py` folds them. Queries and keys are counted from the first ones that it
computes with; those in front of them, which no key or query sees, are `queries` and `keys` of a `Place` too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fa2cupy import philox
from fa2cupy.cpu_mask import Mask

Array = npt.NDArray[Any]

__all__ = ["Band", "Place", "Tiles", "by_group"]


class Band(NamedTuple):
    """Which keys queries see: query r, which stands beside key r + beside, the keys from r + first to r + last."""

    first: int
    last: int
    beside: int = 0

    def below(self, query: int, key: int = 0) -> Band:
        """The same, with queries and keys counted from these on."""
        by = query - key
        return Band(self.first + by, self.last + by, self.beside + by)


class Place(NamedTuple):
    """Where arrays begin, for what is dropped: the number of the first sequence, and within it of a query and a key."""

    batch: int = 0
    query: int = 0
    key: int = 0


def by_group(x: Array, batch: int, num_heads_k: int) -> Array:
    """(heads,) or (batch, heads), or 1 for it -> (batch x num_heads_k, heads / num_heads_k, 1, 1)"""
    num_heads = x.shape[-1]
    whole = np.broadcast_to(x, (batch, num_heads))
    return whole.reshape(batch * num_heads_k, num_heads // max(1, num_heads_k), 1, 1)


class Tiles:
    """The features of one call, tile by tile. Of a call without any everything stays as it is.

    scale: what scores are multiplied by in the exponent: 1 once softcap or slopes have seen them as they are. factor:
    what is kept by dropout is multiplied by. sinks: (n, g, 1, 1), float64.
    """

    def __init__(
        self,
        Q: Array,
        K: Array,
        scale: float,
        band: Band,
        *,
        batch: int,
        softcap: float | None,
        alibi_slopes: Array | None,
        sinks: Array | None,
        dropout_p: float,
        dropout_seed: Array | None,
        place: Place,
        mask: Mask | None,
    ):
        """Q (n, g, rows, d) and K (n, 1, seqlen_k, d): what a tile is made of."""
        num_heads_k, group = len(Q) // max(1, batch), Q.shape[1]
        self._band, self._seqlen_k, self._place = band, K.shape[2], place
        self._mask, self._heads = mask, (num_heads_k, group)
        self._unit = scale
        self._softcap = None if softcap is None else min(max(softcap, 1e-30), 1e30)  # as good in float32
        self._slopes = None if alibi_slopes is None else by_group(alibi_slopes, batch, num_heads_k).astype(Q.dtype)
        self._weakens = self._slopes is None or not (self._slopes < 0).any()
        self.sinks = None if sinks is None else by_group(sinks, batch, num_heads_k)
        self.scale = scale if softcap is None and alibi_slopes is None else 1.0
        self.factor, self._tweak, self._p = 1.0, None, dropout_p
        if dropout_p:
            assert dropout_seed is not None
            tweak = philox.tweaks(dropout_seed, place.batch + np.arange(batch), np.arange(num_heads_k * group))
            self._tweak = tuple(t.reshape(len(Q), group) for t in tweak)
            self.factor = 1 / (1 - dropout_p)

    def seen(self, n: slice, i: slice, j: slice) -> Array | bool:
        """What of a tile the mask lets through, (n or 1, g or 1, rows, columns); True for all, False for nothing."""
        return True if self._mask is None else self._mask.tile(n, i, j, *self._heads)

    def scores(self, S: Array, n: slice, i: slice, j: slice) -> Array | None:
        """Make scores of S = Q K^T, in place, and return their derivative, None for 1."""
        if self._softcap is None and self._slopes is None:
            return None
        S *= self._unit
        derivative = None
        if self._softcap is not None:
            S /= self._softcap
            np.tanh(S, out=S)
            derivative = 1 - S * S
            S *= self._softcap
        if self._slopes is not None:
            row, column = np.arange(i.start, i.stop)[:, None], np.arange(j.start, j.stop)
            distance = abs(row + self._band.beside - column) - self._least(n, i)
            S -= (self._slopes[n] * distance.astype(S.dtype)).reshape(S.shape)
        return derivative

    def row_terms(self, n: slice, i: slice) -> Array | float:
        """What `scores` has left out of rows, (n, g, rows, 1): of them it knows only how they differ.

        Of ALiBi the key that it weakens least, so that far from the diagonal no score is a difference of large numbers.
        """
        return 0.0 if self._slopes is None else -self._slopes[n].astype(np.float64) * self._least(n, i)

    def _least(self, n: slice, i: slice) -> Array:
        """The distance of the key that ALiBi weakens least among those that a row sees, (n, g, rows, 1) or without n
        and g.
        """
        assert self._slopes is not None
        row = np.arange(i.start, i.stop)[:, None]
        beside = row + self._band.beside
        first = np.maximum(0, row + self._band.first)
        last = np.minimum(self._seqlen_k - 1, row + self._band.last)
        nearest: Array = np.maximum(0, np.maximum(first - beside, beside - last))
        if self._weakens:
            return nearest
        furthest: Array = np.maximum(abs(beside - first), abs(beside - last))
        return np.where(self._slopes[n] < 0, furthest, nearest)

    def kept(self, n: slice, i: slice, j: slice) -> Array | None:
        """Which P dropout keeps, of the shape of a tile; None for all."""
        if self._tweak is None:
            return None
        t0, t1 = self._tweak
        queries = slice(i.start + self._place.query, i.stop + self._place.query)
        keys = slice(j.start + self._place.key, j.stop + self._place.key)
        kept = philox.kept((t0[n], t1[n]), queries, keys, self._p)
        return kept.reshape(len(kept), -1, kept.shape[-1])
