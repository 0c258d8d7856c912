"""Tiles: how big a piece of the problem a thread block takes. The rows are beside their kernels, in tables.

The kernels of sm_80 have a table per class of shared memory (bytes per block): 99 KiB (sm_86, sm_89, sm_120), 163 KiB
(sm_80), 227 KiB (sm_90, sm_100). The wgmma kernels, which only sm_90 runs, have tables of their own. Rejected rows are
in docs/lab with their numbers.

Rows are found by the larger of head_dim and head_dim_v, unless they say otherwise. A head_dim_v of 0 is the same as
head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from fa2cupy.spec import Row

__all__ = [
    "ELEMENT_BYTES",
    "SHARED_MEMORY",
    "head_dims_of_rows",
    "padded_head_dim",
    "rows_for",
    "shared_memory_class",
    "tile_bytes",
]

# Bytes of shared memory that a block may use, by architecture; others go by what their driver says.
SHARED_MEMORY = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_87": 166912,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_103": 232448,
    "sm_120": 101376,
    "sm_121": 101376,
}
# Of what kernels of sm_80 have rows for: dtypes, and "tf32", which is float32 with less precise products.
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "tf32": 4, "float64": 8}
# Elements behind each row of a tile, and of one of scores (`kPad` and `kScorePad` of sm80/operand.cuh), by their bytes.
_PADS = {2: (8, 8), 4: (4, 8), 8: (4, 4)}
_CLASSES = (232448, 166912, 101376)
# head_dim and head_dim_v of models in use, where they differ: multi-head latent attention.
_HEAD_DIM_PAIRS = ((192, 128),)

_Row = TypeVar("_Row", bound=Row)


def shared_memory_class(shared_mem_optin: int) -> int:
    """The largest class that fits into `shared_mem_optin` bytes."""
    return next((size for size in _CLASSES if size <= shared_mem_optin), _CLASSES[-1])


def padded_head_dim(head_dim: int, split: int = 1) -> int:
    """The width that a kernel is compiled for: `split` times a multiple of 16, tiles being made of 16 x 16 matrices."""
    unit = 16 * split
    return max(unit, -(-head_dim // unit) * unit)


def tile_bytes(rows: int, columns: int, element_bytes: int = 2, *, scores: bool = False) -> int:
    """A `Tile`, or a `ScoreTile`, of sm80/tile.cuh: its rows padded, aligned to 128 bytes."""
    return -(-rows * (columns + _PADS[element_bytes][scores]) * element_bytes // 128) * 128


def rows_for(table: Sequence[_Row], head_dim: int) -> list[_Row]:
    """The rows of the smallest head_dim that is large enough."""
    served = min((tile.head_dim for tile in table if head_dim <= tile.head_dim), default=0)
    return [tile for tile in table if tile.head_dim == served]


def head_dims_of_rows(table: Sequence[_Row]) -> Iterator[tuple[_Row, int, int]]:
    """(row, head_dim, head_dim_v) of what is compiled ahead: each row at its widest, and pairs that are in use."""
    for tile in table:
        yield tile, tile.head_dim, 0
    for head_dim, head_dim_v in _HEAD_DIM_PAIRS:
        for tile in rows_for(table, max(head_dim, head_dim_v)):
            yield tile, head_dim, head_dim_v
