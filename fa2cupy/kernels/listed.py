"""Lists of tiles in a workspace (cuda_src/common/listed.cuh), from which kernels take their tiles where the lengths of
sequences are data on the device."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from fa2cupy.kernels.params import ListedPlace, ListedPosition, ListParams
from fa2cupy.problem import AttentionProblem
from fa2cupy.spec import LengthsSpec

__all__ = ["Lists"]

_ALIGNMENT = 256  # bytes, of each


@dataclass(frozen=True, slots=True)
class Lists:
    """Of query tiles, and of key tiles where a backward needs them: how many there can be, and where they lie.

    block_m, block_n: rows of a tile. rows_q, rows_k: of an array, or of each row of its batch. tiles_of_head_q,
    tiles_of_head_k: the most tiles of a head that lengths can make, whose workspaces are that long. positioned: tiles
    say which rows of their sequence they are. offset: bytes in front of the lists in the workspace.
    """

    block_m: int
    block_n: int
    rows_q: int
    rows_k: int
    tiles_of_head_q: int
    tiles_of_head_k: int
    has_keys: bool
    positioned: bool = False
    offset: int = 0

    @classmethod
    def of(cls, problem: AttentionProblem, block_m: int, block_n: int, *, has_keys: bool, offset: int = 0) -> Lists:
        lengths = problem.lengths
        assert lengths is not None
        tiles_q, tiles_k = (
            _most_tiles(rows, block, problem.batch, lengths, packed)
            for rows, block, packed in (
                (problem.seqlen_q, block_m, lengths.packed_q),
                (problem.seqlen_k, block_n, lengths.packed_k),
            )
        )
        rows = problem.seqlen_q, problem.seqlen_k
        return cls(block_m, block_n, *rows, tiles_q, tiles_k, has_keys, problem.positioned, offset)

    @property
    def offsets(self) -> dict[str, int]:
        """Bytes from the start of the workspace, by the fields of `ListParams`."""
        tiles_q = self.offset + _ALIGNMENT
        offsets = {"counts": self.offset, "tiles_q": tiles_q}
        return offsets | {"tiles_k": tiles_q + self._bytes(self.tiles_of_head_q)} if self.has_keys else offsets

    @property
    def end(self) -> int:
        """Bytes up to the end of the lists."""
        keys = self._bytes(self.tiles_of_head_k) if self.has_keys else 0
        return self.offset + _ALIGNMENT + self._bytes(self.tiles_of_head_q) + keys

    def _bytes(self, tiles: int) -> int:
        """Of a list: with room for whole runs of eight neighbours, of which the kernels read what is there in place of
        the missing ones."""
        tile = ListedPosition if self.positioned else ListedPlace
        return -(-tiles * ctypes.sizeof(tile) // _ALIGNMENT) * _ALIGNMENT

    def defines(self) -> dict[str, int | str]:
        """Of the kernels that take tiles from the lists, and of the one that makes them."""
        positioned = {"FA2_POSITIONED": 1} if self.positioned else {}
        return {"FA2_LISTED": 1, "FA2_UNSEEN_ROWS": 1, **positioned}

    def params(self) -> ListParams:
        """The block of these kernels, less its pointers."""
        return ListParams(0, 0, 0, self.rows_q, self.rows_k, self.tiles_of_head_q, self.tiles_of_head_k)


def _most_tiles(rows: int, block: int, batch: int, lengths: LengthsSpec, is_packed: bool) -> int:
    """Of sequences that share rows each may have a tile that is not full."""
    if not is_packed and not lengths.segments:
        return batch * -(-rows // block)
    total = rows if is_packed else batch * rows
    return (total + min(lengths.sequences, total) * (block - 1)) // block
