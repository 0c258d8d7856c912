"""One call on a cache: its arrays and options, checked together, before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fa2cupy.cached.arguments import Given
from fa2cupy.cached.cache import Cache, check_integers
from fa2cupy.checks import LAYOUTS
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.first_call import _one_framework as one_framework
from fa2cupy.frameworks import JAX
from fa2cupy.frameworks.base import TensorRef, describe
from fa2cupy.frameworks.overlap import has_duplicates
from fa2cupy.prepared import check_overlap, workspace_block
from fa2cupy.problem import MAX_LENGTH, check_array
from fa2cupy.sizes import Sizes

__all__ = ["ARRAYS", "LENGTHS", "OF_CACHE", "OF_CALL", "Call"]

# All arrays of a call, in the order of its pointers: those of the cache, then those of the call, where new keys and
# values are k_new and v_new.
OF_CACHE = ("k_cache", "v_cache", "block_table", "indptr", "indices", "k_scale", "v_scale")
OF_CALL = (
    "q", "out", "lse_out", "k_new", "v_new", "cache_seqlens", "seqused_k", "cache_batch_idx", "leftpad_k",
    "rotary_cos", "rotary_sin", "cu_seqlens_q", "alibi_slopes", "sinks",
)  # fmt: skip
ARRAYS = OF_CACHE + OF_CALL
LENGTHS = (
    "block_table", "indptr", "indices", "cache_seqlens", "seqused_k", "cache_batch_idx", "leftpad_k", "cu_seqlens_q",
)  # fmt: skip
_OUTPUTS = ("out", "lse_out")
_DTYPES = {"cuda": ("float16", "bfloat16"), "cpu": ("float16", "bfloat16", "float32", "float64")}
_NAMES = {"k_new": "k", "v_new": "v", "rotary_cos": "the cos of rotary", "rotary_sin": "the sin of rotary"}


def _shown(name: str) -> str:
    """What the user calls an array."""
    return _NAMES.get(name, name)


@dataclass(frozen=True, slots=True)
class Call:
    """Queries, and everything else of one call, checked.

    arrays: those of `ARRAYS` that are there, of the cache's framework. batch: sequences; seqlen_q: queries of each, of
    packed ones all of them; seqlen_new: likewise new keys, None without them.
    """

    cache: Cache
    arrays: Mapping[str, Any]
    options: Mapping[str, Any]
    numbers: Mapping[str, float | int]
    dtype: str
    batch: int
    seqlen_q: int
    num_heads: int
    seqlen_new: int | None
    is_packed: bool

    @classmethod
    def of(cls, cache: Cache, q: Any, given: Given, workspace: Any) -> Call:
        held = {"q": q} | {{"k": "k_new", "v": "v_new"}.get(name, name): a for name, a in given.arrays.items()}
        held.pop("workspace", None)
        framework, own = one_framework({_shown(name): array for name, array in held.items()})
        own = dict(zip(held, own.values(), strict=True))
        if framework is not cache.framework:
            raise InvalidType(
                f"q is a {describe(q)} but the cache has arrays of {cache.framework.name}: all arrays must come from "
                "the same framework"
            )
        refs = {name: framework.ref(array, _shown(name)) for name, array in own.items()}
        for name, ref in refs.items():
            if ref.device != cache.device and framework is not JAX:  # which looks for itself
                raise InvalidArgument(
                    f"{_shown(name)} is on {ref.device} but the cache is on {cache.device}: all arrays must be on one "
                    "device"
                )
        dtype = _dtypes(cache, refs)
        call = cls(
            cache, {**cache.arrays, **own}, given.options, {**cache.numbers, **given.numbers}, dtype,
            *_lengths(cache, refs),
        )  # fmt: skip
        call._check_shapes(refs)
        framework.check_call(call.ordered(), "attention_with_kvcache", lambda: tuple(map(_shown, ARRAYS)))
        if framework is not JAX:
            call._check_memory(workspace)
        return call

    def ordered(self) -> list[Any]:
        """The arrays of `ARRAYS`, None where there is none."""
        return [self.arrays.get(name) for name in ARRAYS]

    @property
    def appends(self) -> bool:
        return self.seqlen_new is not None

    @property
    def written(self) -> tuple[str, ...]:
        """The arrays of the caller that the call writes."""
        caches = ("k_cache", "v_cache") if self.appends else ()
        return (*caches, *(name for name in _OUTPUTS if name in self.arrays))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of q, out, lse_out, and the new k_new and v_new."""
        cache = self.cache
        if name == "lse_out":
            return (() if self.is_packed else (self.batch,)) + (self.num_heads, self.seqlen_q)
        length, heads, width = self.seqlen_q, self.num_heads, cache.head_dim
        if name in ("k_new", "v_new"):
            length, heads = self.seqlen_new or 0, cache.num_heads_k
        if name in ("out", "v_new"):
            width = cache.head_dim_v
        if self.is_packed:
            return length, heads, width
        return (self.batch, length, heads, width) if cache.layout == "bshd" else (self.batch, heads, length, width)

    @property
    def sizes(self) -> Sizes:
        """As `attention` has them, of all of the cache."""
        cache = self.cache
        return Sizes(
            self.batch, self.seqlen_q, cache.capacity, self.num_heads, cache.num_heads_k,
            cache.head_dim, cache.head_dim_v, self.is_packed,
        )  # fmt: skip

    def _check_shapes(self, refs: Mapping[str, TensorRef]) -> None:
        cache, batch = self.cache, self.batch
        for name in ("q", "k_new", "v_new", *_OUTPUTS):
            if name in refs and refs[name].shape != self.shape(name):
                raise InvalidArgument(f"{_shown(name)} has shape {refs[name].shape}: {self.shape(name)} is needed")
        if self.num_heads % cache.num_heads_k if cache.num_heads_k else self.num_heads:
            raise InvalidArgument(
                f"q has {self.num_heads} heads and the cache has {cache.num_heads_k}: the number of query heads must "
                "be a multiple of the number of key heads"
            )
        tables, what = cache.tables, "rows in the table of pages"
        if tables is None:
            tables, what = cache.rows, "rows"
        if "cache_batch_idx" not in refs and tables != batch:
            raise InvalidArgument(
                f"the cache has {tables} {what} but q is a batch of {batch}: they must be equal, or cache_batch_idx "
                "says which row is whose"
            )
        for name in ("cache_seqlens", "seqused_k", "cache_batch_idx", "leftpad_k"):
            if name in refs:
                check_integers(name, refs[name], "(batch,)", 1)
                if refs[name].shape != (batch,):
                    raise InvalidArgument(f"{name} has shape {refs[name].shape}: (batch,) is needed, here ({batch},)")
        for name in ("k_scale", "v_scale"):
            scale = cache.arrays.get(name)
            shape = () if scale is None else cache.framework.shape(scale)
            if len(shape) == 2 and shape[0] != batch:
                raise InvalidArgument(f"{name} has shape {shape}: (batch, num_heads_k) is needed, here {batch} rows")
        has_lengths = {"cache_seqlens", "seqused_k"} & (refs.keys() | self.numbers.keys())
        if self.appends and not has_lengths:
            raise InvalidArgument(
                "k is given without cache_seqlens or seqused_k, which say where in the cache it goes: give one of them"
            )
        if "indptr" in cache.arrays and not has_lengths:
            raise InvalidArgument(
                "indptr is given without cache_seqlens or seqused_k, which say how many keys are in use: give one of "
                "them"
            )
        for name in ("alibi_slopes", "sinks"):
            if name in refs:
                check_array(name, refs[name], self.sizes, self.dtype)
        if "rotary_cos" in refs:
            self._check_rotary(refs["rotary_cos"], refs["rotary_sin"])

    def _check_rotary(self, cos: TensorRef, sin: TensorRef) -> None:
        if not self.appends:
            raise InvalidArgument("rotary is given without k and v: it turns new keys, and q beside them")
        form = "(positions, rotary_dim / 2) is needed"
        for name, ref in (("cos", cos), ("sin", sin)):
            if len(ref.shape) != 2:
                raise InvalidArgument(f"the {name} of rotary has shape {ref.shape}: {form}")
            if ref.dtype != cos.dtype or ref.dtype not in ("float32", self.dtype):
                either = "float32" if self.dtype == "float32" else f"float32 or {self.dtype}"
                raise InvalidType(f"the {name} of rotary has dtype {ref.dtype}: {either} is needed, of both")
        if cos.shape != sin.shape:
            raise InvalidArgument(f"the sin of rotary has shape {sin.shape} but its cos {cos.shape}: {form}, of both")
        positions, half = cos.shape
        if not 1 <= half <= self.cache.head_dim // 2:
            raise InvalidArgument(
                f"the cos of rotary has {half} columns, rotary_dim {2 * half}: at most head_dim {self.cache.head_dim} "
                "of rotary_dim, and at least 2, is needed"
            )
        if positions == 0:
            raise InvalidArgument("the cos of rotary has no rows: one for each position is needed")

    def _check_memory(self, workspace: Any) -> None:
        """What strides and pointers must fulfil."""
        framework, arrays = self.cache.framework, self.arrays
        for name in self.written:
            array = arrays[name]
            if framework.readonly(array):
                raise InvalidArgument(f"{_shown(name)} is read-only: what is written must be writable")
            if not framework.has_contiguous_rows(array) or not framework.is_strided_by_element(array):
                raise InvalidArgument(
                    f"{_shown(name)} has strides {framework.byte_strides(array)} (bytes): its last dimension must be "
                    "contiguous"
                )
            if has_duplicates(framework.extent(array)):
                raise InvalidArgument(
                    f"{_shown(name)} has strides {framework.byte_strides(array)} (bytes) for shape "
                    f"{framework.shape(array)}: what is written must not hold an element twice"
                )
        if self.written or workspace is not None:
            blocks = [
                (_shown(name), framework.pointer(array, name), framework.extent(array))
                for name, array in arrays.items()
            ]
            check_overlap(blocks, set(self.written))
            if workspace is not None:
                block = workspace_block(framework, workspace, self.cache.device, 0)
                check_overlap([*blocks, block], {"workspace"})


def _dtypes(cache: Cache, refs: Mapping[str, TensorRef]) -> str:
    """The dtype of queries, results and new keys. InvalidType where arguments disagree or are not supported."""
    dtype = refs["q"].dtype
    kind = cache.device.kind
    if dtype not in _DTYPES[kind]:
        place = "on a GPU" if kind == "cuda" else "on the CPU"
        raise InvalidType(f"q has dtype {dtype}, which is not supported: {place} {', '.join(_DTYPES[kind])}")
    if not cache.is_quantised and cache.dtype != dtype:
        raise InvalidType(f"the cache has dtype {cache.dtype} but q has {dtype}: they must be the same")
    wide = "float64" if dtype == "float64" else "float32"
    for name, needed in (("k_new", dtype), ("v_new", dtype), ("out", dtype), ("lse_out", wide)):
        if name in refs and refs[name].dtype != needed:
            raise InvalidType(f"{_shown(name)} has dtype {refs[name].dtype}: {needed} is needed")
    return dtype


def _lengths(cache: Cache, refs: Mapping[str, TensorRef]) -> tuple[int, int, int, int | None, bool]:
    """batch, seqlen_q, num_heads, seqlen_new, is_packed. InvalidArgument for ranks that are not as they should be."""
    is_packed = "cu_seqlens_q" in refs
    form = "(total, num_heads, head_dim), with cu_seqlens_q," if is_packed else LAYOUTS[cache.layout]
    for one, other in (("k_new", "v_new"), ("v_new", "k_new")):
        if one in refs and other not in refs:
            raise InvalidArgument(f"{_shown(one)} is given without {_shown(other)}: new keys and values come together")
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("q", "k_new"):
        if name not in refs:
            continue
        shape = refs[name].shape
        if len(shape) != (3 if is_packed else 4):
            hint = "; for one query each pass q[:, None]" if len(shape) == 3 and name == "q" and not is_packed else ""
            raise InvalidArgument(f"{_shown(name)} has {len(shape)} dimensions, shape {shape}: {form} is needed{hint}")
        shapes[name] = shape
    if is_packed:
        starts = refs["cu_seqlens_q"]
        check_integers("cu_seqlens_q", starts, "(batch + 1,)", 1)
        if starts.shape[0] == 0:
            raise InvalidArgument("cu_seqlens_q has shape (0,): (batch + 1,) is needed, the starts and the end")
        batch = starts.shape[0] - 1
        row, head = 0, 1
        if "k_new" in shapes and shapes["k_new"][0] != shapes["q"][0]:
            raise InvalidArgument(
                f"k has {shapes['k_new'][0]} rows but q has {shapes['q'][0]}: packed, each query has its new key"
            )
    else:
        batch = shapes["q"][0]
        row, head = (1, 2) if cache.layout == "bshd" else (2, 1)
    seqlen_q, num_heads, width = shapes["q"][row], shapes["q"][head], shapes["q"][-1]
    if width != cache.head_dim:
        raise InvalidArgument(f"q has head_dim {width} but the cache has {cache.head_dim}: they must be equal ({form})")
    lengths: Iterable[tuple[str, int]] = (("batch", batch), ("seqlen", seqlen_q), ("num_heads", num_heads))
    for what, length in lengths:
        if length > MAX_LENGTH:
            raise InvalidArgument(f"q has {what} {length}, which is not supported: at most {MAX_LENGTH}")
    return batch, seqlen_q, num_heads, shapes["k_new"][row] if "k_new" in shapes else None, is_packed
