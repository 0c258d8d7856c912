"""Draw a run: TFLOP/s over the sequence length, a panel per mode, head_dim and mask.

    python benchmarks/plot.py [results.jsonl] [--run RUN] [--out picture.png]

without a GPU, from the records alone; the last run of the file unless one is named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import results
from benchmarks.cases import grid

__all__ = ["draw", "last_run"]

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
    gemm = [float(str(r["tflops"])) for r in records if r["peer"] == "gemm"]
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
                handles["GEMM 8192³"] = axis.axhline(gemm[0], color="0.6", linewidth=1, linestyle=":")
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
    args = parser.parse_args(arguments)
    files = [args.file] if args.file else sorted(results.RESULTS.glob("*.jsonl"))
    if len(files) != 1:
        parser.error(f"name one of {', '.join(map(str, files))}" if files else f"no results in {results.RESULTS}")
    records = results.load(files[0])
    try:
        run = args.run or last_run(records)
        chosen = [r for r in records if r["run"] == run]
        path = draw(chosen, args.out or files[0].with_suffix(".png"))
    except ValueError as error:
        parser.error(f"{files[0]}: {error}")
    if args.table:
        print(results.summary(chosen))
    print(f"run {run}: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
