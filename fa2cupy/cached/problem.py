"""CacheProblem: what a call on a cache computes on a GPU, frozen and printable."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields

from fa2cupy.cached.call import ARRAYS, Call
from fa2cupy.checks import KV_DTYPES
from fa2cupy.errors import InvalidArgument
from fa2cupy.frameworks.base import TensorRef, contiguous_strides
from fa2cupy.spec import ScoreSpec, SinksSpec

__all__ = ["CacheProblem", "Rotary", "Strides"]

# Of keys or values of 8 bits: a number, or strides along pages, sequences and heads.
Scale = tuple[float, tuple[int, int, int]]
Strides = tuple[int, int, int]  # in elements, between (batch, row, head) neighbours

_MAX_GPU_SCALE = 2e38  # the kernels take it times log2(e) as float32
_MAX_ROWS = 2**30
_STRIDED = ("q", "k_cache", "v_cache", "out", "k_new", "v_new")


@dataclass(frozen=True, slots=True)
class Rotary:
    """half: pairs of columns that are turned. positions: rows of the tables. neighbours: "interleaved". is_float: the
    tables are float32, not of q's dtype. each: queries follow each other, and do not all stand at the first new key.
    """

    half: int
    positions: int
    neighbours: bool
    is_float: bool
    each: bool


@dataclass(frozen=True, slots=True)
class CacheProblem:
    """One call, in bshd order whatever the user's layout.

    batch: sequences; seqlen_q: queries of each, of packed ones all of them. rows: of the cache, pages or sequences;
    page: keys of one; tables: rows that a sequence may have one of, of the cache or of the table of pages; width: the
    most pages of a sequence; entries: of `indices`.
    arrays: the names of `cached.call.ARRAYS` that are there, out and lse_out among them. by_number: cache_seqlens is
    one number, handed over in place of a pointer.
    scales: of keys and values of 8 bits. score, sinks: as in `AttentionProblem`.
    left, right: ends of the band of keys that a query sees, at most the lengths.
    strides: of q, the caches, out and new keys; lse_out as (batch, row, head), too. aligned: of all of them every row
    starts at a multiple of 16 bytes and head dims are multiples of 8.
    """

    batch: int
    seqlen_q: int
    num_heads: int
    num_heads_k: int
    head_dim: int
    head_dim_v: int
    dtype: str
    kv_dtype: str
    rows: int
    page: int
    tables: int
    width: int
    entries: int
    arrays: tuple[str, ...]
    by_number: bool
    left: int
    right: int
    softmax_scale: float
    strides: tuple[tuple[str, Strides], ...]
    aligned: bool
    seqlen_new: int | None = None
    rotary: Rotary | None = None
    scales: tuple[Scale, Scale] = ((1.0, (0, 0, 0)), (1.0, (0, 0, 0)))
    score: ScoreSpec | None = None
    sinks: SinksSpec | None = None
    split_size: int | None = None

    @property
    def is_quantised(self) -> bool:
        return self.kv_dtype in KV_DTYPES

    @property
    def has_scale_of_page(self) -> bool:
        return any(along[0] for _, along in self.scales)

    @property
    def is_packed(self) -> bool:
        return "cu_seqlens_q" in self.arrays

    @property
    def is_paged(self) -> bool:
        return "block_table" in self.arrays or "indptr" in self.arrays

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.num_heads // max(1, self.num_heads_k)

    @property
    def packed_rows(self) -> int:
        """Of a sequence, at most: its queries times the heads that share a key head."""
        return self.seqlen_q * self.group

    def __str__(self) -> str:
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in values if value is not None)})"

    @classmethod
    def of(cls, call: Call, copied: Collection[str] = ()) -> CacheProblem:
        """copied: names of arrays of which the kernels get C-contiguous copies."""
        cache, options = call.cache, call.options
        scale = options.get("softmax_scale")
        scale = cache.head_dim**-0.5 if scale is None else scale
        if abs(scale) > _MAX_GPU_SCALE:
            raise InvalidArgument(
                f"softmax_scale={scale!r} is not supported on a GPU: at most {_MAX_GPU_SCALE} in magnitude"
            )
        rows = call.seqlen_q * call.num_heads
        if rows > _MAX_ROWS:
            raise InvalidArgument(
                f"q has {call.seqlen_q} x {call.num_heads} rows and heads, which is not supported on a GPU: at most "
                f"{_MAX_ROWS}"
            )
        refs = {name: cache.framework.ref(array, name) for name, array in call.arrays.items()}
        for name in {"out", "lse_out"} - refs.keys() | set(copied):
            shape = call.shape(name) if name in ("out", "lse_out") else refs[name].shape
            refs[name] = TensorRef(0, shape, contiguous_strides(shape), call.dtype, cache.device, None)
        strides = {name: _bshd(refs[name], cache.layout) for name in _STRIDED if name in refs}
        lse = refs["lse_out"]
        batch, head, row = _numbers((1,) * (3 - len(lse.shape)) + lse.shape, (0,) * (3 - len(lse.shape)) + lse.strides)
        aligned = cache.head_dim % 8 == 0 and cache.head_dim_v % 8 == 0
        for name in strides:
            per_chunk = 16 if cache.is_quantised and name in ("k_cache", "v_cache") else 8
            aligned &= refs[name].ptr % 16 == 0 and all(s % per_chunk == 0 for s in strides[name])
        strides["lse_out"] = batch, row, head
        left, right = options.get("window_size") or (-1, -1)
        right = 0 if options.get("causal") else right
        return cls(
            batch=call.batch,
            seqlen_q=call.seqlen_q,
            num_heads=call.num_heads,
            num_heads_k=cache.num_heads_k,
            head_dim=cache.head_dim,
            head_dim_v=cache.head_dim_v,
            dtype=call.dtype,
            kv_dtype=cache.dtype,
            rows=cache.rows,
            page=cache.page,
            tables=cache.rows if cache.tables is None else cache.tables,
            width=cache.width,
            entries=refs["indices"].shape[0] if "indices" in refs else 0,
            arrays=tuple(name for name in ARRAYS if name in refs),
            by_number="cache_seqlens" in call.numbers,
            left=cache.capacity if left < 0 else min(left, cache.capacity),
            right=call.seqlen_q if right < 0 else min(right, call.seqlen_q),
            softmax_scale=scale,
            strides=tuple(strides.items()),
            aligned=bool(aligned),
            seqlen_new=call.seqlen_new,
            rotary=_rotary(call, refs) if "rotary_cos" in refs else None,
            scales=(_scale(call, refs, "k_scale"), _scale(call, refs, "v_scale")),
            score=_score(call, refs, scale),
            sinks=SinksSpec(refs["sinks"].dtype != "float32") if "sinks" in refs else None,
            split_size=options.get("split_size"),
        )


def _rotary(call: Call, refs: Mapping[str, TensorRef]) -> Rotary:
    positions, half = refs["rotary_cos"].shape
    options = call.options
    return Rotary(
        half,
        positions,
        options["rotary_style"] == "interleaved",
        refs["rotary_cos"].dtype == "float32",
        bool(options.get("causal")) or "window_size" in options,
    )


def _score(call: Call, refs: Mapping[str, TensorRef], scale: float) -> ScoreSpec | None:
    """What becomes of scores, if anything does."""
    softcap, strides = call.options.get("softcap"), None
    if "alibi_slopes" in refs:
        along = _numbers(refs["alibi_slopes"].shape, refs["alibi_slopes"].strides)
        strides = (along[0], along[1]) if len(along) == 2 else (0, along[0])
    return None if softcap is None and strides is None else ScoreSpec(scale, softcap, strides)


def _scale(call: Call, refs: Mapping[str, TensorRef], name: str) -> Scale:
    if name not in refs:
        return float(call.numbers.get(name, 1.0)), (0, 0, 0)
    shape = refs[name].shape
    heads = shape[-1]
    return 1.0, (heads if len(shape) == 3 else 0, heads if len(shape) == 2 else 0, 1)


def _bshd(ref: TensorRef, layout: str) -> Strides:
    """(batch, row, head) strides; a packed array has 0 for the batch that it has not."""
    if len(ref.shape) == 3:
        row, head, _ = _numbers(ref.shape, ref.strides)
        return 0, row, head
    batch, first, second, _ = _numbers(ref.shape, ref.strides)
    return (batch, first, second) if layout == "bshd" else (batch, second, first)


def _numbers(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """0 in place of those that mean nothing: of dimensions of size 1, and of empty arrays."""
    if math.prod(shape) == 0:
        return (0,) * len(shape)
    return tuple(0 if n == 1 else s for n, s in zip(shape, strides, strict=True))
