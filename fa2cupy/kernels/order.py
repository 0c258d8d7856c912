"""In which order thread blocks take tiles (`tile_of` in cuda_src/common/schedule.cuh): how many heads are a section,
whose tiles are interleaved."""

from __future__ import annotations

import math

import numpy as np

from fa2cupy.jit.driver import DeviceInfo

__all__ = ["heads_per_even_section", "heads_per_listed_section", "heads_per_section", "heads_per_turn_section"]

_BLOCKS_PER_SM = 4  # thread blocks for each multiprocessor that a section of a causal problem is to have
_SHORT_SECTION = 16  # tiles
_ROUNDS = 64
_LISTED_TILES = 4.2  # for each worker, of a section of a list


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
    enough = _largest_share(workers, heads, tiles_per_head, usual) + 0.005
    fewer = (n for n in range(-(-_SHORT_SECTION // tiles_per_head), usual) if heads % n == 0)
    return next((n for n in fewer if _largest_share(workers, heads, tiles_per_head, n) <= enough), usual)


def heads_per_listed_section(workers: int, heads: int, tiles_of_head: int) -> int:
    """Where `workers` take tiles from a list of sequences of any lengths, longest first: as few as share them out well
    by `_LISTED_TILES`, and if possible as many in every section. tiles_of_head: the most that there can be.

    Few, so that what long sequences read and add to is in L2. By simulation of mixed lengths: docs/lab/lengths.md.
    """
    least = min(heads, math.ceil(_LISTED_TILES * workers / tiles_of_head))
    return next((n for n in range(least, 2 * least + 1) if heads % n == 0), least)


def _largest_share(workers: int, heads: int, tiles_per_head: int, section: int) -> float:
    """Of the work of the thread blocks the largest, relative to the mean.

    `Schedule` in sm90/flash_fwd.cu shares it out. A tile's work is taken to grow by one from tile to tile of a head.
    Enough rounds are looked at to tell.
    """
    tiles, blocks = heads * tiles_per_head, min(workers, heads * tiles_per_head)
    linear = np.arange(min(tiles, _ROUNDS * blocks))
    rounds, place = np.divmod(linear, blocks)
    block = np.where(rounds % 2 == 0, place, blocks - 1 - place)
    sections = linear // (section * tiles_per_head)
    long_first = ((heads - 1) // section - sections) % 2 == 0
    index = linear % (section * tiles_per_head) // np.minimum(section, heads - sections * section)
    work = np.bincount(block, np.where(long_first, tiles_per_head - index, index + 1))
    return float(work.max() / work.mean())


def heads_per_turn_section(least: float, heads: int) -> int:
    """Of a list whose blocks add in turn: `least` heads or more, and sections of one size if possible."""
    even = (n for n in range(math.ceil(least), math.ceil(2 * least) + 1) if heads % n == 0)
    return next(even, min(heads, math.ceil(1.4 * least)))
