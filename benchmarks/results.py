"""The records: one JSON line per measurement, appended, every run kept; ratios of ours to the peers."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.cases import Case

__all__ = [
    "DETERMINISTIC",
    "FEATURE_KEYS",
    "KEYS",
    "OURS",
    "PEERS",
    "DuplicateCellError",
    "Results",
    "command",
    "commit",
    "file_name",
    "gemm_tflops",
    "geometric_mean",
    "load",
    "make_feature_record",
    "make_record",
    "memory_table",
    "new_run_id",
    "ratios",
    "summary",
]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OURS = "fa2cupy"
DETERMINISTIC = "fa2cupy-deterministic"  # ours with deterministic=True, measured on request
PEERS = ("fa2", "cudnn", "fa3", "fa4")
CELL_KEYS = ("mode", "head_dim", "head_dim_v", "seqlen", "causal", "dtype", "batch", "num_heads", "num_heads_k")
KEYS = (
    "run", "cell", "peer", "kernel", "nvrtc", *CELL_KEYS, "ms", "tflops", "wrong", "workspace_bytes", "peak_bytes",
    "gpu", "date", "commit",
)  # fmt: skip
FEATURE_KEYS = ("run", "cell", "peer", "mode", "ms", "tflops", "wrong", "gpu", "date", "commit")

Record = dict[str, object]


class DuplicateCellError(ValueError):
    """One cell of one peer was measured twice in a run."""


def new_run_id() -> str:
    """UTC start time, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def command(script: str, arguments: Sequence[str]) -> str:
    """The command of a record, without where its file went (--out, --json): that is of one machine."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument not in ("--out", "--json"):
            kept.append(argument)
        skip = argument in ("--out", "--json")
    return " ".join(["python", f"benchmarks/{script}", *kept])


def commit() -> str:
    """The checkout's commit, ``+`` after it when tracked files differ; ``unknown`` outside git."""
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head.stdout.strip() or "unknown"


def file_name(gpu: str) -> str:
    """``NVIDIA H200`` -> ``h200.jsonl``."""
    words = re.sub(r"^nvidia\s+(geforce\s+|tesla\s+)?", "", gpu.strip().lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-") + ".jsonl"


def make_record(
    run: str,
    peer: str,
    case: Case | None,
    ms: float,
    flops: float,
    gpu: str,
    commit: str,
    kernel: str | None = None,
    workspace_bytes: int | None = None,
    nvrtc: str | None = None,
    *,
    peak_bytes: int | None = None,
    wrong: bool = False,
) -> Record:
    """A line of the results. case is None for the GEMM. Milliseconds and TFLOP/s.

    Of ours alone: kernel (sm80, sm90), nvrtc (the build that compiled it), workspace_bytes (of the backward).
    peak_bytes: what forward and backward together allocate beside the inputs, in the record of the backward. wrong:
    the result is not the others'. cell is a name where features are measured, and null here.
    """
    cell = {key: getattr(case, key) if case is not None else None for key in CELL_KEYS}
    if case is None:
        cell["dtype"] = "bfloat16"
    return {
        "run": run,
        "cell": None,
        "peer": peer,
        "kernel": kernel,
        "nvrtc": nvrtc,
        **cell,
        "ms": round(ms, 5),
        "tflops": round(flops / ms / 1e9, 1),
        "wrong": wrong,
        "workspace_bytes": workspace_bytes,
        "peak_bytes": peak_bytes,
        "gpu": gpu,
        "date": run[:10],
        "commit": commit,
    }


def make_feature_record(
    run: str, cell: str, peer: str, mode: str, ms: float, flops: float, gpu: str, commit: str, *, wrong: bool
) -> Record:
    """A line of results/features: a named cell, the work of its live pairs."""
    values = (run, cell, peer, mode, round(ms, 5), round(flops / ms / 1e9, 1), wrong, gpu, run[:10], commit)
    return dict(zip(FEATURE_KEYS, values, strict=True))


def load(path: Path) -> list[Record]:
    """All records of a file; an empty list where there is none. ValueError names a line that is not one."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if not isinstance(record, dict) or not {"run", "peer", "mode", "ms", "tflops"} <= record.keys():
            raise ValueError(f"{path}:{number}: not a measurement")
        records.append(record)
    return records


def _cell(record: Mapping[str, object], keys: Sequence[str] = CELL_KEYS) -> tuple[object, ...]:
    return tuple(record[key] for key in keys)


class Results:
    """An append-only file of records that refuses a cell it already has in the same run.

    keys: what a record has; cell_keys: what tells cells apart.
    """

    def __init__(self, path: Path, keys: Sequence[str] = KEYS, cell_keys: Sequence[str] = CELL_KEYS) -> None:
        self.path, self.keys, self.cell_keys = path, keys, cell_keys
        self._seen = {(r["run"], r["peer"], _cell(r, cell_keys)) for r in load(path)}

    def has(self, run: str, peer: str, case: Case | None) -> bool:
        """Whether this was measured already; case is None for the GEMM."""
        return (run, peer, _cell(make_record(run, peer, case, 1.0, 1.0, "", ""))) in self._seen

    def check(self, run: str, peer: str, case: Case) -> None:
        """DuplicateCellError if this was measured already: asked before the GPU is, not only after."""
        if self.has(run, peer, case):
            raise DuplicateCellError(f"{peer} {case.label} is already in run {run} of {self.path}")

    def append(self, record: Record) -> None:
        if set(record) != set(self.keys):
            raise ValueError(f"a record has the keys {self.keys}, not {tuple(record)}")
        cell = _cell(record, self.cell_keys)
        key = (record["run"], record["peer"], cell)
        if key in self._seen:
            raise DuplicateCellError(f"measured twice in run {record['run']}: {record['peer']} {cell}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._seen.add(key)


def geometric_mean(values: Iterable[float]) -> float:
    """NaN for no values."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def by_cell(records: Iterable[Mapping[str, object]]) -> dict[tuple[object, ...], dict[str, float]]:
    """cell -> peer -> milliseconds, without GEMM and what is wrong. DuplicateCellError if a peer has a cell twice."""
    table: dict[tuple[object, ...], dict[str, float]] = {}
    for record in records:
        if record["mode"] is None or record.get("wrong"):
            continue
        row = table.setdefault(_cell(record), {})
        if str(record["peer"]) in row:
            raise DuplicateCellError(f"{record['peer']} {_cell(record)} twice")
        row[str(record["peer"])] = float(record["ms"])  # type: ignore[arg-type]
    return table


def ratios(
    records: Iterable[Mapping[str, object]], mode: str, others: Sequence[str], ours: str = OURS
) -> dict[tuple[object, ...], float]:
    """cell -> speed of ours over the fastest of `others` that has the cell, of the records of one run."""
    return {
        cell: min(row[p] for p in others if p in row) / row[ours]
        for cell, row in by_cell(records).items()
        if cell[0] == mode and ours in row and any(p in row for p in others)
    }


def forward_and_backward(
    records: Sequence[Mapping[str, object]], others: Sequence[str]
) -> dict[tuple[object, ...], float]:
    """Cell without its mode -> the best single library's ms(fwd) + ms(bwd) over ours."""
    table = by_cell(records)
    result = {}
    for cell, row in table.items():
        back = table.get(("bwd", *cell[1:]), {})
        both = [p for p in others if p in row and p in back]
        if cell[0] == "fwd" and both and OURS in row and OURS in back:
            result[cell[1:]] = min(row[p] + back[p] for p in both) / (row[OURS] + back[OURS])
    return result


def gemm_tflops(records: Iterable[Mapping[str, object]]) -> float | None:
    """What the GEMM reached in the run of these records; None where it was not measured."""
    return next((float(str(r["tflops"])) for r in records if r["peer"] == "gemm"), None)


def describe(cell: Sequence[object]) -> str:
    """A cell in a few characters, for tables: ``D64 S512 causal``, and what is not the grid's own."""
    _, d, dv, s, causal, dtype, b, h, hk = cell
    text = f"D{d}" + (f"/{dv}" if dv != d else "") + f" S{s} " + ("causal" if causal else "full")
    usual = (
        h == hk and isinstance(h, int) and isinstance(d, int) and h == max(1, 2048 // d) and b == 16384 // int(str(s))
    )
    return text + ("" if usual else f" B{b} H{h}/{hk}") + ("" if dtype == "bfloat16" else f" {dtype}")


def _line(title: str, values: Mapping[tuple[object, ...], float], with_mode: bool = True) -> str:
    if not values:
        return f"{title:28s} no cell has both"
    worst = min(values, key=lambda c: values[c])
    cell = worst if with_mode else ("both", *worst)
    mean = geometric_mean(values.values())
    return f"{title:28s} {mean:5.3f}   lowest {values[worst]:5.3f} ({describe(cell)})   {len(values)} cells"


def summary(records: Sequence[Mapping[str, object]]) -> str:
    """TFLOP/s of every cell, and the ratios: geometric mean, lowest cell, how many. Of the records of one run.

    What is wrong is left out. GEMM is that of the run. Beside a backward cell the bytes of our workspace, which records
    of before 2026-11-22 do not have.
    """
    flops = {
        (_cell(r), r["peer"]): float(str(r["tflops"])) for r in records if r["mode"] is not None and not r.get("wrong")
    }
    workspaces = {_cell(r): r["workspace_bytes"] for r in records if r["peer"] == OURS and "workspace_bytes" in r}
    gemm = gemm_tflops(records)
    present = dict.fromkeys(str(r["peer"]) for r in records)
    peers = [p for p in PEERS if p in present]
    names = [OURS, *peers, *([DETERMINISTIC] if DETERMINISTIC in present else [])]
    lines = []
    for mode in ("fwd", "bwd"):
        cells = [c for c in by_cell(records) if c[0] == mode]
        if not cells:
            continue
        lines.append(
            f"{mode}, TFLOP/s".ljust(30)
            + "".join(f"{n.removeprefix('fa2cupy-')[:8]:>9s}" for n in names)
            + "   ours/fa2  ours/best  ours/GEMM"
            + ("  workspace bytes" if mode == "bwd" else "")
        )
        for cell in cells:
            row = describe(cell).ljust(30)
            row += "".join(f"{flops[cell, n]:9.0f}" if (cell, n) in flops else f"{'-':>9s}" for n in names)
            mine, fa2 = flops.get((cell, OURS)), flops.get((cell, "fa2"))
            others = [flops[cell, p] for p in peers if (cell, p) in flops]
            for other in (fa2, max(others, default=None), gemm):
                row += f"{mine / other:11.3f}" if mine and other else f"{'-':>11s}"
            if mode == "bwd":
                size = workspaces.get(cell)
                row += f"{'-' if size is None else size:>17}"
            lines.append(row)
        lines.append("")
    for mode in ("fwd", "bwd"):
        if "fa2" in peers:
            lines.append(_line(f"{mode} {OURS}/fa2", ratios(records, mode, ["fa2"])))
        if peers:
            lines.append(_line(f"{mode} {OURS}/best peer", ratios(records, mode, peers)))
    if DETERMINISTIC in present:
        lines.append(_line("bwd deterministic/default", ratios(records, "bwd", [OURS], DETERMINISTIC)))
    together = forward_and_backward(records, peers)
    if together:
        lines.append(_line("fwd + bwd ours/best library", together, with_mode=False))
    if gemm:
        lines.append(f"GEMM 8192^3 bf16: {gemm:.0f} TFLOP/s")
    return "\n".join(lines)


def memory_table(records: Sequence[Mapping[str, object]]) -> str:
    """Time and memory of cells of which both directions were measured, as a table in Markdown; of one run."""
    times = {(_cell(r)[1:], r["peer"], r["mode"]): r for r in records if r["mode"] is not None and not r.get("wrong")}
    lines = [
        "| tokens | mask | library | forward ms | backward ms | both TFLOP/s | peak MiB beside q, k, v, dout |",
        "|---|---|---|---|---|---|---|",
    ]
    for (cell, peer, mode), back in times.items():
        forward = times.get((cell, peer, "fwd"))
        if mode != "bwd" or forward is None or back.get("peak_bytes") is None:
            continue
        ms = [float(str(r["ms"])) for r in (forward, back)]
        work = sum(float(str(r["tflops"])) * t for r, t in zip((forward, back), ms, strict=True))
        mask = "causal" if back["causal"] else "full"
        lines.append(
            f"| {back['seqlen']:,} | {mask} | {peer} | {ms[0]:.2f} | {ms[1]:.2f} | {work / sum(ms):.0f} | "
            f"{int(str(back['peak_bytes'])) / 2**20:,.0f} |"
        )
    return "\n".join(lines)
