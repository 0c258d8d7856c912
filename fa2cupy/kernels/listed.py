"""Lists of tiles in a workspace (cuda_src/common/listed.cuh), from which kernels take their tiles where the lengths of
sequences are data on the device; and what is found there of segments, before they are listed."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from fa2cupy.kernels.params import IdRun, ListedPlace, ListedPosition, ListParams, SegmentParams
from fa2cupy.problem import AttentionProblem
from fa2cupy.spec import LengthsSpec

__all__ = ["Block", "Lists", "Segments", "Shorts"]

_ALIGNMENT = 256  # bytes, of each
_LONGEST_RUN = 8  # kListedRun of cuda_src/common/config.cuh, at most
_COUNTS_OF_SHORTS = 8  # bytes behind those of the lists
_MOST_GROUPS = 1024  # threads of smxx/list_tiles.cu, each of which looks at what one group has


class Block(Protocol):
    """What kernels are told of something that lies in the workspace: a block of parameters behind those of all specs,
    less its pointers, which are to the bytes of `offsets` (by its fields); and what they are compiled with."""

    @property
    def offsets(self) -> Mapping[str, int]: ...
    def params(self) -> ctypes.Structure: ...
    def defines(self) -> dict[str, int | str]: ...


@dataclass(frozen=True, slots=True)
class Lists:
    """Of query tiles, and of key tiles where a backward needs them: how many there can be, and where they lie.

    block_m, block_n: rows of a tile. rows_q, rows_k: of an array, or of each row of its batch. tiles_of_head_q,
    tiles_of_head_k: the most tiles of a head that lengths can make, whose workspaces are that long; of segments with
    `Segments.short_keys` those that have room. positioned: tiles say which rows of their sequence they are. offset:
    bytes in front of the lists in the workspace.
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
    def of(
        cls,
        problem: AttentionProblem,
        block_m: int,
        block_n: int,
        *,
        has_keys: bool,
        offset: int = 0,
        short_keys: int = 0,
    ) -> Lists:
        """short_keys: segments of so many keys may be listed by themselves, and only the others surely have room."""
        lengths = problem.lengths
        assert lengths is not None
        tiles_q, tiles_k = (
            _most_tiles(rows, block, problem, lengths, packed, short_keys)
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
        return offsets | {"tiles_k": tiles_q + self.bytes_of(self.tiles_of_head_q)} if self.has_keys else offsets

    @property
    def end(self) -> int:
        """Bytes up to the end of the lists."""
        keys = self.bytes_of(self.tiles_of_head_k) if self.has_keys else 0
        return self.offset + _ALIGNMENT + self.bytes_of(self.tiles_of_head_q) + keys

    def bytes_of(self, tiles: int) -> int:
        """Of a list: with room for whole runs of neighbours, of which the kernels read what is there in place of the
        missing ones."""
        tile = ListedPosition if self.positioned else ListedPlace
        return _aligned(-(-tiles // _LONGEST_RUN) * _LONGEST_RUN * ctypes.sizeof(tile))

    def defines(self) -> dict[str, int | str]:
        """Of the kernels that take tiles from the lists, and of the one that makes them."""
        positioned = {"FA2_POSITIONED": 1} if self.positioned else {}
        return {"FA2_LISTED": 1, "FA2_UNSEEN_ROWS": 1, **positioned}

    def params(self) -> ListParams:
        """The block of these kernels, less its pointers."""
        return ListParams(0, 0, 0, self.rows_q, self.rows_k, self.tiles_of_head_q, self.tiles_of_head_k)


@dataclass(frozen=True, slots=True)
class Segments:
    """Of a problem with segment_ids: how many there can be, and where what is found of them lies, behind `lists` in the
    workspace.

    Rows of the batch are looked at in `groups` of rows_of_group, by a thread block each. short_keys: of so many keys
    they are listed by themselves (`Shorts`) if the lists have no room for all; 0 if these always have.
    """

    batch: int
    lists: Lists
    short_keys: int = 0

    @property
    def most(self) -> int:
        """Segments that have a query and a key."""
        return self.batch * min(self.lists.rows_q, self.lists.rows_k)

    @property
    def rows_of_group(self) -> int:
        return max(1, -(-self.batch // _MOST_GROUPS))

    @property
    def groups(self) -> int:
        return max(1, -(-self.batch // self.rows_of_group))

    @property
    def offsets(self) -> dict[str, int]:
        """Bytes from the start of the workspace, by the fields of `SegmentParams`."""
        return self._places()[0]

    @property
    def end(self) -> int:
        """Bytes up to the end of all of it."""
        return self._places()[1]

    def _places(self) -> tuple[dict[str, int], int]:
        lists = self.lists
        sizes = {
            "found": 3 * 4 * self.groups,
            "runs_q": ctypes.sizeof(IdRun) * self.batch * lists.rows_q,
            "runs_k": ctypes.sizeof(IdRun) * self.batch * lists.rows_k,
            "segments": ctypes.sizeof(ListedPlace) * self.most,
        }
        if self.short_keys:
            sizes["shorts"] = lists.bytes_of(self.most)
        offsets, end = {}, lists.end
        for name, size in sizes.items():
            offsets[name] = end
            end += _aligned(size)
        return offsets, end

    def defines(self) -> dict[str, int | str]:
        """Of who finds them, and of who lists them."""
        return {"FA2_SEGMENTS": 1}

    def params(self) -> SegmentParams:
        """The block of these two, less its pointers."""
        return SegmentParams(
            batch_rows=self.batch,
            groups=self.groups,
            rows_of_group=self.rows_of_group,
            short_keys=self.short_keys,
        )


@dataclass(frozen=True, slots=True)
class Shorts:
    """The list of segments of few keys, for the kernels that take each by one thread block: as `Lists`, but that of the
    queries and that of the keys are one, of whole sequences; and statistics of queries are kept row by row."""

    segments: Segments

    @property
    def tiles_of_head_q(self) -> int:
        """Rows of a head's statistics."""
        return self.segments.batch * self.segments.lists.rows_q

    @property
    def tiles_of_head_k(self) -> int:
        return self.segments.most

    @property
    def offsets(self) -> dict[str, int]:
        shorts, counts = self.segments.offsets["shorts"], self.segments.lists.offsets["counts"]
        return {"counts": counts + _COUNTS_OF_SHORTS, "tiles_q": shorts, "tiles_k": shorts}

    def defines(self) -> dict[str, int | str]:
        return {**self.segments.lists.defines(), "FA2_SHORT": 1}

    def params(self) -> ListParams:
        lists = self.segments.lists
        return ListParams(0, 0, 0, lists.rows_q, lists.rows_k, self.tiles_of_head_q, self.tiles_of_head_k)


def _most_tiles(
    rows: int, block: int, problem: AttentionProblem, lengths: LengthsSpec, is_packed: bool, short_keys: int
) -> int:
    """Of sequences that share rows each may have a tile that is not full.

    Without the short segments no row of the batch has more than its keys allow; room for one more makes it enough for
    whole rows, and for segments that are about as long as the short ones.
    """
    if lengths.segments:
        most = min(rows, problem.seqlen_q, problem.seqlen_k)
        if short_keys:
            most = min(most, 1 + problem.seqlen_k // (short_keys + 1))
        return problem.batch * ((rows + most * (block - 1)) // block)
    if not is_packed:
        return problem.batch * -(-rows // block)
    return (rows + min(lengths.sequences, rows) * (block - 1)) // block


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
