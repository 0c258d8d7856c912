"""Draw a run: TFLOP/s over the sequence length, a panel per mode, head_dim and mask.

    python benchmarks/plot.py [results.jsonl] [--run RUN] [--out picture.png] [--table]
    python benchmarks/plot.py [results.jsonl] [--run RUN] --readme

without a GPU, from the records alone; the last run of the file unless one is named. --readme prints README.md's table
instead, of the last run that has every cell of the grid, and puts it between the README's markers.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import results
from benchmarks.cases import HEAD_DIMS, Case, grid

__all__ = ["draw", "last_run", "last_whole_run", "readme_block"]

README = results.ROOT / "README.md"
README_SEQLENS = (512, 2048, 8192, 16384)
MARKED = re.compile(r"(?<=<!-- measured: begin -->\n).*?(?=<!-- measured: end -->)", re.DOTALL)

STYLE = {  # peer: (label, colour, line width, dashes)
    "fa2cupy": ("fa2cupy", "#d62728", 2.4, "-"),
    "fa2": ("FA2 (torch)", "#1f77b4", 1.3, "-"),
    "cudnn": ("cuDNN", "#2ca02c", 1.3, "-"),
    "fa3": ("FA3", "#9467bd", 1.3, "--"),
    "fa4": ("FA4", "#ff7f0e", 1.3, "--"),
}


def last_run(records: Sequence[Mapping[str, object]]) -> str:
    """The run that was written last. ValueError for no records."""
    if not records:
        raise ValueError("there are no measurements in this file")
    return str(records[-1]["run"])


def last_whole_run(records: Sequence[Mapping[str, object]]) -> str:
    """The last run in which ours has every cell of the grid. ValueError if there is none."""
    for run in reversed(dict.fromkeys(str(r["run"]) for r in records)):
        if len(_grid_speeds([r for r in records if r["run"] == run and r["peer"] == results.OURS])) == len(grid()):
            return run
    raise ValueError("no run has every cell of the grid")


def _grid_speeds(records: Sequence[Mapping[str, object]]) -> dict[tuple[Case, str], float]:
    """(cell of the grid, peer) -> TFLOP/s, of one run's records."""
    cells = {tuple(getattr(case, key) for key in results.CELL_KEYS): case for case in grid()}
    found = ((cells.get(tuple(r[key] for key in results.CELL_KEYS)), r) for r in records)
    return {(case, str(r["peer"])): float(str(r["tflops"])) for case, r in found if case is not None}


def readme_block(records: Sequence[Mapping[str, object]]) -> str:
    """README.md's table of one run's records: TFLOP/s at some lengths, means over all cells. Markdown."""
    speeds, ours, gemm = _grid_speeds(records), results.OURS, results.gemm_tflops(records)
    if gemm:
        speeds |= {(case, "gemm"): gemm for case in grid()}
    columns = [
        (mode, peer)
        for mode in ("fwd", "bwd")
        for peer in (ours, "gemm", *results.PEERS)
        if any(case.mode == mode and peer == p for case, p in speeds)
    ]
    names = {peer: label.partition(" ")[0] for peer, (label, *_) in STYLE.items()} | {"gemm": "of GEMM"}

    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def tflops(case: Case, peer: str) -> str:
        """Of the GEMM: our share of it."""
        x = speeds.get((case, ours if peer == "gemm" else peer))
        if x is None:
            return "-"
        return f"{x / speeds[case, peer]:.2f}" if peer == "gemm" else f"{x:.0f}"

    def mean(mode: str, peer: str) -> str:
        mine = {case: x for (case, p), x in speeds.items() if case.mode == mode and p == ours}
        ratios = [x / speeds[case, peer] for case, x in mine.items() if (case, peer) in speeds]
        return "" if peer == ours else f"{results.geometric_mean(ratios):.3f}"

    first = records[0]
    kernels = ", ".join(sorted({f"`{r['kernel']}`" for r in records if r["peer"] == ours}))
    reached = f"; a GEMM of 8192³ in that run reaches {gemm:.0f}" if gemm else ""
    lines = [
        f"{first['gpu']}, {first['date']}, `python benchmarks/bench.py`, commit {first['commit']}, kernels {kernels}.",
        f"TFLOP/s, bfloat16, batch x S = 16,384, heads x head_dim = 2,048, fwd forward, bwd backward{reached}.",
        "",
        row(["head_dim, mask, S", *(f"{mode} {names[peer]}" for mode, peer in columns)]),
        row(["---", *("---:" for _ in columns)]),
    ]
    for head_dim in HEAD_DIMS:
        for causal in (False, True):
            for seqlen in README_SEQLENS:
                by_mode = {c.mode: c for c in grid(head_dims=[head_dim], seqlens=[seqlen]) if c.causal == causal}
                label = f"{head_dim}, {'causal' if causal else 'full'}, {seqlen:,}"
                lines.append(row([label, *(tflops(by_mode[mode], peer) for mode, peer in columns)]))
    title = f"**fa2cupy / GEMM or peer**, mean of {len(grid()) // 2} cells"
    lines.append(row([title, *(mean(*column) for column in columns)]))
    return "\n".join(lines) + "\n"


def draw(records: Sequence[Mapping[str, object]], path: Path) -> Path:
    """A PNG of the grid's cells of one run's records. ValueError when it has none of them; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # The grid's own cells: extra cells share a head_dim and a length with some of them.
    shapes = {(c.mode, c.head_dim, c.seqlen, c.causal, c.batch, c.num_heads, c.num_heads_k, c.dtype) for c in grid()}
    keys = ("mode", "head_dim", "seqlen", "causal", "batch", "num_heads", "num_heads_k", "dtype")
    lines: dict[tuple[str, bool], dict[tuple[int, str], dict[int, float]]] = {}
    for r in records:
        if tuple(r[k] for k in keys) in shapes:
            panel = lines.setdefault((str(r["mode"]), bool(r["causal"])), {})
            line = panel.setdefault((int(str(r["head_dim"])), str(r["peer"])), {})
            line[int(str(r["seqlen"]))] = float(str(r["tflops"]))
    if not lines:
        raise ValueError("no cell of the grid is in this run")
    rows = sorted(lines, key=lambda key: (key[0] != "fwd", key[1]))
    columns = sorted({d for panel in lines.values() for d, _ in panel})
    gemm = results.gemm_tflops(records)
    figure, axes = pyplot.subplots(
        len(rows), len(columns), figsize=(3.6 * len(columns), 2.5 * len(rows)), squeeze=False, sharex=True, sharey="row"
    )
    handles: dict[str, object] = {}
    for row, key in zip(axes, rows, strict=True):
        for axis, head_dim in zip(row, columns, strict=True):
            for peer, (label, colour, width, dashes) in reversed(STYLE.items()):  # ours is drawn on top
                points = sorted(lines[key].get((head_dim, peer), {}).items())
                if points:
                    x, y = zip(*points, strict=True)
                    (handles[label],) = axis.plot(
                        x, y, dashes, color=colour, linewidth=width, marker="o", markersize=3, label=label
                    )
            if gemm:
                handles["GEMM 8192³"] = axis.axhline(gemm, color="0.6", linewidth=1, linestyle=":")
            axis.set_xscale("log", base=2)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.25)
            axis.set_title(
                f"{'forward' if key[0] == 'fwd' else 'backward'}, D = {head_dim}, {'causal' if key[1] else 'full'}",
                fontsize=9,
            )
            ticks = sorted({s for line in lines[key].values() for s in line})
            axis.set_xticks(ticks, [f"{s // 1024}k" if s >= 1024 else str(s) for s in ticks])
        row[0].set_ylabel("TFLOP/s")
    for axis in axes[-1]:
        axis.set_xlabel("sequence length")
    first = records[0]
    figure.suptitle(f"{first['gpu']}, bf16, batch x S = 16,384, heads x D = 2,048 ({first['run']})", fontsize=10)
    order = [label for label, *_ in STYLE.values() if label in handles] + [k for k in handles if k.startswith("GEMM")]
    figure.legend([handles[k] for k in order], order, loc="lower center", ncols=len(order), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.04, 1, 0.98))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="default: the only file in benchmarks/results")
    parser.add_argument("--run", help="default: the last one in the file")
    parser.add_argument("--out", type=Path, help="default: beside the file, .png")
    parser.add_argument("--table", action="store_true", help="print the table and the ratios too")
    parser.add_argument("--readme", action="store_true", help="print README.md's table and renew it there")
    args = parser.parse_args(arguments)
    files = [args.file] if args.file else sorted(results.RESULTS.glob("*.jsonl"))
    if len(files) != 1:
        parser.error(f"name one of {', '.join(map(str, files))}" if files else f"no results in {results.RESULTS}")
    records = results.load(files[0])
    try:
        run = args.run or (last_whole_run if args.readme else last_run)(records)
        chosen = [r for r in records if r["run"] == run]
        if args.readme:
            block = readme_block(chosen)
            README.write_text(MARKED.sub(lambda _: block, README.read_text()))
            print(block, end="")
            return 0
        path = draw(chosen, args.out or files[0].with_suffix(".png"))
    except ValueError as error:
        parser.error(f"{files[0]}: {error}")
    if args.table:
        print(results.summary(chosen))
    print(f"run {run}: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
