"""In which order thread blocks take tiles (`tile_of` in cuda_src/common/schedule.cuh): how many heads are a section,
whose tiles are interleaved."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fa2cupy.jit.driver import DeviceInfo

__all__ = [
    "Banded",
    "heads_per_banded_section",
    "heads_per_even_section",
    "heads_per_listed_section",
    "heads_per_section",
    "heads_per_turn_section",
]

_BLOCKS_PER_SM = 4  # thread blocks for each multiprocessor that a section of a causal problem is to have
_SHORT_SECTION = 16  # tiles
_ROUNDS = 64
_LISTED_TILES = 4.2  # for each worker, of a section of a list
_LONG_SEQUENCE = 32  # tiles
_COST_OF_TILE = 2  # in blocks, beside those that it meets
_AS_GOOD = 0.005  # of the mean: how much more the largest share may be
_AS_GOOD_IN_BAND = 0.01  # whose lengths are guessed at


def heads_per_section(device: DeviceInfo, causal: bool, heads: int, blocks_per_head: int, bytes_per_head: int) -> int:
    """Heads whose blocks are interleaved, so that a causal problem's long blocks start first.

    As many as fit the L2 cache, but at least `_BLOCKS_PER_SM` blocks for each multiprocessor. All sections are of about
    the same size: the last one's long blocks, if few, would leave most of the GPU idle in the end.
    """
    if not causal:
        return 1
    fitting = device.l2_bytes // max(1, bytes_per_head)
    wanted = max(1, fitting, math.ceil(_BLOCKS_PER_SM * device.sm_count / blocks_per_head))
    return -(-heads // max(1, heads // wanted))


def heads_per_even_section(workers: int, causal: bool, heads: int, tiles_per_head: int) -> int:
    """The same where `workers` (thread blocks, one for each multiprocessor, or clusters of them) take tiles from a
    list: as few as give each a tile and a half, and if possible as many in every section, since sections alternate in
    direction.

    Of short sequences as few as have `_SHORT_SECTION` tiles, if that shares them out as well: then the tiles that need
    a head's keys run at the same time, and memory is read evenly.
    """
    if not causal:
        return 1
    least = math.ceil(1.5 * workers / tiles_per_head)
    even = (n for n in range(least, min(2 * least, heads) + 1) if heads % n == 0)
    usual = next(even, -(-heads // max(1, heads // least)))
    if tiles_per_head > _SHORT_SECTION:
        return usual
    growing = np.arange(tiles_per_head, 0, -1)
    enough = _largest_share(workers, heads, usual, growing, both_ways=True) + _AS_GOOD
    fewer = (n for n in range(-(-_SHORT_SECTION // tiles_per_head), usual) if heads % n == 0)
    return next((n for n in fewer if _largest_share(workers, heads, n, growing, both_ways=True) <= enough), usual)


@dataclass(frozen=True, slots=True)
class Banded:
    """Tiles of `tile` rows out of `rows`, in a band: row r meets the others from r - before to r + behind. Of these
    there are `others`, in blocks of `block`; each of them is `row_bytes` of memory for a head."""

    tile: int
    block: int
    rows: int
    others: int
    before: int
    behind: int
    row_bytes: int

    def met(self) -> NDArray[np.int64]:
        """How many blocks each tile of a head meets."""
        first = np.arange(0, self.rows, self.tile)
        last = np.minimum(first + self.tile, self.rows) - 1
        low, high = (np.clip(x, 0, self.others - 1) // self.block for x in (first - self.before, last + self.behind))
        return high - low + 1

    def bytes_at_once(self, tiles: int) -> int:
        """What neighbouring tiles of a head meet."""
        return min(self.others, tiles * self.tile + self.before + self.behind) * self.row_bytes


def heads_per_banded_section(device: DeviceInfo, workers: int, heads: int, band: Banded, group: int = 1) -> int:
    """`heads_per_even_section` in a band, whose tiles are all of one length but those at the ends: these come again
    after as many tiles as a section has, and if that is a multiple of the workers, or nearly, always to the same ones.

    As few heads as share the work out about as well as any number of them whose rows fit L2. group: heads that share
    keys, which stay together.
    """
    work = band.met() + _COST_OF_TILE
    fewest, *more = (n for n in range(group, heads + 1, group) if heads % n == 0)
    if len(work) * heads > _ROUNDS * workers:  # so many that the ends are little
        return fewest
    fitting = [n for n in more if n // group * band.bytes_at_once(-(-workers // n)) <= device.l2_bytes]
    shares = {n: _largest_share(workers, heads, n, work, both_ways=False) for n in (fewest, *fitting)}
    return next(n for n, share in shares.items() if share <= min(shares.values()) + _AS_GOOD_IN_BAND)


def heads_per_listed_section(workers: int, heads: int, tiles_of_head: int, tiles_of_sequence: int) -> int:
    """Where `workers` take tiles from a list of sequences of any lengths, longest first. tiles_of_head: the most that
    there can be; tiles_of_sequence: of an average one.

    Of short sequences all heads, of one sequence after the other. Of long ones as few as share them out well by
    `_LISTED_TILES`, and if possible as many in every section, so that what they read and add to is in L2. Measured:
    docs/lab/lengths.md.
    """
    if tiles_of_sequence < _LONG_SEQUENCE:
        return heads
    least = min(heads, math.ceil(_LISTED_TILES * workers / tiles_of_head))
    return next((n for n in range(least, 2 * least + 1) if heads % n == 0), least)


def _largest_share(workers: int, heads: int, section: int, work: NDArray[np.int64], *, both_ways: bool) -> float:
    """Of the work of the thread blocks the largest, relative to the mean.

    `Schedule` in sm90/flash_fwd.cu shares it out. work: of a head's tiles in their order, which every other section
    has from its end on (`both_ways`). Enough rounds are looked at to tell.
    """
    tiles_per_head = len(work)
    tiles, blocks = heads * tiles_per_head, min(workers, heads * tiles_per_head)
    linear = np.arange(min(tiles, _ROUNDS * blocks))
    rounds, place = np.divmod(linear, blocks)
    block = np.where(rounds % 2 == 0, place, blocks - 1 - place)
    sections = linear // (section * tiles_per_head)
    forwards = ((heads - 1) // section - sections) % 2 == 0 if both_ways else True
    index = linear % (section * tiles_per_head) // np.minimum(section, heads - sections * section)
    shares = np.bincount(block, work[np.where(forwards, index, tiles_per_head - 1 - index)])
    return float(shares.max() / shares.mean())


def heads_per_turn_section(least: float, heads: int) -> int:
    """Of a list whose blocks add in turn: `least` heads or more, and sections of one size if possible."""
    even = (n for n in range(math.ceil(least), math.ceil(2 * least) + 1) if heads % n == 0)
    return next(even, min(heads, math.ceil(1.4 * least)))
