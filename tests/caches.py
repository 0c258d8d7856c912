"""Cases of attention on a KV cache: caches with poison wherever nobody may read, and what has to come out, in float64.

The reference knows each sequence's keys as one array from the start; it reads no cache, and no table of pages.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests import reference
from tests.reference import as_float64, store

FLOAT8, INT8 = "float8_e4m3fn", "int8"
GARBAGE = (2**31 - 1, -1, 2147480000, -(2**31))  # entries of tables that nobody may follow


@dataclass(frozen=True)
class CacheCase:
    """before: keys of each sequence in the cache before the call. queries: of every sequence, or of each (packed). new:
    likewise new keys, None without; packed they are as many as the queries.

    page: keys of a page, None without pages; table: how pages are found. capacity: of each sequence. by: which array
    says how many keys there are, None: all of the capacity. rotary: (rotary_dim, style, dtype of its tables). scales:
    shapes of k_scale and v_scale, by name. slopes: shape of alibi_slopes, "head" or "batch"; sinks:
    their dtype. spare: rows of the cache, or pages, that are nobody's.
    """

    before: tuple[int, ...]
    queries: int | tuple[int, ...] = 1
    new: int | None = None
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 32
    head_dim_v: int | None = None
    dtype: str = "float16"
    page: int | None = None
    table: str = "block_table"
    capacity: int = 128
    layout: str = "bshd"
    by: str | None = "cache_seqlens"
    causal: bool = False
    window: tuple[int, int] | None = None
    scale: float | None = None
    leftpad: tuple[int, ...] | None = None
    batch_idx: bool = False
    rotary: tuple[int, str, str] | None = None
    kv_dtype: str | None = None
    scales: tuple[str, str] = ("head", "number")
    softcap: float | None = None
    slopes: str | None = None
    sinks: str | None = None
    spare: int = 2
    seed: int = 0

    @property
    def batch(self) -> int:
        return len(self.before)

    @property
    def is_packed(self) -> bool:
        return isinstance(self.queries, tuple)

    @property
    def lengths_q(self) -> tuple[int, ...]:
        return self.queries if isinstance(self.queries, tuple) else (self.queries,) * self.batch

    @property
    def lengths_new(self) -> tuple[int, ...]:
        if self.new is None:
            return (0,) * self.batch
        return self.lengths_q if self.is_packed else (self.new,) * self.batch

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(min(b + n, self.capacity) for b, n in zip(self.before, self.lengths_new, strict=True))

    @property
    def is_quantised(self) -> bool:
        return self.kv_dtype is not None


@dataclass
class Drawn:
    """A case in arrays: bfloat16 as bits in uint16, 8 bits as uint8; bshd whatever the case's layout.

    arrays: by keyword of `KVCache` and `attend`, new keys k_new and v_new. keys, values: of each sequence as attention
    sees them, after the call. after: the caches as they have to be then.
    """

    case: CacheCase
    q: np.ndarray
    k_cache: np.ndarray
    v_cache: np.ndarray
    arrays: dict[str, Any] = field(default_factory=dict)
    turned_q: list[np.ndarray] = field(default_factory=list)
    keys: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)
    after: dict[str, np.ndarray] = field(default_factory=dict)
    new_places: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    @property
    def first_q(self) -> list[int]:
        return [0, *np.cumsum(self.case.lengths_q).tolist()] if self.case.is_packed else []


def _nan(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if dtype in (FLOAT8, INT8):  # 0x7f is NaN of the one, and the largest of the other
        return np.full(shape, 0x7F, np.uint8)
    bits = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32, "float64": np.uint64}[dtype]
    whole = np.full(shape, -1, np.int64).astype(bits)
    return whole if dtype == "bfloat16" else whole.view(dtype)


def e4m3(codes: np.ndarray) -> np.ndarray:
    """What the codes of float8_e4m3fn mean, by its definition, in float64."""
    sign, exponent, mantissa = codes >> 7, (codes >> 3 & 15).astype(int), (codes & 7).astype(float)
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    magnitude = np.where(codes & 0x7F == 0x7F, np.nan, magnitude)
    return np.where(sign == 1, -magnitude, magnitude)


_CODES = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)


def encoded(x: np.ndarray, kv_dtype: str) -> np.ndarray:
    """The nearest code of each number, ties to the even one, by looking at all of them."""
    if kv_dtype == INT8:
        return np.clip(np.rint(x), -128, 127).astype(np.int8).view(np.uint8)
    x = np.clip(x, -448, 448)
    distance = abs(x[..., None] - e4m3(_CODES))
    least = distance.min(-1, keepdims=True)
    best = _CODES[np.where((distance == least) & (_CODES % 2 == 0), 2, (distance == least) * 1).argmax(-1)]
    return np.where(best & 0x7F == 0, np.signbit(x) * 0x80, best).astype(np.uint8)


def decoded(codes: np.ndarray, kv_dtype: str) -> np.ndarray:
    return e4m3(codes) if kv_dtype == FLOAT8 else codes.view(np.int8).astype(np.float64)


def turned(x: np.ndarray, positions: np.ndarray, cos: np.ndarray, sin: np.ndarray, style: str) -> np.ndarray:
    """x (rows, heads, d) in float64, turned pair by pair."""
    result = x.copy()
    half = cos.shape[1]
    for row, position in enumerate(positions):
        for i in range(half):
            one, other = (2 * i, 2 * i + 1) if style == "interleaved" else (i, i + half)
            c, s = cos[position, i], sin[position, i]
            result[row, :, one] = x[row, :, one] * c - x[row, :, other] * s
            result[row, :, other] = x[row, :, one] * s + x[row, :, other] * c
    return result


def draw(case: CacheCase) -> Drawn:
    assert case.capacity % (case.page or 1) == 0, "the last page has room for more than the capacity"
    rng = np.random.default_rng(case.seed)
    num_heads, num_heads_k = case.heads
    widths = {"k": case.head_dim, "v": case.head_dim_v or case.head_dim}
    stored = case.kv_dtype or case.dtype

    def normal(*shape: int) -> np.ndarray:
        return store(rng.standard_normal(shape), case.dtype)

    # Where the keys of each sequence lie: (row of the cache, row of the page) of each.
    rows = case.batch + (case.spare if case.batch_idx else 0)
    places, tables = _places(case, rng, rows)
    page = case.page or case.capacity
    count = rows if case.page is None else sum(len(t) for t in tables) + case.spare
    arrays = _tables(case, rng, tables, rows)
    row_of = arrays.get("cache_batch_idx", np.arange(case.batch))
    caches = {f"{n}_cache": _nan((count, page, num_heads_k, width), stored) for n, width in widths.items()}
    scales = {n: _scale(case, rng, form, count) for n, form in zip(("k", "v"), case.scales, strict=True)}
    total = sum(case.lengths_q)
    shape_q = (total,) if case.is_packed else (case.batch, case.lengths_q[0] if case.batch else 1)
    drawn = Drawn(case, normal(*shape_q, num_heads, case.head_dim), **caches)
    if case.new is not None:
        shape_new = (total,) if case.is_packed else (case.batch, case.new)
        for name, width in widths.items():
            arrays[f"{name}_new"] = normal(*shape_new, num_heads_k, width)
    if case.rotary is not None:
        dim, _, dtype = case.rotary
        angles = np.arange(case.capacity)[:, None] * 10.0 ** -np.linspace(0, 2, dim // 2)
        arrays["rotary_cos"], arrays["rotary_sin"] = store(np.cos(angles), dtype), store(np.sin(angles), dtype)
    caches_after = {name: cache.copy() for name, cache in caches.items()}
    for b in range(case.batch):
        pages, inside = places[row_of[b]]
        end, first = case.ends[b], case.leftpad[b] if case.leftpad else 0
        own = slice(drawn.first_q[b], drawn.first_q[b + 1]) if case.is_packed else None
        q = drawn.q[own] if case.is_packed else drawn.q[b]
        each = case.causal or case.window is not None
        drawn.turned_q.append(_turned_rows(case, arrays, q, case.before[b], each=each))
        for name, width in widths.items():
            scale = _of_keys(scales[name], case, b, pages[:end])
            old = rng.standard_normal((case.before[b], num_heads_k, width))
            if case.is_quantised:
                old = encoded(old / (1 if scale is None else scale[: case.before[b]]), case.kv_dtype or "")
            else:
                old = store(old, case.dtype)
            kept = range(first, case.before[b])
            caches[f"{name}_cache"][pages[kept], inside[kept]] = old[first:]
            keys = old
            if case.new is not None:
                new = arrays[f"{name}_new"][own] if case.is_packed else arrays[f"{name}_new"][b]
                new = new[: end - case.before[b]]
                if name == "k":
                    new = _turned_rows(case, arrays, new, case.before[b], each=True)
                if case.is_quantised:
                    factor = np.float32(1 if scale is None else scale[case.before[b] :])
                    new = encoded((as_float64(new).astype(np.float32) / factor).astype(np.float64), case.kv_dtype or "")
                keys = np.concatenate([old, new])
            caches_after[f"{name}_cache"][pages[first:end], inside[first:end]] = keys[first:]
            if case.is_quantised:
                keys = decoded(keys, case.kv_dtype or "") * (1 if scale is None else scale)
            (drawn.keys if name == "k" else drawn.values).append(keys[first:])
        drawn.new_places.append((pages[case.before[b] : end], inside[case.before[b] : end]))
    drawn.after = caches_after
    if case.is_packed:
        arrays["cu_seqlens_q"] = np.array(drawn.first_q, np.int32)
    if case.by == "cache_seqlens":
        arrays["cache_seqlens"] = np.array(case.before, np.int32)
    elif case.by == "seqused_k":
        arrays["seqused_k"] = np.array([b + n for b, n in zip(case.before, case.lengths_new, strict=True)], np.int32)
    if case.leftpad is not None:
        arrays["leftpad_k"] = np.array(case.leftpad, np.int32)
    for name, scale in scales.items():
        if scale is not None:
            arrays[f"{name}_scale"] = scale
    if case.slopes is not None:
        shape = (num_heads,) if case.slopes == "head" else (case.batch, num_heads)
        arrays["alibi_slopes"] = (rng.random(shape) * 0.3).astype("float64" if case.dtype == "float64" else "float32")
    if case.sinks is not None:
        arrays["sinks"] = store(rng.standard_normal(num_heads) + 2, case.sinks)
    drawn.arrays = arrays
    return drawn


def _places(case: CacheCase, rng: np.random.Generator, rows: int) -> tuple[list[Any], list[np.ndarray]]:
    """(row of the cache, row within it) of the keys of each row of the table; and that row's pages."""
    if case.page is None:
        numbers = np.arange(case.capacity)
        return [(np.full(case.capacity, row), numbers) for row in range(rows)], []
    pages = -(-case.capacity // case.page)
    shuffled = rng.permutation(rows * pages + case.spare)[: rows * pages].reshape(rows, pages)
    numbers = np.arange(case.capacity)
    return [(own[numbers // case.page], numbers % case.page) for own in shuffled], list(shuffled)


def _tables(case: CacheCase, rng: np.random.Generator, tables: list[np.ndarray], rows: int) -> dict[str, Any]:
    """The arrays that say where pages are. Entries behind the last page of a sequence are garbage."""
    arrays: dict[str, Any] = {}
    row_of = np.arange(case.batch)
    if case.batch_idx:
        row_of = rng.permutation(rows)[: case.batch]
        arrays["cache_batch_idx"] = row_of.astype(np.int32)
    if case.page is None:
        return arrays
    used = np.zeros(rows, int)
    used[row_of] = [-(-end // case.page) for end in case.ends]
    if case.table == "block_table":
        table = rng.choice(GARBAGE, (rows, len(tables[0]) if tables else 0)).astype(np.int32)
        for row, own in enumerate(tables):
            table[row, : used[row]] = own[: used[row]]
        return {**arrays, "block_table": table}
    full = [own.copy() for own in tables]
    for row, own in enumerate(full):
        own[used[row] :] = 0
    indices = np.concatenate([np.array([7], np.int64), *full]).astype(np.int64)
    for row in range(rows):
        start = 1 + row * len(tables[0])
        indices[start + used[row] : start + len(tables[0])] = GARBAGE[row % 4]
    indptr = 1 + np.arange(rows + 1) * (len(tables[0]) if tables else 0)
    return {**arrays, "indptr": indptr.astype(np.int32), "indices": indices.astype(np.int32)}


def _scale(case: CacheCase, rng: np.random.Generator, form: str, count: int) -> Any:
    if not case.is_quantised or form == "none":
        return None
    heads = case.heads[1]
    shape = {"number": (), "head": (heads,), "batch": (case.batch, heads), "page": (count, 1, heads)}[form]
    scale = (0.02 if case.kv_dtype == INT8 else 0.5) * (1 + rng.random(shape))
    return np.float32(scale) if form == "number" else scale.astype(np.float32)


def _of_keys(scale: Any, case: CacheCase, b: int, pages: np.ndarray) -> Any:
    """float64, (keys, heads or 1, 1)."""
    if scale is None:
        return None
    scale = np.asarray(scale, np.float64)
    if scale.ndim == 3:
        return scale[pages, 0][:, :, None]
    of_heads = scale[b] if scale.ndim == 2 else scale
    return np.broadcast_to(np.reshape(of_heads, (1, -1, 1)), (len(pages), of_heads.size, 1))


def _turned_rows(case: CacheCase, arrays: dict[str, Any], x: np.ndarray, first: int, *, each: bool) -> np.ndarray:
    """Rows from position `first` on, or all at it; rounded to the case's dtype."""
    if case.rotary is None:
        return x
    positions = np.minimum(first + np.arange(len(x)) * each, case.capacity - 1)
    cos, sin = (as_float64(arrays[name]) for name in ("rotary_cos", "rotary_sin"))
    return store(turned(as_float64(x), positions, cos, sin, case.rotary[1]), case.dtype)


def expect(drawn: Drawn) -> list[reference.Expected]:
    """Of each sequence: its queries over its keys."""
    case = drawn.case
    expected = []
    slopes, sinks = drawn.arrays.get("alibi_slopes"), drawn.arrays.get("sinks")
    for b, (q, k, v) in enumerate(zip(drawn.turned_q, drawn.keys, drawn.values, strict=True)):
        features = reference.Features(
            softcap=case.softcap,
            slopes=slopes if slopes is None or slopes.ndim == 1 else slopes[b : b + 1],
            sinks=sinks,
        )
        expected.append(
            reference.expect(
                q[None], k[None], v[None], causal=case.causal, scale=case.scale, window=case.window, features=features,
                dtype=case.dtype,
            )
        )  # fmt: skip
    return expected


def check(drawn: Drawn, out: np.ndarray, lse: np.ndarray, expected: list[reference.Expected] | None = None) -> None:
    """AssertionError unless out (bshd, or packed) and lse are right, and the caches are as they have to be."""
    case = drawn.case
    for b, each in enumerate(expected if expected is not None else expect(drawn)):
        own = slice(drawn.first_q[b], drawn.first_q[b + 1]) if case.is_packed else slice(None)
        one = out[own][None] if case.is_packed else out[b : b + 1]
        one_lse = lse[None, :, own] if case.is_packed else lse[b : b + 1]
        try:
            each.check(out=one, lse=one_lse)
        except AssertionError as error:
            raise AssertionError(f"sequence {b}: {error}") from error
    check_caches(drawn)


def check_caches(drawn: Drawn) -> None:
    """New keys are where they belong, the rest is as it was, bit for bit."""
    for name, wanted in drawn.after.items():
        got = drawn.k_cache if name == "k_cache" else drawn.v_cache
        same = _bits(got) == _bits(wanted)
        if name == "k_cache" and drawn.case.rotary is not None:  # a tie may have been rounded the other way
            for pages, inside in drawn.new_places:
                places = _order(got[pages, inside]) - _order(wanted[pages, inside])
                one, other = (_numbers(drawn.case, x[pages, inside]) for x in (got, wanted))
                least = 1 if drawn.case.kv_dtype == INT8 else 1e-6
                same[pages, inside] = (abs(places) <= 1) | (abs(one - other) <= least)
        assert same.all(), f"{name}: {int((~same).sum())} elements are not what they have to be"


def _numbers(case: CacheCase, x: np.ndarray) -> np.ndarray:
    return decoded(x, case.kv_dtype) if case.kv_dtype else as_float64(x)


def _order(x: np.ndarray) -> np.ndarray:
    """Neighbouring numbers of a floating-point format are neighbouring integers."""
    bits = x.view(f"i{x.dtype.itemsize}").astype(np.int64)
    return np.where(bits < 0, -(1 << (8 * x.dtype.itemsize - 1)) - bits, bits)


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view(f"u{x.dtype.itemsize}")


def replace(case: CacheCase, **changes: Any) -> CacheCase:
    return dataclasses.replace(case, **changes)
