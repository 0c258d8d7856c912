"""What a problem may ask for beyond dense attention, and what the planner has to know of it: a feature is a `Spec`."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar, cast

from fa2cupy.checks import DROPOUT_STEPS

__all__ = [
    "CARRIED",
    "DIFFERENTIABLE",
    "FINDING",
    "LENGTHS",
    "LISTING",
    "MASK_ARRAYS",
    "MASK_BLOCK",
    "OF_SINKS",
    "PREPROCESS",
    "DlseParams",
    "DropoutParams",
    "DropoutSpec",
    "LengthsParams",
    "LengthsSpec",
    "PrecisionSpec",
    "Row",
    "ScoreParams",
    "ScoreSpec",
    "SinksGradientParams",
    "SinksParams",
    "SinksSpec",
    "SoftmaxSpec",
    "Spec",
    "WindowParams",
    "WindowSpec",
    "of_dtype",
]

LISTING = "smxx/list_tiles.cu"  # who makes the lists of tiles that other kernels go by
FINDING = "smxx/find_segments.cu"  # who finds segments before
PREPROCESS = "smxx/flash_bwd_preprocess.cu"
OF_SINKS = "smxx/flash_bwd_sinks.cu"  # who makes their gradient


class Row(Protocol):
    """What all rows of tile tables have. block_m query rows x block_n keys; note: the reason, with its measurement.

    family: 'sm80' or 'sm90', as FA2CUPY_KERNEL calls the kernel of this row. room: registers are left for what hooks of
    scores keep.
    """

    @property
    def family(self) -> str: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def block_m(self) -> int: ...
    @property
    def block_n(self) -> int: ...
    @property
    def num_warps(self) -> int: ...
    @property
    def note(self) -> str: ...
    @property
    def room(self) -> bool: ...


_Struct = TypeVar("_Struct", bound=ctypes.Structure)


def of_dtype(struct: type[_Struct], dtype: str) -> type[_Struct]:
    """The struct as kernels of a dtype have it, of the same name: of float64 its numbers (`Real` there) are doubles."""
    return cast(type[_Struct], _of_doubles(struct)) if dtype == "float64" else struct


@functools.cache
def _of_doubles(struct: type[ctypes.Structure]) -> type[ctypes.Structure]:
    if not any(kind is ctypes.c_float for _, kind, *_ in struct._fields_):
        return struct
    fields = [(name, ctypes.c_double if kind is ctypes.c_float else kind) for name, kind, *_ in struct._fields_]
    return type(struct.__name__, (ctypes.Structure,), {"_fields_": fields})


class Spec:
    """One optional field of `AttentionProblem`: None where it is absent, else a frozen dataclass of this class.

    It holds what the plan depends on (hashable, no arrays). Whatever it leaves as it is here does not concern it.
    """

    __slots__ = ()

    positions: ClassVar[bool] = False  # whether it goes by the numbers of queries and keys in their sequence

    def reaches(self, source: str) -> bool:
        """Whether the kernel of that source ("sm80/flash_fwd.cu") has its defines and its block of parameters."""
        return True

    def defines(self) -> dict[str, int | str]:
        """What the kernels are compiled with."""
        return {}

    def params(self) -> ctypes.Structure | None:
        """Its block of a kernel's parameters (the rules are in kernels/params.py), filled in but for its pointers."""
        return None

    def arrays(self) -> tuple[str, ...]:
        """Names of its arrays, in the order in which a call hands over their pointers: behind those of dense attention,
        spec by spec in the order of the problem's fields (which is that of the keywords), in front of the workspace.
        Its block has a field for each.
        """
        return ()

    def results(self) -> tuple[str, ...]:
        """Names of what a backward writes beyond the dense gradients: behind these among the pointers of a call. Each
        is a field of its block.
        """
        return ()

    def pointers(self, names: Sequence[str]) -> dict[str, tuple[int, int]]:
        """By the fields of its block: position among the pointers of a call, whose names these are and behind which the
        workspace comes, and bytes to add.
        """
        return {name: (names.index(name), 0) for name in self.arrays() + self.results()}

    def objection(self, row: Row) -> str:
        """What speaks against computing it with a row of a tile table, or the empty string."""
        return ""


# Below it is a scale of scores so small that its inverse, in which slopes are counted, is not one of float32.
_TINY_SCALE = 1e-30


class WindowParams(ctypes.Structure):
    """The twin of the struct in cuda_src/common/params.cuh."""

    _fields_ = (("left", ctypes.c_int32), ("right", ctypes.c_int32))


@dataclass(frozen=True, slots=True)
class WindowSpec(Spec):
    """The keys that a query sees, around the key that it stands beside: `left` of them before it, `right` behind it.

    Both are numbers, at most the lengths, which are no limit. only_drops: when the leading queries that see no key and
    the leading keys that no query sees are dropped, everybody left sees everybody left, and no kernel need know.
    """

    left: int
    right: int
    only_drops: bool = False

    def reaches(self, source: str) -> bool:
        return not self.only_drops and (source in (LISTING, OF_SINKS) or not source.startswith("smxx/"))

    def defines(self) -> dict[str, int | str]:
        return {"FA2_BAND": 1}

    def params(self) -> WindowParams:
        return WindowParams(self.left, self.right)


class ScoreParams(ctypes.Structure):
    """The twin of the struct in cuda_src/common/params.cuh."""

    _fields_ = (
        ("alibi_slopes", ctypes.c_uint64),
        ("alibi_batch_stride", ctypes.c_int64),
        ("alibi_head_stride", ctypes.c_int64),
        ("softcap_factor", ctypes.c_float),
        ("softcap_log2", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True)
class ScoreSpec(Spec):
    """What becomes of scores, which are softmax_scale * q . k.

    softcap: s = softcap * tanh(s / softcap), None without; it has the scale in it. alibi: then slope * distance is
    taken off; its strides in elements along batch and heads, None without. dtype: the problem's. wide_slopes: they are
    of float64.
    """

    softmax_scale: float
    softcap: float | None = None
    alibi: tuple[int, int] | None = None
    dtype: str = "bfloat16"
    wide_slopes: bool = False

    def reaches(self, source: str) -> bool:
        return not source.startswith("smxx/")

    def defines(self) -> dict[str, int | str]:
        defines: dict[str, int | str] = {}
        if self.softcap is not None:  # has the scale in it
            defines |= {"FA2_SOFTCAP": 1, "FA2_SCALE_FIRST": 0}
        elif self.softmax_scale < _TINY_SCALE:
            defines["FA2_SCALE_FIRST"] = 1
        if self.wide_slopes:
            defines["FA2_WIDE_SLOPES"] = 1
        return defines if self.alibi is None else {**defines, "FA2_ALIBI": 1}

    def params(self) -> ctypes.Structure:
        block = of_dtype(ScoreParams, self.dtype)
        batch, head = self.alibi or (0, 0)
        if self.softcap is None:
            return block(0, batch, head)
        return block(0, batch, head, self.softmax_scale / self.softcap, self.softcap * math.log2(math.e))

    def arrays(self) -> tuple[str, ...]:
        return () if self.alibi is None else ("alibi_slopes",)

    def objection(self, row: Row) -> str:
        return "" if row.room else "no registers are left for scores that become others"


MASK_BLOCK = 128  # queries and keys of a block of a mask
# The arrays of a BlockMask, in the order of `block_mask.lists.BlockLists`.
MASK_ARRAYS = (
    "mask_rows_q", "mask_entries_q", "mask_rows_k", "mask_entries_k", "mask_ranks", "mask_bits",
)  # fmt: skip


class SinksParams(ctypes.Structure):
    """The twin of the struct in cuda_src/common/params.cuh."""

    _fields_ = (("sinks", ctypes.c_uint64), ("sinks_are_16_bit", ctypes.c_int32))


class SinksGradientParams(ctypes.Structure):
    """The twin of the struct in cuda_src/common/params.cuh."""

    _fields_ = (
        ("sinks", ctypes.c_uint64),
        ("dsinks", ctypes.c_uint64),
        ("sink_sums", ctypes.c_uint64),
        ("sinks_are_16_bit", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True)
class PrecisionSpec(Spec):
    """float32 by single products of tf32, which has 10 bits behind the point."""

    def reaches(self, source: str) -> bool:
        return source.startswith("sm80/")

    def defines(self) -> dict[str, int | str]:
        return {"FA2_TF32_PRODUCTS": 1, "FA2_PROMOTE": 0}


@dataclass(frozen=True, slots=True)
class SinksSpec(Spec):
    """A logit of each query head that takes part in the softmax of its rows, and in nothing else.

    sixteen_bit: of the problem's dtype; else float32. of_backward: there lse has them in it, and nobody else need know,
    unless their gradient is wanted.
    """

    sixteen_bit: bool
    of_backward: bool = False
    gradient: bool = False

    def reaches(self, source: str) -> bool:
        if self.of_backward:
            return self.gradient and source in (PREPROCESS, OF_SINKS)
        return source.endswith("/flash_fwd.cu") or source in (LISTING, "smxx/fill_unseen.cu")

    def defines(self) -> dict[str, int | str]:
        return {"FA2_SINKS": 1}

    def params(self) -> SinksParams | SinksGradientParams:
        if self.of_backward:
            return SinksGradientParams(sinks_are_16_bit=self.sixteen_bit)
        return SinksParams(0, self.sixteen_bit)

    def arrays(self) -> tuple[str, ...]:
        """(num_heads,), contiguous."""
        return ("sinks",)

    def results(self) -> tuple[str, ...]:
        return ("dsinks",) if self.gradient else ()


class DropoutParams(ctypes.Structure):
    """The twin of the struct in cuda_src/common/params.cuh."""

    _fields_ = (
        ("dropout_seed", ctypes.c_uint64),
        ("words", ctypes.c_int32),
        ("threshold", ctypes.c_uint32),
        ("kept", ctypes.c_float),
        ("inverse", ctypes.c_float),
        ("first_query", ctypes.c_int32),
        ("first_key", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True)
class DropoutSpec(Spec):
    """Some of P is dropped: `threshold` of 32768, by a seed of so many 32-bit `words` (2, 4 or 8).

    empty_rows, empty_keys: those of the problem, which are left out, and count all the same. moves: the device may
    leave out some, too. dtype: the problem's.
    """

    threshold: int
    words: int = 0
    empty_rows: int = 0
    empty_keys: int = 0
    moves: bool = False
    dtype: str = "bfloat16"

    positions: ClassVar[bool] = True

    def reaches(self, source: str) -> bool:
        return not source.startswith("smxx/") or source == PREPROCESS

    def defines(self) -> dict[str, int | str]:
        """One by one: where rows may be left out, or the threshold is a NaN among half numbers (dropout.cuh)."""
        one_by_one = self.moves or self.empty_rows or self.empty_keys or self.threshold > 0x7C00
        return {"FA2_DROPOUT": 1, **({"FA2_ONE_BY_ONE": 1} if one_by_one else {})}

    def params(self) -> ctypes.Structure:
        rows = self.empty_rows, self.empty_keys
        return of_dtype(DropoutParams, self.dtype)(
            0, self.words, self.threshold * 0x10001, self.kept, 1 / self.kept, *rows
        )

    @property
    def kept(self) -> float:
        """What part of P is."""
        return 1 - self.threshold / DROPOUT_STEPS

    def arrays(self) -> tuple[str, ...]:
        """Words of 32 bits, contiguous: the seed, its low word first; of 4 the offset, too; of 8 also what is added to
        the numbers of sequences and of query heads, in two words each.
        """
        return ("dropout_seed",)

    def objection(self, row: Row) -> str:
        return "" if row.room else "no registers are left for dropout"


# The arrays that say where sequences lie, in the order of the keywords. Those of segments, segment_ids, are two: one
# for the queries and one for the keys, which may be the same array.
LENGTHS = (
    "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k", "segment_ids_q", "segment_ids_k",
)  # fmt: skip


# The arrays that torch's operators carry as arguments of their own, in the order of the keywords; and of these the ones
# that may have a gradient.
CARRIED = ("alibi_slopes", "mask", *MASK_ARRAYS, "sinks", "dropout_seed", *LENGTHS)
DIFFERENTIABLE = ("sinks",)


class LengthsParams(ctypes.Structure):
    """The twin of the struct in cuda_src/common/listed.cuh."""

    _fields_ = (*((name, ctypes.c_uint64) for name in LENGTHS), ("sequences", ctypes.c_int32))


@dataclass(frozen=True, slots=True)
class LengthsSpec(Spec):
    """Sequences whose places and lengths are known on the device only, by the arrays that are True here.

    sequences: how many there are at most; of segments the most that there can be. A packed side is one row of tokens,
    (total, heads, head_dim), of which cu_seqlens says where sequences start: its stride of the batch is 0.
    """

    sequences: int
    cu_seqlens_q: bool = False
    cu_seqlens_k: bool = False
    seqused_q: bool = False
    seqused_k: bool = False
    leftpad_k: bool = False
    segments: bool = False

    def reaches(self, source: str) -> bool:
        """Who makes lists of tiles looks at the arrays, who finds segments before, and who asks for rows that are in no
        tile; what others are told is `kernels.listed.Lists`.
        """
        return source in (LISTING, OF_SINKS) or (self.segments and source == FINDING)

    def params(self) -> LengthsParams:
        return LengthsParams(sequences=self.sequences)

    @property
    def packed_q(self) -> bool:
        return self.cu_seqlens_q

    @property
    def packed_k(self) -> bool:
        return self.cu_seqlens_k

    def arrays(self) -> tuple[str, ...]:
        """int32, contiguous: cu_seqlens (sequences + 1,), seqused and leftpad_k (sequences,), segment_ids (batch,
        seqlen).
        """
        return tuple(name for name in LENGTHS if getattr(self, "segments" if name.startswith("segment") else name))


class DlseParams(ctypes.Structure):
    """The twin of the struct in cuda_src/common/params.cuh."""

    _fields_ = (
        ("dlse", ctypes.c_uint64),
        ("dlse_batch", ctypes.c_int64),
        ("dlse_row", ctypes.c_int64),
        ("dlse_head", ctypes.c_int64),
        ("dlse_first_row", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True)
class SoftmaxSpec(Spec):
    """What a row's statistics take in, of a backward: dlse, a gradient of lse, which is taken off D.

    dlse: its strides in elements along batch, num_heads, seqlen_q; any will do, 0 too. empty: leading query rows that
    see no key, and whose gradients are 0 whatever dlse is.
    """

    dlse: tuple[int, int, int]
    empty: int = 0

    def reaches(self, source: str) -> bool:
        return source in (PREPROCESS, OF_SINKS)

    def defines(self) -> dict[str, int | str]:
        return {"FA2_DLSE": 1}

    def params(self) -> DlseParams:
        batch, head, row = self.dlse
        return DlseParams(0, batch, row, head, self.empty)

    def arrays(self) -> tuple[str, ...]:
        return ("dlse",)
