"""A GPT trained in JAX with our attention, with cuDNN's and with XLA's: loss curves and step times.

    python benchmarks/gpt_jax.py                 # all of it, about 3 minutes on an H200
    python benchmarks/gpt_jax.py curves          # 124M, 3 seeds x 300 steps x 3 attentions, 6 and 3 at once on one GPU
    python benchmarks/gpt_jax.py times           # 12 x 2,048 at S 8,192, one process after the other
    python benchmarks/gpt_jax.py --rehearse      # everything on a CPU with tiny sizes

The model is that of examples/gpt_jax.py; each training is a process of its own. --json PATH appends a record. Exit
status 1 if a bar is missed or a process failed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import curves, results

EXAMPLE = results.ROOT / "examples" / "gpt_jax.py"
OURS, CUDNN, XLA = "fa2cupy", "cudnn", "xla"
CURVES, TIMED = (OURS, CUDNN, XLA), (OURS, CUDNN)  # XLA's would need S x S numbers of every head and layer
# Trainings at once. XLA's attention keeps S x S numbers of every head and layer: 14 GiB in one piece.
AT_ONCE = {OURS: 6, CUDNN: 6, XLA: 3}
MEMORY = 0.9  # of the GPU's, for all that run at once
CURVE_BAR, LOSS_BAR, TIME_BAR = 1.5, 2.5, 1.0
SHORT, LONG = "124m", "8k"  # shapes of the example
TIMED_STEPS, TURNS = 12, 2

Job = tuple[str, str, int, int]  # attention, shape, steps, seed


def train(jobs: Sequence[Job], at_once: bool, memory: float) -> list[dict[str, Any]]:
    """What examples/gpt_jax.py writes for each job. `memory`: of the GPU's, for each process. Raises if one failed."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        running: list[tuple[Job, subprocess.Popen[str], Path]] = []
        for number, (attention, shape, steps, seed) in enumerate(jobs):
            path = Path(folder) / f"{number}.json"
            command = [sys.executable, str(EXAMPLE), "--attention", attention, "--shape", shape]
            command += ["--steps", str(steps), "--seed", str(seed), "--json", str(path)]
            environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{memory:.3f}"}
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(results.ROOT), os.environ.get("PYTHONPATH"))))
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)
            running.append((jobs[number], process, path))
            if not at_once:
                found.append(_result(*running.pop()))
        found += [_result(*each) for each in running]
    return found


def _result(job: Job, process: subprocess.Popen[str], path: Path) -> dict[str, Any]:
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{job}: exit status {process.returncode}\n{said[-3000:]}")
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def waves(jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs in groups that fit on the GPU side by side."""
    found = []
    for most in dict.fromkeys(AT_ONCE.values()):
        group = [job for job in jobs if AT_ONCE[job[0]] == most]
        found += [group[start : start + most] for start in range(0, len(group), most)]
    return found


def run_curves(rehearse: bool, steps: int, seeds: int) -> dict[str, Any]:
    kinds = (OURS, XLA) if rehearse else CURVES
    shape = "tiny" if rehearse else SHORT
    jobs = [(kind, shape, steps, seed) for seed in range(seeds) for kind in kinds]
    found: dict[str, Any] = {key: {kind: {} for kind in kinds} for key in ("losses", "norms")}
    for wave in waves(jobs):
        trained = train(wave, at_once=True, memory=MEMORY / len(wave))
        for (kind, _, _, seed), result in zip(wave, trained, strict=True):
            for key, row in found.items():
                row[kind][seed] = [round(value, 6) for value in result[key]]
    return found


def run_times(rehearse: bool) -> dict[str, list[float]]:
    """attention -> the median milliseconds of a step, of each turn."""
    kinds, shape = ((OURS, XLA), "tiny") if rehearse else (TIMED, LONG)
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(1 if rehearse else TURNS):
        for kind in kinds:
            (result,) = train([(kind, shape, TIMED_STEPS, 0)], at_once=False, memory=MEMORY)
            found[kind].append(round(result["ms"], 2))
    return found


def verdicts(record: Mapping[str, Any]) -> list[tuple[str, float, float, bool]]:
    """(bar, found, at most, held) of what was measured."""
    found: list[tuple[str, float, float]] = []
    if "losses" in record:
        for key, name in (("losses", "loss"), ("norms", "norm of the gradients")):
            for other, ratio in curves.ratios(record[key], OURS).items():
                found.append((f"{name}: ours - {other}, over cudnn - xla", ratio, CURVE_BAR))
        last = max(curves.mean_of_last(curve) for curve in record["losses"][OURS].values())
        found.append(("mean loss of our last 20 steps, worst seed", last, LOSS_BAR))
    if "ms" in record:
        ours, cudnn = (statistics.median(record["ms"][kind]) for kind in TIMED)
        found.append(("ms a step at S 8,192: ours over cudnn", ours / cudnn, TIME_BAR))
    return [(*each, each[1] <= each[2]) for each in found]


def table(record: Mapping[str, Any]) -> str:
    lines = []
    if "losses" in record:
        losses, norms = curves.distances(record["losses"]), curves.distances(record["norms"])
        lines += ["| | rms difference of the loss | of the norm of the gradients |", "|---|---:|---:|"]
        lines += [f"| {one} - {other} | {losses[one, other]:.2e} | {norms[one, other]:.2e} |" for one, other in losses]
    if "ms" in record:
        lines += ["", "| 12 x 2,048, heads of 128, S 8,192, batch 2 | ms a step |", "|---|---:|"]
        lines += [f"| {kind} | {statistics.median(ms):.1f} |" for kind, ms in record["ms"].items()]
    return "\n".join(lines)


def machine() -> dict[str, str]:
    """Asked in a process of its own, so that this one holds no memory of the GPU."""
    code = (
        "import json, jax; d = jax.devices()[0]; "
        "print(json.dumps({'gpu': d.device_kind if d.platform == 'gpu' else 'CPU', 'jax': jax.__version__}))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["all", "curves", "times"], default="all")
    parser.add_argument("--steps", type=int, default=300, help="of a curve")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="append the record there")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny: no cuDNN, no bars")
    args = parser.parse_args(arguments)
    about = machine()
    if about["gpu"] == "CPU" and not args.rehearse:
        parser.error("this measures a GPU, and JAX has none: --rehearse runs everything on the CPU, tiny")
    command = " ".join(["python", "benchmarks/gpt_jax.py", *(sys.argv[1:] if arguments is None else arguments)])
    record: dict[str, Any] = {"run": results.new_run_id(), **about, "commit": results.commit(), "command": command}
    begin = time.monotonic()
    if args.what in ("all", "curves"):
        record |= run_curves(args.rehearse, args.steps, args.seeds)
        print(f"curves: {time.monotonic() - begin:.0f} s", flush=True)
    if args.what in ("all", "times"):
        record["ms"] = run_times(args.rehearse)
        print(f"{args.what}: {time.monotonic() - begin:.0f} s", flush=True)
    print(f"{record['gpu']}, jax {record['jax']}, {record['run']}, `{command}`, commit {record['commit']}\n")
    print(table(record))
    held = [] if args.rehearse else verdicts(record)
    for text, value, most, ok in held:
        print(f"{text}: {value:.3f}, at most {most:g}: {'held' if ok else 'MISSED'}")
    if args.json:
        with args.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    return 0 if all(ok for *_, ok in held) else 1


if __name__ == "__main__":
    raise SystemExit(main())
