"""Do two strided arrays have a byte in common? Does an array hold an element twice? Exactly, without touching memory.

Two arrays may be interleaved slices of one buffer, so that their address ranges meet and their elements do not. An
element of array A starts at `a + sum(i[d] * s[d])`, `0 <= i[d] < n[d]`; a common byte is a solution of one linear
equation in bounded non-negative integers. With all coefficients made positive and sorted, real layouts leave one or
two candidates per dimension, gcd(smaller strides) discards most of those, and the last two are solved in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import gcd

__all__ = ["Extent", "has_duplicates", "shares_memory"]

# Candidates looked at before giving up and answering "yes": for outputs, the safe side. Slices of packed buffers need
# fewer than 20.
_MAX_CANDIDATES = 200_000


@dataclass(frozen=True, slots=True)
class Extent:
    """Shape and strides of an array, without its address; dimensions of size 1 and signs are normalised away.

    low, high: it touches only bytes of [pointer + low, pointer + high). terms: (positive stride in bytes, size - 1).
    """

    itemsize: int
    empty: bool
    low: int
    high: int
    terms: tuple[tuple[int, int], ...] = field(repr=False)

    @classmethod
    def of(cls, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> Extent:
        """From a shape and strides in bytes."""
        if 0 in shape:
            return cls(itemsize, True, 0, 0, ())
        low = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if s < 0)
        terms = tuple((abs(s), n - 1) for n, s in zip(shape, strides, strict=True) if n > 1)
        return cls(itemsize, False, low, low + sum(s * u for s, u in terms) + itemsize, terms)


def shares_memory(a_ptr: int, a: Extent, b_ptr: int, b: Extent) -> bool:
    """Whether some byte belongs to an element of both arrays."""
    a_start, b_start = a_ptr + a.low, b_ptr + b.low
    if a.empty or b.empty or a_start >= b_ptr + b.high or b_start >= a_ptr + a.high:
        return False
    return _shares(b_start - a_start, a, b)


@lru_cache(maxsize=4096)
def _shares(delta: int, a: Extent, b: Extent) -> bool:
    # a_start + A + x = b_start + B + y (x, y: a byte within an element), with max(B) - B' for B, max(y) - y' for y.
    terms = [*a.terms, *b.terms, (1, a.itemsize - 1), (1, b.itemsize - 1)]
    target = delta + sum(s * u for s, u in b.terms) + b.itemsize - 1
    return _solvable(terms, target)


@lru_cache(maxsize=4096)
def has_duplicates(extent: Extent) -> bool:
    """Whether two different indices of the array reach a common byte."""
    terms = sorted(extent.terms)
    reach = extent.itemsize
    for stride, bound in terms:
        if stride < reach:
            break
        reach += stride * bound
    else:
        return False  # every dimension steps over all the smaller ones: the usual case
    # Two indices with difference e, |e[d]| <= u[d], of which e[i] > 0 is the first non-zero; e + u is non-negative.
    for i, (stride, bound) in enumerate(terms):
        later = terms[i + 1 :]
        shifted = [(stride, bound - 1), *((s, 2 * u) for s, u in later), (1, 2 * (extent.itemsize - 1))]
        if _solvable(shifted, sum(s * u for s, u in later) + extent.itemsize - 1 - stride):
            return True
    return False


def _solvable(terms: list[tuple[int, int]], target: int) -> bool:
    """Whether sum(s * x) == target for integers 0 <= x <= u, over terms (s, u) with s >= 0."""
    bounds: dict[int, int] = {}
    for stride, bound in terms:
        if stride and bound:
            bounds[stride] = bounds.get(stride, 0) + bound
    strides = sorted(bounds, reverse=True)
    n = len(strides)
    reach, divisor = [0] * (n + 1), [0] * (n + 1)
    for i in range(n - 1, -1, -1):
        reach[i] = reach[i + 1] + strides[i] * bounds[strides[i]]
        divisor[i] = gcd(strides[i], divisor[i + 1])
    candidates = _MAX_CANDIDATES

    def search(i: int, rest: int) -> bool:
        nonlocal candidates
        if not 0 <= rest <= reach[i] or (rest % divisor[i] if i < n else rest):
            return False
        if n - i <= 1:
            return True
        stride, after = strides[i], divisor[i + 1]
        first = max(0, -((reach[i + 1] - rest) // stride))
        last = min(bounds[stride], rest // stride)
        # stride * x = rest (modulo everything smaller): x is fixed modulo `step`.
        common = gcd(stride, after)
        step = after // common
        root = (rest // common) * pow(stride // common, -1, step) % step
        first += (root - first) % step
        if n - i == 2:
            return first <= last  # `first` leaves a multiple of the last stride, within its reach
        for x in range(first, last + 1, step):
            candidates -= 1
            if candidates < 0 or search(i + 1, rest - stride * x):
                return True
        return False

    return search(0, target)
