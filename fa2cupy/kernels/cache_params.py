"""What kernels over a cache are told: the twins of cuda_src/common/cache_params.cuh's structs, and pointers."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping
from ctypes import c_float, c_int32, c_int64, c_uint32, c_uint64
from typing import Any

from fa2cupy.cached.call import ARRAYS
from fa2cupy.cached.problem import CacheProblem
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.kernels.launch import Pointer
from fa2cupy.kernels.params import Strides3, composed
from fa2cupy.kernels.tiles import SHARED_MEMORY
from fa2cupy.spec import ScoreParams, SinksParams

__all__ = [
    "CacheParams", "Divisor", "NewKeysParams", "ScaleParams", "TurnParams", "device_of", "feature_defines", "packed",
    "problem_of", "scattered",
]  # fmt: skip


class Divisor(ctypes.Structure):
    _fields_ = (("factor", c_uint32), ("shift", c_int32), ("value", c_int32))

    @classmethod
    def by(cls, value: int) -> Divisor:
        """x // value of any x in [0, 2^31) is x * factor >> shift."""
        value = max(1, value)
        shift = 31 + (value - 1).bit_length()
        return cls(-(-(1 << shift) // value), shift, value)


# Fields that are arrays of integers, or null, and the arrays of a call.
_LENGTHS = {
    "seqlens": "cache_seqlens", "seqused": "seqused_k", "batch_idx": "cache_batch_idx", "leftpad": "leftpad_k",
    "starts_q": "cu_seqlens_q",
}  # fmt: skip
_STRIDED = {"q": "q", "k": "k_cache", "v": "v_cache", "out": "out", "lse": "lse_out"}
_OWN_WORKSPACES = ("partial_out", "partial_lse", "counters")


class CacheParams(ctypes.Structure):
    _fields_ = (
        *((name, c_uint64) for name in (*_STRIDED, "table", "table_starts", *_LENGTHS, *_OWN_WORKSPACES)),
        ("seqlens_number", c_int64),
        *((f"{name}_strides", Strides3) for name in _STRIDED),
        *((name, c_int32) for name in ("batch", "seqlen_q", "num_heads", "num_heads_k", "head_dim", "head_dim_v")),
        *((name, c_int32) for name in ("rows", "table_rows", "table_width", "table_entries")),
        ("page", Divisor),
        ("group", Divisor),
        *((name, c_int32) for name in ("left", "right", "seqlen_new", "part_rows", "part_slices")),
        ("scale_softmax_log2", c_float),
    )


_ALONG = {name: tuple(f"{name}_{along}" for along in ("page", "batch", "head")) for name in "kv"}


class NewKeysParams(ctypes.Structure):
    _fields_ = (
        *((name, c_uint64) for name in ("k_new", "v_new", "k_to", "v_to")),
        *((f"{name}_strides", Strides3) for name in ("k_new", "v_new")),
    )


class TurnParams(ctypes.Structure):
    _fields_ = (
        *((name, c_uint64) for name in ("cos", "sin")),
        *((name, c_int32) for name in ("half", "positions", "neighbours", "is_float", "each")),
    )


class ScaleParams(ctypes.Structure):
    _fields_ = (
        *((name, c_uint64) for name in ("k_scale", "v_scale")),
        *((name, c_float) for name in ("k_number", "v_number")),
        *((field, c_int32) for name in "kv" for field in _ALONG[name]),
    )


def blocks_of(problem: CacheProblem, *, new_keys: bool, scores: bool = True) -> tuple[type[ctypes.Structure], ...]:
    """The blocks behind `CacheParams`, in their order. new_keys, scores: whether it has to do with any."""
    parts = (
        (new_keys, NewKeysParams),
        (problem.rotary is not None, TurnParams),
        (problem.is_quantised, ScaleParams),
        (scores and problem.score is not None, ScoreParams),
        (scores and problem.sinks is not None, SinksParams),
    )
    return tuple(block for is_there, block in parts if is_there)


def feature_defines(problem: CacheProblem, arch: str, *, new_keys: bool, scores: bool = True) -> dict[str, int | str]:
    """What kernels are compiled with for what is there; with the size of the struct."""
    blocks = blocks_of(problem, new_keys=new_keys, scores=scores)
    defines: dict[str, int | str] = {"FA2_NEW_KEYS": 1} if new_keys else {}
    if problem.rotary is not None:
        defines["FA2_TURNED"] = 1
    if problem.is_quantised:
        defines["FA2_QUANTISED"] = 1 + (problem.kv_dtype == "int8")
        defines["FA2_SCALE_OF_PAGE"] = int(problem.has_scale_of_page)
        defines["FA2_CVT_E4M3"] = int(int(arch.removeprefix("sm_")) >= 89)
    for spec in (problem.score, problem.sinks) if scores else ():
        defines |= {} if spec is None else spec.defines()
    return defines | {"FA2_PARAMS_BYTES": ctypes.sizeof(composed(CacheParams, blocks) if blocks else CacheParams)}


def scattered(problem: CacheProblem, block_n: int) -> int:
    """kScattered: where the keys of a sequence lie, for slices of so many."""
    return 0 if not problem.is_paged else 2 if problem.page % block_n == 0 else 1


def packed(problem: CacheProblem, *, new_keys: bool, scores: bool = True) -> tuple[ctypes.Structure, list[Pointer]]:
    """The struct of a kernel, less its pointers and workspaces, and its pointers. new_keys, scores: as `blocks_of`."""
    blocks, turned = blocks_of(problem, new_keys=new_keys, scores=scores), problem.rotary is not None
    struct = composed(CacheParams, blocks) if blocks else CacheParams
    new = problem.seqlen_new
    params = struct()
    for spec in (problem.score, problem.sinks) if scores else ():
        if spec is not None:
            setattr(params, type(spec.params()).__name__, spec.params())
    for field, value in (
        ("seqlens_number", -1),
        ("batch", problem.batch),
        ("seqlen_q", problem.seqlen_q),
        ("num_heads", problem.num_heads),
        ("num_heads_k", problem.num_heads_k),
        ("head_dim", problem.head_dim),
        ("head_dim_v", problem.head_dim_v),
        ("rows", problem.rows),
        ("table_rows", problem.tables),
        ("table_width", problem.width),
        ("table_entries", problem.entries),
        ("page", Divisor.by(problem.page)),
        ("group", Divisor.by(problem.group)),
        ("left", problem.left),
        ("right", problem.right),
        ("seqlen_new", 0 if new is None else -1 if problem.is_packed else new),
        ("scale_softmax_log2", problem.softmax_scale * math.log2(math.e)),
    ):
        setattr(params, field, value)
    strides = dict(problem.strides)
    for field, name in (*_STRIDED.items(), *((n, n) for n in ("k_new", "v_new") if new_keys)):
        setattr(params, f"{field}_strides", Strides3(*strides[name]))
    for name, number, along in (("k", *problem.scales[0]), ("v", *problem.scales[1])) if problem.is_quantised else ():
        for field, value in ((f"{name}_number", number), *zip(_ALONG[name], along, strict=True)):
            setattr(params, field, value)
    if problem.rotary is not None:
        for field in ("half", "positions", "neighbours", "is_float", "each"):
            setattr(params, field, int(getattr(problem.rotary, field)))
    places = dict(_places(problem, new_keys, turned))
    places |= {name: name for name in ("alibi_slopes", "sinks") if scores and name in problem.arrays}
    return params, [
        Pointer(_offset(struct, field), ARRAYS.index(name), 0) for field, name in places.items() if name in ARRAYS
    ]


def _places(problem: CacheProblem, new_keys: bool, turned: bool) -> Iterator[tuple[str, str]]:
    """(field, name of the array)."""
    yield from _STRIDED.items()
    yield from ((field, name) for field, name in _LENGTHS.items() if name in problem.arrays)
    if "block_table" in problem.arrays:
        yield "table", "block_table"
    elif "indptr" in problem.arrays:
        yield from (("table", "indices"), ("table_starts", "indptr"))
    if problem.by_number:
        yield "seqlens_number", "cache_seqlens"
    if new_keys:
        yield from (("k_new", "k_new"), ("v_new", "v_new"), ("k_to", "k_cache"), ("v_to", "v_cache"))
    if turned:
        yield from (("cos", "rotary_cos"), ("sin", "rotary_sin"))
    yield from ((name, name) for name in ("k_scale", "v_scale") if name in problem.arrays)


def _offset(struct: type[ctypes.Structure], field: str) -> int:
    """Of a field of a struct, or of one of its parts."""
    for name, kind, *_ in struct._fields_:
        if name == field:
            return int(getattr(struct, name).offset)
        if isinstance(kind, type) and issubclass(kind, ctypes.Structure) and name == kind.__name__:
            inner = [each for each, *_ in kind._fields_]
            if field in inner:
                return int(getattr(struct, name).offset + getattr(kind, field).offset)
    raise KeyError(field)


def device_of(arch: str) -> DeviceInfo:
    """A GPU of an architecture."""
    digits = arch.removeprefix("sm_")
    return DeviceInfo(0, arch, (int(digits[:-1]), int(digits[-1])), 4, SHARED_MEMORY[arch], 1 << 20)


def problem_of(head_dim: int, dtype: str, page: int | None, more: Mapping[str, Any]) -> CacheProblem:
    """One of its kind, for what is compiled ahead. page: None without pages; more: other fields."""
    names = ("k_cache", "v_cache", *(("block_table",) if page else ()), "q", "out", "lse_out", "cache_seqlens")
    strides = tuple((name, (0, head_dim, head_dim)) for name in ("q", "k_cache", "v_cache", "out", "lse_out"))
    strides += tuple((name, (0, head_dim, head_dim)) for name in ("k_new", "v_new"))
    kind: dict[str, Any] = {"kv_dtype": dtype, **more}
    return CacheProblem(
        batch=1, seqlen_q=1, num_heads=8, num_heads_k=1, head_dim=head_dim, head_dim_v=head_dim, dtype=dtype,
        rows=1, page=page or 1024, tables=1, width=1, entries=0, arrays=names, by_number=False, left=1024, right=0,
        softmax_scale=1.0, strides=strides, aligned=True, **kind,
    )  # fmt: skip
