"""`overlap.py` against brute force, and on the layouts that people really have."""

from __future__ import annotations

import itertools
import random
import time

import numpy as np
import pytest

from fa2cupy.frameworks import overlap
from fa2cupy.frameworks.overlap import Extent, has_duplicates, shares_memory


def touched(ptr: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> list[set[int]]:
    """The bytes of each element."""
    starts = (ptr + sum(i * s for i, s in zip(index, strides, strict=True)) for index in np.ndindex(*shape))
    return [set(range(start, start + itemsize)) for start in starts]


def test_against_brute_force() -> None:
    rng = random.Random(2)
    seen = {False: 0, True: 0}
    twice = {False: 0, True: 0}
    for _ in range(6000):
        arrays = []
        for _ in range(2):
            ndim = rng.randint(1, 4)
            shape = tuple(0 if rng.random() < 0.03 else rng.randint(1, 4) for _ in range(ndim))
            strides = tuple(rng.choice([0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, -2, -3, -7, 24, 30]) for _ in range(ndim))
            arrays.append((rng.randint(0, 60), shape, strides, rng.choice([1, 2, 4])))
        extents = [Extent.of(*array[1:]) for array in arrays]
        bytes_of = [touched(*array) for array in arrays]
        meet = bool(set().union(*bytes_of[0]) & set().union(*bytes_of[1]))
        assert shares_memory(arrays[0][0], extents[0], arrays[1][0], extents[1]) == meet, arrays
        assert shares_memory(arrays[1][0], extents[1], arrays[0][0], extents[0]) == meet, arrays
        seen[meet] += 1
        elements = bytes_of[0]
        duplicate = sum(map(len, elements)) != len(set().union(*elements))
        assert has_duplicates(extents[0]) == duplicate, arrays[0]
        twice[duplicate] += 1
    assert min(*seen.values(), *twice.values()) > 500


def overlaps(a: np.ndarray, b: np.ndarray) -> bool:
    pointers = [x.__array_interface__["data"][0] for x in (a, b)]
    extents = [Extent.of(x.shape, x.strides, x.itemsize) for x in (a, b)]
    return shares_memory(pointers[0], extents[0], pointers[1], extents[1])


def huge(shape: tuple[int, ...]) -> np.ndarray:
    """An array that was never touched: addresses only."""
    return np.lib.stride_tricks.as_strided(np.zeros(1, np.float16), shape, np.cumprod([1, *shape[:0:-1]])[::-1] * 2)


PACKED = huge((8, 4096, 3, 16, 128))
GROUPED = huge((8, 4096, 24, 128))  # 16 query heads, 4 key heads, 4 value heads


@pytest.mark.parametrize(
    ("a", "b", "meet"),
    [
        (PACKED[:, :, 0], PACKED[:, :, 1], False),
        (PACKED[:, :, 0], PACKED[:, :, 0], True),
        (PACKED[:, :, 0].transpose(0, 2, 1, 3), PACKED[:, :, 2], False),
        (PACKED[:, :, 0, :, :64], PACKED[:, :, 0, :, 64:], False),
        (PACKED[:, :, 0, :, :65], PACKED[:, :, 0, :, 64:], True),
        (PACKED[:, ::2], PACKED[:, 1::2], False),
        (PACKED[:, ::-2, 0], PACKED[:, ::2, 0], False),
        (PACKED[:, ::-3, 0], PACKED[:, ::2, 0], True),
        (PACKED[:, :, 0, ::2], PACKED[:, :, 0, 1::2], False),
        (PACKED[..., ::2], PACKED[..., 1::2], False),
        (GROUPED[:, :, :16], GROUPED[:, :, 16:20], False),
        (GROUPED[:, :, 16:20], GROUPED[:, :, 20:], False),
        (GROUPED[:, :, :17], GROUPED[:, :, 16:20], True),
        (GROUPED[:4], GROUPED[4:], False),
        (GROUPED[:5], GROUPED[4:], True),
        (GROUPED[:, :2048], GROUPED[:, 2048:], False),
        (GROUPED[:, 5:5], GROUPED, False),
    ],
)
def test_slices_of_one_buffer(a: np.ndarray, b: np.ndarray, meet: bool) -> None:
    overlap._shares.cache_clear()
    start = time.perf_counter()
    assert overlaps(a, b) == meet
    assert overlaps(b, a) == meet
    assert time.perf_counter() - start < 0.2


def test_elements_of_different_size() -> None:
    lse = np.zeros(64, np.float32)
    out = lse.view(np.float16)
    assert overlaps(lse[::2], out[1::4])  # the second half of an element
    assert not overlaps(lse[::2], out[2::4])


def test_gives_up_on_the_safe_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_MAX_CANDIDATES", 0)
    overlap._shares.cache_clear()
    assert overlaps(PACKED[:, :, 0], PACKED[:, :, 0])


def test_duplicates() -> None:
    assert has_duplicates(Extent.of((4, 3), (0, 2), 2))
    assert not has_duplicates(Extent.of((1, 3), (0, 2), 2))
    assert has_duplicates(Extent.of((3, 4), (4, 2), 2))  # a sliding window
    assert not has_duplicates(Extent.of((2, 3), (3, 2), 1))  # 0 2 4 3 5 7: not nested, and yet no element twice
    assert has_duplicates(Extent.of((4,), (1,), 2))  # elements that overlap by half
    assert not has_duplicates(Extent.of((0, 4), (0, 0), 2))
    for order in itertools.permutations(range(4)):
        array = np.empty((3, 5, 2, 8), np.float16).transpose(order)
        assert not has_duplicates(Extent.of(array.shape, array.strides, 2))
