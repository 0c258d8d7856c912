"""Attention on the CPU: the tiled algorithm of FlashAttention-2 in NumPy, for arrays that are NumPy's.

The names are the paper's: S = Q K^T, P = exp(S - m), l = rowsum(P), O = P V / l, the saved log-sum-exp L; and backward
D = rowsum(dO * O) - dL, dP = dO V^T, dS = P * (dP - D). docs/algorithm.md explains both passes beside the kernels.
What features make of scores and P is in `cpu_scores.py`.

Inside, arrays are (n, g, seqlen, d): n counts the pairs (batch, key head), g the query heads that share that key head,
so that grouped heads (GQA) need no repeated K and their dK and dV add up by themselves. A tile folds g into its rows:
(n, g x block_m, block_n) is one batched matmul. Memory beside the inputs is linear in the sequence lengths.

float16 and bfloat16 are computed in float32, float32 and float64 in their own type. bfloat16 is read and written as
bits, whether the dtype is ml_dtypes' or the plain uint16 of an array that came without it. Shapes, types and overlaps
have been checked by the caller.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from fa2cupy.cpu_mask import Mask
from fa2cupy.cpu_scores import Band, Place, Tiles

Array = npt.NDArray[Any]

_HERE = Place()

BLOCK_M = 256  # query rows of a tile
BLOCK_N = 256  # key columns of a tile
_TILE_SCORES = 1 << 18  # elements of S at a time, over as many n as fit: 1 MiB, for the cache


@np.errstate(all="ignore")  # NaN and infinity in the inputs are the caller's business and show in the results
def forward(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool,
    softmax_scale: float,
    window_size: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Array | None = None,
    mask: Mask | None = None,
    precision: str | None = None,
    place: Place = _HERE,
    out: Array | None = None,
    lse: Array | None = None,
) -> tuple[Array, Array]:
    """out (batch, seqlen_q, heads, head_dim_v) in the dtype of q, lse (batch, heads, seqlen_q) in the type of the sums.

    q is (batch, seqlen_q, heads, head_dim), k and v (batch, seqlen_k, heads_k, head_dim or head_dim_v), any strides.
    window_size is (left, right), each -1 for unlimited; alibi_slopes is (heads,) or (batch, heads), sinks (heads,),
    dropout_seed what `checks.check_seed` says, precision of no account here, and `place` where among a sequence's rows
    these are, which dropout alone asks. mask is counted from these rows. `out` and `lse` are written when given.
    """
    out = np.empty((*q.shape[:3], v.shape[3]), q.dtype) if out is None else out
    lse = np.empty((q.shape[0], q.shape[2], q.shape[1]), _compute_dtype(q)) if lse is None else lse
    first, unseen, band = _visible(q, k, causal, window_size)
    num_heads_k = k.shape[2]
    Q, K, V = (_load(x, num_heads_k) for x in (q[:, first:], k[:, unseen:], v[:, unseen:]))
    sinks = None if sinks is None else _as_float64(sinks)
    Q, scale = _positive_scale(Q, softmax_scale)
    tiles = Tiles(
        Q, K, scale, band, batch=len(q), softcap=softcap, alibi_slopes=alibi_slopes, dropout_p=dropout_p,
        dropout_seed=dropout_seed, sinks=sinks, place=place._replace(query=place.query + first, key=place.key + unseen),
        mask=None if mask is None else mask.below(0, first, unseen),
    )  # fmt: skip
    O = np.empty((*Q.shape[:3], V.shape[3]), Q.dtype)
    L = np.empty((*Q.shape[:3], 1), Q.dtype)
    for n in _slabs(Q, K):
        for i in _blocks(0, Q.shape[2], BLOCK_M):
            O[n, :, i], L[n, :, i] = _forward_block(Q[n, :, i], K[n, 0], V[n, 0], tiles, n, i, band.below(i.start))
    out[:, :first] = 0
    lse[:, :, :first] = -np.inf if sinks is None else sinks[:, None]
    _unload(O, out[:, first:])
    _unload(L, lse[:, :, first:].swapaxes(1, 2)[..., None])
    return out, lse


def _forward_block(Q: Array, K: Array, V: Array, tiles: Tiles, n: slice, i: slice, band: Band) -> tuple[Array, Array]:
    """O (n, g, m, d_v) and L (n, g, m, 1) of a block of queries Q (n, g, m, d) over all K (n, seqlen_k, d) and V.

    n, i: where they are in the whole.
    """
    slab, g, rows, _ = Q.shape
    scale = tiles.scale
    Q = _fold(Q)
    m = np.full((slab, g * rows, 1), -np.inf, Q.dtype)  # running maximum of S, without the scale
    l = np.zeros((slab, g * rows, 1), Q.dtype)  # running sum of P
    O = np.zeros((slab, g * rows, V.shape[2]), Q.dtype)  # not divided by l until the end
    first = max(0, band.first) // BLOCK_N * BLOCK_N
    for j in reversed(list(_blocks(first, min(K.shape[1], band.last + rows), BLOCK_N))):
        seen = tiles.seen(n, i, j)
        if seen is False:
            continue
        S = Q @ K[:, j].swapaxes(1, 2)
        tiles.scores(S, n, i, j)
        _mask(S, rows, band.below(0, j.start), seen)
        m_new = np.maximum(m, S.max(-1, keepdims=True))
        m_finite = np.where(np.isneginf(m_new), 0, m_new)  # no key so far: -inf - -inf would be NaN
        alpha = np.exp((m - m_finite) * scale)
        P = _exp(S, m_finite, scale)
        l = alpha * l + P.sum(-1, keepdims=True)
        O = alpha * O + _dropped(P, tiles.kept(n, i, j)) @ V[:, j]
        m = m_new
    l[l == 0] = 1  # of rows without any key, where O is 0
    O = (O / l * tiles.factor).reshape(slab, g, rows, V.shape[2])
    L = (m.astype(np.float64) * scale + np.log(l)).reshape(slab, g, rows, 1) + tiles.row_terms(n, i)
    if tiles.sinks is not None:  # one more key in each row's softmax, whose value is 0
        keys, L = L, np.logaddexp(L, tiles.sinks[n])
        O *= np.where(np.isneginf(keys), 0, np.exp(keys - L))
    return O, L


@np.errstate(all="ignore")
def backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    causal: bool,
    softmax_scale: float,
    window_size: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Array | None = None,
    mask: Mask | None = None,
    precision: str | None = None,
    place: Place = _HERE,
    dlse: Array | None = None,
    dq: Array | None = None,
    dk: Array | None = None,
    dv: Array | None = None,
    dsinks: Array | None = None,
) -> tuple[Array, Array, Array]:
    """dq, dk, dv in the shapes and dtypes of q, k, v, written where given; `out` and `lse` are what `forward` gave.

    dlse, the gradient of lse, is taken off D: dL/dS = P, so that dS = P * (dP - D) gains P * dlse. dsinks (heads,) is
    written if given. With dropout, P and dP are 0 where D, which is rowsum(dO * O) all the same, is taken off 0.
    As in the kernel, the outer loop is over key blocks, which own dK and dV; dQ is added up over them.
    """
    dq, dk, dv = (np.empty(x.shape, x.dtype) if dx is None else dx for x, dx in ((q, dq), (k, dk), (v, dv)))
    first, unseen, band = _visible(q, k, causal, window_size)
    num_heads_k = k.shape[2]
    Q, K, V, dO = (_load(x, num_heads_k) for x in (q[:, first:], k[:, unseen:], v[:, unseen:], dout[:, first:]))
    D = np.sum(dO * _load(out[:, first:], num_heads_k), axis=-1, keepdims=True)
    if dlse is not None:
        D -= _load_rows(dlse[:, :, first:], num_heads_k)
    L = _load_rows(lse[:, :, first:], num_heads_k)
    if dsinks is not None:
        assert sinks is not None
        store(_of_sinks(_as_float64(sinks), L, D, None if dlse is None else dlse[:, :, :first]), dsinks)
    Q, scale = _positive_scale(Q, softmax_scale)
    tiles = Tiles(
        Q, K, scale, band, batch=len(q), softcap=softcap, alibi_slopes=alibi_slopes, dropout_p=dropout_p,
        dropout_seed=dropout_seed, sinks=None, place=place._replace(query=place.query + first, key=place.key + unseen),
        mask=None if mask is None else mask.below(0, first, unseen),
    )  # fmt: skip
    every = slice(0, len(Q)), slice(0, Q.shape[2])
    shift, rest = _split_lse(L, tiles.scale, tiles.row_terms(*every))
    dQ, dK, dV = np.zeros_like(Q), np.zeros_like(K), np.zeros_like(V)
    for n in _slabs(Q, K):
        for j in _blocks(0, K.shape[2], BLOCK_N):
            Kj, Vj = K[n, 0, j], V[n, 0, j]
            first_block = max(0, j.start - band.last) // BLOCK_M * BLOCK_M
            for i in _blocks(first_block, min(Q.shape[2], j.stop - band.first), BLOCK_M):
                seen = tiles.seen(n, i, j)
                if seen is False:
                    continue
                Qi, dOi, Di, shift_i, rest_i = (_fold(x[n, :, i]) for x in (Q, dO, D, shift, rest))
                S = Qi @ Kj.swapaxes(1, 2)
                derivative = tiles.scores(S, n, i, j)
                _mask(S, i.stop - i.start, band.below(i.start, j.start), seen)
                P = _exp(S, shift_i, tiles.scale, rest_i)  # exp(S - L)
                kept = tiles.kept(n, i, j)
                dV[n, 0, j] += _dropped(P, kept).swapaxes(1, 2) @ dOi
                dS = dOi @ Vj.swapaxes(1, 2)  # dP, turned into dS = P * (dP - D) in place
                if kept is not None:
                    dS = _dropped(dS, kept)
                    dS *= tiles.factor
                dS -= Di
                dS *= P
                if derivative is not None:
                    dS *= derivative
                dK[n, 0, j] += dS.swapaxes(1, 2) @ Qi
                dQ[n, :, i] += (dS @ Kj).reshape(dQ[n, :, i].shape)
    dQ *= softmax_scale
    dK *= scale  # the sign is in Q
    dV *= tiles.factor
    dq[:, :first] = 0
    dk[:, :unseen], dv[:, :unseen] = 0, 0
    for x, dx in ((dQ, dq[:, first:]), (dK, dk[:, unseen:]), (dV, dv[:, unseen:])):
        _unload(x, dx)
    return dq, dk, dv


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def _visible(q: Array, k: Array, causal: bool, window_size: tuple[int, int] | None) -> tuple[int, int, Band]:
    """(queries, keys, band): leading queries that see no key, leading keys that no query sees, and who sees whom among
    the rest, counted from there.

    Those leading ones are dropped: nothing of them is read. There are no others, since causal and window are aligned
    bottom-right: the last query stands beside the last key.
    """
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    left, right = window_size or (-1, -1)
    right = 0 if causal else right
    if seqlen_k == 0:
        return seqlen_q, 0, Band(0, 0)
    queries = 0 if right < 0 else min(seqlen_q, max(0, seqlen_q - seqlen_k - right))
    keys = 0 if left < 0 or seqlen_q == 0 else max(0, seqlen_k - seqlen_q - left)
    beside = seqlen_k - keys - (seqlen_q - queries)  # of those that stay: query r stands beside key r + beside
    ends = -seqlen_q if left < 0 else beside - left, seqlen_k if right < 0 else beside + right
    return queries, keys, Band(*ends, beside)


def _mask(S: Array, rows: int, band: Band, seen: Array | bool) -> None:
    """Set the scores of a tile (n, g x rows, columns) to -inf outside of the band, and what the mask hides."""
    columns = S.shape[2]
    if seen is not True:
        np.copyto(S.reshape(S.shape[0], -1, rows, columns), -np.inf, where=~np.asarray(seen))
    if columns - 1 > band.last or rows - 1 + band.first > 0:
        row, column = np.arange(rows)[:, None], np.arange(columns)
        hidden = (column > row + band.last) | (column < row + band.first)
        S.reshape(S.shape[0], -1, rows, columns)[:, :, hidden] = -np.inf


def _exp(S: Array, shift: Array, scale: float, rest: Array | None = None) -> Array:
    """exp((S - shift) scale - rest), in place. Subtracting before scaling is exact where it matters: for S near m."""
    S -= shift
    S *= scale
    if rest is not None:
        S -= rest
    return np.exp(S, out=S)


def _split_lse(L: Array, scale: float, terms: Array | float) -> tuple[Array, Array]:
    """(shift, rest) for `_exp`, with shift x scale + rest = L - terms, which are the rows'.

    At logits of -50,000 a float32 is 0.004 from the next: S x scale - L would add one more such error to those of S and
    L themselves, (S - shift) x scale - rest does not.
    """
    own = L if isinstance(terms, float) else L - terms
    own = np.where(np.isneginf(own), np.inf, own)  # a row without any key: P is 0 there
    shift = np.clip(own / scale, -1e30, 1e30).astype(L.dtype, copy=False)  # finite when the scale is tiny
    return shift, (own - shift.astype(np.float64) * scale).astype(L.dtype)


def _dropped(P: Array, kept: Array | None) -> Array:
    """P without what dropout drops."""
    return P if kept is None else np.where(kept, P, 0)


def _of_sinks(sinks: Array, L: Array, D: Array, unseen: Array | None) -> Array:
    """The gradient of sinks: exp(sink - L) (dL - rowsum(dO * O)) of every row; of rows that see no key dL alone, which
    is `unseen`, (batch, heads, rows), as L is the sink there. L, D: (batch x num_heads_k, g, rows, 1).
    """
    batch, rows = L.size // max(1, len(sinks) * L.shape[2]), L.shape[2]
    L, D = (x.reshape(batch, len(sinks), rows).astype(np.float64) for x in (L, D))
    share = np.where(np.isneginf(sinks[:, None]), 0, np.exp(sinks[:, None] - L))
    gradient: Array = -np.sum(share * D, axis=(0, 2))
    if unseen is not None:
        gradient += np.where(np.isneginf(sinks), 0, np.sum(unseen, axis=(0, 2), dtype=np.float64))
    return gradient


def _positive_scale(Q: Array, softmax_scale: float) -> tuple[Array, float]:
    """The scale made positive by giving Q its sign: the running maximum and -inf x scale rely on it. 0 makes Q = 0."""
    scale = abs(float(softmax_scale))
    if Q.dtype.type(scale) == 0:
        return np.zeros_like(Q), 1.0
    return (Q if softmax_scale > 0 else -Q), scale


# ----------------------------------------------------------------------------------------------------------------------
# Blocks and layouts


def _blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    """start, start + size, ... as slices that end at stop."""
    return (slice(n, min(n + size, stop)) for n in range(start, stop, size))


def _slabs(Q: Array, K: Array) -> Iterator[slice]:
    """Ranges of n that are computed at once: more than one where tiles are small."""
    scores = Q.shape[1] * min(Q.shape[2], BLOCK_M) * min(K.shape[2], BLOCK_N)
    return _blocks(0, Q.shape[0], max(1, _TILE_SCORES // max(1, scores)))


def _fold(x: Array) -> Array:
    """(n, g, rows, d) -> (n, g x rows, d)"""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3])


def _compute_dtype(x: Array) -> npt.DTypeLike:
    return np.float64 if x.dtype == np.float64 else np.float32


def _is_bfloat16(x: Array) -> bool:
    return x.dtype == np.uint16 or x.dtype.name == "bfloat16"


def _load(x: Array, num_heads_k: int) -> Array:
    """(batch, seqlen, heads, d) -> (batch x num_heads_k, heads / num_heads_k, seqlen, d), contiguous, for computing."""
    batch, seqlen, num_heads, d = x.shape
    group = num_heads // max(1, num_heads_k)
    x = x.reshape(batch, seqlen, num_heads_k, group, d).transpose(0, 2, 3, 1, 4)
    if _is_bfloat16(x):
        x = (x.view(np.uint16).astype(np.uint32, order="C") << 16).view(np.float32)
    return np.ascontiguousarray(x, _compute_dtype(x)).reshape(batch * num_heads_k, group, seqlen, d)


def _as_float64(x: Array) -> Array:
    """Of one dimension."""
    row: Array = _load(x[None, None, None], 1)[0, 0, 0]
    return row.astype(np.float64)


def _load_rows(x: Array, num_heads_k: int) -> Array:
    """`_load` of one number a row: (batch, heads, seqlen) -> (batch x num_heads_k, heads / num_heads_k, seqlen, 1)."""
    return _load(x.swapaxes(1, 2)[..., None], num_heads_k)


def _unload(x: Array, out: Array) -> None:
    """The inverse of `_load`: round x to the dtype of `out` and write it there."""
    store(x.reshape(out.shape[0], out.shape[2], out.shape[1], out.shape[3]).swapaxes(1, 2), out)


def store(x: Array, out: Array) -> None:
    """Round x to the dtype of `out`, which has its shape, and write it there."""
    if _is_bfloat16(out):
        out = out.view(np.uint16)
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        nearest_even = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        x = np.where(np.isnan(x), 0x7FC0, nearest_even).astype(np.uint16)
    out[...] = x
