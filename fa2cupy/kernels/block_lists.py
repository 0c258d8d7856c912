"""How a BlockMask is built on a GPU: its launches, and what they need of memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fa2cupy.block_mask.lists import BLOCK, blocks_of
from fa2cupy.kernels.common import Where
from fa2cupy.kernels.launch import KernelLaunch
from fa2cupy.kernels.smxx import classify_blocks, list_blocks
from fa2cupy.kernels.smxx.classify_blocks import BITS, KINDS, Seeing
from fa2cupy.problem import AttentionProblem

__all__ = ["Building", "launches", "launches_of_call", "plan"]

_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Building:
    """What is built. shape: (batch, num_heads, seqlen_q, seqlen_k); max_entries, max_partial: what there is room for.

    Lists go to the pointers from `first` on, in the order of `BlockLists`; the workspace comes behind them.
    """

    shape: tuple[int, int, int, int]
    max_entries: int
    max_partial: int
    first: int

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.shape[0] * self.shape[1], blocks_of(self.shape[2]), blocks_of(self.shape[3])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the lists, int32. There is one block of bits at least, which wrong counts may be sent to."""
        masks, rows, columns = self.grid
        entries = self.max_entries
        return {
            "rows_q": (masks, rows, 4),
            "entries_q": (entries, 2),
            "rows_k": (masks, columns, 4),
            "entries_k": (entries, 2),
            "ranks": (entries,),
            "bits": (max(1, self.max_partial), 2, BLOCK, 4),
        }

    @property
    def offsets(self) -> dict[str, int]:
        """Bytes from the start of the workspace; `counts` come first: entries and partial blocks."""
        masks, rows, columns = self.grid
        blocks = masks * rows * columns
        sizes = {"counts": 8, "first_partial": 4 * masks * rows, "numbers": 8 * blocks, "kinds": blocks}
        offsets, end = {}, 0
        for name, size in sizes.items():
            offsets[name] = end
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        return {**offsets, "end": end}

    @property
    def workspace_bytes(self) -> int:
        return self.offsets["end"]


def plan(arch: str, seeing: Seeing, building: Building) -> tuple[KernelLaunch, ...]:
    """The launches, in order. Of a mask without blocks none: its arrays are empty, or zeros."""
    lists = {name: (building.first + n, 0) for n, name in enumerate(building.shapes)}
    workspace = building.first + len(lists)
    places = lists | {name: (workspace, offset) for name, offset in building.offsets.items() if name != "end"}
    return launches(arch, seeing, building, places)


def launches(arch: str, seeing: Seeing, building: Building, places: Mapping[str, Where]) -> tuple[KernelLaunch, ...]:
    """The same. places: of the lists, by the fields of `BlockLists`, and of the workspace's parts."""
    if 0 in building.grid:
        return ()

    def classify(step: int) -> KernelLaunch:
        own = {name: places[name] for name in ("kinds", "numbers", "bits")}
        return classify_blocks.launch(arch, seeing, building.shape, step, own)

    def listing(step: int) -> KernelLaunch:
        own = {name: place for name, place in places.items() if name != "bits"}
        most = max(1, building.max_partial)
        return list_blocks.launch(arch, building.grid, building.max_entries, most, step, own)

    return (classify(KINDS), *(listing(step) for step in list_blocks.STEPS), classify(BITS))


def launches_of_call(problem: AttentionProblem, arch: str, names: Sequence[str]) -> tuple[KernelLaunch, ...]:
    """Of a call whose mask is an array: its lists, in the call's workspace. names: of the pointers in front of that."""
    mask = problem.mask
    if mask is None or mask.array is None:
        return ()
    places = {
        name.removeprefix("mask_"): (len(names), offset) for name, offset in mask.offsets.items() if name != "end"
    }
    batch, heads, rows, columns = mask.array.shape
    blocks = batch * heads * blocks_of(rows) * blocks_of(columns)
    seeing = Seeing.by_blocks(mask.array.strides, (1, 1), mask.array.band, names.index("mask"))
    return launches(arch, seeing, Building(mask.array.shape, blocks, blocks, 0), places)
