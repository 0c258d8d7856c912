"""What attention is, in float64, and how far from it a result may be.

Shared by all tests:

* `attention_reference`, `attention_backward_reference`: the plain formulas in float64 with all of S in memory.
* `attention_model`, `attention_backward_model`: the same, but for the roundings that the format forces on everybody:
  P, dS and the results to the dtype, the saved lse to float32. A good kernel is about as wrong as this model.
* `attention_by_scipy`: the forward once more, by SciPy, for those that judge the reference itself.
* `expect(...)` runs the first two, returns an `Expected`; `expected.check(out=..., lse=..., dq=...)` applies `compare`.

Arrays are (batch, seqlen, heads, head_dim), lse is (batch, heads, seqlen). Tests keep them in their storage type, in
which bfloat16 is a uint16 array of bits, so nothing here needs ml_dtypes; `as_float64` reads every kind. The formulas
take `xp`, the module that does the work: numpy, cupy or torch (for shapes that are too big for the CPU, give arrays or
tensors that live on the GPU). `Expected` always holds NumPy arrays.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

Array = Any

# ----------------------------------------------------------------------------------------------------------------------
# Shapes that have found bugs in attention kernels

SEQLENS = (
    (1, 1), (1, 239), (239, 1), (3, 799), (799, 3), (5, 5), (17, 17), (113, 203), (113, 211), (108, 256), (128, 217),
    (127, 512), (127, 513), (97, 97), (256, 512), (512, 256), (307, 256), (640, 128), (1023, 1024), (1024, 1023),
    (1024, 1024), (2048, 2048), (4224, 4224), (64, 8192), (16, 20000),
)  # fmt: skip
SEQLENS_BOTH_WAYS = tuple(sorted({pair for sq, sk in SEQLENS for pair in ((sq, sk), (sk, sq))}))  # (seqlen_q, seqlen_k)
HEAD_DIMS = (8, 16, 32, 40, 59, 64, 72, 80, 96, 111, 112, 128, 160, 192, 224, 256)
HEAD_DIM_PAIRS = ((192, 128), (64, 128), (40, 72), (56, 64), (256, 64), (59, 16))  # (head_dim, head_dim_v)
HEADS = ((1, 1), (4, 4), (6, 3), (8, 2), (6, 1), (7, 7))  # (num_heads, num_heads_k)

# ----------------------------------------------------------------------------------------------------------------------
# Formats

# dtype: (explicit mantissa bits, exponent of the smallest normal number, largest finite number)
_FORMATS = {
    "bfloat16": (7, -126, (2 - 2**-7) * 2.0**127),
    "float16": (10, -14, 65504.0),
    "float32": (23, -126, (2 - 2**-23) * 2.0**127),
}


def round_to(x: Array, dtype: str, xp: Any = np) -> Array:
    """`x` (float64) rounded to the nearest values that `dtype` has, ties to even, still float64."""
    if dtype == "float64":
        return x
    mantissa, min_exponent, largest = _FORMATS[dtype]
    dropped = 52 - mantissa
    bits = x.view(xp.int64)
    bits = (bits + ((1 << (dropped - 1)) - 1) + ((bits >> dropped) & 1)) & -(1 << dropped)
    ulp = 2.0 ** (min_exponent - mantissa)  # of the subnormal numbers
    y = xp.where(abs(x) < 2.0**min_exponent, xp.round(x / ulp) * ulp, bits.view(xp.float64))
    y = xp.where(abs(y) > largest, xp.copysign(xp.full_like(x, np.inf), x), y)
    return xp.where(xp.isnan(x), x, y)


def dtype_name(x: Array) -> str:
    """The format of an array's values: a uint16 array holds bfloat16."""
    name = str(x.dtype).removeprefix("torch.")
    return "bfloat16" if name == "uint16" else name


def as_float64(x: Array, xp: Any = np) -> Array:
    """The values of a NumPy, CuPy, torch or JAX array (uint16: the bits of bfloat16) as float64 of the module `xp`."""
    if xp.__name__ == "torch":
        x = x if hasattr(x, "data_ptr") else xp.as_tensor(as_float64(x))
        return (x.view(xp.bfloat16) if x.dtype == xp.uint16 else x).to(xp.float64)
    if hasattr(x, "data_ptr"):  # a torch tensor; NumPy has no bfloat16 to read it with
        x = (x.view(dtype=_torch_bfloat16()) if dtype_name(x) == "bfloat16" else x).detach().double().cpu().numpy()
    elif hasattr(x, "get") and xp is np:  # CuPy's way to the host
        x = x.get()
    x = xp.asarray(x)
    if str(x.dtype) == "uint16":
        x = (x.astype(xp.uint32) << 16).view(xp.float32)
    return x.astype(xp.float64)


def _torch_bfloat16() -> Any:
    import torch

    return torch.bfloat16


def store(x: Array, dtype: str) -> np.ndarray:
    """`x` as a NumPy array of `dtype`, rounded to nearest even; bfloat16 as the uint16 of its bits."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return np.asarray(x, np.float64).astype(dtype)
    exact = np.ascontiguousarray(round_to(np.asarray(x, np.float64), dtype), np.float32)
    return (exact.view(np.uint32) >> 16).astype(np.uint16)


def as_ml_dtypes(x: np.ndarray) -> np.ndarray:
    """The same memory, a uint16 array seen as ml_dtypes.bfloat16; every other dtype as it is."""
    if x.dtype != np.uint16:
        return x
    import ml_dtypes

    return x.view(ml_dtypes.bfloat16)


class Inputs(NamedTuple):
    """Storage arrays (batch, seqlen, heads, head_dim)."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray


def make_inputs(
    seed: int,
    seqlen_q: int,
    seqlen_k: int,
    *,
    dtype: str,
    batch: int = 2,
    heads: tuple[int, int] = (4, 4),
    head_dim: int = 64,
    head_dim_v: int | None = None,
    outliers: bool = False,
) -> Inputs:
    """Normal random numbers; with `outliers`, 0.1% of the entries of q, k and v have ten times a normal one added."""
    rng = np.random.default_rng(seed)
    head_dim_v = head_dim if head_dim_v is None else head_dim_v

    def draw(seqlen: int, num_heads: int, width: int, plain: bool = False) -> np.ndarray:
        x = rng.standard_normal((batch, seqlen, num_heads, width))
        if outliers and not plain:
            x += 10 * rng.standard_normal(x.shape) * (rng.random(x.shape) < 1e-3)
        return store(x, dtype)

    return Inputs(
        q=draw(seqlen_q, heads[0], head_dim),
        k=draw(seqlen_k, heads[1], head_dim),
        v=draw(seqlen_k, heads[1], head_dim_v),
        dout=draw(seqlen_q, heads[0], head_dim_v, plain=True),
    )


# ----------------------------------------------------------------------------------------------------------------------
# The formulas

_MAX_SCORES = 1 << 24  # elements of S at a time, at least one slab's: 128 MiB


Window = tuple[int, int] | None  # window_size


def visible_keys(seqlen_q: int, seqlen_k: int, causal: bool, window: Window = None) -> np.ndarray:
    """(seqlen_q, seqlen_k) bool: which keys a query sees; causal and window are bottom-right aligned."""
    i, j = np.arange(seqlen_q)[:, None], np.arange(seqlen_k)[None, :]
    beside = i + seqlen_k - seqlen_q
    left, right = window or (-1, -1)
    sees = (j <= beside) | (not causal)
    return sees & ((j >= beside - left) | (left < 0)) & ((j <= beside + right) | (right < 0))


class Features(NamedTuple):
    """What goes beyond a plain softmax, each as the function under test is given it, but for `keep`: which P dropout
    keeps, bool (batch, heads, seqlen_q, seqlen_k). slopes: (heads,) or (batch, heads); sinks: (heads,); mask: True
    where a query sees a key, of the shape of `keep` or what broadcasts to it.
    """

    softcap: float | None = None
    slopes: Array | None = None
    sinks: Array | None = None
    dropout_p: float = 0.0
    keep: Array | None = None
    mask: Array | None = None


PLAIN = Features()


def attention_reference(
    q: Array,
    k: Array,
    v: Array,
    causal: bool = False,
    scale: float | None = None,
    *,
    window: Window = None,
    features: Features = PLAIN,
    xp: Any = np,
) -> tuple[Array, Array]:
    """out (batch, seqlen_q, heads, head_dim_v) and lse (batch, heads, seqlen_q), in float64."""
    return _by_slab(q, k, v, None, causal, scale, "float64", xp, window=window, features=features)[:2]


def attention_by_scipy(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool = False, scale: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What `attention_reference` gives, by SciPy's log-sum-exp and softmax: a judge that shares no line with it."""
    from scipy import special

    q, k, v = (np.moveaxis(as_float64(x), 2, 1) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("bhid,bhjd->bhij", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    hidden = np.triu(np.ones(scores.shape[2:], bool), 1 + k.shape[2] - q.shape[2]) & causal
    scores = np.where(hidden, -np.inf, scores)
    lse = special.logsumexp(scores, axis=-1)
    blind = hidden.all(-1)[:, None]  # a row of -inf alone has no softmax
    weights = np.where(blind, 0.0, special.softmax(np.where(blind, 0.0, scores), axis=-1))
    return np.moveaxis(weights @ v, 1, 2), lse


def attention_model(
    q: Array, k: Array, v: Array, causal: bool = False, scale: float | None = None, *, dtype: str = "", xp: Any = np
) -> tuple[Array, Array]:
    """`attention_reference` with P and out rounded to `dtype` (that of q) and lse to float32."""
    return _by_slab(q, k, v, None, causal, scale, dtype or dtype_name(q), xp)[:2]


def attention_backward_reference(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    causal: bool = False,
    scale: float | None = None,
    *,
    window: Window = None,
    dlse: Array | None = None,
    features: Features = PLAIN,
    xp: Any = np,
) -> tuple[Array, Array, Array]:
    """dq, dk, dv in float64; dk and dv have the heads of k. dlse: the gradient of lse, of its shape; None is 0."""
    return _by_slab(q, k, v, dout, causal, scale, "float64", xp, dlse=dlse, window=window, features=features)[2:5]


def attention_backward_model(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    causal: bool = False,
    scale: float | None = None,
    *,
    out: Array | None = None,
    dtype: str = "",
    xp: Any = np,
) -> tuple[Array, Array, Array]:
    """`attention_backward_reference` with P, dS, dq, dk, dv rounded to `dtype`, and D from `out` (the model's)."""
    return _by_slab(q, k, v, dout, causal, scale, dtype or dtype_name(q), xp, out)[2:5]


def _by_slab(
    q: Array,
    k: Array,
    v: Array,
    dout: Array | None,
    causal: bool,
    scale: float | None,
    dtype: str,
    xp: Any,
    saved: Array | None = None,
    dlse: Array | None = None,
    window: Window = None,
    features: Features = PLAIN,
) -> tuple[Array, ...]:
    """out, lse, dq, dk, dv, max|dP + dlse|, dsinks, the sum of its terms' magnitudes: a slab is some of the batch x
    num_heads_k groups of heads of a key head.
    """
    batch, seqlen_q, num_heads, head_dim = q.shape
    seqlen_k, num_heads_k, head_dim_v = k.shape[1], k.shape[2], v.shape[3]
    group = num_heads // max(num_heads_k, 1)
    scale = head_dim**-0.5 if scale is None else scale

    def split(x: Array, heads_in_group: int) -> Array:
        """(batch, seqlen, heads, d) -> (batch x num_heads_k, heads in the group x seqlen, d), float64"""
        x = as_float64(x, xp).swapaxes(1, 2)
        return x.reshape(batch * num_heads_k, heads_in_group * x.shape[2], x.shape[3])

    def merge(x: Array, seqlen: int, heads: int, width: int) -> Array:
        return x.reshape(batch, heads, seqlen, width).swapaxes(1, 2)

    def of_rows(x: Array) -> Array:
        """(heads,) or (batch, heads) -> (batch, seqlen_q, heads, 1)"""
        x = xp.broadcast_to(as_float64(x, xp), (batch, num_heads))
        return xp.broadcast_to(x[:, None, :, None], (batch, seqlen_q, num_heads, 1))

    if dlse is not None:  # like a row of one column
        dlse = as_float64(dlse, xp)[..., None].swapaxes(1, 2)
    rows = (None if x is None else split(x, group) for x in (dout, saved, dlse))
    slopes, sinks = (None if x is None else split(of_rows(x), group) for x in (features.slopes, features.sinks))
    keep = features.keep
    keep = keep if keep is None else keep.reshape(batch * num_heads_k, group * seqlen_q, seqlen_k)
    own = features.mask
    if own is not None:
        whole = xp.broadcast_to(own, (batch, num_heads, seqlen_q, seqlen_k))
        own = whole.reshape(batch * num_heads_k, group * seqlen_q, seqlen_k)
    slabs = split(q, group), split(k, 1), split(v, 1), *rows, slopes, sinks, keep, own
    visible = np.tile(visible_keys(seqlen_q, seqlen_k, causal, window), (group, 1))
    mask = xp.asarray(visible) if xp.__name__ != "torch" else xp.as_tensor(visible, device=slabs[0].device)
    beside = np.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    distance = np.tile(abs(beside - np.arange(seqlen_k)[None, :]), (group, 1)).astype(np.float64)
    if xp.__name__ == "torch":
        distance = xp.as_tensor(distance, device=slabs[0].device)
    step = max(1, _MAX_SCORES // max(1, visible.size))
    r = 1 / (1 - features.dropout_p)
    parts = [
        _slab(
            *(None if x is None else x[n : n + step] for x in slabs),
            mask, xp.asarray(distance), scale, features.softcap, r, dtype, xp,
        )
        for n in range(0, max(1, batch * num_heads_k), step)  # also when there is none: an empty slab has the shapes
    ]  # fmt: skip
    out, lse, dq, dk, dv = (
        None if part[0] is None else xp.concatenate(part) for part in list(zip(*parts, strict=True))[:5]
    )
    out, lse = merge(out, seqlen_q, num_heads, head_dim_v), lse.reshape(batch, num_heads, seqlen_q)
    if dout is None:
        return out, lse
    dq = merge(dq, seqlen_q, num_heads, head_dim)
    dk = merge(dk, seqlen_k, num_heads_k, head_dim)
    dv = merge(dv, seqlen_k, num_heads_k, head_dim_v)
    largest = max(part[5] for part in parts)
    if sinks is None:
        return out, lse, dq, dk, dv, largest, None, 0.0
    terms = xp.concatenate([part[6] for part in parts]).reshape(batch, num_heads, seqlen_q)
    of_row, sinks_dtype = terms.sum(2), dtype_name(features.sinks)
    dsinks = of_row.sum(0)
    dsinks = round_to(dsinks, sinks_dtype, xp) if sinks_dtype == dtype else dsinks
    return out, lse, dq, dk, dv, largest, dsinks, _largest(abs(terms).sum(2).sum(0), xp)


def _slab(
    Q: Array,
    K: Array,
    V: Array,
    dO: Array | None,
    O: Array | None,
    dlse: Array | None,
    slope: Array | None,
    sink: Array | None,
    keep: Array | None,
    own_mask: Array | None,
    mask: Array,
    distance: Array,
    scale: float,
    softcap: float | None,
    r: float,
    dtype: str,
    xp: Any,
) -> tuple[Array, ...]:
    """out, lse, dq, dk, dv, max|dP + dlse|, terms of dsinks of Q (n, rows, d), K (n, seqlen_k, d), V (n, seqlen_k, dv),
    dO, O (n, rows, dv), dlse, slope, sink (n, rows, 1) and keep (n, rows, seqlen_k). What dropout keeps is r times as
    much: 1 without.
    """

    def rounded(x: Array) -> Array:
        return round_to(x, dtype, xp)

    def kept(x: Array) -> Array:
        return x if keep is None else xp.where(keep, x, 0.0)

    mask = mask if own_mask is None else mask & own_mask
    # Rows without a key take no part: whatever they hold, NaN too, must not reach the rest; nor keys without a query.
    sees, seen = mask.any(-1)[..., None], mask.any(-2)[..., None]
    Q = xp.where(sees, Q, 0.0)
    K, V = xp.where(seen, K, 0.0), xp.where(seen, V, 0.0)
    with np.errstate(all="ignore"):
        S, derivative = (Q @ K.swapaxes(1, 2)) * scale, 1.0
        if softcap is not None:
            t = xp.tanh(S / softcap)
            S, derivative = softcap * t, 1 - t * t
        if slope is not None:
            S = S - slope * distance
        S = xp.where(mask, S, -np.inf)
        m = xp.amax(S, axis=-1, keepdims=True) if S.shape[-1] else xp.sum(S, axis=-1, keepdims=True)
        m = xp.where(sees, m, 0.0)
        P = xp.exp(S - m)
        l = xp.sum(P, axis=-1, keepdims=True)
        lse = xp.where(sees, m + xp.log(xp.where(sees, l, 1.0)), -np.inf)
        lse = lse if sink is None else xp.logaddexp(lse, sink)
        share = xp.where(sees, 1 / xp.where(sees, l, 1.0) if sink is None else xp.exp(m - lse), 0.0)
        out = rounded(xp.where(sees, (rounded(kept(P)) @ V) * (share * r), 0.0))
        lse = lse if dtype == "float64" else round_to(lse, "float32", xp)
        if dO is None:
            return out, lse[..., 0], None, None, None, 0.0
        dO = xp.where(sees, dO, 0.0)
        P = xp.exp(S - xp.where(sees, lse, 0.0))
        dP = kept(dO @ V.swapaxes(1, 2)) * r
        O = out if O is None else xp.where(sees, O, 0.0)
        D = xp.sum(dO * O, axis=-1, keepdims=True)
        terms = None
        if sink is not None:
            of_row = -D if dlse is None else dlse - D
            terms = xp.where(xp.isinf(sink), 0.0, xp.exp(sink - xp.where(xp.isinf(sink), 0.0, lse)) * of_row)
        if dlse is not None:
            dlse = xp.where(sees, dlse, 0.0)
            D = D - dlse
        dS = rounded(P * (dP - D) * derivative / r)
        dq = rounded(scale * r * (dS @ K))
        dk = rounded(scale * r * (dS.swapaxes(1, 2) @ Q))
        dv = rounded(r * (rounded(kept(P)).swapaxes(1, 2) @ dO))
        dP = dP if dlse is None else dP + dlse
        return out, lse[..., 0], dq, dk, dv, _largest(xp.where(mask, dP, 0.0), xp), terms


def _largest(x: Array, xp: Any = np) -> float:
    """max|x| over the finite elements, 0 when there is none."""
    x = abs(xp.where(xp.isfinite(x), x, 0.0))
    return float(x.max()) if 0 not in x.shape else 0.0


# ----------------------------------------------------------------------------------------------------------------------
# How far a result may be from the reference


class Comparison(NamedTuple):
    """Errors of a result and of the model, for reports: the largest, and root-mean-square relative to the reference."""

    max_error: float
    model_max_error: float
    rms_error: float
    model_rms_error: float


def compare(name: str, got: Array, ref: Array, model: Array | None, floor: float) -> Comparison:
    """AssertionError unless `got` is as close to `ref` as its format allows; every test is one that NaN fails.

    1. NaN, +inf and -inf are where the reference has them.
    2. max|got - ref| <= 2 max|model - ref| + floor.
    3. rms(got - ref) <= 1.05 rms(model - ref). Two things are granted beside the 5%, both small on shapes that are
       worth measuring: the model's rms is one random draw, so three standard deviations of it, estimated over its rows
       (2% at 10,000 rows); and float32 arithmetic, which the model does not have: 0.1 floor, added in squares.

    `floor` is 1e-5 of the largest possible magnitude of the sum behind the result (see `expect`). `model=None` leaves
    max|got - ref| <= floor, the rule for float32 and float64 results.
    """
    got, ref = as_float64(got), as_float64(ref)
    assert got.shape == ref.shape, f"{name}: shape {got.shape}, expected {ref.shape}"
    _same_places(name, got, ref)
    finite = np.isfinite(ref)
    error = np.where(finite, got, 0.0) - np.where(finite, ref, 0.0)
    if model is None:
        model_error = np.zeros_like(error)
    else:
        model = as_float64(model)
        _same_places(f"{name} of the model (bad inputs: they overflow the format)", model, ref)
        model_error = np.where(finite, model, 0.0) - np.where(finite, ref, 0.0)

    max_error, model_max_error = _largest(error), _largest(model_error)
    limit = 2 * model_max_error + floor
    if not max_error <= limit:
        where = np.unravel_index(int(np.argmax(abs(error))), error.shape)
        raise AssertionError(
            f"{name}: error {max_error:.3e} above {limit:.3e} (model {model_max_error:.3e}, floor {floor:.3e}) at "
            f"{tuple(int(n) for n in where)}: {got[where]!r}, expected {ref[where]!r}; "
            f"{int((abs(error) > limit).sum())} of {error.size} elements are too far off"
        )
    rms, model_rms = _rms(error), _rms(model_error)
    if model is not None:
        rows = np.sum(np.square(model_error), axis=-1)
        spread = np.sqrt(np.sum(np.square(rows)) / 2) / rows.sum() if rows.any() else 0.0
        rms_limit = np.hypot(1.05 * model_rms * (1 + 3 * spread), 0.1 * floor)
        assert rms <= rms_limit, f"{name}: rms error {rms:.4e} above {rms_limit:.4e} (model {model_rms:.4e})"
    unit = max(_rms(np.where(finite, ref, 0.0)), floor) or 1.0
    return Comparison(max_error, model_max_error, rms / unit, model_rms / unit)


def compare_lse(got: Array, ref: Array) -> float:
    """AssertionError unless |got - ref| <= 1e-4 + 1e-6 |ref| (float64: 1e-12 + 1e-14 |ref|), -inf where ref has it."""
    absolute, relative = (1e-12, 1e-14) if dtype_name(got) == "float64" else (1e-4, 1e-6)
    got, ref = as_float64(got), as_float64(ref)
    assert got.shape == ref.shape, f"lse: shape {got.shape}, expected {ref.shape}"
    _same_places("lse", got, ref)
    finite = np.isfinite(ref)
    error = abs(np.where(finite, got, 0.0) - np.where(finite, ref, 0.0))
    bad = ~(error <= absolute + relative * np.where(finite, abs(ref), 0.0))
    assert not bad.any(), f"lse: error {error.max():.3e}, {int(bad.sum())} of {bad.size} elements are too far off"
    return _largest(error)


def _same_places(name: str, got: np.ndarray, ref: np.ndarray) -> None:
    for what, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        wrong = test(got) != test(ref)
        if wrong.any():
            where = tuple(int(n[0]) for n in np.nonzero(wrong))
            raise AssertionError(
                f"{name}: {int(test(got).sum())} {what}, expected {int(test(ref).sum())}; first at {where}: "
                f"{got[where]!r}, expected {ref[where]!r}"
            )


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0


class Bound(NamedTuple):
    """One output's reference, model (None for float32 and float64) and floor, as `compare` takes them."""

    ref: np.ndarray
    model: np.ndarray | None
    floor: float


@dataclasses.dataclass(frozen=True)
class Expected:
    """What `expect` found: bounds for "out", "dq", "dk", "dv", "dsinks" (the last ones if it had dout), and the lse."""

    lse: np.ndarray
    bounds: dict[str, Bound]

    def check(self, *, lse: Array | None = None, **outputs: Array) -> dict[str, Comparison]:
        """`compare` the given ones of out, lse, dq, dk, dv and dsinks."""
        if lse is not None:
            compare_lse(lse, self.lse)
        return {name: compare(name, got, *self.bounds[name]) for name, got in outputs.items()}


def expect(
    q: Array,
    k: Array,
    v: Array,
    dout: Array | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: Window = None,
    out: Array | None = None,
    dlse: Array | None = None,
    features: Features = PLAIN,
    dtype: str = "",
    xp: Any = np,
) -> Expected:
    """Reference, model and floors of a case; without `dout` of the forward only. `dtype` defaults to that of q.
    `dlse` is the gradient of lse, if there is one.

    `out` is what the backward under test is given, where that is not the model's own out: an input like any other,
    rounded, from which the model takes its D too. Without it the model's rounding errors in D are not those of the
    result, and in small cases the one is now and then twice the other (7 of 10,000 honest outputs fail `compare`).
    """
    dtype = dtype or dtype_name(q)
    ref = _by_slab(q, k, v, dout, causal, scale, "float64", xp, dlse=dlse, window=window, features=features)
    rounds = dtype in ("float16", "bfloat16")
    model = _by_slab(q, k, v, dout, causal, scale, dtype, xp, out, dlse, window, features) if rounds else None
    unit = 1e-13 if dtype == "float64" else 1e-5
    r = 1 / (1 - features.dropout_p)
    magnitudes = {"out": r * _largest(as_float64(v, xp), xp)}
    if dout is not None:
        scale = abs(q.shape[3] ** -0.5 if scale is None else scale)
        sees = visible_keys(q.shape[1], k.shape[1], causal, window).any(-1)
        first = int(np.argmax(sees)) if sees.any() else q.shape[1]
        magnitudes["dq"] = scale * ref[5] * _largest(as_float64(k, xp), xp)
        magnitudes["dk"] = scale * ref[5] * _largest(as_float64(q[:, first:], xp), xp)
        magnitudes["dv"] = r * _largest(as_float64(dout[:, first:], xp), xp)
        if features.sinks is not None:
            magnitudes["dsinks"] = ref[7]
    place = {"out": 0, "dq": 2, "dk": 3, "dv": 4, "dsinks": 6}
    return Expected(
        lse=as_float64(ref[1]),
        bounds={
            name: Bound(
                as_float64(ref[place[name]]),
                None if model is None else as_float64(model[place[name]]),
                unit * magnitude,
            )
            for name, magnitude in magnitudes.items()
        },
    )
