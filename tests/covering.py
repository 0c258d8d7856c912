"""Covering arrays: few cases in which every choice of a few factors meets every choice of every other few.

    python -m tests.covering                 the arrays that tests/host runs
    FA2_TEST_SEED=7 pytest tests/host        other ones, of another seed

A bug is rarely in more than two choices at once, so arrays of strength 2 stand for products of everything.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

SEED = int(os.environ.get("FA2_TEST_SEED") or 14)

Partial = Mapping[str, Any]


def covering(
    factors: Mapping[str, Sequence[Any]],
    *,
    seed: int = SEED,
    strength: int = 2,
    impossible: Callable[[Partial], bool] = lambda partial: False,
    tries: int = 12,
) -> list[dict[str, Any]]:
    """Cases, each a value for every factor, that together have all values of every `strength` factors.

    impossible: whether the values that are chosen so far exclude each other; such a case is not made. Greedy: of a few
    random attempts the one that covers most of what is still missing. The same seed gives the same cases.
    """
    chance = random.Random(seed)
    groups = list(itertools.combinations(factors, strength))
    chosen_from = [(group, values) for group in groups for values in itertools.product(*(factors[f] for f in group))]
    missing = {pair for pair in chosen_from if not impossible(dict(zip(*pair, strict=True)))}
    cases = []
    while missing:
        first = next(pair for pair in chosen_from if pair in missing)
        attempts = (_attempt(first, factors, groups, missing, impossible, chance) for _ in range(tries))
        found = [attempt for attempt in attempts if attempt is not None]
        if not found:
            raise ValueError(f"no case has {dict(zip(*first, strict=True))}: let `impossible` say so")
        case = max(found, key=lambda each: len(missing & set(_covered(each, groups))))
        missing -= set(_covered(case, groups))
        cases.append({name: case[name] for name in factors})
    return cases


def chosen(rows: Sequence[Partial], *, seed: int = SEED, strength: int = 2) -> list[int]:
    """Places of few of the rows, in order, that have all values of every `strength` factors that any row has.

    A row has a value for every factor. For what exists and is not made: one after the other, the row that adds most.
    """
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    has = [set(_covered(row, list(itertools.combinations(sorted(row), strength)))) for row in rows]
    missing = set().union(*has)
    found = []
    while missing:
        best = max(order, key=lambda place: len(missing & has[place]))
        missing -= has[best]
        found.append(best)
    return sorted(found)


def _attempt(
    first: tuple[tuple[str, ...], tuple[Any, ...]],
    factors: Mapping[str, Sequence[Any]],
    groups: Sequence[tuple[str, ...]],
    missing: set[Any],
    impossible: Callable[[Partial], bool],
    chance: random.Random,
) -> dict[str, Any] | None:
    """A case with `first` in it, the other factors in random order; None where nothing is possible any more."""
    case = dict(zip(*first, strict=True))
    for name in chance.sample(sorted(factors.keys() - case.keys()), len(factors) - len(case)):
        values = [value for value in factors[name] if not impossible({**case, name: value})]
        if not values:
            return None
        mine = [group for group in groups if name in group]
        gains = [sum(pair in missing for pair in _covered({**case, name: value}, mine)) for value in values]
        case[name] = chance.choice([v for v, gain in zip(values, gains, strict=True) if gain == max(gains)])
    return case


def _covered(case: Partial, groups: Iterable[tuple[str, ...]]) -> list[tuple[tuple[str, ...], tuple[Any, ...]]]:
    """The groups of which a case has every factor, with its values."""
    return [(group, tuple(case[name] for name in group)) for group in groups if case.keys() >= set(group)]


def main() -> None:
    from tests.host import cases

    print(f"seed {SEED}")
    for title, groups in (("forward", cases.covering_groups(False)), ("backward", cases.covering_groups(True))):
        print(f"{title}: {len(groups)} groups, {sum(map(len, groups.values()))} cases")
        for name, members in groups.items():
            print(f"  {name}: {'; '.join(str(member) for member in members)}")


if __name__ == "__main__":
    main()
