"""AttentionProblem: what one call computes, frozen and printable. Checks of shapes, dtypes and options."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from fa2cupy.checks import DROPOUT_STEPS, SEED_DTYPES, SEED_SHAPES, is_seed
from fa2cupy.declared import FLOAT32_ON_GPU, SEGMENTS_OF_PACKED
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.frameworks.base import TensorRef
from fa2cupy.keywords import asked
from fa2cupy.mask_spec import MaskArray, MaskSpec
from fa2cupy.options import Options
from fa2cupy.sizes import MAX_HEAD_DIM, MAX_LENGTH, STARTS, Sizes
from fa2cupy.spec import (
    LENGTHS,
    MASK_ARRAYS,
    MASK_BLOCK,
    DropoutSpec,
    LengthsSpec,
    ScoreSpec,
    SinksSpec,
    SoftmaxSpec,
    Spec,
    WindowSpec,
)

__all__ = [
    "ARRAY_RULES",
    "MAX_HEAD_DIM",
    "MAX_LENGTH",
    "SPECS",
    "ArrayRule",
    "AttentionProblem",
    "Sizes",
    "Strides",
    "broadcasts",
    "check_array",
    "check_block_mask",
    "check_dtypes",
    "softmax_scale",
    "with_features",
    "with_mask",
]

Strides = tuple[int, int, int]  # in elements, between (batch, seqlen, head) neighbours; lse: (batch, head, seqlen)

_DTYPES = {"cuda": ("float16", "bfloat16"), "cpu": ("float16", "bfloat16", "float32", "float64")}
# The kernels take the scale times log2(e) as float32.
_MAX_GPU_SCALE = 2e38


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
    fits: says it instead, where these are many. dtypes: likewise, by the problem's dtype. pairs: which of both go
    together, if not all. strided: the kernels take any strides of it; of the others they get C-contiguous arrays.
    """

    expected: str
    shapes: Callable[[Sizes], Collection[tuple[int, ...]]]
    dtypes: Callable[[str], Collection[str]]
    strided: bool = False
    fits: Callable[[tuple[int, ...], Sizes], bool] | None = None
    pairs: Callable[[tuple[int, ...], str], bool] | None = None


def _integers(expected: str, shape: Callable[[Sizes], tuple[int, ...]]) -> ArrayRule:
    """Of an array of lengths. The kernels take int32, others are converted on the device."""
    return ArrayRule(expected, lambda sizes: (shape(sizes),), lambda dtype: ("int32", "int64"))


def _dtypes_of_sinks(dtype: str) -> tuple[str, ...]:
    """float32 or that of q, whose bits may be in uint16."""
    of_q = ("bfloat16", "uint16") if dtype == "bfloat16" else () if dtype == "float32" else (dtype,)
    return "float32", *of_q


def _mask_shape(sizes: Sizes) -> tuple[int, ...]:
    """Of packed queries over all of them, whose sequence a mask need not know."""
    return 1 if sizes.packed_q else sizes.batch, sizes.num_heads, sizes.seqlen_q, sizes.seqlen_k


def broadcasts(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether an array of that shape broadcasts to the whole one."""
    own = whole[len(whole) - len(shape) :]
    return len(shape) <= len(whole) and all(n == m or n == 1 for n, m in zip(shape, own, strict=True))


def check_block_mask(shape: tuple[int, int, int, int], sizes: Sizes) -> None:
    """InvalidArgument unless a BlockMask of that shape is for these lengths."""
    wanted = _mask_shape(sizes)
    if shape[2:] != wanted[2:] or not broadcasts(shape, wanted):
        hint = ", over the packed rows" if sizes.packed_q or sizes.packed_k else ""
        raise InvalidArgument(
            f"mask is a BlockMask of shape {shape}: {wanted} is needed{hint}, of which batch and num_heads may be 1"
        )


# By name: of the keyword, or where one stands for two arrays, of the array.
ARRAY_RULES: dict[str, ArrayRule] = {
    "alibi_slopes": ArrayRule(
        "(num_heads,) or (batch, num_heads)",
        lambda sizes: ((sizes.num_heads,), (sizes.batch, sizes.num_heads)),
        lambda dtype: ("float32", "float64") if dtype == "float64" else ("float32",),
    ),
    "mask": ArrayRule(
        "a shape that broadcasts to (batch, num_heads, seqlen_q, seqlen_k)",
        lambda sizes: (_mask_shape(sizes),),
        lambda dtype: ("bool",),
        strided=True,
        fits=lambda shape, sizes: broadcasts(shape, _mask_shape(sizes)),
    ),
    **{
        name: ArrayRule("a BlockMask's own", lambda sizes: (), lambda dtype: ("int32",), fits=lambda shape, sizes: True)
        for name in MASK_ARRAYS
    },
    "sinks": ArrayRule("(num_heads,)", lambda sizes: ((sizes.num_heads,),), _dtypes_of_sinks),
    "dropout_seed": ArrayRule(
        "(2,) or (4,), of uint32 also (8,),", lambda sizes: SEED_SHAPES, lambda dtype: SEED_DTYPES, pairs=is_seed
    ),
    **{name: _integers("(batch + 1,)", lambda sizes: (sizes.batch + 1,)) for name in STARTS},
    **{name: _integers("(batch,)", lambda sizes: (sizes.batch,)) for name in ("seqused_q", "seqused_k", "leftpad_k")},
    "segment_ids_q": _integers("(batch, seqlen_q)", lambda sizes: (sizes.batch, sizes.seqlen_q)),
    "segment_ids_k": _integers("(batch, seqlen_k)", lambda sizes: (sizes.batch, sizes.seqlen_k)),
    "dlse": ArrayRule(
        "lse's shape",
        lambda sizes: (sizes.shape("lse", "bshd"),),
        lambda dtype: ("float64" if dtype == "float64" else "float32",),
        strided=True,
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


def _score(problem: AttentionProblem) -> ScoreSpec:
    return problem.score or ScoreSpec(problem.softmax_scale)


def _alibi_strides(ref: TensorRef) -> tuple[int, int]:
    """Along batch and heads; 0 for a batch that is not there."""
    strides = [0 if n == 1 else stride for n, stride in zip(ref.shape, ref.strides, strict=True)]
    return (strides[0], strides[1]) if len(strides) == 2 else (0, strides[0])


def _with_gradient_of_sinks(problem: AttentionProblem) -> AttentionProblem:
    assert problem.sinks is not None
    return replace(problem, sinks=replace(problem.sinks, gradient=True))


def _with_dropout(problem: AttentionProblem, p: float) -> AttentionProblem:
    lengths, rows = problem.lengths, (problem.empty_rows, problem.empty_keys)
    moves = lengths is not None and (
        problem.causal or problem.window is not None or lengths.leftpad_k or lengths.segments
    )
    return replace(problem, dropout=DropoutSpec(round(p * DROPOUT_STEPS), 0, *rows, moves))


def _with_seed(problem: AttentionProblem, ref: TensorRef) -> AttentionProblem:
    assert problem.dropout is not None
    words = ref.shape[0] * (1 if ref.dtype == "uint32" else 2)
    return replace(problem, dropout=replace(problem.dropout, words=words))


def with_mask(problem: AttentionProblem, shape: tuple[int, int, int, int]) -> AttentionProblem:
    """With a BlockMask of that shape, which `check_block_mask` has looked at."""
    batch, heads, *lengths = shape
    rows, columns = (-(-length // MASK_BLOCK) for length in lengths)
    group = problem.num_heads // max(1, problem.num_heads_k)
    return replace(problem, mask=MaskSpec(heads if batch > 1 else 0, int(heads > 1), rows, columns, group))


def _with_mask(problem: AttentionProblem, mask: Any) -> AttentionProblem:
    """mask: the shape of a BlockMask, whose arrays are given besides; or an array, from which a call makes lists, of
    what causal and windows leave of it: so these are none of the kernels' any more.
    """
    if problem.lengths is not None:
        raise InvalidArgument(
            "mask= with lengths is not supported on a GPU yet: leave one out, or pass arrays on the CPU"
        )
    if not isinstance(mask, TensorRef):
        return with_mask(problem, mask)
    rank = len(mask.shape)
    shape = (1,) * (4 - rank) + tuple(mask.shape)
    strides = [0] * (4 - rank) + [0 if n == 1 else step for n, step in zip(mask.shape, mask.strides, strict=True)]
    offset, far = problem.seqlen_k - problem.seqlen_q, problem.seqlen_q + problem.seqlen_k
    left, right = far, 0 if problem.causal else far
    if problem.window is not None:
        left, right = problem.window.left, problem.window.right
    whole = shape[0], shape[1], problem.seqlen_q, problem.seqlen_k
    array = MaskArray(whole, (strides[0], strides[1], strides[2], strides[3]), (offset - left, offset + right))
    dropout = problem.dropout and replace(problem.dropout, empty_rows=0, empty_keys=0)
    masked = with_mask(replace(problem, causal=False, window=None, dropout=dropout), whole)
    assert masked.mask is not None
    return replace(masked, mask=replace(masked.mask, array=array))


# By keyword (or array): an AttentionProblem and the value (of an array its TensorRef) -> the problem with the `Spec` of
# it. Fields with specs that have arrays stand in the order of the table of keywords.
SPECS: dict[str, Callable[[AttentionProblem, Any], AttentionProblem]] = {
    "window_size": lambda problem, window: _with_window(problem, *window),
    "softcap": lambda problem, softcap: replace(problem, score=replace(_score(problem), softcap=softcap)),
    "alibi_slopes": lambda problem, ref: replace(problem, score=replace(_score(problem), alibi=_alibi_strides(ref))),
    "sinks": lambda problem, ref: replace(
        problem, sinks=SinksSpec(ref.dtype != "float32", "dq" in dict(problem.strides))
    ),
    "dsinks": lambda problem, ref: _with_gradient_of_sinks(problem),
    "dropout_p": _with_dropout,
    "dropout_seed": _with_seed,
    "mask": _with_mask,
    **{name: lambda problem, ref: problem for name in MASK_ARRAYS},
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
            raise InvalidArgument(
                f"{asked(name)} is not supported on a GPU yet: leave it out, or pass arrays on the CPU"
            )
        problem = SPECS[name](problem, value)
    arrays = [name for spec in problem.specs for name in spec.arrays()]
    refs = [name for name, value in given.items() if name in ARRAY_RULES and isinstance(value, TensorRef)]
    assert arrays == refs, "fields in another order than the table"
    return problem


def check_array(name: str, ref: TensorRef, sizes: Sizes, dtype: str) -> None:
    """InvalidArgument or InvalidType unless the array fits its rule."""
    rule = ARRAY_RULES[name]
    if name.startswith("segment") and (sizes.packed_q or sizes.packed_k):
        raise SEGMENTS_OF_PACKED.error()
    if not (rule.fits(ref.shape, sizes) if rule.fits else ref.shape in rule.shapes(sizes)):
        here = " or ".join(str(tuple(shape)) for shape in rule.shapes(sizes))
        raise InvalidArgument(f"{name} has shape {ref.shape}: {rule.expected} is needed, here {here}")
    if ref.dtype not in rule.dtypes(dtype):
        raise InvalidType(f"{name} has dtype {ref.dtype}: {' or '.join(rule.dtypes(dtype))} is needed")
    if rule.pairs is not None and not rule.pairs(ref.shape, ref.dtype):
        raise InvalidArgument(f"{name} has shape {ref.shape} and dtype {ref.dtype}: {rule.expected} is needed")


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
    score: ScoreSpec | None = None
    mask: MaskSpec | None = None
    sinks: SinksSpec | None = None
    dropout: DropoutSpec | None = None
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

    @property
    def extra_results(self) -> tuple[str, ...]:
        """Names of what a backward writes beyond dq, dk and dv, likewise."""
        return tuple(name for spec in self.specs for name in spec.results())

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
