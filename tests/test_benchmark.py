"""The benchmark's own arithmetic, on a made-up GPU: turns, records, ratios, pictures, filters."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import against, bench, cases, feature_peers, host_cost, peers, plot, results, timing, variants
from benchmarks.cases import Case
from fa2cupy import jit
from fa2cupy.jit import driver

ROOT = Path(__file__).resolve().parents[1]
KEYS = [
    "run", "cell", "peer", "kernel", "nvrtc", "mode", "head_dim", "head_dim_v", "seqlen", "causal", "dtype", "batch",
    "num_heads", "num_heads_k", "ms", "tflops", "wrong", "workspace_bytes", "peak_bytes", "gpu", "date", "commit",
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# cells


def test_the_grid_is_the_72_cells() -> None:
    grid = cases.grid()
    assert len(grid) == len(set(grid)) == 72
    assert all(c.batch * c.seqlen == 16384 and c.num_heads * c.head_dim == 2048 for c in grid)
    assert {c.mode for c in grid} == {"fwd", "bwd"}


def test_flops_are_the_fields() -> None:
    full = Case("fwd", 128, 4096, False, 4, 16, 16)
    assert full.flops == 4 * 4 * 16 * 4096**2 * 128
    assert replace(full, causal=True).flops == full.flops / 2
    assert replace(full, mode="bwd").flops == 2.5 * full.flops
    wide = Case("bwd", 192, 4096, True, 4, 16, 16, head_dim_v=128)
    assert wide.flops == 2 * 4 * 16 * 4096**2 * (3 * 192 + 2 * 128) / 2


def test_labels_are_specifications() -> None:
    every = [c for make in cases.CASE_SETS.values() for c in make()]
    assert all(cases.parse_case(c.label) == c for c in every)
    assert cases.parse_case("bwd:d192/128:b2:s4096:h32/8:causal:fp16") == Case(
        "bwd", 192, 4096, True, 2, 32, 8, "float16", 128
    )
    with pytest.raises(ValueError, match="fwd:d128"):
        cases.parse_case("fwd:128")


def test_wide_cells() -> None:
    wide = cases.CASE_SETS["wide"]()
    assert len(wide) == len(set(wide)) == 3 * 2 * 2 * 2
    assert {(c.head_dim, c.head_dim_v) for c in wide} == {(96, 96), (192, 192), (192, 128)}
    assert all(c.batch * c.seqlen == 16384 and c.num_heads == c.num_heads_k == 16 for c in wide)
    assert "fwd:d192/128:b1:s16384:h16:causal:bf16" in {c.label for c in wide}


def test_kernel_family_is_of_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of what would run without FA2CUPY_KERNEL, or with another NVRTC."""
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(current_device=lambda: 0)))
    monkeypatch.setattr(driver, "device_info", lambda index: variants.device_of("sm_90a"))
    monkeypatch.setattr(jit, "expected_nvrtc_build", lambda: "13.0.88 CL-1")
    case = cases.grid()[0]
    assert peers.kernel_family(case) == "sm90"
    monkeypatch.setenv("FA2CUPY_KERNEL", "sm80")
    assert peers.kernel_family(case) == "sm80"
    monkeypatch.delenv("FA2CUPY_KERNEL")
    monkeypatch.setattr(jit, "expected_nvrtc_build", lambda: "11.8.89 CL-1")
    with warnings.catch_warnings(record=True):
        assert peers.kernel_family(case) == "sm80"


def test_a_peer_that_raises_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(case: Case, tensors: object) -> Callable[[], object]:
        if case.head_dim != case.head_dim_v:
            raise RuntimeError("No available kernel.\nAborting execution.")
        return lambda: "out"

    for name in ("fa2cupy", "fa2", "fa3"):
        monkeypatch.setitem(peers._MAKERS, name, refuse if name == "fa2" else lambda case, tensors: lambda: "out")
    tensors = peers.Tensors(None, None, None, None)
    even, uneven = Case("fwd", 192, 64, True, 1, 1, 1), Case("fwd", 192, 64, True, 1, 1, 1, head_dim_v=128)
    ready, refused = peers.calls(even, tensors, ["fa2cupy", "fa2", "fa3"])
    assert list(ready) == ["fa2cupy", "fa2", "fa3"] and refused == {}
    ready, refused = peers.calls(uneven, tensors, ["fa2cupy", "fa2", "fa3"])
    assert list(ready) == ["fa2cupy", "fa3"] and refused == {"fa2": "RuntimeError: No available kernel."}
    ready, refused = peers.calls(replace(even, mode="bwd"), tensors, ["fa2", "fa3"])
    assert list(ready) == ["fa2"] and refused == {}
    monkeypatch.setitem(peers._MAKERS, "fa2cupy", refuse)
    with pytest.raises(RuntimeError, match="No available kernel"):
        peers.calls(uneven, tensors, ["fa2cupy"])


def test_filters_and_parts() -> None:
    chosen = cases.select(["grid"], ["bwd"], [64, 256], [512], (1, 1))
    assert {(c.mode, c.head_dim, c.seqlen) for c in chosen} == {("bwd", 64, 512), ("bwd", 256, 512)}
    parts = [cases.select(["grid"], [], [], [], (i, 3)) for i in (1, 2, 3)]
    assert sorted(c.label for part in parts for c in part) == sorted(c.label for c in cases.grid())
    assert all(c.dtype == "float16" for c in cases.select(["fp16"], [], [], [], (1, 1)))
    extra = {"gqa": 4, "thin": 4, "head_dims": 20, "fp16": 4, "wide": 24, "long": 8}
    assert all(len(cases.select([name], [], [], [], (1, 1))) == count for name, count in extra.items())
    # head_dims has some of the same cells.
    assert len(cases.select(list(extra), [], [], [], (1, 1))) == sum(extra.values()) - 8
    with pytest.raises(ValueError, match="part"):
        cases.select(["grid"], [], [], [], (4, 3))


# ---------------------------------------------------------------------------------------------------------------------
# turns


@dataclass
class FakeClock:
    """Each call knows how long it takes on the GPU and to queue; a burst is in time if queueing fits the delay."""

    gpu_ms: dict[str, float]
    host_ms: dict[str, float]
    log: list[tuple[str, int, float]] = field(default_factory=list)

    def contestants(self) -> dict[str, Callable[[], object]]:
        def make(name: str) -> Callable[[], object]:
            return lambda: name

        return {name: make(name) for name in self.gpu_ms}

    def burst(self, call: Callable[[], object], calls: int, delay_ms: float) -> tuple[float, bool]:
        name = str(call())
        self.log.append((name, calls, delay_ms))
        drift = 1 + 0.001 * len(self.log)  # the GPU gets warmer
        return self.gpu_ms[name] * drift, self.host_ms[name] * calls < delay_ms


@pytest.mark.parametrize("count", range(1, 9))
def test_everybody_comes_after_everybody_else_equally_often(count: int) -> None:
    rounds = [timing.order_of_round(turn, count) for turn in range(count * (1 + count % 2))]
    assert all(sorted(order) == list(range(count)) for order in rounds)
    places = Counter(place for order in rounds for place in enumerate(order))
    neighbours = Counter(pair for order in rounds for pair in itertools.pairwise(order))
    each = len(rounds) // count
    assert places == dict.fromkeys(itertools.product(range(count), repeat=2), each)
    assert neighbours == dict.fromkeys(itertools.permutations(range(count), 2), each)


def test_libraries_take_turns_burst_by_burst() -> None:
    clock = FakeClock({"a": 1.0, "b": 2.0, "c": 30.0}, {"a": 0.01, "b": 0.01, "c": 0.01})
    timings = timing.take_turns(clock.contestants(), clock, bursts=8)
    assert all(len(t.bursts) == 8 and t.thrown_away == 0 for t in timings.values())
    turns = [name for name, _, _ in clock.log[3:]]  # after one burst each that chooses the length
    assert turns[:9] == ["a", "c", "b", "c", "a", "b", "c", "b", "a"]
    assert (timings["a"].calls, timings["b"].calls, timings["c"].calls) == (20, 10, 5)
    assert 1.0 < timings["a"].ms < 1.1 and 30 < timings["c"].ms < 33


def test_late_bursts_are_thrown_away_and_the_delay_grows() -> None:
    clock = FakeClock({"slow host": 1.0, "usual": 1.0}, {"slow host": 0.6, "usual": 0.01})
    timings = timing.take_turns(clock.contestants(), clock, bursts=8)
    slow = timings["slow host"]
    assert slow.thrown_away == 2 and slow.delay_ms == 20.0 and len(slow.bursts) == 8
    assert timings["usual"].thrown_away == 0 and timings["usual"].delay_ms == 5.0
    hopeless = FakeClock({"x": 1.0}, {"x": 100.0})
    with pytest.raises(RuntimeError, match="x: queueing"):
        timing.take_turns(hopeless.contestants(), hopeless, bursts=4)


def test_host_cost_cycles_through_the_buffers() -> None:
    numbers: list[int] = []
    ticks = iter(range(10**6))
    times = host_cost.measure({"a": numbers.append, "b": lambda n: None}, lambda: None, 3, lambda: float(next(ticks)))
    assert set(numbers) == set(range(host_cost.BUFFER_SETS))
    assert len(times["a"]) == len(times["b"]) == 3
    assert times["a"][0] == pytest.approx(1e6 / host_cost.CALLS)


# ---------------------------------------------------------------------------------------------------------------------
# records

RUN = "2026-01-02T03:04:05Z"
GEMM = results.make_record(RUN, "gemm", None, 1.4, 2 * 8192**3, "NVIDIA H200", "abc")  # 785 TFLOP/s


def _records(speeds: dict[str, float], chosen: list[Case] | None = None) -> list[results.Record]:
    """Every library at a constant TFLOP/s; FA3 without a backward, as its wheel is."""
    made = []
    for case in cases.grid() if chosen is None else chosen:
        for peer, tflops in speeds.items():
            if peer == "fa3" and case.mode == "bwd":
                continue
            ms = case.flops / tflops / 1e9
            made.append(results.make_record(RUN, peer, case, ms, case.flops, "NVIDIA H200", "abc", None))
    return made


def test_a_record_has_the_keys_and_no_others() -> None:
    case = cases.grid()[0]
    record = results.make_record(RUN, "fa2cupy", case, 0.5, case.flops, "NVIDIA H200", "abc", "sm80", None, "13.0.88")
    assert list(record) == KEYS
    assert record["date"] == "2026-01-02" and record["kernel"] == "sm80" and record["workspace_bytes"] is None
    assert record["nvrtc"] == "13.0.88"
    assert record["cell"] is None and record["wrong"] is False and record["peak_bytes"] is None
    assert record["tflops"] == round(case.flops / 0.5 / 1e9, 1)
    assert list(GEMM) == KEYS and GEMM["mode"] is None and GEMM["tflops"] == pytest.approx(785, abs=1)
    json.dumps([record, GEMM])


def test_a_cell_measured_twice_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.jsonl"
    case = cases.grid()[5]
    file = results.Results(path)
    record = results.make_record(RUN, "fa2", case, 0.5, case.flops, "X", "abc")
    file.append(record)
    file.append({**record, "peer": "fa4"})
    file.append({**record, "run": "another"})
    for again in (file, results.Results(path)):  # in the same command, and in one that continues the run
        with pytest.raises(results.DuplicateCellError, match="twice"):
            again.append(record)
        with pytest.raises(results.DuplicateCellError, match=case.label):
            again.check(RUN, "fa2", case)
        again.check(RUN, "fa2", replace(case, causal=not case.causal))
        assert not again.has(RUN, "gemm", None)
    assert results.load(path) == [record, {**record, "peer": "fa4"}, {**record, "run": "another"}]
    file.append(GEMM)
    assert results.Results(path).has(RUN, "gemm", None) and not file.has("another", "gemm", None)
    with pytest.raises(ValueError, match="keys"):
        file.append({"run": RUN})
    with pytest.raises(results.DuplicateCellError):
        results.ratios([record, record], "fwd", ["fa2"])


def test_load_names_a_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(_records({"fa2": 1.0})[0]) + "\n\n{broken\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:3"):
        results.load(path)
    assert results.load(tmp_path / "none.jsonl") == []


def test_committed_results_have_no_cell_twice_in_a_run() -> None:
    for path in results.RESULTS.glob("*.jsonl"):
        records = results.load(path)
        for run in {r["run"] for r in records}:
            results.by_cell([r for r in records if r["run"] == run])
        later = (("cell", "wrong", "peak_bytes"), ("nvrtc",), ("workspace_bytes",))
        lacking = [[key for keys in later[:n] for key in keys] for n in range(len(later) + 1)]
        allowed = [[key for key in KEYS if key not in some] for some in lacking]
        assert all(list(r) in allowed for r in records), path
    assert sum(p.stat().st_size for p in results.RESULTS.glob("*")) < 5 << 20


def test_ratios() -> None:
    records = _records({"fa2cupy": 330.0, "fa2": 300.0, "cudnn": 440.0, "fa3": 660.0})
    assert len(results.ratios(records, "fwd", ["fa2"])) == 36
    assert results.geometric_mean(results.ratios(records, "fwd", ["fa2"]).values()) == pytest.approx(1.1, rel=1e-3)
    assert all(r == pytest.approx(0.5, rel=1e-2) for r in results.ratios(records, "fwd", results.PEERS).values())
    assert all(r == pytest.approx(0.75, rel=1e-2) for r in results.ratios(records, "bwd", results.PEERS).values())
    # The best single library with both modes is cuDNN: FA3 has no backward.
    together = results.forward_and_backward(records, results.PEERS)
    assert len(together) == 36 and results.geometric_mean(together.values()) == pytest.approx(0.75, rel=1e-3)
    assert results.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_summary_names_the_lowest_cell() -> None:
    records = _records({"fa2cupy": 330.0, "fa2": 300.0})
    slow = next(r for r in records if r["peer"] == "fa2cupy" and r["mode"] == "bwd" and r["seqlen"] == 2048)
    slow["ms"] = float(str(slow["ms"])) * 2
    text = results.summary(records)
    assert "bwd fa2cupy/fa2" in text and "lowest 0.550 (D64 S2048 full)" in text
    assert "GEMM 8192^3" not in text
    ours = [r for r in records if r["mode"] == "bwd" and r["peer"] == "fa2cupy"]
    text = results.summary([*records, *({**r, "peer": results.DETERMINISTIC} for r in ours)])
    assert "bwd deterministic/default    1.000" in text and "bwd fa2cupy/best peer        1.0" in text
    sized = results.summary([{**r, "workspace_bytes": 1234567} for r in ours])
    assert all(line.endswith(" 1234567") for line in sized.splitlines() if line.startswith("D"))
    unsized = results.summary([{k: v for k, v in r.items() if k != "workspace_bytes"} for r in ours])
    assert sized.replace("1234567", "      -") == unsized
    only_peers = results.summary(_records({"fa2": 300.0, "fa4": 500.0}))
    assert "no cell has both" in only_peers


def test_summary_has_the_share_of_the_gemm() -> None:
    records = _records({"fa2cupy": 330.0, "fa2": 300.0})
    assert results.gemm_tflops(records) is None
    text = results.summary([*records, GEMM])
    assert "GEMM 8192^3 bf16: 785" in text
    for shares, column in ((results.summary(records), "-"), (text, "0.420")):  # 330 / 785
        tables = shares.split("\n\n")[:2]
        titles = [table.splitlines()[0].split() for table in tables]
        cells = [line.split() for table in tables for line in table.splitlines()[1:]]
        assert all(title[6] == "ours/GEMM" for title in titles)  # after "fwd, TFLOP/s fa2cupy fa2 ours/fa2 ours/best"
        assert len(cells) == 72 and all(cell[7] == column for cell in cells)


def test_what_is_wrong_is_no_bar() -> None:
    """Neither in ratios nor in tables."""
    records = _records({"fa2cupy": 330.0, "fa2": 300.0, "cudnn": 440.0})
    for record in records:
        record["wrong"] = record["peer"] == "cudnn"
    assert all(r == pytest.approx(1.1, rel=1e-2) for r in results.ratios(records, "fwd", results.PEERS).values())
    assert "  440 " not in results.summary(records)


def test_wrong_ones_are_not_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    class Array(float):
        def float(self) -> Array:
            return self

        def norm(self) -> float:
            return abs(self)

        def __sub__(self, other: float) -> Array:
            return Array(float(self) - other)

    def returns(*values: float) -> Callable[[], object]:
        return lambda: Array(values[0]) if len(values) == 1 else tuple(map(Array, values))

    forward, backward = Case("fwd", 64, 512, True, 1, 1, 1), Case("bwd", 64, 512, True, 1, 1, 1)
    calls = {"fa2cupy": returns(1.0), "fa2": returns(1.01), "cudnn": returns(1.05), "fa4": returns(float("nan"))}
    assert bench.wrong_ones(forward, calls) == {"cudnn", "fa4"}
    calls = {"fa2cupy": returns(1.0, 2.0, 3.0), "fa2": returns(1.0, 2.0, 3.01), "fa4": returns(1.0, 2.2, 3.0)}
    assert bench.wrong_ones(backward, calls) == {"fa4"}
    assert bench.wrong_ones(backward, {"fa2": calls["fa2"]}) == set()


def test_table_of_memory() -> None:
    chosen = [c for c in cases.CASE_SETS["long"]() if c.causal and c.seqlen == 65536]
    forward, backward = _records({"fa2cupy": 500.0}, chosen)
    backward["peak_bytes"] = 3 << 30
    lines = results.memory_table([forward, backward]).splitlines()
    assert len(lines) == 3 and lines[2].startswith("| 65,536 | causal | fa2cupy | ")
    assert lines[2].endswith(" | 500 | 3,072 |")
    assert len(results.memory_table([backward]).splitlines()) == 2  # nothing is said of half a cell


def test_descriptions_show_what_is_not_the_grids() -> None:
    def described(case: Case) -> str:
        return results.describe([getattr(case, key) for key in results.CELL_KEYS])

    assert described(cases.grid()[0]) == "D64 S512 full"
    assert described(Case("fwd", 128, 8192, True, 2, 32, 8)) == "D128 S8192 causal B2 H32/8"
    assert (
        described(Case("fwd", 192, 4096, False, 4, 16, 16, "float16", 128)) == "D192/128 S4096 full B4 H16/16 float16"
    )


def test_file_names() -> None:
    assert results.file_name("NVIDIA H200") == "h200.jsonl"
    assert results.file_name("NVIDIA A100-SXM4-80GB") == "a100-sxm4-80gb.jsonl"
    assert results.file_name("NVIDIA GeForce RTX 4090") == "rtx-4090.jsonl"


# ---------------------------------------------------------------------------------------------------------------------
# pictures and commands


def test_picture_from_records_alone(tmp_path: Path) -> None:
    path = tmp_path / "h200.jsonl"
    records = _records({"fa2cupy": 330.0, "fa2": 300.0, "cudnn": 440.0, "fa3": 660.0, "fa4": 500.0})
    records += _records({"fa2cupy": 200.0}, [Case("fwd", 128, 8192, True, 2, 32, 8)])
    # Lines of another program: no kernel, no commit.
    foreign = [{k: v for k, v in r.items() if k not in ("kernel", "commit")} | {"run": "older"} for r in records[:50]]
    path.write_text("".join(json.dumps(r) + "\n" for r in [*foreign, *records]))
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "plot.py", path, "--table"], capture_output=True, text=True, check=True
    )
    assert RUN in done.stdout and "fwd fa2cupy/best peer" in done.stdout
    picture = path.with_suffix(".png").read_bytes()
    assert picture.startswith(b"\x89PNG") and 20_000 < len(picture) < 400_000
    assert plot.main([str(path), "--run", "older", "--out", str(tmp_path / "older.png")]) == 0
    with pytest.raises(ValueError, match="no cell of the grid"):
        plot.draw(records[-1:], tmp_path / "none.png")
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path / "empty.jsonl")])


def test_table_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, readme = tmp_path / "h200.jsonl", tmp_path / "README.md"
    speeds = {"fa2cupy": 330.0, "fa2": 300.0, "cudnn": 440.0, "fa3": 660.0, "fa4": 500.0}
    whole = [GEMM, *_records(speeds, [*cases.grid(), Case("fwd", 128, 8192, True, 2, 32, 8)])]
    part = [{**r, "run": "later"} for r in whole if r["head_dim"] == 64]
    path.write_text("".join(json.dumps(r) + "\n" for r in [*whole, *part]))
    readme.write_text("a\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nb\n")
    monkeypatch.setattr(plot, "README", readme)
    assert plot.main([str(path), "--readme"]) == 0
    block = capsys.readouterr().out
    assert readme.read_text() == f"a\n<!-- measured: begin -->\n{block}<!-- measured: end -->\nb\n"
    rows = [line.split(" | ") for line in block.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 3 * 2 * 4 + 1 and {len(row) for row in rows} == {12}  # FA3 has no backward
    assert rows[0][1:4] == ["fwd fa2cupy", "fwd of GEMM", "fwd FA2"] and "reaches 785" in block
    assert all(row[1:4] == ["330", "0.42", "300"] for row in rows[2:-1])
    assert rows[-1][2:7] == ["0.420", "1.100", "0.750", "0.500", "0.660"]
    without = plot.readme_block(whole[1:])
    assert "GEMM of" not in without and "of GEMM" not in without
    assert not path.with_suffix(".png").exists()
    with pytest.raises(ValueError, match="no run has every cell"):
        plot.last_whole_run(part)


def test_the_readme_has_the_last_whole_run() -> None:
    for path in results.RESULTS.glob("h200.jsonl"):  # an sdist has none
        records = results.load(path)
        run = plot.last_whole_run(records)
        block = plot.readme_block([r for r in records if r["run"] == run])
        assert block in (ROOT / "README.md").read_text(), "run `python benchmarks/plot.py --readme`"


def test_arguments_of_the_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    args = bench.parse(["--modes", "fwd", "--head-dims", "64,128", "--seqlens", "512", "--part", "1/2"])
    assert len(args.selected) == 2 and args.peers == ["fa2cupy", "fa2", "cudnn", "fa3", "fa4", "gemm"]
    assert args.bursts == 8
    assert len(bench.parse(["--modes", "fwd", "--seqlens", "3072"]).selected) == 6  # a length of one's own
    for wrong in (["--peers", "fa5"], ["--modes", "up"], ["--cases", "nothing"], ["--part", "3/2"]):
        with pytest.raises(SystemExit):
            bench.parse(wrong)
    assert "unknown peer 'fa5'" in capsys.readouterr().err


def test_a_whole_run_fits_a_command_of_ten_minutes() -> None:
    seconds = bench.estimated_seconds(cases.grid(), libraries=5, bursts=8, burst_ms=20.0)
    assert 60 < seconds < 400


# ---------------------------------------------------------------------------------------------------------------------
# two commits


def _repeats(*changes: dict[str, float]) -> list[dict[str, tuple[float, float]]]:
    """Repeats of the grid in which both take as long, but for the named cells: ours takes as much more."""
    return [
        {c.label: (case_ms * change.get(c.label, change.get(c.mode, 1.0)), case_ms) for c in cases.grid()}
        for change in changes
        for case_ms in (2.0,)
    ]


def test_level_is_within_half_a_percent_and_without_a_lost_cell() -> None:
    first, other = cases.grid()[0].label, cases.grid()[1].label
    same = against.judge(_repeats({}, {}, {}))
    assert same.ok and same.directions == pytest.approx({"fwd": 1.0, "bwd": 1.0}) and str(same).endswith("\nlevel")
    # a mean: 0.4% is level, 0.6% is not, in one direction alone; faster is no objection
    assert against.judge(_repeats(*[{"bwd": 1.004}] * 3)).ok
    slower = against.judge(_repeats(*[{"bwd": 1.006}] * 3))
    assert not slower.ok and slower.slower == ("bwd",) and slower.lost == ()
    assert "bwd, mean of 36 cells: 0.9940 of the other's speed, slower" in str(slower)
    assert str(slower).endswith("\nNOT LEVEL")
    faster = against.judge(_repeats(*[{"fwd": 0.9}] * 3))
    assert faster.ok and "fwd, mean of 36 cells: 1.1111 of the other's speed, faster" in str(faster)
    # a cell: by more than 1.5% in every repeat
    lost = against.judge(_repeats(*[{first: 1.016, other: 1.014}] * 3))
    assert lost.lost == (first,) and not lost.ok and not lost.slower and f"lost: {first}: 0.98" in str(lost)
    assert against.judge(_repeats({first: 1.02}, {first: 1.2}, {first: 1.014})).ok
    assert against.judge(_repeats(*[{first: 0.5}] * 3)).ok
    for wrong in ([], [*_repeats({}), {first: (1.0, 1.0)}]):
        with pytest.raises(ValueError, match="the same cells"):
            against.judge(wrong)


def test_both_trees_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tree's calls are the other's: each package is asked for its own, and checked against the other."""
    clock = FakeClock({"fa2cupy": 2.0, "fa2cupy_other": 1.0}, {"fa2cupy": 0.01, "fa2cupy_other": 0.01})
    packages = clock.contestants()
    checked: list[tuple[str, ...]] = []
    monkeypatch.setattr(peers, "make_tensors", lambda case: None)
    monkeypatch.setattr(peers, "ours", lambda case, tensors, package: package)
    monkeypatch.setattr(bench, "check_agreement", lambda case, calls, names, ours: checked.append((*names, *ours)))
    chosen = cases.grid()[:2]
    times = bench.measure_against(chosen, clock, 4, 12.0, packages)
    assert list(times) == [c.label for c in chosen]
    assert all(1.9 < one / other < 2.1 for one, other in times.values())
    assert checked == [("fa2cupy", "fa2cupy_other", "fa2cupy")] * 2


def test_cells_of_features_against_another_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside others, or alone; they are a direction of their own, so that the grid's mean is the grid's."""
    alone = bench.parse(["--against", "HEAD", "--features", "w1k_8k,vl*"])
    assert not alone.selected and alone.feature_cells[-1].name == "w1k_8k" and len(alone.feature_cells) == 10
    both = bench.parse(["--against", "HEAD", "--cases", "causal", "--seqlens", "512", "--features", "w256_8k"])
    assert {(c.seqlen, c.causal) for c in both.selected} == {(512, True)} and len(both.selected) == 6
    for wrong in (["--features", "w*"], ["--against", "HEAD", "--features", "x*"]):
        with pytest.raises(SystemExit):
            bench.parse(wrong)
    clock = FakeClock({"fa2cupy": 2.0, "fa2cupy_other": 1.0}, {"fa2cupy": 0.01, "fa2cupy_other": 0.01})
    for module in (peers, feature_peers):
        monkeypatch.setattr(module, "make_tensors", lambda case: None)
    monkeypatch.setattr(peers, "ours", lambda case, tensors, package: package)
    monkeypatch.setattr(feature_peers, "ours", lambda cell, tensors, mode, package: package)
    monkeypatch.setattr(bench, "check_agreement", lambda case, calls, names, ours: None)
    chosen = [*both.selected[:1], *(bench.FeatureCase(both.feature_cells[0], mode) for mode in cases.MODES)]
    times = bench.measure_against(chosen, clock, 4, 12.0, clock.contestants())
    assert list(times)[1:] == ["fwd of features:w256_8k", "bwd of features:w256_8k"]
    assert set(against.judge([times]).directions) == {"fwd", "fwd of features", "bwd of features"}
    assert bench.estimated_seconds(chosen, 2, 8, 12.0) > bench.estimated_seconds(chosen[:1], 2, 8, 12.0)


def test_three_repeats_of_the_grid_fit_four_minutes() -> None:
    args = bench.parse(["--against", "HEAD"])
    seconds = bench.estimated_seconds(args.selected, 2, args.bursts, args.burst_ms, min_calls=bench.AGAINST_CALLS)
    assert len(args.selected) == 72 and 60 < against.REPEATS * seconds < 240
    with pytest.raises(SystemExit):
        bench.parse(["--json", "x.json"])


def test_another_tree_is_imported_beside_ours(tmp_path: Path) -> None:
    """Under a name of its own, late imports and all, and with its own CUDA sources."""
    tree = tmp_path / "tree"
    for folder in ("fa2cupy", "cuda_src"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "cuda_src" / "mark.cu").write_text("// theirs\n")
    (tree / "fa2cupy" / "late.py").write_text("def module():\n    from fa2cupy.jit import source\n    return source\n")
    program = (
        "import sys\n"
        "from benchmarks import against\n"
        "import fa2cupy\n"
        f"other, name = against.load({str(tree)!r})\n"
        "from fa2cupy_other import late\n"
        "from fa2cupy.jit import source\n"
        "import numpy as np\n"
        "q = np.random.default_rng(0).standard_normal((1, 8, 2, 16)).astype(np.float16)\n"
        "assert (other.attention(q, q, q) == fa2cupy.attention(q, q, q)).all()\n"
        "files = {m.__name__: getattr(m, '__file__', None) or '' for m in list(sys.modules.values())}\n"
        "own = [name for name, file in files.items() if 'against-' in file]\n"
        "assert own and all(n.startswith('fa2cupy_other') for n in own), own\n"
        "assert late.module() is not source and other is not fa2cupy\n"
        "assert late.module().load('mark.cu').code == b'// theirs\\n'\n"
        "print(name, late.module().__name__, source.root(), late.module().root().parent)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    name, module, ours, theirs = done.stdout.split()
    assert (name, module, ours) == (str(tree), "fa2cupy_other.jit.source", str(ROOT / "cuda_src"))
    assert not Path(theirs).exists(), "the copy goes with the process"


def test_neither_a_commit_nor_a_directory(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"neither a directory nor a commit|git cannot be asked"):
        against._copy("no-such-commit", tmp_path)
    with pytest.raises(SystemExit, match="no package fa2cupy"):
        against._copy(str(tmp_path), tmp_path)


def test_this_tree_with_other_constants(tmp_path: Path) -> None:
    assert against._copy("FA2_LISTED_RUN=4,FA2_BF16=0", tmp_path) == "this tree with FA2_LISTED_RUN=4,FA2_BF16=0"
    ours = (ROOT / "cuda_src" / "common" / "config.cuh").read_text()
    theirs = (tmp_path / "cuda_src" / "common" / "config.cuh").read_text()
    assert theirs == "#define FA2_LISTED_RUN 4\n#define FA2_BF16 0\n" + ours
    with pytest.raises(SystemExit, match="no kernel has a constant FA2_LISTED"):
        against._copy("FA2_LISTED_RUNS=4", tmp_path / "again")


def test_host_cost_inside_a_context() -> None:
    """Only the contestant that a context is for runs inside it."""
    entered: list[bool] = []

    @contextmanager
    def context() -> Iterator[None]:
        entered.append(True)
        yield
        entered.pop()

    seen: dict[str, set[bool]] = {"a": set(), "b": set()}
    contestants: dict[str, Callable[[int], None]] = {
        "a": lambda n: seen["a"].add(bool(entered)),
        "b": lambda n: seen["b"].add(bool(entered)),
    }
    host_cost.measure(contestants, lambda: None, 2, inside={"b": context})
    assert (seen, entered) == ({"a": {False}, "b": {True}}, [])


def test_host_cost_of_two_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, each kind of array; a backward's calls are fewer, since it is of several launches."""
    clock = [0.0]
    calls: Counter[str] = Counter()

    def call(name: str, us: float) -> Callable[[int], None]:
        def one(number: int) -> None:
            calls[name] += 1
            clock[0] += us / 1e6

        return one

    def contestants(packages: dict[str, object]) -> dict[str, Callable[[int], None]]:
        return {
            f"{mode}:{package}, {kind}": call(f"{mode}:{package}, {kind}", us * (1.02 if "other" in package else 1))
            for mode, us in (("fwd", 15.0), ("bwd", 40.0))
            for kind in ("torch tensors", "CuPy arrays")
            for package in packages
        }

    monkeypatch.setattr(host_cost, "contestants", contestants)
    packages = {"fa2cupy": None, "fa2cupy_other": None}
    repeats = host_cost.compare(packages, lambda: None, 2, lambda: clock[0])
    assert len(repeats) == against.REPEATS
    assert list(repeats[0]) == ["fwd:torch tensors", "fwd:CuPy arrays", "bwd:torch tensors", "bwd:CuPy arrays"]
    assert repeats[0]["bwd:CuPy arrays"] == pytest.approx((40.0, 40.8))
    assert calls["fwd:fa2cupy, CuPy arrays"] == 3 * 4 * host_cost.CALLS
    assert calls["bwd:fa2cupy_other, CuPy arrays"] == 3 * 4 * host_cost.BACKWARD_CALLS
    verdict = against.judge(repeats)
    assert verdict.ok and verdict.directions == pytest.approx({"fwd": 1.02, "bwd": 1.02})
    swapped = against.judge([{name: (b, a) for name, (a, b) in each.items()} for each in repeats])
    assert swapped.slower == ("fwd", "bwd") and len(swapped.lost) == 4


def test_variants_multiply_out() -> None:
    made = variants.expand("block_m=64|128, q_in_regs=True,FA2_X=1|2")
    assert len(made) == 4
    assert made[0] == variants.Variant((("block_m", 64), ("q_in_regs", True)), (("FA2_X", 1),))
    assert str(made[3]) == "block_m=128,q_in_regs=True,FA2_X=2"
    with pytest.raises(ValueError, match="name=value"):
        variants.expand("block_m")


@pytest.mark.parametrize(("mode", "arch"), [("fwd", "sm_80"), ("bwd", "sm_80")])
def test_a_variant_changes_the_plan(mode: str, arch: str) -> None:
    case = replace(cases.grid()[0], mode=mode)
    info = variants.device_of(arch)
    usual = variants.plan_variant(case, info, variants.Variant(), False)
    row = usual.tile
    wanted = variants.Variant((("block_n", row.block_n // 2), ("num_warps", 4)), (("FA2_NEW", 7),))
    changed = variants.plan_variant(case, info, wanted, False)
    assert (changed.tile.block_n, changed.tile.num_warps) == (row.block_n // 2, 4)
    main = variants.main_launch(changed)
    assert main.defines["FA2_NEW"] == 7 and main.defines["FA2_BLOCK_N"] == row.block_n // 2
    assert main.source.startswith("sm80/") and len(variants.jobs_of([usual, changed])) == 2 * len(usual.launches)
    with pytest.raises(ValueError, match="block_m"):
        variants.plan_variant(case, info, variants.Variant((("block_x", 1),)), False)


def test_a_variant_of_the_wgmma_backward() -> None:
    case = replace(cases.grid()[0], mode="bwd")
    changed = variants.plan_variant(case, variants.device_of("sm_90a"), variants.Variant((("num_stages", 1),)), False)
    main = variants.main_launch(changed)
    assert main.source == "sm90/flash_bwd.cu" and main.defines["FA2_NUM_STAGES"] == 1


def test_a_variant_of_the_wgmma_forward() -> None:
    case = replace(cases.grid()[0], mode="fwd")
    info = variants.device_of("sm_90a")
    usual = variants.plan_variant(case, info, variants.Variant(), False)
    changed = variants.plan_variant(case, info, variants.Variant((("block_m", 192), ("num_kv_stages", 3))), False)
    main = variants.main_launch(changed)
    assert main.source == variants.main_launch(usual).source == "sm90/flash_fwd.cu"
    assert (main.defines["FA2_BLOCK_M"], main.defines["FA2_NUM_KV_STAGES"], main.defines["FA2_NUM_WARPS"]) == (
        192,
        3,
        16,
    )
