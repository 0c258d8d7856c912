"""The benchmark of features: cells, reference, bars, records and a rehearsal. A made-up GPU, and NumPy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import bench, feature_cells, feature_peers, features, results
from benchmarks.feature_cells import BARS, CELLS, DENSE, GROUPS, MODES, Cell, References, judge, select, tiny
from fa2cupy.keywords import KEYWORDS

OURS = results.OURS
RUN = "2026-01-02T03:04:05Z"
NEEDS = {
    "packed": "cu_seqlens_q", "equal": "cu_seqlens_q", "keypad": "seqused_k", "window": "window_size",
    "scores": "sinks",
}  # fmt: skip


def is_there(cell: Cell) -> bool:
    return KEYWORDS[NEEDS[cell.group]].since is not None


# ---------------------------------------------------------------------------------------------------------------------
# cells


def test_the_cells() -> None:
    groups = {name: [c.name for c in CELLS.values() if c.group == name] for name in GROUPS}
    assert set(groups["packed"]) == {
        "vl_mix_c", "vl_mix_f", "vl_zero_c", "vl_mix_c_gqa", "vl_mix_c_d256", "vl16x1k_c", "vl16x1k_f_d64",
        "vl64x256_c", "vl512x32_f",
    }  # fmt: skip
    assert set(groups["window"]) == {
        "w256_8k", "w1k_8k", "w4k_8k", "w256_32k", "w1k_32k", "w4k_32k", "w512sym_8k", "w1k_8k_gqa", "w1k_8k_d64",
    }  # fmt: skip
    assert set(groups["scores"]) == {
        "softcap30", "softcap50_gqa", "alibi", "sink", "drop_c", "drop_f", "gptoss", "gemma2",
    }  # fmt: skip
    assert groups["keypad"] == ["keypad"] and len(groups["equal"]) == 24
    for cell in CELLS.values():
        assert cell.batch * cell.seqlen == (32768 if cell.seqlen == 32768 else 16384), cell.name
        assert sum(cell.lengths) in (0, cell.seqlen) and cell.num_heads % cell.num_heads_k == 0


@pytest.mark.parametrize("name", ["vl_mix_c", "vl_zero_c", "vl512x32_f", "w1k_8k", "w512sym_8k", "w4k_32k", "keypad"])
def test_live_pairs(name: str) -> None:
    """As they were counted by another program, and as a mask counts them at a tiny size."""
    known = {
        "vl_mix_c": 30278422, "vl_zero_c": 25892928, "vl512x32_f": 524288, "w1k_8k": 15744000, "w512sym_8k": 16268288,
        "w4k_32k": 125859840, "keypad": 19195904,
    }  # fmt: skip
    cell = CELLS[name]
    assert cell.pairs == known[name]
    assert cell.flops("fwd") == 4 * known[name] * cell.num_heads * cell.head_dim == cell.flops("bwd") / 2.5
    small = tiny(cell)
    assert small.pairs == int(live(small).sum()) > 0


def test_selection() -> None:
    assert [c.name for c in select(["keypad", "vl_zero*"])] == ["vl_zero_c", "keypad"]
    assert {c.group for c in select(["w*"])} == {"window"} and {c.group for c in select(["vl*"])} == {"packed"}
    assert len(select(["*"])) == len(CELLS)
    with pytest.raises(ValueError, match="no cell matches 'x\\*'"):
        select(["w*", "x*"])


def test_every_feature_is_left_at_a_tiny_size() -> None:
    for cell in CELLS.values():
        small = tiny(cell)
        assert bool(small.lengths) == bool(cell.lengths) and bool(small.used) == bool(cell.used)
        assert (0 in small.lengths) == (0 in cell.lengths) and small.pairs < 10_000
        assert [w > 0 for w in small.window] == [w > 0 for w in cell.window] and max(small.window) < small.seqlen / 2
        assert all(getattr(small, what) == getattr(cell, what) for what in ("softcap", "alibi", "sinks", "dropout"))
        assert (small.num_heads == small.num_heads_k) == (cell.num_heads == cell.num_heads_k)


# ---------------------------------------------------------------------------------------------------------------------
# what is right


def live(cell: Cell) -> np.ndarray:
    """(rows, rows) of the flat batch: whether a query sees a key."""
    rows = cell.batch * cell.seqlen
    lengths = cell.lengths or (cell.seqlen,) * cell.batch
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    place = np.concatenate([np.arange(length) for length in lengths])
    i, j = place[:, None], place[None]
    mask = (sequence[:, None] == sequence[None]) & np.ones((rows, rows), bool)
    if cell.causal:
        mask &= j <= i
    left, right = cell.window
    mask &= (j >= i - left) if left >= 0 else True
    mask &= (j <= i + right) if right >= 0 else True
    if cell.used:
        mask &= j < np.asarray(cell.used)[sequence][None]
    return mask


def by_the_mask(cell: Cell, arrays: Sequence[np.ndarray], sinks: Any = None) -> list[np.ndarray]:
    """out, dq, dk, dv of the flat batch, by one matrix of scores a head; nothing is dropped."""
    q, k, v, dout = (a.astype(np.float64) for a in arrays)
    group, scale, mask = cell.num_heads // cell.num_heads_k, cell.head_dim**-0.5, live(cell)
    found = [np.zeros_like(a) for a in (q, q, k, v)]
    for h in range(cell.num_heads):
        hk = h // group
        s, slant = q[:, h] @ k[:, hk].T * scale, np.ones(mask.shape)
        if cell.softcap:
            slant = np.cosh(s / cell.softcap) ** -2
            s = cell.softcap * np.tanh(s / cell.softcap)
        if cell.alibi:
            rows = np.arange(len(s))
            s = s - 2.0 ** (-8 * (h + 1) / cell.num_heads) * abs(rows[:, None] - rows[None])
        s = np.where(mask, s, -np.inf)
        top = s.max(-1, keepdims=True)
        p = np.exp(s - top)
        p /= p.sum(-1, keepdims=True) + (np.exp(float(sinks[h]) - top) if cell.sinks else 0)
        dp = dout[:, h] @ v[:, hk].T
        ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * slant * scale
        found[0][:, h], found[1][:, h] = p @ v[:, hk], ds @ k[:, hk]
        found[2][:, hk] += ds.T @ q[:, h]
        found[3][:, hk] += p.T @ dout[:, h]
    return found


@pytest.mark.parametrize("rows_at_once", [24, 1024])
@pytest.mark.parametrize(
    "name",
    ["vl_zero_c", "vl_mix_f", "vl_mix_c_gqa", "w1k_8k", "w512sym_8k", "w1k_8k_gqa", "keypad", "softcap30", "alibi",
     "sink", "drop_f", "gptoss", "gemma2"],
)  # fmt: skip
def test_the_reference(name: str, rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cells, "ROWS_AT_ONCE", rows_at_once)
    cell = tiny(CELLS[name])
    tensors = feature_peers.make_tensors(cell, "numpy")
    right = by_the_mask(cell, tensors.flat(), tensors.sinks)
    references = References(np, cell, tensors.flat(), tensors.sinks)
    shaped = [a.reshape(t.shape) for a, t in zip(right, (tensors.q, tensors.q, tensors.k, tensors.v), strict=True)]
    assert references.errors(shaped[:1], "fwd")["out"] < 1e-14
    assert all(error < 1e-13 for error in references.errors(shaped[1:], "bwd").values())
    for mode in MODES if not cell.dropout else ():  # the contestant of a rehearsal
        found = feature_peers.as_given(feature_peers.make("formula", cell, tensors, mode)(), tensors, mode)
        assert all(error < 1e-6 for error in references.errors(found, mode).values())


def test_what_is_wrong_is_seen() -> None:
    """A window that is off by one, a neighbour's keys, a number that is not finite, outside of what is sampled too."""
    cell = tiny(CELLS["w4k_8k"])
    tensors = feature_peers.make_tensors(cell, "numpy")
    references = References(np, cell, tensors.flat())
    out, *gradients = by_the_mask(replace(cell, window=(cell.window[0] + 1, 0)), tensors.flat())
    assert references.errors([out], "fwd")["out"] > cell.right
    assert all(error > cell.right for error in references.errors(gradients, "bwd").values())

    cell = tiny(CELLS["vl_mix_f"])
    tensors = feature_peers.make_tensors(cell, "numpy")
    references = References(np, cell, tensors.flat())
    out = by_the_mask(replace(cell, lengths=(sum(cell.lengths),)), tensors.flat())[0]
    assert references.errors([out], "fwd")["out"] > cell.right
    out = by_the_mask(cell, tensors.flat())[0]
    assert references.errors([out], "fwd")["out"] < cell.right
    out[-1, -1, -1] = np.nan
    assert references.errors([out], "fwd")["out"] == math.inf


def test_dropout_is_right_on_average() -> None:
    """Neither what drops nothing, nor what does not divide, nor what only adds noise."""
    cell = CELLS["drop_f"]
    cell = replace(cell, batch=1, seqlen=256, num_heads=1, num_heads_k=1, head_dim=16)
    tensors = feature_peers.make_tensors(cell, "numpy")
    references = References(np, cell, tensors.flat())
    q, k, v, _ = (x[:, 0].astype(np.float64) for x in tensors.flat())
    p = np.exp(q @ k.T / 4)
    p /= p.sum(-1, keepdims=True)
    kept = np.random.default_rng(3).random(p.shape) >= cell.dropout
    outs = {"dropped": p * kept / 0.9, "plain": p, "not divided": p * kept * 0.9, "twice": 2 * p}
    wrong = {name: bool(references.wrong([(weights @ v)[:, None]], "fwd")) for name, weights in outs.items()}
    assert wrong == {"dropped": False, "plain": True, "not divided": True, "twice": True}


def test_long_cells_are_sampled() -> None:
    for name, count in (("vl512x32_f", 18), ("vl_mix_c", 23), ("w1k_8k", 2), ("vl_zero_c", 7)):
        chosen = list(feature_cells._sampled(CELLS[name]))
        assert len(chosen) <= count and all(rows for (_, rows, _), _ in chosen)
        lengths = CELLS[name].lengths or (CELLS[name].seqlen,)
        assert max(lengths) in {rows for (_, rows, _), _ in chosen}
    assert len({head for _, head in feature_cells._sampled(CELLS["vl512x32_f"])}) == 16


# ---------------------------------------------------------------------------------------------------------------------
# bars


def run_of(speed: Callable[[Cell, str], float], cells: Sequence[Cell] = tuple(CELLS.values())) -> list[dict[str, Any]]:
    """A run where ours is so many times as fast as the best of the others, which take a millisecond."""
    records = []
    for cell in cells:
        for number, mode in enumerate(MODES):
            for peer, ms in ((OURS, 1 / speed(cell, mode)), ("fa2", 3.0), *((p, 1.0) for p in cell.best[number])):
                records.append(
                    results.make_feature_record(
                        RUN, cell.name, peer, mode, ms, cell.flops(mode), "NVIDIA H200", "abc", wrong=False
                    )
                )
    return records


def enough(cell: Cell, mode: str) -> float:
    bar = BARS[cell.group, mode]
    return bar.mean or max(1.0, feature_cells._floor(cell, mode, bar))


def test_the_bars_are_the_issues() -> None:
    assert {key: (bar.mean, round(bar.floor, 3)) for key, bar in BARS.items()} == {
        ("packed", "fwd"): (1.03, 0.95), ("packed", "bwd"): (1.12, 0.97),
        ("window", "fwd"): (1.05, 0.97), ("window", "bwd"): (1.08, 0.97),
        ("keypad", "fwd"): (None, 1.0), ("keypad", "bwd"): (None, 1.25),
        ("equal", "fwd"): (None, 0.971), ("equal", "bwd"): (None, 0.971),
        ("scores", "fwd"): (None, 0.0), ("scores", "bwd"): (None, 0.0),
    }  # fmt: skip
    assert {cell.name: cell.floors for cell in CELLS.values() if cell.floors} == {
        "softcap30": (0.97, 1.35), "softcap50_gqa": (0.97, 1.35), "alibi": (1.02, 0.97), "sink": (1.02, 1.02),
        "drop_c": (1.7, 1.15), "drop_f": (1.7, 1.15), "gptoss": (1.5, 1.5), "gemma2": (1.25, 1.4),
    }  # fmt: skip


def test_bars_that_are_reached() -> None:
    judged = judge(run_of(lambda cell, mode: 1.001 * enough(cell, mode)), GROUPS)
    assert judged.missed == () and len(judged.lines) == 10 and all(line.endswith(": reached") for line in judged.lines)


@pytest.mark.parametrize(("group", "mode"), list(BARS))
def test_a_bar_that_is_missed(group: str, mode: str) -> None:
    """Each mean and each floor by itself, by two per mille."""
    others = [name for name in GROUPS if name != group]
    bar, good = BARS[group, mode], run_of(lambda cell, m: 1.001 * enough(cell, m))
    if bar.mean:
        low = 0.998 * bar.mean
        records = run_of(lambda cell, m: low if (cell.group, m) == (group, mode) else 1.001 * enough(cell, m))
        judged = judge(records, GROUPS)
        assert len(judged.missed) == 1 and "a mean of" in judged.missed[0] and GROUPS[group].title in judged.missed[0]
        assert judge(records, others).missed == ()
    last = [cell for cell in CELLS.values() if cell.group == group][-1]  # of the equal lengths one of 8,192

    def with_floor(share: float) -> list[dict[str, Any]]:
        slow = [dict(r) for r in good]
        for record in slow:
            if (record["cell"], record["mode"], record["peer"]) == (last.name, mode, OURS):
                record["ms"] = 1 / (share * feature_cells._floor(last, mode, bar))
            elif record["cell"] != last.name and record["peer"] == OURS:
                record["ms"] /= 1.5  # no mean is missed
        return slow

    assert judge(with_floor(1.002), GROUPS).missed == ()
    (missed,) = judge(with_floor(0.998), GROUPS).missed
    assert missed.startswith(f"{last.name} {mode}: ") and "below" in missed


def test_short_equal_lengths_have_a_bar_of_their_own() -> None:
    def at(share: float) -> tuple[str, ...]:
        return judge(run_of(lambda cell, mode: share), ["equal"]).missed

    assert at(1 / 1.029) == ()
    missed = at(1 / 1.05)
    assert missed and all("eq1k" not in text for text in missed) and len(missed) == 2 * 18
    assert len(at(1 / 1.07)) == 2 * 24


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: None if r["peer"] == OURS else r, "w1k_8k fwd: ours was not measured"),
        (lambda r: {**r, "wrong": True} if r["peer"] == OURS else r, "w1k_8k fwd: ours is wrong"),
        (lambda r: None if r["peer"] == "fa4" else r, "w1k_8k fwd: without fa4, the fastest"),
        (lambda r: {**r, "wrong": True} if r["peer"] != OURS else r, "w1k_8k fwd: none of the others is right"),
    ],
)
def test_what_was_not_seen_is_not_passed(change: Callable[[dict[str, Any]], dict[str, Any] | None], said: str) -> None:
    records = run_of(lambda cell, mode: 2.0)
    changed = [change(r) if (r["cell"], r["mode"]) == ("w1k_8k", "fwd") else r for r in records]
    (missed,) = judge([r for r in changed if r], GROUPS).missed
    assert missed.startswith(said)


def test_a_wrong_peer_is_not_the_bar() -> None:
    records = run_of(lambda cell, mode: 1.8)
    for record in records:
        if record["peer"] == "fa2":
            record |= {"ms": 0.1, "wrong": True}
    assert judge(records, GROUPS).missed == ()
    assert "fa2 " in (text := features.table(records)) and "!" in text and "1.800 of fa4" in text


# ---------------------------------------------------------------------------------------------------------------------
# the command


class MadeUpClock:
    """A millisecond a call, and a library whose host never keeps up."""

    def __init__(self, slow: Callable[[], object] | None = None) -> None:
        self.slow = slow

    def burst(self, call: Callable[[], object], calls: int, delay_ms: float) -> tuple[float, bool]:
        return 1.0, call is not self.slow


def test_a_rehearsal(capsys: pytest.CaptureFixture[str]) -> None:
    """Every cell by NumPy: right where the keyword is there, and missing, never passed, where it is not."""
    lacking = [cell.name for cell in CELLS.values() if not is_there(cell)]
    assert bench.main(["--cases", "features", "--rehearse"]) == 0
    printed = capsys.readouterr().out
    for cell in CELLS.values():
        for mode in MODES:
            assert (f"{cell.name} {mode}: right; fa2cupy " in printed) == is_there(cell), (cell.name, mode)
    assert f"{len(CELLS)} cells rehearsed, {2 * len(lacking)} missing, 0 failed or wrong" in printed
    if lacking:
        assert bench.main(["--cases", "features", "--rehearse", "--check", "--cells", lacking[0]]) == 1
        assert f"missing: {lacking[0]} fwd, {lacking[0]} bwd: " in capsys.readouterr().out
    assert bench.main(["--cases=features", "--rehearse", "--check", "--cells", "w1k_8k,w512*"]) == 0


@pytest.fixture
def liar(monkeypatch: pytest.MonkeyPatch) -> str:
    """A peer that computes without the window, on the CPU."""

    def make(cell: Cell, t: feature_peers.Tensors, mode: str) -> Callable[[], Any]:
        return feature_peers._formula(replace(cell, window=(-1, -1)), t, mode)

    monkeypatch.setitem(feature_peers._MAKERS, "fa2", make)
    return "fa2"


def test_a_rehearsal_of_what_is_wrong(
    liar: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(feature_peers._MAKERS, OURS, feature_peers._MAKERS[liar])
    assert features.main(["--rehearse", "--cells", "w1k_8k"]) == 1
    assert "w1k_8k fwd: FAILED: fa2cupy: out is off by" in (printed := capsys.readouterr().out)
    assert "w1k_8k bwd: FAILED: fa2cupy: dq is off by" in printed and "2 failed or wrong" in printed


def on_cpu(monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str], clock: Any = None) -> int:
    """`on_gpu` with NumPy, tiny cells and a made-up clock."""
    monkeypatch.setattr(
        feature_peers, "probe", lambda names: {"fa3": "ImportError: no wheel"} if "fa3" in names else {}
    )
    whole = features.measure
    monkeypatch.setattr(features, "measure", lambda cell, *rest: whole(tiny(cell), *rest))
    args = features.parse(arguments)
    try:
        return features.on_gpu(args, "NVIDIA H200", "numpy", clock or MadeUpClock())
    finally:
        monkeypatch.setattr(features, "measure", whole)


def test_a_run(liar: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(feature_peers._MAKERS, "fa4", feature_peers._formula)
    monkeypatch.setitem(feature_peers._MAKERS, "vfa3", feature_peers._fa3)  # which has neither windows nor a backward
    usual = [
        "--cells",
        "w1k_8k",
        "--peers",
        "fa2,fa3,vfa3,fa4",
        "--out",
        str(tmp_path),
        "--run",
        RUN,
        "--commit",
        "abc",
    ]
    assert on_cpu(monkeypatch, usual) == 0
    printed = capsys.readouterr().out
    assert "absent: fa3 (ImportError: no wheel)" in printed and "does not run: vfa3 (it has no windows)" in printed
    assert "wrong: fa2 (out is off by" in printed
    records = results.load(tmp_path / "h200.jsonl")
    assert all(
        list(r) == ["run", "cell", "peer", "mode", "ms", "tflops", "wrong", "gpu", "date", "commit"] for r in records
    )
    assert [(r["peer"], r["mode"], r["wrong"]) for r in records] == [
        (peer, mode, peer == "fa2") for mode in MODES for peer in (OURS, "fa2", "fa4")
    ]
    assert {(r["run"], r["cell"], r["gpu"], r["date"], r["commit"]) for r in records} == {
        (RUN, "w1k_8k", "NVIDIA H200", "2026-01-02", "abc")
    }
    # the same cell again is refused before anything is measured, and the bars of a part of a group are missed
    with pytest.raises(SystemExit, match="w1k_8k fwd, w1k_8k bwd: already in run"):
        on_cpu(monkeypatch, usual)
    assert features.main(["--records", "--cells", "w*", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "missed: w1k_8k fwd: without vfa3" in printed and "missed: w4k_32k fwd; w512sym_8k fwd; " in printed
    assert "w1k_8k_d64 bwd: ours was not measured" in printed
    assert features.main(["--records", "--cells", "w*", "--out", str(tmp_path), "--check"]) == 1
    assert on_cpu(monkeypatch, [*usual[2:], "--cells", "w4k_8k", "--check"]) == 1


def test_records_that_reach_every_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "h200.jsonl"
    records = run_of(lambda cell, mode: 1.001 * enough(cell, mode))
    old = [{**r, "run": "older", "ms": 1e3} for r in records]
    path.write_text("".join(json.dumps(r) + "\n" for r in [*old, *records]))
    assert bench.main(["--cases", "features", "--records", "--check", "--out", str(path)]) == 0
    assert "every bar is reached" in capsys.readouterr().out
    assert features.main(["--records", "--check", "--out", str(path), "--run", "older"]) == 1
    with pytest.raises(SystemExit, match="no records of run nothing"):
        features.main(["--records", "--out", str(path), "--run", "nothing"])
    with pytest.raises(SystemExit, match="here are 0"):
        features.main(["--records", "--out", str(tmp_path / "none")])


def test_committed_records_of_features() -> None:
    for path in features.FOLDER.glob("*.jsonl"):
        records = results.load(path)
        assert all(tuple(r) == results.FEATURE_KEYS for r in records), path
        assert all(r["cell"] in CELLS and r["mode"] in MODES for r in records), path
        assert len({(r["run"], r["cell"], r["mode"], r["peer"]) for r in records}) == len(records), path


def test_the_time_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--cells", "w1k_8k,w4k_8k", "--peers", "fa2", "--out", str(tmp_path), "--run", RUN, "--seconds", "-1"]
    assert on_cpu(monkeypatch, arguments) == 0
    assert f"out of time; next: the same command with --cells w1k_8k,w4k_8k --run {RUN}" in capsys.readouterr().out
    assert on_cpu(monkeypatch, [*arguments, "--check"]) == 1


def test_ours_that_fails_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(cell: Cell, t: feature_peers.Tensors, mode: str) -> Callable[[], Any]:
        raise RuntimeError("no such kernel")

    arguments = ["--cells", "w1k_8k", "--peers", "fa4", "--out", str(tmp_path), "--run", RUN]
    monkeypatch.setitem(feature_peers._MAKERS, "fa4", fails)
    assert on_cpu(monkeypatch, arguments) == 0  # a peer may fail
    assert "does not run: fa4 (RuntimeError: no such kernel)" in capsys.readouterr().out
    monkeypatch.setitem(feature_peers._MAKERS, OURS, fails)
    assert on_cpu(monkeypatch, [*arguments[:-1], "again"]) == 1
    assert "w1k_8k bwd: FAILED: RuntimeError: no such kernel" in capsys.readouterr().out


def test_a_host_that_is_too_slow_is_left_out() -> None:
    row = features.Found()
    calls = {OURS: lambda: 0, "fa4": lambda: 1}
    features._time(calls, MadeUpClock(calls["fa4"]), 4, 12.0, row)
    assert row.times == {OURS: 1.0} and row.refused["fa4"].startswith("fa4: queueing") and not row.failed
    row = features.Found()
    features._time(calls, MadeUpClock(calls[OURS]), 4, 12.0, row)
    assert row.times == {"fa4": 1.0} and row.failed.startswith("fa2cupy: queueing")


def test_who_is_far_behind_gets_two_bursts() -> None:
    class Clock:
        def __init__(self) -> None:
            self.asked: list[object] = []

        def burst(self, call: Callable[[], object], calls: int, delay_ms: float) -> tuple[float, bool]:
            self.asked.append(call())
            return {OURS: 1.4, "fa4": 1.0, "fa2": 2.0, "wrong": 0.1}[str(call())], True

    clock, row = Clock(), features.Found(wrong={"wrong": "out"})
    calls = {name: (lambda name=name: name) for name in (OURS, "fa4", "fa2", "wrong")}
    features._time(calls, clock, 6, 12.0, row)
    assert row.times == {OURS: 1.4, "fa4": 1.0, "fa2": 2.0, "wrong": 0.1}
    assert {name: clock.asked.count(name) for name in calls} == {OURS: 10, "fa4": 10, "fa2": 3, "wrong": 3}


def test_work_off_the_stream_is_timed_by_the_wall() -> None:
    waited: list[object] = []
    clock = features.EitherClock(MadeUpClock())
    assert clock.burst(lambda: 0, 3, 5.0) == (1.0, True)
    ms, in_time = clock.burst(feature_peers.Queued(lambda: 7, waited.append), 3, 5.0)
    assert in_time and 0 <= ms < 1.0 and waited == [7, 7]


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    args = features.parse([])
    assert len(args.selected) == len(CELLS) and tuple(args.peers) == feature_peers.OTHERS and not args.check
    for wrong in (["--peers", "fa5"], ["--modes", "up"], ["--cells", "nothing"]):
        with pytest.raises(SystemExit):
            features.parse(wrong)
    assert features.main(["--list", "--cells", "keypad,eq1k_c"]) == 0
    assert "keypad  B8 S2048 H16/16 D128 full, 523 to 1537 keys used" in capsys.readouterr().out
    assert features.contestants(CELLS["eq1k_c"], ["fa4"]) == [OURS, DENSE]
    assert features.contestants(CELLS["w1k_8k"], ["fa4"]) == [OURS, "fa4"]
