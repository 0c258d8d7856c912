"""What benchmarks/gpt_jax.py and host_cost_jax.py make of numbers. No JAX and no GPU."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks import curves, gpt_jax, host_cost_jax


def test_distances_of_curves() -> None:
    rows = {"fa2cupy": {0: [1.0, 2.0], 1: [0.0, 0.0]}, "cudnn": {0: [1.0, 4.0], 1: [3.0, 3.0]}, "xla": {0: [1.0, 2.0]}}
    found = curves.distances(rows)
    assert found["fa2cupy", "cudnn"] == pytest.approx((math.sqrt(2) + 3) / 2)
    assert found["fa2cupy", "xla"] == 0 and found["cudnn", "xla"] == pytest.approx(math.sqrt(2))
    assert curves.ratios(rows, "fa2cupy")["cudnn"] == pytest.approx((math.sqrt(2) + 3) / 2 / math.sqrt(2))
    assert math.isnan(curves.ratios({name: {0: [1.0]} for name in rows}, "fa2cupy")["xla"])
    assert curves.mean_of_last([9.0, 1.0, 3.0], 2) == 2


def record(ours: float, ms: float) -> dict[str, object]:
    losses = {"fa2cupy": {0: [2.0 + ours] * 30}, "cudnn": {0: [2.0] * 30}, "xla": {0: [2.1] * 30}}
    return {"losses": losses, "norms": losses, "ms": {"fa2cupy": [ms, ms], "cudnn": [10.0, 10.0]}}


def test_bars_of_the_gpt() -> None:
    assert all(held for *_, held in gpt_jax.verdicts(record(0.1, 9.9)))
    assert [text for text, *_, held in gpt_jax.verdicts(record(0.1, 10.1)) if not held] == [
        "ms a step at S 8,192: ours over cudnn"
    ]
    missed = [text for text, *_, held in gpt_jax.verdicts(record(0.6, 9.9)) if not held]
    assert len(missed) == 5 and "mean loss of our last 20 steps, worst seed" in missed
    assert "| fa2cupy - cudnn | 1.00e-01 | 1.00e-01 |" in gpt_jax.table(record(0.1, 9.9))


def test_trainings_that_fit_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA's, which need most, at a fourth of the memory at least; each result where it belongs."""
    seen: list[tuple[set[str], float]] = []

    def train(jobs: Sequence[gpt_jax.Job], at_once: bool, memory: float) -> list[dict[str, Any]]:
        seen.append(({kind for kind, *_ in jobs}, memory))
        assert len(jobs) * memory <= 0.91 and all(shape in shapes for _, shape, *_ in jobs)
        return [{"losses": [hash(job)], "norms": [seed], "ms": 1.0} for job in jobs for seed in job[3:]]

    monkeypatch.syspath_prepend(str(gpt_jax.EXAMPLE.parent))
    shapes = importlib.import_module("gpt_data").SHAPES
    monkeypatch.setattr(gpt_jax, "train", train)
    for seeds, number in ((3, 2), (4, 4)):
        seen.clear()
        found = gpt_jax.run_curves(False, 300, seeds)
        assert len(seen) == number and all(memory >= 0.25 for kinds, memory in seen if "xla" in kinds)
        assert all(kinds == {"xla"} for kinds, _ in seen if "xla" in kinds)
        for kind in gpt_jax.CURVES:
            assert found["losses"][kind] == {s: [hash((kind, "124m", 300, s))] for s in range(seeds)}
            assert found["norms"][kind] == {s: [s] for s in range(seeds)}
    assert gpt_jax.run_times(False) == {"fa2cupy": [1.0, 1.0], "cudnn": [1.0, 1.0]}


def test_bars_of_the_host_cost() -> None:
    row = {"eager": 30.0, "jitted": 30.0, "one more": 14.0}
    ratios = {"eager over jitted": 1.0, "forward and backward, ours over forward and backward, jax.nn": 0.8}
    us, even = {"without": row, "with": {**row, "one more": 1.0}}, {"without": ratios, "with": ratios}
    assert all(held for *_, held in host_cost_jax.verdicts(us, even))
    slow = {"without": ratios, "with": {**ratios, "eager over jitted": 1.1}}
    missed = host_cost_jax.verdicts({"without": {**row, "one more": 15.5}, "with": row}, slow)
    assert [text for text, *_, held in missed if not held] == [
        "one more, without command buffers, us",
        "one more, with command buffers, us",
        "eager over jitted, with command buffers",
    ]
    assert "| one more | 14.0 | 1.0 |" in host_cost_jax.table(us)


def test_rounds_of_the_host_cost() -> None:
    """Everybody comes right after everybody else equally often, and is timed in each round."""
    called: list[str] = []
    calls = {name: functools.partial(called.append, name) for name in "abcdefg"}
    times = host_cost_jax.measure(calls, 14, lambda _: None)
    assert all(len(each) == 14 for each in times.values())
    turns = [name for name, _ in itertools.groupby(called)]
    after = Counter(itertools.pairwise(turns[14:]))
    assert set(after) >= {pair for pair in itertools.product("abcdefg", repeat=2) if pair[0] != pair[1]}
