"""What a problem may ask for beyond dense attention, and what the planner has to know of it: a feature is a `Spec`."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import ClassVar, Protocol

__all__ = [
    "LENGTHS",
    "LISTING",
    "DlseParams",
    "LengthsParams",
    "LengthsSpec",
    "Row",
    "SoftmaxSpec",
    "Spec",
    "WindowParams",
    "WindowSpec",
]

LISTING = "smxx/list_tiles.cu"  # who makes the lists of tiles that other kernels go by


class Row(Protocol):
    """What all rows of tile tables have. block_m query rows x block_n keys; note: the reason, with its measurement.

    family: 'sm80' or 'sm90', as FA2CUPY_KERNEL calls the kernel of this row.
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

    def objection(self, row: Row) -> str:
        """What speaks against computing it with a row of a tile table, or the empty string."""
        return ""


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
        return not self.only_drops and (source == LISTING or not source.startswith("smxx/"))

    def defines(self) -> dict[str, int | str]:
        return {"FA2_BAND": 1}

    def params(self) -> WindowParams:
        return WindowParams(self.left, self.right)


# The arrays that say where sequences lie, in the order of the keywords. Those of segments, segment_ids, are two: one
# for the queries and one for the keys, which may be the same array.
LENGTHS = (
    "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k", "segment_ids_q", "segment_ids_k",
)  # fmt: skip


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
        """Only who makes lists of tiles looks at the arrays; what others are told is `kernels.listed.Lists`."""
        return source == LISTING

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
        return source == "smxx/flash_bwd_preprocess.cu"

    def defines(self) -> dict[str, int | str]:
        return {"FA2_DLSE": 1}

    def params(self) -> DlseParams:
        batch, head, row = self.dlse
        return DlseParams(0, batch, row, head, self.empty)

    def arrays(self) -> tuple[str, ...]:
        return ("dlse",)
