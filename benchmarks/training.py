"""Training a GPT with each attention, in processes of their own: step times, loss curves, gradients.

    python benchmarks/training.py steps --shapes 2k,8k            ms a step beside SDPA as it is, flash, none at all
    python benchmarks/training.py curves --shape 124m --seeds 3   how far curves lie from each other
    python benchmarks/training.py gradients --shape 124m          errors at identical weights, against float32

examples/gpt_torch.py has the model. Each subcommand takes --json PATH. A curve differs from another by the order in
which numbers are rounded, and the difference grows: ours is judged by the difference of torch's own two backends.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "gpt_torch.py"

OURS, DEFAULT, FLASH, CUDNN = "fa2cupy", "sdpa", "flash", "cudnn"
BARS = {"8k": {DEFAULT: 1.05, FLASH: 1.26}, "2k": {DEFAULT: 1.02, FLASH: 1.08}}  # step time of theirs to ours, at least
MAX_CURVE_RATIO = 1.5  # our distance from torch's backends, to theirs from each other
MAX_GRADIENT_RATIO = 1.05  # our error to the smaller of theirs


def run(attention: str, shape: str, steps: int, seed: int = 0) -> dict[str, Any]:
    """One training in a process of its own, without Inductor's caches: what it printed, as the example wrote it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        command = [sys.executable, str(EXAMPLE), "--attention", attention, "--shape", shape, "--steps", str(steps)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        }
        command += ["--seed", str(seed), "--json", str(path)]
        subprocess.run(command, env=environment, check=True)
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


# ---------------------------------------------------------------------------------------------------------------------
# step times


def steps_table(runs: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """runs: by (shape, attention). Milliseconds a step, of theirs to ours, and the share of the peak."""
    lines = ["| shape | attention | ms a step | to ours | of the peak, causal counted | the paper's way | GiB |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for (shape, attention), run in runs.items():
        ratio = run["seconds"] / runs[shape, OURS]["seconds"]
        lines.append(
            f"| {shape} | {attention} | {1e3 * run['seconds']:.1f} | {ratio:.3f} | {run['mfu']:.1%} | "
            f"{run['mfu_full']:.1%} | {run['gib']:.1f} |"
        )
    return "\n".join(lines)


def missed_bars(runs: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    """Sentences about what is slower than it should be."""
    missed = []
    for (shape, attention), run in runs.items():
        bar = BARS.get(shape, {}).get(attention)
        ratio = run["seconds"] / runs[shape, OURS]["seconds"]
        if bar is not None and ratio < bar:
            missed.append(f"{shape}: {attention} takes {ratio:.3f} x our step, {bar} is wanted")
    return missed


# ---------------------------------------------------------------------------------------------------------------------
# curves


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Root mean square over steps of the difference of two curves."""
    if len(a) != len(b) or not a:
        raise ValueError(f"curves of {len(a)} and {len(b)} steps cannot be compared")
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a))


def curve_ratios(runs: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, float]:
    """runs: one mapping of attention -> run for each seed. Of losses and of norms: the mean over seeds of our distance
    from torch's backends (the mean of both), to the mean of theirs from each other."""
    ratios = {}
    for what in ("losses", "norms"):
        ours = [sum(distance(seed[OURS][what], seed[other][what]) for other in (FLASH, CUDNN)) / 2 for seed in runs]
        theirs = [distance(seed[FLASH][what], seed[CUDNN][what]) for seed in runs]
        ratios[what] = sum(ours) / sum(theirs)
    return ratios


# ---------------------------------------------------------------------------------------------------------------------
# gradients at identical weights


def example() -> Any:
    """examples/gpt_torch.py as a module."""
    spec = importlib.util.spec_from_file_location("gpt_torch", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gradient_errors(
    shape: str, checkpoints: int, every: int, device: str, attentions: Sequence[str] = (OURS, FLASH, CUDNN)
) -> list[dict[str, float]]:
    """One training (ours); at each checkpoint the root mean square error, relative to the gradient's size, of the whole
    gradient with each attention, against float32 and SDPA's math. Nothing is compiled: one process serves all."""
    import numpy as np
    import torch

    gpt = example()
    tokens, _ = gpt.data()
    *_, seqlen, batch, _, rate = gpt.SHAPES[shape]
    batch = min(batch, 4)  # SDPA's math in float32 holds all of S
    torch.manual_seed(0)
    model = gpt.GPT(shape, OURS).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), rate, (0.9, 0.95), weight_decay=0.1)
    feed = gpt.batches(tokens, np.random.default_rng(0), batch, seqlen, device)

    def gradient(attention: str, rows: Any, low: bool) -> Any:
        for block in model.blocks:
            block.attention = attention
        with gpt.chosen(attention), torch.autocast(device, torch.bfloat16, enabled=low):
            loss = model(*rows)
        parts = torch.autograd.grad(loss, list(model.parameters()))
        return torch.cat([part.flatten() for part in parts])

    errors = []
    for number in range(checkpoints):
        rows = next(feed)
        exact = gradient("math", rows, low=False).double()
        size = exact.square().mean().sqrt()
        errors.append(
            {
                attention: float((gradient(attention, rows, low=True).double() - exact).square().mean().sqrt() / size)
                for attention in attentions
            }
        )
        print(f"checkpoint {number}: " + ", ".join(f"{name} {error:.3e}" for name, error in errors[-1].items()))
        for block in model.blocks:
            block.attention = OURS
        for _ in range(every):
            with torch.autocast(device, torch.bfloat16):
                model(*next(feed)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return errors


def gradient_ratio(errors: Sequence[Mapping[str, float]]) -> float:
    """Our rms error over checkpoints, to the smaller of the others'."""

    def rms(name: str) -> float:
        return math.sqrt(sum(row[name] ** 2 for row in errors) / len(errors))

    return rms(OURS) / min(rms(name) for name in errors[0] if name != OURS)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    times = commands.add_parser("steps")
    times.add_argument("--shapes", default="2k,8k")
    times.add_argument("--attentions", default=f"{OURS},enabled,{DEFAULT},{FLASH},none")
    times.add_argument("--steps", type=int, default=30)
    curves = commands.add_parser("curves")
    curves.add_argument("--shape", default="124m")
    curves.add_argument("--seeds", type=int, default=3)
    curves.add_argument("--steps", type=int, default=300)
    gradients = commands.add_parser("gradients")
    gradients.add_argument("--shape", default="124m")
    gradients.add_argument("--checkpoints", type=int, default=20)
    gradients.add_argument("--every", type=int, default=15)
    for command in (times, curves, gradients):
        command.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)

    if args.command == "steps":
        wanted = [(shape, kind) for shape in args.shapes.split(",") for kind in args.attentions.split(",")]
        runs = {(shape, kind): run(kind, shape, args.steps) for shape, kind in wanted}
        problems = missed_bars(runs)
        record: Any = [dict(each) for each in runs.values()]
        print(steps_table(runs))
    elif args.command == "curves":
        by_seed = [
            {kind: run(kind, args.shape, args.steps, seed) for kind in (OURS, FLASH, CUDNN)}
            for seed in range(args.seeds)
        ]
        ratios = curve_ratios(by_seed)
        problems = [f"{what}: {ratio:.2f}" for what, ratio in ratios.items() if ratio > MAX_CURVE_RATIO]
        record = {"ratios": ratios, "runs": by_seed}
        print(f"our distance from torch's backends to theirs from each other: {ratios}")
    else:
        errors = gradient_errors(args.shape, args.checkpoints, args.every, "cuda")
        ratio = gradient_ratio(errors)
        problems = [f"our error is {ratio:.3f} x the smaller one"] if ratio > MAX_GRADIENT_RATIO else []
        record = {"ratio": ratio, "errors": errors}
        print(f"our rms error to the smaller one of flash and cuDNN: {ratio:.4f}")
    if args.json:
        args.json.write_text(json.dumps(record) + "\n", encoding="utf-8")
    print("\n".join(problems) or "within the bars")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
