"""AttentionProblem: what one call computes, frozen and printable. Checks of shapes, dtypes and options."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from fa2cupy.checks import LAYOUTS
from fa2cupy.declared import BHSD_OF_PACKED, FLOAT32_ON_GPU, SEGMENTS_OF_PACKED
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.frameworks.base import TensorRef
from fa2cupy.options import Options
from fa2cupy.spec import LENGTHS, LengthsSpec, SoftmaxSpec, Spec, WindowSpec

__all__ = [
    "ARRAY_RULES",
    "MAX_HEAD_DIM",
    "MAX_LENGTH",
    "SPECS",
    "ArrayRule",
    "AttentionProblem",
    "Sizes",
    "Strides",
    "check_array",
    "check_dtypes",
    "softmax_scale",
    "with_features",
]

Strides = tuple[int, int, int]  # in elements, between (batch, seqlen, head) neighbours; lse: (batch, head, seqlen)

MAX_HEAD_DIM = 256
# Lengths, batch and heads: leaves the kernels' 32-bit counters room to round up to a tile. Offsets are 64-bit.
MAX_LENGTH = 2**30
_DTYPES = {"cuda": ("float16", "bfloat16"), "cpu": ("float16", "bfloat16", "float32", "float64")}
# The kernels take the scale times log2(e) as float32.
_MAX_GPU_SCALE = 2e38


@dataclass(frozen=True, slots=True)
class Sizes:
    """The lengths of a problem, read from q, k and v.

    packed_q, packed_k: this side is (total, heads, head_dim), all sequences one behind the other; its seqlen is the
    total, and batch the number of sequences. lse follows the queries.
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_heads_k: int
    head_dim: int
    head_dim_v: int
    packed_q: bool = False
    packed_k: bool = False

    @classmethod
    def of(cls, refs: Mapping[str, TensorRef], layout: str) -> Sizes:
        """From q, k, v and, where they are among `refs`, cu_seqlens_q and cu_seqlens_k.

        Raises InvalidArgument where the shapes do not fit together.
        """
        starts = {name: _sequences(name, refs[name].shape) for name in _STARTS if name in refs}
        if starts and layout != "bshd":
            raise BHSD_OF_PACKED.error()
        packed = {name: start in starts for name, start in zip("qkv", (*_STARTS, _STARTS[1]), strict=True)}
        forms = {name: _PACKED if packed[name] else LAYOUTS[layout] for name in "qkv"}
        shapes = {name: _bshd(name, refs[name].shape, layout, packed[name]) for name in "qkv"}
        batches = starts | {name: shapes[name][0] for name in "qkv" if not packed[name]}
        first, batch = next((name, batches[name]) for name in ("q", *_STARTS, "k") if name in batches)
        _, seqlen_q, num_heads, head_dim = shapes["q"]
        _, seqlen_k, num_heads_k, _ = shapes["k"]
        head_dim_v = shapes["v"][3]
        for name, what, width in (("q", "head_dim", head_dim), ("v", "head_dim_v", head_dim_v)):
            if not 1 <= width <= MAX_HEAD_DIM:
                raise InvalidArgument(f"{name} has {what} {width}, which is not supported: 1 to {MAX_HEAD_DIM}")
        for name, length in batches.items():
            if length != batch:
                if starts:
                    wrong, right = _batch_in_words(name, length), _batch_in_words(first, batch)
                    raise InvalidArgument(f"{wrong} but {right}: they must be equal")
                raise InvalidArgument(f"{name} has batch {length} but q has {batch}: they must be equal")
        if shapes["k"][3] != head_dim:
            raise InvalidArgument(
                f"k has head_dim {shapes['k'][3]} but q has {head_dim}: they must be equal "
                f"({_meaning(layout, forms['k'])})"
            )
        for axis, what in ((1, "rows" if packed["k"] else "seqlen"), (2, "num_heads")):
            if shapes["v"][axis] != shapes["k"][axis]:
                raise InvalidArgument(
                    f"v has {what} {shapes['v'][axis]} but k has {shapes['k'][axis]}: they must be equal "
                    f"({_meaning(layout, forms['v'])})"
                )
        if num_heads % num_heads_k if num_heads_k else num_heads:
            raise InvalidArgument(
                f"q has {num_heads} heads and k has {num_heads_k}: the number of query heads must be a multiple of the "
                f"number of key heads ({_meaning(layout, forms['q'])})"
            )
        for name, what, length in (
            (first, "batch", batch),
            ("q", "seqlen", seqlen_q),
            ("k", "seqlen", seqlen_k),
            ("q", "num_heads", num_heads),
        ):
            if length > MAX_LENGTH:
                raise InvalidArgument(f"{name} has {what} {length}, which is not supported: at most {MAX_LENGTH}")
        return cls(
            batch, seqlen_q, seqlen_k, num_heads, num_heads_k, head_dim, head_dim_v, packed["q"], packed["k"]
        )  # fmt: skip

    def shape(self, name: str, layout: str) -> tuple[int, ...]:
        """The shape, in the user's layout, of a tensor of this problem: 'dq', 'out', ..., 'lse' (no layout)."""
        if name in ("lse", "lse_out"):
            return (() if self.packed_q else (self.batch,)) + (self.num_heads, self.seqlen_q)
        is_packed = self.packed_q
        if name in ("q", "dq"):
            length, heads, width = self.seqlen_q, self.num_heads, self.head_dim
        elif name in ("out", "dout"):
            length, heads, width = self.seqlen_q, self.num_heads, self.head_dim_v
        else:
            is_packed = self.packed_k
            width = self.head_dim if name in ("k", "dk") else self.head_dim_v
            length, heads = self.seqlen_k, self.num_heads_k
        if is_packed:
            return length, heads, width
        return (self.batch, length, heads, width) if layout == "bshd" else (self.batch, heads, length, width)

    def check_shape(self, name: str, shape: tuple[int, ...], layout: str) -> None:
        """InvalidArgument if argument `name` does not have the shape that this problem gives it."""
        expected = self.shape(name, layout)
        if shape != expected:
            raise InvalidArgument(f"{name} has shape {shape}: {expected} is needed")


_STARTS = ("cu_seqlens_q", "cu_seqlens_k")
_PACKED = "(total, num_heads, head_dim)"


def _sequences(name: str, shape: tuple[int, ...]) -> int:
    """How many sequences an array of their starts is for."""
    if len(shape) != 1 or shape[0] == 0:
        raise InvalidArgument(f"{name} has shape {shape}: (batch + 1,) is needed, the starts and the end of the last")
    return shape[0] - 1


def _batch_in_words(name: str, length: int) -> str:
    return f"{name} is for a batch of {length}" if name in _STARTS else f"{name} has batch {length}"


def _meaning(layout: str, form: str) -> str:
    """What the dimensions of an array are, as an error adds it."""
    return f"packed arrays are {form}" if form == _PACKED else f"layout={layout!r} means {form}"


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
            if kind == "cuda" and ref.dtype in _DTYPES["cpu"]:
                raise FLOAT32_ON_GPU.error(name=name, dtype=ref.dtype)
            raise InvalidType(f"{name} has dtype {ref.dtype}, which is not supported: {place} {supported}")
        elif options.dtype not in (None, ref.dtype):
            raise InvalidArgument(
                f"dtype={options.dtype!r} but {name} has dtype {ref.dtype}: dtype is for uint16 arrays"
            )
        if ref.dtype != refs[first].dtype:
            raise InvalidType(
                f"{name} has dtype {ref.dtype} but {first} has {refs[first].dtype}: they must be the same"
            )
    return options.dtype_of(refs[first])


@dataclass(frozen=True, slots=True)
class ArrayRule:
    """What the array of a keyword beyond dense attention must be. expected: its shapes in words.

    shapes: those that are right for a problem; in no set, since torch's symbolic lengths have no hash.
    dtypes: likewise, by the problem's dtype.
    """

    expected: str
    shapes: Callable[[Sizes], Collection[tuple[int, ...]]]
    dtypes: Callable[[str], Collection[str]]


def _integers(expected: str, shape: Callable[[Sizes], tuple[int, ...]]) -> ArrayRule:
    """Of an array of lengths. The kernels take int32, others are converted on the device."""
    return ArrayRule(expected, lambda sizes: (shape(sizes),), lambda dtype: ("int32", "int64"))


# By name: of the keyword, or where one stands for two arrays, of the array.
ARRAY_RULES: dict[str, ArrayRule] = {
    **{name: _integers("(batch + 1,)", lambda sizes: (sizes.batch + 1,)) for name in _STARTS},
    **{name: _integers("(batch,)", lambda sizes: (sizes.batch,)) for name in ("seqused_q", "seqused_k", "leftpad_k")},
    "segment_ids_q": _integers("(batch, seqlen_q)", lambda sizes: (sizes.batch, sizes.seqlen_q)),
    "segment_ids_k": _integers("(batch, seqlen_k)", lambda sizes: (sizes.batch, sizes.seqlen_k)),
    "dlse": ArrayRule(
        "lse's shape",
        lambda sizes: (sizes.shape("lse", "bshd"),),
        lambda dtype: ("float64" if dtype == "float64" else "float32",),
    ),
}


def _with_window(problem: AttentionProblem, left: int, right: int) -> AttentionProblem:
    """Ends that nobody notices are none, and a right end of 0 alone is causal: equal problems get equal plans.

    Of sequences with lengths of their own none is longer than the arrays, so what is no end there is none to any.
    """
    seqlen_q, seqlen_k = problem.seqlen_q, problem.seqlen_k
    left = seqlen_k if left < 0 else min(left, seqlen_k)
    right = 0 if problem.causal else seqlen_q if right < 0 else min(right, seqlen_q)
    if left >= seqlen_k - 1 and (right >= seqlen_q - 1 or right == 0):
        return replace(problem, causal=problem.causal or right < seqlen_q - 1)
    windowed = replace(problem, causal=False, window=WindowSpec(left, right))
    if windowed.lengths is not None:
        return windowed
    queries, keys = seqlen_q - windowed.empty_rows, seqlen_k - windowed.empty_keys
    only_drops = left >= keys - 1 and right >= queries - 1
    return replace(windowed, window=WindowSpec(left, right, only_drops))


def _with_lengths(name: str, problem: AttentionProblem, ref: TensorRef) -> AttentionProblem:
    """With the array `name` among those that say where sequences lie."""
    lengths = problem.lengths or LengthsSpec(problem.batch)
    if name.startswith("segment"):  # those that have a query and a key
        most = problem.batch * min(problem.seqlen_q, problem.seqlen_k)
        return replace(problem, lengths=replace(lengths, sequences=most, segments=True))
    return replace(problem, lengths=replace(lengths, **{name: True}))


# By keyword (or array): an AttentionProblem and the value (of an array its TensorRef) -> the problem with the `Spec` of
# it. Fields with specs that have arrays stand in the order of the table of keywords.
SPECS: dict[str, Callable[[AttentionProblem, Any], AttentionProblem]] = {
    "window_size": lambda problem, window: _with_window(problem, *window),
    **{name: functools.partial(_with_lengths, name) for name in LENGTHS},
    "dlse": lambda problem, ref: replace(
        problem, softmax=SoftmaxSpec(_kernel_strides("lse", ref, "bshd"), problem.empty_rows)
    ),
}


def with_features(problem: AttentionProblem, given: Mapping[str, Any]) -> AttentionProblem:
    """The problem with what a call asks for beyond dense attention. InvalidArgument for what no kernel can do yet.

    Lengths come first: what the others mean to the kernels depends on whether the host knows them.
    """
    for name, value in sorted(given.items(), key=lambda item: item[0] not in LENGTHS):
        if name not in SPECS:
            raise InvalidArgument(f"{name} is not supported on a GPU yet: leave it out, or pass arrays on the CPU")
        problem = SPECS[name](problem, value)
    arrays = [name for spec in problem.specs for name in spec.arrays()]
    assert arrays == [name for name in given if name in ARRAY_RULES], "fields in another order than the table"
    return problem


def check_array(name: str, ref: TensorRef, sizes: Sizes, dtype: str) -> None:
    """InvalidArgument or InvalidType unless the array fits its rule."""
    rule = ARRAY_RULES[name]
    if name.startswith("segment") and (sizes.packed_q or sizes.packed_k):
        raise SEGMENTS_OF_PACKED.error()
    if ref.shape not in rule.shapes(sizes):
        here = " or ".join(str(tuple(shape)) for shape in rule.shapes(sizes))
        raise InvalidArgument(f"{name} has shape {ref.shape}: {rule.expected} is needed, here {here}")
    if ref.dtype not in rule.dtypes(dtype):
        raise InvalidType(f"{name} has dtype {ref.dtype}: {' or '.join(rule.dtypes(dtype))} is needed")


def _bshd(name: str, shape: tuple[int, ...], layout: str, packed: bool) -> tuple[int, int, int, int]:
    """A shape in that order, of a packed array with a batch of one."""
    if len(shape) != (3 if packed else 4):
        needed = f"3 are needed with {_start_of(name)}, {_PACKED}" if packed else f"4 are needed, {LAYOUTS[layout]}"
        hint = _packed_hint(name, shape) if packed else _rank_hint(name, shape, layout)
        raise InvalidArgument(f"{name} has {len(shape)} dimensions, shape {shape}: {needed}{hint}")
    if packed:
        return 1, shape[0], shape[1], shape[2]
    batch, first, second, width = shape
    return (batch, first, second, width) if layout == "bshd" else (batch, second, first, width)


def _start_of(name: str) -> str:
    return _STARTS[name != "q"]


def _packed_hint(name: str, shape: tuple[int, ...]) -> str:
    """What an array of another rank than 3 may be, where packed sequences are said to be."""
    if len(shape) == 2:
        return f"; for one head pass {name}[:, None, :]"
    if len(shape) == 4 and shape[0] == 1:
        return f"; pass {name}[0]"
    if len(shape) == 4:
        return (
            f"; leave {_start_of(name)} out for {shape[0]} sequences of {shape[1]} rows each, where seqused says how "
            f"many of these count, or pass {name}.reshape(-1, {shape[2]}, {shape[3]}), whose sequences "
            f"{_start_of(name)} then says"
        )
    return ""


def _rank_hint(name: str, shape: tuple[int, ...], layout: str) -> str:
    """What an array of another rank than 4 may be, and how it is passed."""
    if len(shape) == 2:
        indices = "None, :, None, :" if layout == "bshd" else "None, None, :, :"
        return f"; for one head of one sequence pass {name}[{indices}]"
    if len(shape) != 3:
        return ""
    split = f"{name}.reshape({shape[0]}, {shape[1]}, num_heads, head_dim)"
    split += "" if layout == "bshd" else " with layout='bshd'"
    if shape[2] > MAX_HEAD_DIM:  # longer than any head: several side by side
        return f"; if its last dimension holds all heads, pass {split}"
    indices = ":, :, None, :" if layout == "bshd" else ":, None, :, :"
    return (
        f"; pass {name}[None] for a batch of one, {name}[{indices}] for one head, or {split} if its last dimension "
        f"holds all heads; if it holds packed sequences, {_PACKED}, say where they start with {_start_of(name)}"
    )


@dataclass(frozen=True, slots=True)
class AttentionProblem:
    """One call, in bshd order whatever the user's layout.

    causal: bottom-right aligned; False with a window, which has two ends.
    With `lengths`, batch is the number of sequences, or of rows of segments, a packed side has all its rows in seqlen,
    and which rows see no key is not known here.
    strides: in elements, by the names q, k, v, out, (dout, dq, dk, dv,) lse; dimensions of size 1, all of an empty
    tensor, and the batch of a packed one have stride 0. The last dimension of the 16-bit tensors, and seqlen of lse,
    are contiguous.
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
    window: WindowSpec | None = None
    lengths: LengthsSpec | None = None
    softmax: SoftmaxSpec | None = None

    @property
    def empty_rows(self) -> int:
        """Leading query rows that see no key. The kernels never see them. Nobody knows here where lengths are data."""
        if self.lengths is not None:
            return 0
        if self.seqlen_k == 0:
            return self.seqlen_q
        if self.window is not None:
            return max(0, self.seqlen_q - self.seqlen_k - self.window.right)
        return max(0, self.seqlen_q - self.seqlen_k) if self.causal else 0

    @property
    def empty_keys(self) -> int:
        """Leading keys that no query sees. The kernels never see them. As for `empty_rows`."""
        if self.lengths is not None or self.window is None or self.seqlen_q == 0:
            return 0
        return max(0, self.seqlen_k - self.seqlen_q - self.window.left)

    @property
    def specs(self) -> tuple[Spec, ...]:
        """Those that are there, in the order of the fields."""
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(value for value in values if isinstance(value, Spec))

    @property
    def positioned(self) -> bool:
        """Whether tiles of lists say which rows of their sequence they are."""
        return self.lengths is not None and any(spec.positions for spec in self.specs)

    @property
    def extra_arrays(self) -> tuple[str, ...]:
        """Names of the arrays beyond those of dense attention, in the order of a call's pointers."""
        return tuple(name for spec in self.specs for name in spec.arrays())

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
    """(batch, seqlen, head) strides; of lse, and what has its shape, (batch, head, seqlen). 0 for a batch that is not
    there. Those of dimensions of size 1 are junk by contract in several libraries: never kept.
    """
    count = 3 if name == "lse" else 4
    shape, strides = ((1,) * (count - len(ref.shape)) + tuple(x) for x in (ref.shape, ref.strides))
    if 0 in shape:
        return 0, 0, 0
    first, second, third = (0 if n == 1 else s for n, s in zip(shape[:3], strides[:3], strict=True))
    return (first, second, third) if layout == "bshd" or name == "lse" else (first, third, second)
