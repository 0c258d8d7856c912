"""The `Spec` of a mask: its lists of blocks, which a call brings, or makes in its workspace of an array."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from fa2cupy.spec import MASK_ARRAYS, MASK_BLOCK, Row, Spec

__all__ = ["MaskArray", "MaskSpec", "PickedParams"]

_NUMBERS = ("batch_masks", "head_masks", "query_blocks", "key_blocks", "heads_of_key")


class PickedParams(ctypes.Structure):
    """The twin of the struct in cuda_src/common/params.cuh."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in MASK_ARRAYS),
        *((name, ctypes.c_int32) for name in _NUMBERS),
    )


@dataclass(frozen=True, slots=True)
class MaskArray:
    """A bool array of which a call makes lists, and its strides in elements. shape: (batch or 1, num_heads or 1,
    seqlen_q, seqlen_k). Query i sees none but the keys from i + band[0] to i + band[1].
    """

    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    band: tuple[int, int]


@dataclass(frozen=True, slots=True)
class MaskSpec(Spec):
    """Which blocks of 128 queries and 128 keys meet each other, by lists, and which of their elements.

    batch_masks, head_masks: how many masks further that of the next row of the batch is, and of the next query
    head; 0 where it is the same. query_blocks, key_blocks: of a mask. heads_of_key: query heads that share a key head.
    array: what the lists are made of, if a call does not bring them.
    """

    batch_masks: int
    head_masks: int
    query_blocks: int
    key_blocks: int
    heads_of_key: int
    array: MaskArray | None = None

    def reaches(self, source: str) -> bool:
        return not source.startswith("smxx/") or source == "smxx/fill_unseen.cu"

    def defines(self) -> dict[str, int | str]:
        return {"FA2_PICKED": 1, "FA2_UNSEEN_ROWS": 1}

    def params(self) -> PickedParams:
        return PickedParams(**{name: getattr(self, name) for name in _NUMBERS})

    def arrays(self) -> tuple[str, ...]:
        return MASK_ARRAYS if self.array is None else ("mask",)

    def pointers(self, names: Sequence[str]) -> dict[str, tuple[int, int]]:
        if self.array is None:
            return Spec.pointers(self, names)
        offsets = self.offsets
        return {name: (len(names), offsets[name]) for name in MASK_ARRAYS}

    @property
    def offsets(self) -> dict[str, int]:
        """Of lists that are made: bytes from the start of the workspace, by the names of `MASK_ARRAYS` and of what they
        are made with; and "end".
        """
        if self.array is None:
            return {"end": 0}
        batch, heads, _, _ = self.array.shape
        rows, columns = batch * heads * self.query_blocks, batch * heads * self.key_blocks
        blocks = rows * self.key_blocks
        entries, bits = 8 * blocks, 4 * MASK_BLOCK * 8 * max(1, blocks)
        sizes = dict(zip(MASK_ARRAYS, (16 * rows, entries, 16 * columns, entries, 4 * blocks, bits), strict=True))
        sizes |= {"counts": 8, "first_partial": 4 * rows, "numbers": 8 * blocks, "kinds": blocks}
        offsets, end = {}, 0
        for name, size in sizes.items():
            offsets[name] = end
            end += -(-size // 256) * 256
        return {**offsets, "end": end}

    def objection(self, row: Row) -> str:
        if MASK_BLOCK % row.block_m or MASK_BLOCK % row.block_n:
            return f"tiles of {row.block_m} x {row.block_n} are no equal parts of a mask's blocks of {MASK_BLOCK}"
        if getattr(row, "cluster", 1) > 1:
            return "thread blocks that share queries do not go by a mask's lists"
        return "" if row.room or row.family == "sm80" else "no registers are left for a mask's bits"
