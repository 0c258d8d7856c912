"""The generator of covering arrays, and the arrays that tests/host runs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.covering import chosen, covering
from tests.gpu.cases import DTYPES
from tests.host import cases

FACTORS: dict[str, tuple[Any, ...]] = {"a": (1, 2, 3, 4), "b": ("x", "y", "z"), "c": (True, False), "d": (1, 2, 3)}


@pytest.mark.parametrize("strength", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, 14])
def test_every_choice_meets_every_other(strength: int, seed: int) -> None:
    made = covering(FACTORS, seed=seed, strength=strength)
    for group in itertools.combinations(FACTORS, strength):
        seen = {tuple(case[name] for name in group) for case in made}
        assert seen == set(itertools.product(*(FACTORS[name] for name in group)))
    assert all(list(case) == list(FACTORS) for case in made)
    least = {1: 4, 2: 12, 3: 36}[strength]
    assert least <= len(made) <= 1.5 * least  # of a product of 72
    assert made == covering(FACTORS, seed=seed, strength=strength)


def test_what_is_impossible_is_left_out() -> None:
    made = covering(FACTORS, impossible=lambda case: case.get("a") == 4 and case.get("b") != "x" and "b" in case)
    assert {case["b"] for case in made if case["a"] == 4} == {"x"}
    pairs = {(case["a"], case["d"]) for case in made}
    assert pairs == set(itertools.product(FACTORS["a"], FACTORS["d"]))
    with pytest.raises(ValueError, match=r"no case has {'a': 1"):
        covering(FACTORS, impossible=lambda case: len(case) == 3)


@pytest.mark.parametrize("strength", [1, 2])
def test_few_of_what_exists_have_every_choice_that_any_has(strength: int) -> None:
    rows = [dict(zip(FACTORS, each, strict=True)) for each in itertools.product(*FACTORS.values())][::3]
    places = chosen(rows, strength=strength)
    assert places == sorted(set(places)) == chosen(rows, strength=strength) and len(places) < len(rows)
    for group in itertools.combinations(FACTORS, strength):
        every = [tuple(row[name] for name in group) for row in rows]
        assert {every[place] for place in places} == set(every)
    assert chosen([]) == []


@pytest.mark.parametrize("backward", [False, True])
def test_the_arrays_of_the_kernels(backward: bool) -> None:
    """Every pair of what kernels are compiled for; every length in every group; few enough to compile."""
    groups = cases.covering_groups(backward)
    assert len(groups) <= 40
    compiled = []
    for group in groups.values():
        choices = {
            (m.arch, (m.case.head_dim, m.case.head_dim_v), m.case.dtype, m.case.causal, m.case.deterministic)
            for m in group
        }
        assert len(choices) == 1
        compiled += choices
        assert len({(m.case.seqlen_q, m.case.seqlen_k) for m in group}) == len(group) == 6
    archs, widths = {each[0] for each in compiled}, {each[1] for each in compiled}
    assert len(archs) == 4 and len(widths) == 9
    factors = (archs, widths, DTYPES, (False, True), (False, True) if backward else (False,))
    for (i, first), (j, second) in itertools.combinations(enumerate(factors), 2):
        assert {(each[i], each[j]) for each in compiled} == set(itertools.product(first, second))
    every = [member for group in groups.values() for member in group]
    assert not any(m.case.pad % 8 or m.case.shift for m in every if m.arch == "sm_90")
    assert len({(m.case.seqlen_q, m.case.heads) for m in every}) > 20
    assert len({(m.case.seqlen_q, m.case.layout, m.flip) for m in every}) > 12
    assert {m.case.batch for m in every} == {1, 2}
