"""How far loss curves lie from each other: trainings that differ only in who computes attention, seed by seed.

Such curves differ by the order in which numbers are rounded, and the difference grows. So ours is judged by the
difference of two others from each other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

__all__ = ["distances", "mean_of_last", "ratios"]

Curves = Mapping[str, Mapping[int, Sequence[float]]]  # attention -> seed -> a number for each step


def distances(curves: Curves) -> dict[tuple[str, str], float]:
    """Two attentions -> rms over the steps of the differences of their curves, mean over the seeds that both have."""
    found = {}
    for one, other in itertools.combinations(curves, 2):
        each = [_rms(curves[one][seed], curves[other][seed]) for seed in curves[one] if seed in curves[other]]
        found[one, other] = sum(each) / len(each) if each else math.nan
    return found


def _rms(one: Sequence[float], other: Sequence[float]) -> float:
    squares = [(a - b) ** 2 for a, b in zip(one, other, strict=True)]
    return math.sqrt(sum(squares) / len(squares))


def ratios(curves: Curves, ours: str) -> dict[str, float]:
    """Of three attentions: our distance from each of the others, over that of the others from each other."""
    first, second = (name for name in curves if name != ours)
    found = {frozenset(pair): distance for pair, distance in distances(curves).items()}
    between = found[frozenset((first, second))]
    return {name: found[frozenset((ours, name))] / between if between else math.nan for name in (first, second)}


def mean_of_last(curve: Sequence[float], steps: int = 20) -> float:
    return sum(curve[-steps:]) / len(curve[-steps:])
