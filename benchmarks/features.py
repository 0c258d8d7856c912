"""Ours and the peers on packed sequences, windows, padded keys, changed scores and wider types. Needs a GPU and torch.

    python benchmarks/bench.py --cases features                          every cell
    python benchmarks/bench.py --cases features --check                  the same; exit status 1 if a bar is missed
    python benchmarks/bench.py --cases features --cells 'w*,vl_*' --seconds 120 --modes bwd
    python benchmarks/bench.py --cases features --list                   the cells
    python benchmarks/bench.py --cases features --records [--check]      tables and bars again, from the records alone
    python benchmarks/bench.py --cases features --rehearse               on the CPU, NumPy, tiny, written nowhere

The cells and their bars are in feature_cells.py, the libraries in feature_peers.py, ours in feature_inputs.py. Every
result is compared with the formula in float64 on some of the sequences: a library that is wrong is marked, and no bar.
Libraries far from the fastest are timed in two bursts only. Records go to results/features/<gpu>.jsonl.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import feature_peers, feature_warm, results
from benchmarks.feature_cells import CELLS, DENSE, GROUPS, MODES, Cell, References, judge, ratio, select, tiny
from benchmarks.feature_peers import FORMULA, OTHERS, MissingError, Queued, UnableError
from benchmarks.timing import Clock, Timing, TorchClock, take_turns

FOLDER = results.RESULTS / "features"
CLOSE = 1.25  # times the fastest's time: worth all the bursts
COMPILING_SECONDS = 150.0


class WallClock:
    """A burst by the clock on the wall; `wait` is given what the last call returned."""

    def burst(
        self, call: Callable[[], Any], calls: int, delay_ms: float, wait: Callable[[Any], object] = lambda _: None
    ) -> tuple[float, bool]:
        wait(call())
        begin = time.perf_counter()
        last = None
        for _ in range(calls):
            last = call()
        wait(last)
        return 1e3 * (time.perf_counter() - begin) / calls, True


class EitherClock:
    """On torch's stream, and for what is not on it by the wall."""

    def __init__(self, stream: Clock) -> None:
        self.stream, self.wall = stream, WallClock()

    def burst(self, call: Callable[[], object], calls: int, delay_ms: float) -> tuple[float, bool]:
        if isinstance(call, Queued):
            return self.wall.burst(call, calls, delay_ms, call.wait)
        return self.stream.burst(call, calls, delay_ms)


@dataclass(slots=True)
class Found:
    """Of a cell and a mode: library -> milliseconds, -> what is wrong with its result, -> why it does not run.

    missing: why ours does not. failed: what else went wrong with ours.
    """

    times: dict[str, float] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    missing: str = ""
    failed: str = ""


def contestants(cell: Cell, others: Sequence[str]) -> list[str]:
    return [results.OURS, *([DENSE] if cell.group == "equal" else others)]


def measure(
    cell: Cell, modes: Sequence[str], others: Sequence[str], clock: Clock, device: str, bursts: int, burst_ms: float
) -> dict[str, Found]:
    """mode -> what was found. Where ours has no such feature yet nobody is measured."""
    if device == "numpy":
        import numpy as xp
    else:
        import torch as xp  # type: ignore[no-redef]
    tensors = feature_peers.make_tensors(cell, device)
    references = None
    found: dict[str, Found] = {}
    for mode in modes:
        row, calls = found.setdefault(mode, Found()), {}
        for name in contestants(cell, others):
            try:
                call = feature_peers.make(name, cell, tensors, mode)
                result = feature_peers.as_given(call(), tensors, mode)
                references = references or References(xp, cell, tensors.flat(), tensors.sinks)
                bad = references.wrong(result, mode)
            except UnableError as error:
                row.refused[name] = str(error)
                continue
            except MissingError as error:
                row.missing = str(error)
                break
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                _usable(f"{name} in {cell.name} {mode}", device)
                if name in (results.OURS, DENSE):
                    row.failed = reason
                    break
                row.refused[name] = reason
                continue
            calls[name] = call
            if bad:
                row.wrong[name] = bad
            del result
        if not row.missing and not row.failed:
            _time(calls, clock, bursts, burst_ms, row)
    return found


def _usable(name: str, device: str) -> None:
    """SystemExit if the GPU is not any more, after an error of this library."""
    if device != "cuda":
        return
    import torch

    try:
        torch.cuda.synchronize()
    except Exception as error:
        sys.exit(f"{name} has lost the GPU ({error}): go on without it, by --peers, --cells and --run")


def _time(calls: Mapping[str, Callable[[], Any]], clock: Clock, bursts: int, burst_ms: float, row: Found) -> None:
    """Everybody alone in two bursts, then those that are close to the fastest in turns."""
    for name, call in calls.items():
        timing = _turns({name: call}, clock, min(2, bursts), burst_ms, 1, row)
        row.times |= {n: t.ms for n, t in timing.items()}
    right = [ms for name, ms in row.times.items() if name not in row.wrong]
    near = {
        name: calls[name]
        for name, ms in row.times.items()
        if name == results.OURS or (name not in row.wrong and ms <= CLOSE * min(right))
    }
    if bursts > 2 and near:
        row.times |= {n: t.ms for n, t in _turns(near, clock, bursts, burst_ms, 3, row).items()}


def _turns(
    calls: Mapping[str, Callable[[], Any]], clock: Clock, bursts: int, burst_ms: float, min_calls: int, row: Found
) -> dict[str, Timing]:
    """`take_turns` without those whose host is slower than any delay."""
    calls = dict(calls)
    while calls:
        try:
            return take_turns(calls, clock, bursts=bursts, burst_ms=burst_ms, warm_up=1, min_calls=min_calls)
        except RuntimeError as error:
            slow = str(error).partition(":")[0]
            if slow not in calls:
                raise
            del calls[slow]
            row.refused[slow] = str(error)
            if slow in (results.OURS, DENSE):
                row.failed = str(error)
    return {}


def compile_ours(cells: Sequence[Cell], modes: Sequence[str], package: Any = None) -> None:
    """Compile our kernels for the cells at once; what fails here fails, and is reported, where it is measured."""
    import contextlib

    def compile_one(cell: Cell) -> None:
        for mode in modes:
            with contextlib.suppress(Exception):
                feature_peers.ours(cell, feature_peers.make_tensors(cell), mode, package)()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(compile_one, cells))


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def line_of(cell: Cell, mode: str, records: Sequence[Mapping[str, Any]]) -> str:
    """TFLOP/s of everybody, ! behind what is wrong, and ours over the best of the others."""
    row = [r for r in records if r["cell"] == cell.name and r["mode"] == mode]
    speeds = "  ".join(f"{r['peer']} {r['tflops']:g}" + "!" * bool(r["wrong"]) for r in row)
    value, who = ratio(cell, mode, records)
    return f"{cell.name:14s} {mode}  {speeds}  | " + (who if value is None else f"{value:.3f} of {who}")


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """All that a run measured."""
    measured = {(r["cell"], r["mode"]) for r in records}
    lines = [line_of(c, m, records) for m in MODES for c in CELLS.values() if (c.name, m) in measured]
    return "\n".join(
        ["TFLOP/s of live pairs (! computes something else), and ours over the best that is right", *lines]
    )


# ----------------------------------------------------------------------------------------------------------------------
# The command


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return [w for w in text.split(",") if w]

    parser = argparse.ArgumentParser(
        prog="bench.py --cases features", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=words, default=["*"], metavar="'w*,vl_*'", help="names or patterns of cells")
    parser.add_argument("--modes", type=words, default=list(MODES), metavar="fwd,bwd")
    parser.add_argument("--peers", type=words, default=list(OTHERS), metavar=",".join(OTHERS), help="beside ours")
    parser.add_argument("--bursts", type=int, default=6, help="of each library that is close to the fastest")
    parser.add_argument("--burst-ms", type=float, default=12.0, help="about how long a burst is")
    parser.add_argument("--seconds", type=float, help="begin no cell later than so many seconds after the start")
    parser.add_argument("--run", help="the run that this command continues, or whose records are meant")
    parser.add_argument("--out", type=Path, help="file or directory (default: benchmarks/results/features)")
    parser.add_argument("--commit", help="default: what git says")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a bar of these groups is missed")
    parser.add_argument("--list", action="store_true", help="print the cells")
    parser.add_argument("--records", action="store_true", help="measure nothing: the last run's records, or --run's")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU with NumPy, tiny, written nowhere")
    args = parser.parse_args(arguments)
    if any(mode not in MODES for mode in args.modes):
        parser.error(f"--modes takes {' and '.join(MODES)}")
    unknown = [name for name in args.peers if name not in OTHERS]
    if unknown:
        parser.error(f"unknown peer {unknown[0]!r}: {', '.join(OTHERS)}")
    try:
        args.selected = select(args.cells)
    except ValueError as error:
        parser.error(str(error))
    return args


def verdict(records: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> int:
    """Print table and bars of the selected cells' groups; with --check 1 if one is missed."""
    groups = [name for name in GROUPS if any(cell.group == name for cell in args.selected)]
    print(f"\n{table(records)}\n")
    judged = judge(records, groups, args.modes)
    print("\n".join(judged.lines))
    reasons: dict[str, list[str]] = {}
    for text in judged.missed:
        where, _, why = text.partition(": ")
        reasons.setdefault(why, []).append(where)
    for why, places in reasons.items():
        print(f"missed: {'; '.join(places)}: {why}")
    if not judged.missed:
        print("every bar is reached" + ("" if len(groups) == len(GROUPS) else f" of {', '.join(groups)}"))
    return 1 if judged.missed and args.check else 0


def from_records(args: argparse.Namespace) -> int:
    """Table and bars without a GPU."""
    path = args.out or FOLDER
    files = [path] if path.suffix == ".jsonl" else sorted(path.glob("*.jsonl"))
    if len(files) != 1:
        sys.exit(f"{path}: one file of records is meant, here are {len(files)}; --out names one")
    records = results.load(files[0])
    run = args.run or (records[-1]["run"] if records else None)
    records = [r for r in records if r["run"] == run]
    if not records:
        sys.exit(f"{files[0]}: no records of run {run}")
    print(f"run {run}, commit {records[-1]['commit']}, {records[-1]['gpu']}")
    return verdict(records, args)


def rehearse(args: argparse.Namespace) -> int:
    """Every cell, tiny, beside the plain formula. 1 if ours fails or is wrong; with --check also if it is missing."""
    missing: dict[str, list[str]] = {}
    bad = 0
    for cell in args.selected:
        for mode, row in measure(tiny(cell), args.modes, [FORMULA], WallClock(), "numpy", 1, 0.0).items():
            where = f"{cell.name} {mode}"
            if row.missing:
                missing.setdefault(row.missing, []).append(where)
            elif row.failed or row.wrong:
                bad += 1
                wrong = "; ".join(f"{name}: {what}" for name, what in row.wrong.items())
                print(f"{where}: FAILED: {row.failed or wrong}")
            else:
                print(f"{where}: right; " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in row.times.items()))
    for reason, places in missing.items():
        print(f"missing: {', '.join(places)}: {reason}")
    print(f"{len(args.selected)} cells rehearsed, {sum(map(len, missing.values()))} missing, {bad} failed or wrong")
    return 1 if bad or (args.check and missing) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.list:
        print("\n".join(f"{cell.name:14s} {cell.group:7s} {cell}" for cell in args.selected))
        return 0
    if args.records:
        return from_records(args)
    if args.rehearse:
        return rehearse(args)
    try:
        import torch
    except ImportError:
        sys.exit("the benchmark needs torch: pip install torch")
    if not torch.cuda.is_available():
        sys.exit("the benchmark needs a GPU, and torch sees none; --rehearse runs everything on the CPU, tiny")
    return on_gpu(args, torch.cuda.get_device_name())


def on_gpu(args: argparse.Namespace, gpu: str, device: str = "cuda", clock: Clock | None = None) -> int:
    """Measure, record, print. Status as `verdict`; 1 also where ours failed."""
    start = time.monotonic()
    path = args.out or FOLDER
    path = path if path.suffix == ".jsonl" else path / results.file_name(gpu)
    file = results.Results(path, results.FEATURE_KEYS, ("cell", "mode"))
    run, commit = args.run or results.new_run_id(), args.commit or results.commit()
    before = {(r["cell"], r["mode"]) for r in results.load(path) if r["run"] == run and r["peer"] == results.OURS}
    again = [f"{c.name} {m}" for c in args.selected for m in args.modes if (c.name, m) in before]
    if again:
        sys.exit(f"{', '.join(again)}: already in run {run} of {path}")
    absent = feature_peers.probe(args.peers)
    for name, reason in absent.items():
        print(f"absent: {name} ({reason})")
    others = [name for name in args.peers if name not in absent]
    print(
        f"run {run}, commit {commit}, {gpu}: {len(args.selected)} cells beside {', '.join(others)}; into {path}",
        flush=True,
    )
    if device == "cuda":
        ready = feature_warm.warm(others, args.selected, max(1, min(10, (os.cpu_count() or 2) - 2)), COMPILING_SECONDS)
        compile_ours(args.selected, args.modes)
        ready()
        print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    clock = clock or EitherClock(TorchClock())
    problems, left = [], []
    for cell in args.selected:
        if args.seconds is not None and time.monotonic() - start > args.seconds:
            left.append(cell.name)
            continue
        found = measure(cell, args.modes, others, clock, device, args.bursts, args.burst_ms)
        for mode, row in found.items():
            made = [
                results.make_feature_record(
                    run, cell.name, name, mode, ms, cell.flops(mode), gpu, commit, wrong=name in row.wrong
                )
                for name, ms in row.times.items()
            ]
            for record in made:
                file.append(record)
            if row.missing or row.failed:
                problems.append(
                    f"{cell.name} {mode}: {'missing' if row.missing else 'FAILED'}: {row.missing or row.failed}"
                )
                print(problems[-1], flush=True)
            else:
                print(line_of(cell, mode, made), flush=True)
            for name, why in row.wrong.items():
                print(f"  wrong: {name} ({why})")
            for name, why in row.refused.items():
                print(f"  does not run: {name} ({why})")
            if results.OURS in row.wrong:
                problems.append(f"{cell.name} {mode}: FAILED: ours is wrong, {row.wrong[results.OURS]}")
        if device == "cuda":
            import torch

            torch.cuda.empty_cache()
    status = verdict([r for r in results.load(path) if r["run"] == run], args)
    print("\n".join(problems))
    for name, reason in absent.items():
        print(f"absent: {name} ({reason})")
    if left:
        print(f"out of time; next: the same command with --cells {','.join(left)} --run {run}")
    print(f"{time.monotonic() - start:.0f} s in total")
    return 1 if status or any("FAILED" in text for text in problems) else 0


if __name__ == "__main__":
    raise SystemExit("python benchmarks/bench.py --cases features")
