"""What the GPU tests compute: a Case, the plan of shapes, and where each tensor lies in memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fa2cupy.frameworks.base import ITEMSIZE, Device, TensorRef
from fa2cupy.options import Options
from fa2cupy.problem import SPECS, AttentionProblem, Sizes
from tests.reference import HEAD_DIM_PAIRS, HEAD_DIMS, HEADS, SEQLENS_BOTH_WAYS

__all__ = [
    "DTYPES",
    "SM80_WIDTHS",
    "WIDE_DTYPES",
    "WIDTHS",
    "Case",
    "Place",
    "head_dim_cases",
    "head_dim_v_cases",
    "place",
    "problem_of",
    "random_cases",
    "seqlen_cases",
    "split_cases",
]

DTYPES = ("bfloat16", "float16")
WIDE_DTYPES = ("float32", "float64")

# (head_dim, head_dim_v, dtype) of features' tests: both dtypes where most people are; elsewhere one, for each is a set
# of kernels to compile. And (head_dim, dtype) of those that run the kernels of every GPU.
WIDTHS = (
    (40, None, "bfloat16"),
    (64, None, "bfloat16"),
    (64, None, "float16"),
    (96, None, "float16"),
    (128, None, "bfloat16"),
    (128, None, "float16"),
    (192, 128, "bfloat16"),
    (192, None, "float16"),
    (256, None, "bfloat16"),
)
SM80_WIDTHS = ((59, "bfloat16"), (64, "bfloat16"), (128, "float16"), (256, "float16"))
FORWARD_TENSORS = ("q", "k", "v", "out", "lse")
BACKWARD_TENSORS = ("dout", "q", "k", "v", "out", "lse", "dq", "dk", "dv")
# Axis orders in memory, outermost first, of (batch, seqlen, heads).
ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0))
GUARD = 128  # elements before and after every tensor: a tile's vector loads and then some


@dataclass(frozen=True, slots=True)
class Case:
    """One problem and the way its arrays are laid out.

    head_dim_v: None is head_dim. order: index into ORDERS. pad: elements between the rows of neighbouring heads (or
    whatever lies next to the head dimension). shift: elements by which every tensor starts after a 16-byte boundary.
    given: outputs and workspace are the caller's. expanded: all key heads share one (stride 0). window: window_size.
    mean: added to every element of the inputs. precision: that of a float32 case. sinks: their dtype, "float32" or the
    case's; a backward makes their gradient too. dlse: a backward is given one.
    """

    seqlen_q: int
    seqlen_k: int
    head_dim: int
    dtype: str
    causal: bool
    batch: int = 2
    heads: tuple[int, int] = (4, 4)
    scale: float | None = None
    layout: str = "bshd"
    order: int = 0
    pad: int = 0
    shift: int = 0
    given: bool = True
    expanded: bool = False
    deterministic: bool = False
    outliers: bool = False
    seed: int = 0
    head_dim_v: int | None = None
    window: tuple[int, int] | None = None
    mean: float = 0.0
    precision: str | None = None
    sinks: str | None = None
    dlse: bool = False

    @property
    def unseen(self) -> tuple[int, int]:
        """Leading queries that see no key, and leading keys that no query sees."""
        left, right = self.window or (-1, -1)
        right = 0 if self.causal else right
        queries = 0 if right < 0 else max(0, self.seqlen_q - self.seqlen_k - right)
        keys = 0 if left < 0 else max(0, self.seqlen_k - self.seqlen_q - left)
        return queries if self.seqlen_k else self.seqlen_q, keys if self.seqlen_q else self.seqlen_k

    @property
    def is_wide(self) -> bool:
        """float32 or float64."""
        return self.dtype in ("float32", "float64")

    @property
    def lse_dtype(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def __str__(self) -> str:
        """Only what differs from a usual case."""
        widths = f"d{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v else "")
        text = f"{self.seqlen_q}x{self.seqlen_k} {widths} {self.dtype} {'causal' if self.causal else 'full'}"
        text += f" b{self.batch} h{self.heads[0]}/{self.heads[1]} {self.layout} seed{self.seed}"
        names = (
            "scale",
            "order",
            "pad",
            "shift",
            "expanded",
            "deterministic",
            "outliers",
            "window",
            "mean",
            "precision",
            "sinks",
            "dlse",
        )
        for name in names:
            value = getattr(self, name)
            if value not in (None, False) and (value or name == "scale"):
                text += f" {name}={value}"
        return text + ("" if self.given else " fresh")


class Place(NamedTuple):
    """A tensor in a flat buffer of `size` elements: shape in the user's layout, strides and offset in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    size: int


def place(case: Case, name: str) -> Place:
    """Where tensor `name` of the case lies. GUARD elements and what lies between its rows belong to nobody."""
    sizes = sizes_of(case)
    shape = sizes.shape(name, "bshd")
    if name in ("lse", "lse_out"):
        row = shape[2] + case.pad
        return Place(shape, (shape[1] * row, row, 1), GUARD, 2 * GUARD + shape[0] * shape[1] * row)
    rows, width = list(shape[:3]), shape[3]
    if case.expanded and name in ("k", "v"):
        rows[2] = min(1, rows[2])
    pitch, strides = width + case.pad, [0, 0, 0]
    for axis in reversed(ORDERS[case.order]):
        strides[axis] = pitch
        pitch *= max(1, rows[axis])
    if case.expanded and name in ("k", "v"):
        strides[2] = 0
    first, second = (1, 2) if case.layout == "bshd" else (2, 1)
    return Place(
        (shape[0], shape[first], shape[second], width),
        (strides[0], strides[first], strides[second], 1),
        GUARD + case.shift,
        2 * GUARD + case.shift + pitch,
    )


def sizes_of(case: Case) -> Sizes:
    heads, heads_k = case.heads
    head_dim_v = case.head_dim_v or case.head_dim
    return Sizes(case.batch, case.seqlen_q, case.seqlen_k, heads, heads_k, case.head_dim, head_dim_v)


def problem_of(case: Case, backward: bool) -> AttentionProblem:
    """What `run` will ask the kernels for: lets all plans be made, and compiled, before the first test."""
    options = Options.checked(case.causal, case.scale, case.layout, None, case.deterministic)
    refs = {}
    for name in BACKWARD_TENSORS if backward else FORWARD_TENSORS:
        own = case if case.given or name not in ("out", "lse", "dq", "dk", "dv") else _packed(case)
        where = place(own, name)
        dtype = case.lse_dtype if name == "lse" else case.dtype
        address = 0 if own is not case else ITEMSIZE[dtype] * where.offset
        refs[name] = TensorRef(address, where.shape, where.strides, dtype, Device("cuda", 0), None)
    problem = AttentionProblem.from_refs(refs, sizes_of(case), case.dtype, options)
    for name, value in (("window_size", case.window), ("precision", case.precision)):
        problem = problem if value is None else SPECS[name](problem, value)
    heads = case.heads[0]
    for name in ("sinks", "dsinks") if backward else ("sinks",):
        if case.sinks is not None:
            problem = SPECS[name](problem, TensorRef(0, (heads,), (1,), case.sinks, Device("cuda", 0), None))
    if backward and case.dlse:
        shape = (case.batch, heads, case.seqlen_q)
        strides = (heads * case.seqlen_q, case.seqlen_q, 1)
        problem = SPECS["dlse"](problem, TensorRef(0, shape, strides, case.lse_dtype, Device("cuda", 0), None))
    return problem


def _packed(case: Case) -> Case:
    """The case with the layout of arrays that fa2cupy allocates: C-contiguous as the user sees them."""
    order = 0 if case.layout == "bshd" else 1
    return Case(**{name: getattr(case, name) for name in _SHAPE_FIELDS}, order=order)


_SHAPE_FIELDS = ("seqlen_q", "seqlen_k", "head_dim", "dtype", "causal", "batch", "heads", "layout", "head_dim_v")


def seqlen_cases(dtype: str, head_dim: int) -> Iterator[Case]:
    """Every pair of lengths both ways round, causal and not; heads, layout and fresh outputs take turns."""
    for number, (seqlen_q, seqlen_k) in enumerate(SEQLENS_BOTH_WAYS):
        big = seqlen_q * seqlen_k > 2**20
        for causal in (False, True):
            yield Case(
                seqlen_q,
                seqlen_k,
                head_dim,
                dtype,
                causal,
                batch=1 if big else 2,
                heads=HEADS[(number + causal) % len(HEADS)] if not big else ((4, 4), (6, 3))[number % 2],
                layout=("bshd", "bhsd")[number % 2],
                given=number % 3 != 0,
                deterministic=number % 4 == 1,
                seed=number,
            )


def head_dim_cases(dtype: str, head_dim: int) -> Iterator[Case]:
    """One head_dim with every pair of heads, at two lengths that fit no tile, causal and not."""
    for number, heads in enumerate(HEADS):
        for seqlen_q, seqlen_k in ((113, 203), (203, 113)):
            for causal in (False, True):
                yield Case(seqlen_q, seqlen_k, head_dim, dtype, causal, heads=heads, given=causal, seed=100 + number)


def head_dim_v_cases(dtype: str, head_dim: int, head_dim_v: int) -> Iterator[Case]:
    """A head_dim_v of its own, at lengths around the tiles' edges and some that fit none, causal and not."""
    lengths = ((113, 203), (203, 113), (128, 128), (1, 239), (127, 513), (1024, 1023))
    for number, (seqlen_q, seqlen_k) in enumerate(lengths):
        for causal in (False, True):
            case = Case(seqlen_q, seqlen_k, head_dim, dtype, causal, heads=HEADS[number], head_dim_v=head_dim_v)
            case = replace(case, layout=("bshd", "bhsd")[number % 2], given=causal, seed=300 + number)
            yield replace(case, deterministic=number % 3 == 1)
    # Query heads that several thread blocks share in the backward.
    yield Case(300, 2049, head_dim, dtype, True, 1, (32, 1), seed=306, head_dim_v=head_dim_v)
    yield Case(203, 513, head_dim, dtype, False, 1, (16, 2), seed=307, head_dim_v=head_dim_v)


def split_cases(dtype: str, head_dim: int) -> Iterator[Case]:
    """Many query heads on few keys, which several thread blocks share (kernels/backward.py); the last needs it not."""
    for number, (seqlen_q, seqlen_k, batch, heads) in enumerate(
        (
            (300, 4096, 1, (32, 1)),  # several query heads a block, on a GPU of about a hundred multiprocessors
            (4096, 300, 1, (32, 1)),
            (203, 113, 3, (24, 2)),
            (113, 1003, 1, (16, 2)),
            (1, 2049, 1, (32, 1)),
            (113, 203, 70, (6, 3)),
        )
    ):
        for causal in (False, True):
            deterministic = (number + causal) % 2 == 0
            case = Case(seqlen_q, seqlen_k, head_dim, dtype, causal, batch, heads, deterministic=deterministic)
            yield replace(case, given=causal, layout=("bshd", "bhsd")[number % 2], seed=200 + number)


# Head dims of the random cases that are also run unaligned, deterministic, or with an odd scale: each of these three is
# a kernel of its own, and compiling all of them for every head_dim would take longer than the tests.
_MANY_KERNELS = (40, 59, 64, 111, 128, 256)


def random_cases(dtype: str, count: int, seed: int = 0) -> Iterator[Case]:
    """`count` combinations of everything, always the same ones for a seed."""
    rng = random.Random(f"{dtype} {seed}")
    for number in range(count):
        head_dim = rng.choice(HEAD_DIMS)
        special = head_dim in _MANY_KERNELS
        unaligned = special and rng.random() < 0.4
        heads_k = rng.choice((1, 1, 2, 3, 4))
        scale = rng.choice((None, None, None, 0.05, 0.31, 1.0)) if not special or rng.random() > 0.1 else None
        if special and rng.random() < 0.05:
            scale = rng.choice((0.0, -0.1, -1.0))
        yield Case(
            seqlen_q=_length(rng),
            seqlen_k=_length(rng),
            head_dim=head_dim,
            dtype=dtype,
            causal=rng.random() < 0.5,
            batch=rng.choice((1, 1, 2, 3)),
            heads=(heads_k * rng.choice((1, 1, 2, 3, 8)), heads_k),
            scale=scale,
            layout=rng.choice(("bshd", "bhsd")),
            order=rng.randrange(len(ORDERS)),
            pad=rng.choice((1, 2, 5) if unaligned else (0, 0, 8, 24)),
            shift=rng.choice((0, 1, 3, 4) if unaligned else (0, 0, 8)),
            given=rng.random() < 0.7,
            expanded=rng.random() < 0.05,
            deterministic=special and rng.random() < 0.3,
            outliers=rng.random() < 0.15,
            seed=number,
        )


def _length(rng: random.Random) -> int:
    """Short ones and those around the tiles' edges are worth the most; now and then none at all."""
    kind = rng.random()
    if kind < 0.02:
        return 0
    if kind < 0.2:
        return rng.randint(1, 33)
    if kind < 0.45:
        return max(1, rng.choice((64, 80, 96, 112, 128, 192, 256, 384, 512)) + rng.choice((-1, 0, 0, 1)))
    if kind < 0.95:
        return rng.randint(34, 600)
    return rng.randint(601, 1300)


RANDOM_CASES = 2000  # of each dtype


def groups() -> list[Any]:
    """The whole plan, in lists of cases that share a test: pytest parameters with readable ids."""
    import pytest

    parameters = []
    for dtype in DTYPES:
        for head_dim in (64, 128):
            parameters.append(pytest.param(list(seqlen_cases(dtype, head_dim)), id=f"lengths-{dtype}-d{head_dim}"))
            parameters.append(pytest.param(list(split_cases(dtype, head_dim)), id=f"splits-{dtype}-d{head_dim}"))
        for head_dim in HEAD_DIMS:
            parameters.append(pytest.param(list(head_dim_cases(dtype, head_dim)), id=f"heads-{dtype}-d{head_dim}"))
        for head_dim, head_dim_v in HEAD_DIM_PAIRS:
            pairs = list(head_dim_v_cases(dtype, head_dim, head_dim_v))
            parameters.append(pytest.param(pairs, id=f"pairs-{dtype}-d{head_dim}-{head_dim_v}"))
        cases = list(random_cases(dtype, RANDOM_CASES))
        for start in range(0, RANDOM_CASES, 200):
            parameters.append(pytest.param(cases[start : start + 200], id=f"random-{dtype}-{start}"))
    return parameters
