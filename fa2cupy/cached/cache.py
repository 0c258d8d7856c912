"""A cache: its arrays, checked once, and what their shapes say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fa2cupy.cached.arguments import Given
from fa2cupy.checks import KV_DTYPES, LAYOUTS
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.first_call import _one_device as one_device
from fa2cupy.first_call import _one_framework as one_framework
from fa2cupy.frameworks import JAX
from fa2cupy.frameworks.base import Device, Framework, TensorRef
from fa2cupy.frameworks.jax import is_movable
from fa2cupy.problem import MAX_HEAD_DIM, MAX_LENGTH

__all__ = ["INTEGERS", "Cache", "check_integers"]

INTEGERS = ("int32", "int64")
_STORED_AS = {"float8_e4m3fn": ("uint8", "float8_e4m3fn"), "int8": ("int8",)}


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values of sequences, each in a row of the cache, or in pages that a table names.

    arrays: k_cache, v_cache and, where they are given, block_table or indptr and indices, k_scale and v_scale.
    layout: "bhsd" has the heads before the rows. dtype: what an element is, of 8 bits one of `KV_DTYPES`.
    numbers: k_scale and v_scale where they are numbers.
    rows: pages, or sequences of a cache without pages; page: keys of one; tables: rows of the table of pages, None
    without pages; width: the most pages of a sequence, of indptr those of all.
    """

    framework: Framework
    arrays: Mapping[str, Any]
    device: Device
    layout: str
    dtype: str
    numbers: Mapping[str, float | int]
    rows: int
    page: int
    num_heads_k: int
    head_dim: int
    head_dim_v: int
    tables: int | None = None
    width: int = 1

    @property
    def is_quantised(self) -> bool:
        return self.dtype in KV_DTYPES

    @property
    def capacity(self) -> int:
        """The most keys of a sequence."""
        return self.page * self.width if self.rows else 0

    @classmethod
    def of(cls, k: Any, v: Any, given: Given, names: tuple[str, str]) -> Cache:
        """names: what k and v are called where they were given."""
        options = given.options
        layout = options.get("layout", "bshd")
        labels = dict(zip(names, (k, v), strict=True)) | dict(given.arrays)
        framework, held = one_framework(labels)
        refs = {name: framework.ref(array, name) for name, array in held.items()}
        fixed = {name: ref for name, ref in refs.items() if framework is not JAX or not is_movable(ref.owner)}
        device = one_device(fixed) if fixed else refs[names[0]].device
        dtype = _dtype(refs, names, options.get("kv_dtype"))
        quantised = dtype in KV_DTYPES
        for name in ("k_scale", "v_scale"):
            if (name in refs or name in given.numbers) and not quantised:
                raise InvalidArgument(
                    f"{name} is given, but {names[0]} has dtype {dtype}: scales are for caches of 8 bits, whose "
                    "kv_dtype says what they hold"
                )
        first, second = refs[names[0]], refs[names[1]]
        form = LAYOUTS[layout]
        if "block_table" in refs or "indptr" in refs:
            form = form.replace("batch", "pages").replace("seqlen", "page_size")
        form = form.replace("num_heads", "num_heads_k")
        for name, ref in ((names[0], first), (names[1], second)):
            if len(ref.shape) != 4:
                raise InvalidArgument(f"{name} has {len(ref.shape)} dimensions, shape {ref.shape}: {form} is needed")
        rows, page, num_heads_k, head_dim = _bshd(first.shape, layout)
        *others, head_dim_v = _bshd(second.shape, layout)
        whats = ("first dimension", "seqlen", "num_heads")
        for what, one, other in zip(whats, (rows, page, num_heads_k), others, strict=True):
            if one != other:
                raise InvalidArgument(
                    f"{names[1]} has {what} {other} but {names[0]} has {one}: they must be equal ({form})"
                )
        for name, what, width in ((names[0], "head_dim", head_dim), (names[1], "head_dim_v", head_dim_v)):
            if not 1 <= width <= MAX_HEAD_DIM:
                raise InvalidArgument(f"{name} has {what} {width}, which is not supported: 1 to {MAX_HEAD_DIM}")
        for what, length in (("first dimension", rows), ("seqlen", page), ("num_heads", num_heads_k)):
            if length > MAX_LENGTH:
                raise InvalidArgument(f"{names[0]} has {what} {length}, which is not supported: at most {MAX_LENGTH}")
        tables, width = _tables(refs, page, names[0])
        for name in ("k_scale", "v_scale"):
            if name in refs:
                _check_scale(name, refs[name], rows, num_heads_k, tables is not None)
        arrays = {"k_cache": held[names[0]], "v_cache": held[names[1]]}
        arrays |= {name: array for name, array in held.items() if name not in names}
        return cls(
            framework, arrays, device, layout, dtype, dict(given.numbers),
            rows, page, num_heads_k, head_dim, head_dim_v, tables, width,
        )  # fmt: skip


def _bshd(shape: tuple[int, ...], layout: str) -> tuple[int, int, int, int]:
    batch, first, second, width = shape
    return (batch, first, second, width) if layout == "bshd" else (batch, second, first, width)


def _dtype(refs: Mapping[str, TensorRef], names: tuple[str, str], kv_dtype: str | None) -> str:
    """What an element of the cache is."""
    first, second = (refs[name].dtype for name in names)
    if first != second:
        raise InvalidType(f"{names[1]} has dtype {second} but {names[0]} has {first}: they must be the same")
    if kv_dtype is not None:
        if first not in _STORED_AS[kv_dtype]:
            raise InvalidType(
                f"kv_dtype={kv_dtype!r} but {names[0]} has dtype {first}: {' or '.join(_STORED_AS[kv_dtype])} is needed"
            )
        return kv_dtype
    if first == "float8_e4m3fn":
        return first
    if first in ("uint8", "int8"):
        raise InvalidType(
            f"{names[0]} has dtype {first}: say what it holds, with kv_dtype='float8_e4m3fn' (uint8) or 'int8' (int8)"
        )
    if first == "uint16":
        raise InvalidType(f"{names[0]} has dtype uint16, which is not supported here: view bits as ml_dtypes.bfloat16")
    return first


def _tables(refs: Mapping[str, TensorRef], page: int, name: str) -> tuple[int | None, int]:
    """(rows of the table of pages, the most pages of a sequence), or (None, 1) without pages."""
    if "block_table" in refs:
        table = refs["block_table"]
        check_integers("block_table", table, "(batch, pages of the longest)", 2)
        tables, width = table.shape
    elif "indptr" in refs:
        check_integers("indptr", refs["indptr"], "(batch + 1,)", 1)
        check_integers("indices", refs["indices"], "(pages of all sequences,)", 1)
        if refs["indptr"].shape[0] == 0:
            raise InvalidArgument("indptr has shape (0,): (batch + 1,) is needed, the starts and the end of the last")
        tables, width = refs["indptr"].shape[0] - 1, refs["indices"].shape[0]
    else:
        return None, 1
    if page == 0:
        raise InvalidArgument(f"{name} has pages of 0 keys: at least 1 is needed")
    if page * width > MAX_LENGTH:
        width = MAX_LENGTH // page  # no sequence is longer
    return tables, width


def check_integers(name: str, ref: TensorRef, form: str, rank: int) -> None:
    """InvalidArgument or InvalidType unless an array of integers has this rank."""
    if len(ref.shape) != rank:
        raise InvalidArgument(f"{name} has shape {ref.shape}: {form} is needed")
    if ref.dtype not in INTEGERS:
        raise InvalidType(f"{name} has dtype {ref.dtype}: {' or '.join(INTEGERS)} is needed")


def _check_scale(name: str, ref: TensorRef, rows: int, num_heads_k: int, has_pages: bool) -> None:
    """What can be said without a batch."""
    if ref.dtype != "float32":
        raise InvalidType(f"{name} has dtype {ref.dtype}: float32 is needed")
    form = "a number, (num_heads_k,), (batch, num_heads_k) or, with pages, (pages, 1, num_heads_k) is needed"
    shape = ref.shape
    if len(shape) == 3 and not has_pages:
        raise InvalidArgument(f"{name} has shape {shape}, by page, but the cache has no pages: {form}")
    if len(shape) not in (1, 2, 3) or shape[-1] != num_heads_k or (len(shape) == 3 and shape[:2] != (rows, 1)):
        here = f"here {num_heads_k} heads" + (f" and {rows} pages" if has_pages else "")
        raise InvalidArgument(f"{name} has shape {shape}: {form}, {here}")
