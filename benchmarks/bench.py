"""Ours and the peers, timed in turns in one run. Needs a GPU and torch; a peer that is not here is left out by name.

    python benchmarks/bench.py                                  all 72 cells, every peer, results/<gpu>.jsonl and .png
    python benchmarks/bench.py --modes bwd --head-dims 128      a part of the grid
    python benchmarks/bench.py --cases gqa,thin,head_dims,wide  extra cells
    python benchmarks/bench.py --cases long --bursts 3          16,384 and 65,536 tokens: time and memory
    python benchmarks/bench.py --cases features [--check]       packed sequences, windows, padded keys: features.py
    python benchmarks/bench.py --part 1/2                       half of the cells; prints the command for the rest
    python benchmarks/bench.py --against REV [--json PATH]      this tree and another as the only two: against.py
    python benchmarks/bench.py --against REV --cases causal --features 'w*'     on other cells than the grid's

How it is timed is in timing.py, what each library is in peers.py, what a record holds in results.py.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import against, decode, feature_cells, feature_peers, features, peers, plot, results, timing
from benchmarks import cases as case_module
from benchmarks.cases import Case
from benchmarks.timing import Clock, TorchClock, take_turns
from fa2cupy.jit import compiler

GEMM_SIZE = 8192
GEMM_FLOPS = 2.0 * GEMM_SIZE**3
# Root-mean-square difference between two right answers in bfloat16, relative: a sanity check, not a test.
AGREEMENT = 2e-2
# Two commits: shorter bursts, of which three repeats of the whole grid take four minutes at most.
AGAINST_BURST_MS, AGAINST_CALLS, AGAINST_WARM_UP = 12.0, 3, 2


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return [w for w in text.split(",") if w]

    def integers(text: str) -> list[int]:
        return [int(w) for w in words(text)]

    def fraction(text: str) -> tuple[int, int]:
        index, _, count = text.partition("/")
        return int(index), int(count)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", type=words, default=[], metavar="fwd,bwd")
    parser.add_argument("--head-dims", type=integers, default=[], metavar="64,128,256")
    parser.add_argument("--seqlens", type=integers, default=[], metavar="512,...,16384")
    parser.add_argument("--peers", type=words, default=list(peers.DEFAULT), metavar=",".join(peers.NAMES))
    parser.add_argument(
        "--cases",
        type=words,
        help=f"{', '.join(case_module.CASE_SETS)}, or fwd:d128:b2:s8192:h32/8:causal; or features alone, which has "
        "options of its own: --cases features --help",
    )
    parser.add_argument("--part", type=fraction, default=(1, 1), metavar="i/n", help="measure every n-th cell only")
    parser.add_argument("--run", help="the run that this command continues (default: a new one)")
    parser.add_argument("--bursts", type=int, default=8, help="bursts of each library in each cell")
    parser.add_argument("--burst-ms", type=float, help="about how long a burst is (default: 20; against a commit, 12)")
    parser.add_argument("--against", metavar="REV", help="a commit, or a directory with its tree, as the only peer")
    parser.add_argument(
        "--features", type=words, default=[], metavar="'w*,vl*'", help="with --against: cells of features"
    )
    parser.add_argument("--json", type=Path, help="with --against: everything that was measured, in this file")
    parser.add_argument("--out", type=Path, help="file or directory (default: benchmarks/results/<gpu>.jsonl)")
    parser.add_argument("--commit", help="default: what git says")
    args = parser.parse_args(arguments)
    args.burst_ms = args.burst_ms or (AGAINST_BURST_MS if args.against else 20.0)
    if args.json and not args.against:
        parser.error("--json is for --against; other runs are written to --out")
    if args.features and not args.against:
        parser.error("--features is for --against; others are --cases features")
    if args.cases is None:
        args.cases = [] if args.features else ["grid"]
    unknown = [p for p in args.peers if p not in peers.NAMES]
    if unknown:
        parser.error(f"unknown peer {unknown[0]!r}: {', '.join(peers.NAMES)}")
    if any(m not in case_module.MODES for m in args.modes):
        parser.error(f"--modes takes {' and '.join(case_module.MODES)}")
    try:
        args.selected = case_module.select(args.cases, args.modes, args.head_dims, args.seqlens, args.part)
        args.feature_cells = feature_cells.select(args.features)
    except ValueError as error:
        parser.error(str(error))
    if not args.selected and not args.feature_cells:
        parser.error("no cell passes these filters")
    return args


@dataclass(frozen=True, slots=True)
class FeatureCase:
    """A cell of features and a mode, by the names that a `Case` has."""

    cell: feature_cells.Cell
    mode: str

    @property
    def label(self) -> str:
        return f"{self.mode} of features:{self.cell.name}"

    @property
    def flops(self) -> float:
        return self.cell.flops(self.mode)


def estimated_seconds(
    cases: Sequence[Case | FeatureCase],
    libraries: int,
    bursts: int,
    burst_ms: float,
    tflops: float = 300.0,
    min_calls: int = timing.MIN_CALLS,
) -> float:
    """What a run takes if every library reaches `tflops`: bursts, delays, warm-up, and the set-up of each cell."""
    total = 0.0
    for case in cases:
        ms = case.flops / tflops / 1e9
        calls = max(min_calls, min(timing.MAX_CALLS, round(burst_ms / ms)))
        # 3 calls to warm up, 3 to choose the length of a burst, 1 to be checked.
        total += libraries * (bursts * (calls * ms + 6.0) + 7 * ms + 10.0) / 1e3 + 0.4
    return total


def compile_ours(cases: Sequence[Case], package: Any = None) -> None:
    """Compile our kernels for the cases at once, by a call of each in threads of its own: rows serve lengths, too."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda c: peers.ours(c, peers.make_tensors(c), package=package)(), cases))


def check_agreement(
    case: Case | FeatureCase, calls: Mapping[str, Any], names: Sequence[str], all_ours: Sequence[str] | None = None
) -> None:
    """RuntimeError when ours differs from the first peer that runs the case: a wrong kernel's speed means nothing."""
    if all_ours is None:
        all_ours = [n for n in calls if n.startswith("fa2cupy")]
    other = next((n for n in names if n in calls and n not in all_ours), None)
    if other is None:
        return
    for ours in all_ours:
        got, expected = calls[ours](), calls[other]()
        pairs = [(got, expected)] if case.mode == "fwd" else list(zip(got, expected, strict=True))
        for name, (x, y) in zip(("out",) if case.mode == "fwd" else ("dq", "dk", "dv"), pairs, strict=True):
            x, y = x.float(), y.float()
            error = float((x - y).norm() / y.norm())
            if not error < AGREEMENT:
                raise RuntimeError(f"{case.label}: {name} of {ours} and {other} differ by {error:.2e}")


def wrong_ones(case: Case, calls: Mapping[str, Any]) -> set[str]:
    """The peers that compute something else than ours, which `check_agreement` has compared with one of them."""
    if results.OURS not in calls:
        return set()
    expected = calls[results.OURS]()
    expected = [x.float() for x in ([expected] if case.mode == "fwd" else expected)]
    wrong = set()
    for name, call in calls.items():
        got = call()
        pairs = zip([got] if case.mode == "fwd" else got, expected, strict=True)
        if any(not float((x.float() - y).norm() / y.norm()) < AGREEMENT for x, y in pairs):
            wrong.add(name)
    return wrong


@dataclass(frozen=True, slots=True)
class Measured:
    """Of each library: milliseconds, bytes of workspace (ours) and at the peak; why not. remark: bursts thrown away."""

    times: Mapping[str, float]
    workspaces: Mapping[str, int]
    peaks: Mapping[str, int]
    wrong: set[str]
    refused: Mapping[str, str]
    remark: str


def measure(case: Case, names: Sequence[str], clock: Clock, bursts: int, burst_ms: float) -> Measured:
    import torch

    tensors = peers.make_tensors(case)
    calls, refused = peers.calls(case, tensors, names)
    check_agreement(case, calls, names)
    wrong = wrong_ones(case, calls)
    peaks = {name: peers.peak_bytes(case, tensors, name) for name in calls if case.mode == "bwd"}
    timings = take_turns(calls, clock, bursts=bursts, burst_ms=burst_ms)
    workspaces = {
        name: peers.workspace_bytes(case, tensors, name == results.DETERMINISTIC)
        for name in calls
        if case.mode == "bwd" and name.startswith("fa2cupy")
    }
    late = {name: t.thrown_away for name, t in timings.items() if t.thrown_away}
    remark = "thrown away " + " ".join(f"{name} {n}" for name, n in late.items()) if late else ""
    del tensors, calls
    torch.cuda.empty_cache()
    return Measured({name: t.ms for name, t in timings.items()}, workspaces, peaks, wrong, refused, remark)


def measure_against(
    cases: Sequence[Case | FeatureCase], clock: Clock, bursts: int, burst_ms: float, packages: Mapping[str, Any]
) -> against.Times:
    """One repeat: cell -> milliseconds of ours and of the other. `packages`: both, in this order."""
    times = {}
    names = list(packages)
    for case in cases:
        tensors: Any
        if isinstance(case, FeatureCase):
            tensors = feature_peers.make_tensors(case.cell)
            calls = {n: feature_peers.ours(case.cell, tensors, case.mode, package) for n, package in packages.items()}
        else:
            tensors = peers.make_tensors(case)
            calls = {name: peers.ours(case, tensors, package=package) for name, package in packages.items()}
        check_agreement(case, calls, names, (names[0],))
        found = take_turns(
            calls, clock, bursts=bursts, burst_ms=burst_ms, warm_up=AGAINST_WARM_UP, min_calls=AGAINST_CALLS
        )
        times[case.label] = found[names[0]].ms, found[names[1]].ms
        del tensors, calls
    return times


def run_against(args: argparse.Namespace) -> int:
    """Print how the two compare and whether they are level; 1 if not."""
    import torch

    import fa2cupy

    other, name = against.load(args.against)
    packages = {results.OURS: fa2cupy, against.OTHER: other}
    gpu, commit, modes = torch.cuda.get_device_name(), args.commit or results.commit(), args.modes or case_module.MODES
    cases = [*args.selected, *(FeatureCase(cell, mode) for mode in modes for cell in args.feature_cells)]
    seconds = against.REPEATS * estimated_seconds(cases, 2, args.bursts, args.burst_ms, min_calls=AGAINST_CALLS)
    print(f"commit {commit} against {name}, {gpu}, NVRTC {compiler.nvrtc_build()}")
    print(f"{len(cases)} cells, {against.REPEATS} repeats, about {seconds:.0f} s after compiling", flush=True)
    start = time.monotonic()
    for package in packages.values():
        compile_ours(args.selected, package)
        features.compile_ours(args.feature_cells, modes, package)
    print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    clock, repeats = TorchClock(), []
    for number in range(against.REPEATS):
        repeats.append(measure_against(cases, clock, args.bursts, args.burst_ms, packages))
        torch.cuda.empty_cache()
        print(f"repeat {number + 1}: {time.monotonic() - start:.0f} s", flush=True)
    verdict = against.judge(repeats)
    if args.json:
        against.write(args.json, repeats, verdict, commit=commit, against=name, gpu=gpu)
    print(f"\n{verdict}")
    return 0 if verdict.ok else 1


def measure_gemm(clock: Clock, bursts: int, burst_ms: float) -> float:
    """Milliseconds of an 8192^3 bfloat16 product of random matrices: what the tensor cores sustain in this run."""
    import torch

    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    return take_turns({"gemm": lambda: torch.matmul(a, b, out=c)}, clock, bursts=bursts, burst_ms=burst_ms)["gemm"].ms


def main(arguments: Sequence[str] | None = None) -> int:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--cases")
    chosen, rest = first.parse_known_args(arguments)
    if chosen.cases == "features":
        return features.main(rest)
    if chosen.cases == "decode":
        return decode.main(rest)
    args = parse(arguments)
    try:
        import torch
        from tqdm import tqdm
    except ImportError as error:
        sys.exit(f"the benchmark needs {error.name}: pip install {error.name}")
    if not torch.cuda.is_available():
        sys.exit("the benchmark needs a GPU, and torch sees none")
    if args.against:
        return run_against(args)
    gpu = torch.cuda.get_device_name()
    path = args.out or results.RESULTS
    if path.suffix != ".jsonl":
        path = path / results.file_name(gpu)
    file = results.Results(path)
    run, commit = args.run or results.new_run_id(), args.commit or results.commit()
    absent = peers.probe(args.peers)
    for name, reason in absent.items():
        print(f"left out: {name} ({reason})")
    names = [n for n in args.peers if n not in absent and n != "gemm"]
    for name in peers.FORWARD_ONLY:
        if name in names and any(c.mode == "bwd" for c in args.selected):
            print(f"left out of bwd: {name} (it has no backward)")
    with_gemm = "gemm" in args.peers and not file.has(run, "gemm", None)  # once in a run
    for case in args.selected:
        for name in names:
            file.check(run, name, case)
    with_ours = any(n.startswith("fa2cupy") for n in names)
    nvrtc = compiler.nvrtc_build() if with_ours else None
    seconds = estimated_seconds(args.selected, len(names), args.bursts, args.burst_ms)
    print(
        f"run {run}, commit {commit}, {gpu}, NVRTC {nvrtc or 'not needed'}, torch {torch.__version__}, "
        f"cuDNN {torch.backends.cudnn.version()}\n"
        f"{len(args.selected)} cells x {len(names)} libraries, about {seconds:.0f} s after compiling; into {path}",
        flush=True,
    )

    start = time.monotonic()
    fa4_ready = peers.warm_fa4_cache(args.selected, min(6, os.cpu_count() or 1)) if "fa4" in names else lambda: None
    if with_ours:
        compile_ours(args.selected)
    fa4_ready()
    print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)

    clock = TorchClock()
    if with_gemm:
        ms = measure_gemm(clock, args.bursts, args.burst_ms)
        file.append(results.make_record(run, "gemm", None, ms, GEMM_FLOPS, gpu, commit))
        print(f"GEMM {GEMM_SIZE}^3: {GEMM_FLOPS / ms / 1e9:.0f} TFLOP/s", flush=True)
    # On a terminal a bar; in a log the lines that are written above it are enough.
    for case in tqdm(args.selected, desc="cells", ascii=" -", disable=None):
        found = measure(case, names, clock, args.bursts, args.burst_ms)
        for name, ms in found.times.items():
            ours = (peers.kernel_family(case), found.workspaces.get(name), nvrtc) if name.startswith("fa2cupy") else ()
            more = {"peak_bytes": found.peaks.get(name), "wrong": name in found.wrong}
            file.append(results.make_record(run, name, case, ms, case.flops, gpu, commit, *ours, **more))
        speeds = "  ".join(
            f"{name} {case.flops / ms / 1e9:.0f}"
            + ("!" if name in found.wrong else "")
            + (f" (workspace {found.workspaces[name]} bytes)" if name in found.workspaces else "")
            for name, ms in found.times.items()
        )
        tqdm.write(f"{case.label}: {speeds}" + (f"  ({found.remark})" if found.remark else ""))
        for name, reason in found.refused.items():
            tqdm.write(f"  does not run: {name} ({reason})")

    records = [r for r in results.load(path) if r["run"] == run]
    print("\n" + results.summary(records))
    if "long" in args.cases:
        print("\n" + results.memory_table([r for r in records if r["seqlen"] in (16384, 65536)]))
    try:
        print(f"\npicture: {plot.draw(records, path.with_suffix('.png'))}")
    except ImportError:
        print("\nno picture: matplotlib is not installed here; python benchmarks/plot.py draws it from the file")
    except ValueError as error:
        print(f"\nno picture: {error}")
    index, count = args.part
    if index < count:
        print(f"next: the same command with --part {index + 1}/{count} --run {run}")
    print(f"{time.monotonic() - start:.0f} s in total")
    return 0


if __name__ == "__main__":
    sys.exit(main())
