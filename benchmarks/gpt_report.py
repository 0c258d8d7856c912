"""What the records of gpt.py say: tables, the bars, a picture, the block of docs/torch.md."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import results

Record = Mapping[str, Any]

PAGE, README = results.ROOT / "docs" / "torch.md", results.ROOT / "README.md"
MARKED = re.compile(r"(?<=<!-- gpt: begin -->\n).*?(?=<!-- gpt: end -->)", re.DOTALL)
PEAK_TFLOPS = {"NVIDIA H200": 989, "NVIDIA H100 80GB HBM3": 989, "NVIDIA A100-SXM4-80GB": 312}  # bf16, dense
OURS, PACKED, FLASH, CUDNN = "fa2cupy", "fa2cupy-packed", "sdpa-flash", "sdpa-cudnn"
LABELS = {
    OURS: "fa2cupy.attention",
    PACKED: "fa2cupy, qkv in one",
    "fa2cupy-sdpa": "SDPA, taken over",
    "sdpa-default": "SDPA's default",
    FLASH: "SDPA flash (FA2)",
    CUDNN: "SDPA cuDNN",
    "none": "no attention at all",
}
COLOURS = {OURS: "#d62728", PACKED: "#d62728", FLASH: "#1f77b4", CUDNN: "#2ca02c"}
# shape -> attention -> how many times its step ours must be
TIME_BARS = {"2k": {"sdpa-default": 1.02, FLASH: 1.08}, "8k": {"sdpa-default": 1.05, FLASH: 1.26}}
CURVE_BAR, GRADIENT_BAR, LOSS_BAR = 1.5, 1.05, 2.5
CURVE_RUNS, CHECKPOINTS = 9, 20
LAST_STEPS = 20  # whose mean is the final loss


class Verdict(NamedTuple):
    """One bar: what it asks, what was found (None: not measured), whether that is enough."""

    text: str
    found: float | None
    holds: bool


def load(path: Path) -> list[Record]:
    """The records of a file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def last(records: Iterable[Record], what: str) -> list[Record]:
    """The records of this kind of the last run that has any."""
    found = [record for record in records if record["what"] == what]
    return [record for record in found if record["run"] == found[-1]["run"]]


# ----------------------------------------------------------------------------------------------------------------------
# Step times


def flops(sizes: Sequence[int], vocabulary: int = 50304) -> tuple[float, float]:
    """Of a step, (causal, as the paper counts): 6 for each weight of a matrix and token, and those of attention: what
    a causal mask spares is not counted, or is. The embedding counts once, as the head's matrix."""
    layers, width, _, length, batch = sizes
    tokens = batch * length
    matrices = 6 * tokens * (12 * layers * width**2 + vocabulary * width)
    attention = 12 * tokens * layers * width * length
    return matrices + attention / 2, matrices + attention


def milliseconds(records: Iterable[Record]) -> dict[str, dict[str, float]]:
    """shape -> attention -> median over the turns."""
    found: dict[str, dict[str, float]] = {}
    for record in last(records, "time"):
        found.setdefault(record["shape"], {})[record["attention"]] = statistics.median(record["ms"])
    return found


def our_faster(row: Mapping[str, float]) -> str | None:
    """Which of our attentions, over q, k and v or over qkv in one piece, has the faster step; None without any."""
    return min((kind for kind in (OURS, PACKED) if kind in row), key=lambda kind: row[kind], default=None)


def named_ours(row: Mapping[str, float]) -> str:
    """ "ours", and which one it was if there is a choice."""
    kind = our_faster(row)
    return f"ours ({LABELS[kind]})" if kind and PACKED in row else "ours"


def time_table(records: Sequence[Record]) -> list[str]:
    rows = last(records, "time")
    if not rows:
        return []
    lines = [
        "| shape | attention | ms | over ours | TFLOP/s, causal | MFU | TFLOP/s, the paper's way | MFU | peak GB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    medians = milliseconds(records)
    for shape in medians:
        for row in (row for row in rows if row["shape"] == shape):
            layers, width, heads, length, batch = row["sizes"]
            ms = medians[shape][row["attention"]]
            kind = our_faster(medians[shape])
            peak = PEAK_TFLOPS.get(str(row["gpu"]))
            cells = [
                f"{layers} x {width}, heads of {width // heads}, S {length:,}, batch {batch}",
                LABELS[row["attention"]],
                f"{ms:.1f}",
                f"{ms / medians[shape][kind]:.3f}" if kind else "",
            ]
            for count in flops(row["sizes"]):
                if row["attention"] == "none":  # which does not do these
                    cells += ["", ""]
                else:
                    rate = count / ms / 1e9
                    cells += [f"{rate:.0f}", f"{rate / peak:.1%}" if peak else ""]
            cells.append("" if row["peak_gb"] is None else f"{row['peak_gb']:.1f}")
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def time_verdicts(records: Sequence[Record]) -> list[Verdict]:
    medians = milliseconds(records)
    verdicts = []
    for shape, bars in TIME_BARS.items():
        for attention, bar in bars.items():
            row = medians.get(shape, {})
            kind = our_faster(row)
            ratio = row[attention] / row[kind] if attention in row and kind else None
            text = f"{shape}: {LABELS[attention]}'s step over {named_ours(row)}, at least {bar}"
            verdicts.append(Verdict(text, ratio, ratio is not None and ratio >= bar))
    return verdicts


# ----------------------------------------------------------------------------------------------------------------------
# Curves


def rms(values: Iterable[float]) -> float:
    squares = [value * value for value in values]
    return math.sqrt(sum(squares) / len(squares)) if squares else math.nan


def differences(records: Sequence[Record], key: str) -> dict[tuple[str, str], float]:
    """Two attentions -> rms over the steps of the differences of their losses or norms, mean over the seeds."""
    curves = {(row["attention"], row["seed"]): row[key] for row in last(records, "curve")}
    seeds = sorted({seed for _, seed in curves})
    found = {}
    for one, other in ((OURS, FLASH), (OURS, CUDNN), (FLASH, CUDNN)):
        pairs = [(curves.get((one, seed)), curves.get((other, seed))) for seed in seeds]
        values = [rms(a - b for a, b in zip(x, y, strict=True)) for x, y in pairs if x and y]
        found[one, other] = statistics.mean(values) if values else math.nan
    return found


def curve_table(records: Sequence[Record]) -> list[str]:
    if not last(records, "curve"):
        return []
    losses, norms = differences(records, "losses"), differences(records, "norms")
    lines = ["| | rms difference of the loss | of the norm of the gradients |", "|---|---:|---:|"]
    for one, other in losses:
        lines.append(f"| {LABELS[one]} - {LABELS[other]} | {losses[one, other]:.2e} | {norms[one, other]:.2e} |")
    return lines


def final_loss(row: Record) -> float:
    return statistics.mean(row["losses"][-LAST_STEPS:])


def curve_verdicts(records: Sequence[Record]) -> list[Verdict]:
    rows, verdicts = last(records, "curve"), []
    complete = len(rows) == CURVE_RUNS
    for key, name in (("losses", "loss"), ("norms", "norm of the gradients")):
        found = differences(records, key)
        for other in (FLASH, CUDNN):
            ratio = found[OURS, other] / found[FLASH, CUDNN] if found[FLASH, CUDNN] > 0 else math.nan
            text = f"{name}: ours - {LABELS[other]} over FA2 - cuDNN, at most {CURVE_BAR}"
            verdicts.append(Verdict(text, ratio, complete and ratio <= CURVE_BAR))
    worst = max((final_loss(row) for row in rows if row["attention"] == OURS), default=None)
    text = f"mean loss of our last {LAST_STEPS} steps, worst seed, below {LOSS_BAR}"
    verdicts.append(Verdict(text, worst, complete and worst is not None and worst < LOSS_BAR))
    return verdicts


def gradient_errors(records: Sequence[Record]) -> dict[str, dict[str, dict[int, float]]]:
    """ "model" or "attention" -> attention -> checkpoint -> error."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in last(records, "gradients"):
        found.setdefault(row["of"], {}).setdefault(row["attention"], {})[row["step"]] = row["error"]
    return found


def gradient_table(records: Sequence[Record]) -> list[str]:
    errors = gradient_errors(records)
    if not errors:
        return []
    kinds = [kind for kind in LABELS if kind in errors["model"]]
    lines = [
        "| relative rms error of all gradients | " + " | ".join(LABELS[kind] for kind in kinds) + " |",
        "|---|" + "---:|" * len(kinds),
    ]
    for what, text in (
        ("model", "all in bfloat16, against float32"),
        ("attention", "float32, but q, k, v rounded to bfloat16, against SDPA's float32 math of them"),
    ):
        lines.append(f"| {text} | " + " | ".join(f"{rms(errors[what][kind].values()):.4e}" for kind in kinds) + " |")
    return lines


def gradient_verdicts(records: Sequence[Record]) -> list[Verdict]:
    errors, verdicts = gradient_errors(records), []
    for what in ("model", "attention"):
        row = errors.get(what, {})
        complete = all(len(row.get(kind, {})) == CHECKPOINTS for kind in (OURS, FLASH, CUDNN))
        ratio, worst = None, math.nan
        if complete:
            ratio = rms(row[OURS].values()) / min(rms(row[kind].values()) for kind in (FLASH, CUDNN))
            worst = max(row[OURS][step] / min(row[FLASH][step], row[CUDNN][step]) for step in row[OURS])
        text = (
            f"gradients, {what}: our error over the better of FA2 and cuDNN, rms of {CHECKPOINTS} checkpoints, "
            f"at most {GRADIENT_BAR} (at the worst one {worst:.3f})"
        )
        verdicts.append(Verdict(text, ratio, ratio is not None and ratio <= GRADIENT_BAR))
    return verdicts


# ----------------------------------------------------------------------------------------------------------------------
# All of it


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """Those of what was measured."""
    kinds: tuple[tuple[str, Callable[[Sequence[Record]], list[Verdict]]], ...] = (
        ("time", time_verdicts),
        ("curve", curve_verdicts),
        ("gradients", gradient_verdicts),
    )
    return [verdict for what, judge in kinds if last(records, what) for verdict in judge(records)]


def block(records: Sequence[Record]) -> str:
    """Tables and bars in Markdown."""
    parts = []
    for what, table in (("time", time_table), ("curve", curve_table), ("gradients", gradient_table)):
        rows = last(records, what)
        if rows:
            row = rows[-1]
            said = f"{row['gpu']}, {row['date']}, `{row['command']}`, torch {row['torch']}, commit {row['commit']}:"
            parts.append("\n".join([said, "", *table(records)]))
    lines = ["| bar | found | |", "|---|---:|---|"]
    for verdict in verdicts(records):
        found = "not measured" if verdict.found is None else f"{verdict.found:.3f}"
        lines.append(f"| {verdict.text} | {found} | {'held' if verdict.holds else '**missed**'} |")
    return "\n\n".join([*parts, "\n".join(lines)]) + "\n"


def readme_block(records: Sequence[Record]) -> str:
    """What README.md says: the step times, torch's default first among the others."""
    medians = milliseconds(records)
    said = []
    for shape, row in medians.items():
        length = next(r["sizes"][3] for r in last(records, "time") if r["shape"] == shape)
        kind = our_faster(row)
        ours = row[kind] if kind else math.nan
        others = [f"{row[other] / ours:.3f} x {LABELS[other]}" for other in ("sdpa-default", FLASH) if other in row]
        which = f" ({LABELS[kind]})" if kind and PACKED in row else ""
        said.append(f"at S = {length:,}{which} {' and '.join(others)}")
    text = f"A GPT trained with each attention, {'; '.join(said)}, as steps a second:"
    return "\n".join([text, "", *time_table(records)]) + "\n"


def renew(path: Path, text: str) -> None:
    """Put a text between the markers of a page. ValueError if they are not there."""
    page = path.read_text(encoding="utf-8")
    if not MARKED.search(page):
        raise ValueError(f"{path} has no block between <!-- gpt: begin --> and <!-- gpt: end -->")
    path.write_text(MARKED.sub(lambda _: f"\n{text}\n", page), encoding="utf-8")


def report(records: Sequence[Record], picture: Path | None, *, write: bool = False) -> int:
    """Print tables and bars, draw the picture, renew the pages; 1 if a bar was missed."""
    text = block(records)
    print(text)
    if picture is not None and importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no picture; `python benchmarks/gpt.py report` draws it from the records")
    elif picture is not None:
        draw(records, picture)
        print(picture)
    if write:
        renew(PAGE, text)
        if last(records, "time"):
            renew(README, readme_block(records))
    return 0 if all(verdict.holds for verdict in verdicts(records)) else 1


def draw(records: Sequence[Record], path: Path) -> None:
    """Step times; loss and its differences; errors of gradients. What was not measured is left empty."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    medians = milliseconds(records)
    left, times, names = 0.0, axes[0][0], []
    for shape, row in medians.items():
        for attention, ms in row.items():
            times.bar(left, ms, color=COLOURS.get(attention, "#999999"))
            times.text(left, ms, f"{ms:.0f}", ha="center", va="bottom", fontsize=8)
            names.append((left, f"{shape}\n{LABELS[attention]}"))
            left += 1
        left += 0.5
    times.set_xticks([x for x, _ in names], [name for _, name in names], rotation=60, ha="right", fontsize=7)
    times.set_title("12 x 2,048, heads of 128: ms a step")
    curves = {(row["attention"], row["seed"]): row["losses"] for row in last(records, "curve")}
    for (attention, seed), losses in curves.items():
        label = LABELS[attention] if seed == 0 else None
        axes[0][1].plot(losses, color=COLOURS[attention], linewidth=0.8, label=label)
        other = {OURS: FLASH, FLASH: CUDNN, CUDNN: OURS}[attention]
        if (other, seed) in curves:
            apart = [abs(a - b) for a, b in zip(losses, curves[other, seed], strict=True)]
            label = f"{LABELS[attention]} - {LABELS[other]}" if seed == 0 else None
            axes[1][0].semilogy(apart, color=COLOURS[attention], linewidth=0.6, label=label)
    axes[0][1].set_title("12 x 768, S 1,024: loss")
    axes[1][0].set_title("differences of the loss at the same seed")
    for what, dashes in (("model", "-"), ("attention", "--")):
        for attention, errors in gradient_errors(records).get(what, {}).items():
            axes[1][1].semilogy(
                list(errors), list(errors.values()), dashes, color=COLOURS[attention], linewidth=1.2,
                label=f"{LABELS[attention]}, {'all in bfloat16' if what == 'model' else 'attention alone'}",
            )  # fmt: skip
    axes[1][1].set_title("relative rms error of the gradients against float32")
    for ax in axes.flat:
        if ax is not times:
            ax.set_xlabel("step")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
