"""AttentionProblem: what one call computes, frozen and printable. Checks of shapes, dtypes and options."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fa2cupy.errors import Fa2Error, InvalidArgument, InvalidType
from fa2cupy.frameworks.base import TensorRef, describe
from fa2cupy.spec import SoftmaxSpec, Spec

__all__ = [
    "MAX_HEAD_DIM",
    "AttentionProblem",
    "Options",
    "Sizes",
    "Strides",
    "check_flag",
    "unexpected_keyword",
]

Strides = tuple[int, int, int]  # in elements, between (batch, seqlen, head) neighbours; lse: (batch, head, seqlen)

MAX_HEAD_DIM = 256
# Lengths, batch and heads: leaves the kernels' 32-bit counters room to round up to a tile. Offsets are 64-bit.
_MAX_LENGTH = 2**30
_LAYOUTS = {"bshd": "(batch, seqlen, num_heads, head_dim)", "bhsd": "(batch, num_heads, seqlen, head_dim)"}
_DTYPES = {"cuda": ("float16", "bfloat16"), "cpu": ("float16", "bfloat16", "float32", "float64")}
# The kernels take the scale times log2(e) as float32.
_MAX_GPU_SCALE = 2e38

# What attention functions elsewhere call our keywords, and what they have that is not here yet.
_RENAMED = {
    "is_causal": "causal",
    "scale": "softmax_scale",
    "sm_scale": "softmax_scale",
    "return_softmax_lse": "return_lse",
    "return_attn_probs": "return_lse",
    "lse": "lse_out",
    "softmax_lse": "lse_out",
}
_NOT_YET = frozenset(
    {"attn_mask", "bias", "mask", "dropout_p", "window_size", "softcap", "alibi_slopes", "enable_gqa", "block_table"}
)


def check_flag(name: str, value: object) -> bool:
    """`value` as a bool; NumPy's bool is one."""
    if value is True or value is False:
        return value is True
    if isinstance(value, np.bool_):
        return bool(value)
    raise InvalidType(f"{name}={value!r} is a {describe(value)}: True or False is needed")


def unexpected_keyword(function: str, keywords: Mapping[str, object], allowed: tuple[str, ...]) -> Fa2Error:
    """The error for keywords that `function` does not have."""
    name = next(iter(keywords))
    if name in _NOT_YET:
        hint = (
            "GQA needs no keyword: k and v may have fewer heads" if name == "enable_gqa" else "it is not supported yet"
        )
        return InvalidType(f"{function}() has no keyword {name!r}: {hint}; allowed: {', '.join(allowed)}")
    close = [_RENAMED[name]] if _RENAMED.get(name) in allowed else difflib.get_close_matches(name, allowed, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(allowed)}"
    return InvalidType(f"{function}() got an unexpected keyword argument {name!r}; {hint}")


@dataclass(frozen=True, slots=True)
class Options:
    """The keywords of a call, checked. `dtype` names what uint16 arrays hold, or is None."""

    causal: bool
    softmax_scale: float | None
    layout: str
    dtype: str | None
    deterministic: bool = False

    @classmethod
    def checked(
        cls, causal: object, softmax_scale: object, layout: object, dtype: object, deterministic: object = False
    ) -> Options:
        """From what the user gave, of any type."""
        if not isinstance(layout, str):
            raise InvalidType(f"layout={layout!r} is a {describe(layout)}: 'bshd' or 'bhsd' is needed")
        if layout not in _LAYOUTS:
            raise InvalidArgument(f"layout={layout!r} is unknown: 'bshd' or 'bhsd' is needed")
        if dtype is not None and not isinstance(dtype, str):
            raise InvalidType(
                f"dtype={dtype!r} is a {describe(dtype)}: None, or 'bfloat16' for uint16 arrays, is needed"
            )
        return cls(
            check_flag("causal", causal),
            _checked_scale(softmax_scale),
            layout,
            dtype,
            check_flag("deterministic", deterministic),
        )

    def dtype_of(self, ref: TensorRef) -> str:
        """The dtype that the elements of a 16-bit array hold, for an argument whose own dtype may be uint16."""
        return self.dtype if ref.dtype == "uint16" and self.dtype is not None else ref.dtype


def _checked_scale(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, (bool, np.bool_)):
        raise InvalidType(f"softmax_scale={value!r} is a bool: None or a real number is needed")
    if not isinstance(value, (numbers.Real, np.floating, np.integer)):
        if hasattr(value, "__dlpack__") or hasattr(value, "ndim"):
            raise InvalidType(
                f"softmax_scale is a {describe(value)}: a Python number is needed (reading an array from a GPU would "
                "wait for it)"
            )
        raise InvalidType(f"softmax_scale={value!r} is a {describe(value)}: None or a real number is needed")
    try:
        scale = float(value)
    except OverflowError:
        scale = math.inf
    if not math.isfinite(scale):
        raise InvalidArgument(f"softmax_scale={value!r} is not supported: it must be finite")
    return scale


@dataclass(frozen=True, slots=True)
class Sizes:
    """The lengths of a problem, read from q, k and v."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_heads_k: int
    head_dim: int
    head_dim_v: int

    @classmethod
    def of(cls, q: TensorRef, k: TensorRef, v: TensorRef, layout: str) -> Sizes:
        """Raises InvalidArgument where the shapes of q, k and v do not fit together."""
        shapes = {name: _bshd(name, ref.shape, layout) for name, ref in (("q", q), ("k", k), ("v", v))}
        batch, seqlen_q, num_heads, head_dim = shapes["q"]
        _, seqlen_k, num_heads_k, _ = shapes["k"]
        head_dim_v = shapes["v"][3]
        for name, what, width in (("q", "head_dim", head_dim), ("v", "head_dim_v", head_dim_v)):
            if not 1 <= width <= MAX_HEAD_DIM:
                raise InvalidArgument(f"{name} has {what} {width}, which is not supported: 1 to {MAX_HEAD_DIM}")
        for name in ("k", "v"):
            if shapes[name][0] != batch:
                raise InvalidArgument(f"{name} has batch {shapes[name][0]} but q has {batch}: they must be equal")
        if shapes["k"][3] != head_dim:
            raise InvalidArgument(
                f"k has head_dim {shapes['k'][3]} but q has {head_dim}: they must be equal "
                f"(layout={layout!r} means {_LAYOUTS[layout]})"
            )
        for axis, what in ((1, "seqlen"), (2, "num_heads")):
            if shapes["v"][axis] != shapes["k"][axis]:
                raise InvalidArgument(
                    f"v has {what} {shapes['v'][axis]} but k has {shapes['k'][axis]}: they must be equal "
                    f"(layout={layout!r} means {_LAYOUTS[layout]})"
                )
        if num_heads % num_heads_k if num_heads_k else num_heads:
            raise InvalidArgument(
                f"q has {num_heads} heads and k has {num_heads_k}: the number of query heads must be a multiple of the "
                f"number of key heads (layout={layout!r} means {_LAYOUTS[layout]})"
            )
        for name, what, length in (
            ("q", "batch", batch),
            ("q", "seqlen", seqlen_q),
            ("k", "seqlen", seqlen_k),
            ("q", "num_heads", num_heads),
        ):
            if length > _MAX_LENGTH:
                raise InvalidArgument(f"{name} has {what} {length}, which is not supported: at most {_MAX_LENGTH}")
        return cls(batch, seqlen_q, seqlen_k, num_heads, num_heads_k, head_dim, head_dim_v)

    def shape(self, name: str, layout: str) -> tuple[int, ...]:
        """The shape, in the user's layout, of a tensor of this problem: 'dq', 'out', ..., 'lse' (no layout)."""
        if name in ("lse", "lse_out"):
            return self.batch, self.num_heads, self.seqlen_q
        if name in ("q", "dq"):
            length, heads, width = self.seqlen_q, self.num_heads, self.head_dim
        elif name in ("out", "dout"):
            length, heads, width = self.seqlen_q, self.num_heads, self.head_dim_v
        else:
            width = self.head_dim if name in ("k", "dk") else self.head_dim_v
            length, heads = self.seqlen_k, self.num_heads_k
        return (self.batch, length, heads, width) if layout == "bshd" else (self.batch, heads, length, width)

    def check_shape(self, name: str, shape: tuple[int, ...], layout: str) -> None:
        """InvalidArgument if argument `name` does not have the shape that this problem gives it."""
        expected = self.shape(name, layout)
        if shape != expected:
            raise InvalidArgument(f"{name} has shape {shape}: {expected} is needed")


def check_dtypes(refs: Mapping[str, TensorRef], options: Options) -> str:
    """The dtype of the problem. InvalidType if the arguments disagree or it is not supported on their device."""
    first = next(iter(refs))
    kind = refs[first].device.kind
    supported = ", ".join(_DTYPES[kind])
    place = "on a GPU" if kind == "cuda" else "on the CPU"
    if options.dtype not in (None, "bfloat16") and options.dtype not in _DTYPES["cpu"]:
        raise InvalidArgument(f"dtype={options.dtype!r} is not supported: None, or 'bfloat16' for uint16 arrays")
    for name, ref in refs.items():
        expected = "float64" if refs[first].dtype == "float64" else "float32"
        if name in ("lse", "lse_out"):
            if ref.dtype != expected:
                raise InvalidType(f"{name} has dtype {ref.dtype}: {expected} is needed")
            continue
        if ref.dtype == "uint16":
            if options.dtype is None:
                raise InvalidType(f"{name} has dtype uint16: say what it holds with dtype='bfloat16'")
            if options.dtype != "bfloat16":
                raise InvalidArgument(f"dtype={options.dtype!r} but {name} is uint16, which can only hold 'bfloat16'")
        elif ref.dtype not in _DTYPES[kind]:
            later = " (for now)" if kind == "cuda" and ref.dtype in ("float32", "float64") else ""
            raise InvalidType(f"{name} has dtype {ref.dtype}, which is not supported: {place}{later} {supported}")
        elif options.dtype not in (None, ref.dtype):
            raise InvalidArgument(
                f"dtype={options.dtype!r} but {name} has dtype {ref.dtype}: dtype is for uint16 arrays"
            )
        if ref.dtype != refs[first].dtype:
            raise InvalidType(
                f"{name} has dtype {ref.dtype} but {first} has {refs[first].dtype}: they must be the same"
            )
    return options.dtype_of(refs[first])


def _bshd(name: str, shape: tuple[int, ...], layout: str) -> tuple[int, int, int, int]:
    if len(shape) != 4:
        hint = ""
        if len(shape) == 2:
            indices = "None, :, None, :" if layout == "bshd" else "None, None, :, :"
            hint = f"; for one head of one sequence pass {name}[{indices}]"
        elif len(shape) == 3:
            indices = ":, :, None, :" if layout == "bshd" else ":, None, :, :"
            hint = f"; pass {name}[None] for a batch of one, or {name}[{indices}] for one head"
        raise InvalidArgument(
            f"{name} has {len(shape)} dimensions, shape {shape}: 4 are needed, {_LAYOUTS[layout]}{hint}"
        )
    batch, first, second, width = shape
    return (batch, first, second, width) if layout == "bshd" else (batch, second, first, width)


@dataclass(frozen=True, slots=True)
class AttentionProblem:
    """One call, in bshd order whatever the user's layout.

    causal: bottom-right aligned.
    strides: in elements, by the names q, k, v, out, (dout, dq, dk, dv,) lse; dimensions of size 1 and all of an empty
    tensor have stride 0. The last dimension of the 16-bit tensors, and seqlen of lse, are contiguous.
    aligned: every 16-bit pointer and stride is a multiple of 16 bytes and the head dims are multiples of 8.
    What goes beyond dense attention is a field with a `Spec`, None where it is absent.
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_heads_k: int
    head_dim: int
    head_dim_v: int
    dtype: str
    causal: bool
    softmax_scale: float
    strides: tuple[tuple[str, Strides], ...]
    aligned: bool
    softmax: SoftmaxSpec | None = None

    @property
    def specs(self) -> tuple[Spec, ...]:
        """Those that are there, in the order of the fields."""
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(value for value in values if isinstance(value, Spec))

    def __str__(self) -> str:
        """Only what is there."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in values if value is not None)})"

    @classmethod
    def from_refs(cls, refs: Mapping[str, TensorRef], sizes: Sizes, dtype: str, options: Options) -> AttentionProblem:
        """From tensors on a GPU whose dtypes and shapes were checked; `refs` has every name of `strides`."""
        scale = softmax_scale(sizes, options)
        if abs(scale) > _MAX_GPU_SCALE:
            raise InvalidArgument(
                f"softmax_scale={scale!r} is not supported on a GPU: at most {_MAX_GPU_SCALE} in magnitude"
            )
        strides = {name: _kernel_strides(name, ref, options.layout) for name, ref in refs.items()}
        sixteen_bit = [name for name in refs if name != "lse"]
        aligned = (
            sizes.head_dim % 8 == 0
            and sizes.head_dim_v % 8 == 0
            and all(refs[name].ptr % 16 == 0 and all(s % 8 == 0 for s in strides[name]) for name in sixteen_bit)
        )
        return cls(
            batch=sizes.batch,
            seqlen_q=sizes.seqlen_q,
            seqlen_k=sizes.seqlen_k,
            num_heads=sizes.num_heads,
            num_heads_k=sizes.num_heads_k,
            head_dim=sizes.head_dim,
            head_dim_v=sizes.head_dim_v,
            dtype=dtype,
            causal=options.causal,
            softmax_scale=scale,
            strides=tuple(strides.items()),
            aligned=aligned,
        )


def softmax_scale(sizes: Sizes, options: Options) -> float:
    """The scale of a call: the user's, else that of the true head_dim."""
    return sizes.head_dim**-0.5 if options.softmax_scale is None else options.softmax_scale


def _kernel_strides(name: str, ref: TensorRef, layout: str) -> Strides:
    if 0 in ref.shape:
        return 0, 0, 0
    # Strides of dimensions of size 1 are junk by contract in several libraries: never kept.
    first, second, third = (0 if n == 1 else s for n, s in zip(ref.shape[:3], ref.strides[:3], strict=True))
    return (first, second, third) if layout == "bshd" or name == "lse" else (first, third, second)
