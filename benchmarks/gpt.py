"""A GPT trained with our attention and with torch's: step times, loss curves, errors of gradients.

    python benchmarks/gpt.py                    # all of it, about 6 minutes on an H200
    python benchmarks/gpt.py times              # milliseconds of a step, S 2,048 and 8,192, MFU
    python benchmarks/gpt.py curves             # 3 seeds x 300 steps, and gradients at 20 checkpoints
    python benchmarks/gpt.py report --write     # tables, verdicts and picture again, from the records alone
    python benchmarks/gpt.py --rehearse         # everything on the CPU with tiny sizes, written nowhere

The model is that of examples/gpt_torch.py. Each attention has a process of its own, Inductor's caches are off (they do
not ask which attention SDPA was), and torch's profiler must have seen the kernels of the attention that was asked for,
and no others. Step times: all processes compile at the same time, then take turns, one at a time on the GPU. Curves:
all at once on one GPU. Records go to results/gpt/<gpu>.jsonl; exit status 1 if a bar is missed or a process failed.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from gpt_data import SHAPES, VOCABULARY  # noqa: E402

from benchmarks import gpt_report, results  # noqa: E402
from benchmarks.timing import order_of_round  # noqa: E402

WORKER = Path(__file__).with_name("gpt_worker.py")
TINY = {"2k": (2, 32, 2, 32, 2), "8k": (2, 32, 2, 64, 1), "124m": (2, 32, 2, 32, 2)}
TIMED = ("fa2cupy", "fa2cupy-packed", "fa2cupy-sdpa", "sdpa-default", "sdpa-flash", "sdpa-cudnn", "none")
CURVES = ("fa2cupy", "sdpa-flash", "sdpa-cudnn")
OWNERS = {
    "fa2cupy": "fa2cupy",
    "fa2cupy-packed": "fa2cupy",
    "fa2cupy-sdpa": "fa2cupy",
    "sdpa-flash": "fa2",
    "sdpa-cudnn": "cudnn",
    "none": None,
}


class WorkerError(RuntimeError):
    """A process of one attention that failed, with what it said last."""


class Worker:
    """A process of gpt_worker.py and its answers."""

    def __init__(self, job: Mapping[str, Any], threads: int) -> None:
        self.name = f"{job['what']} {job['attention']}" + (f" seed {job['seed']}" if job["what"] == "curve" else "")
        environment = {
            **os.environ,
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
            "OMP_NUM_THREADS": "1",
            "FA2CUPY_STRICT": "1",
        }
        command = [sys.executable, str(WORKER), json.dumps(dict(job))]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment
        )
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.last: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def answer(self, timeout: float) -> dict[str, Any] | None:
        """The next, None after the last. WorkerError where the process failed or says nothing for so many seconds."""
        end = time.monotonic() + timeout
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                self.process.kill()
                raise WorkerError(f"{self.name}: no answer in {timeout:.0f} s\n{''.join(self.last)}") from None
            if line is None:
                if self.process.wait():
                    raise WorkerError(f"{self.name}: exit status {self.process.returncode}\n{''.join(self.last)}")
                return None
            if line.startswith("@"):
                found: dict[str, Any] = json.loads(line[1:])
                return found
            self.last = [*self.last[-30:], line]

    def must_answer(self, timeout: float) -> dict[str, Any]:
        found = self.answer(timeout)
        if found is None:
            raise WorkerError(f"{self.name}: ended too early\n{''.join(self.last)}")
        return found

    def ask(self, question: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(dict(question)) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why
        return self.must_answer(timeout)

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Driver:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.shapes = TINY if args.rehearse else SHAPES
        self.failures: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.common = {
            "run": results.new_run_id(),
            **machine(args.rehearse),
            "commit": args.commit or results.commit(),
            "command": results.command("gpt.py", sys.argv[1:]),
        }
        out = args.out or results.RESULTS / "gpt"
        self.path = None if args.rehearse else out / results.file_name(str(self.common["gpu"]))

    def record(self, **what: Any) -> None:
        line = {**self.common, **what}
        self.records.append(line)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def failed(self, why: object) -> None:
        self.failures.append(str(why))
        print(f"FAILED: {why}", file=sys.stderr, flush=True)

    def job(self, what: str, attention: str, shapes: Sequence[str], **more: Any) -> dict[str, Any]:
        rehearse = self.args.rehearse
        return {
            "what": what,
            "attention": attention,
            "shapes": {shape: self.shapes[shape] for shape in shapes},
            "device": "cpu" if rehearse else "cuda",
            "compile": self.args.compile,
            "vocabulary": 256 if rehearse else VOCABULARY,
            "steps": self.args.steps,
            "seed": 0,
            **more,
        }

    def start(self, jobs: Sequence[Mapping[str, Any]]) -> list[Worker]:
        threads = max(1, len(os.sched_getaffinity(0)) // len(jobs))
        return [Worker(job, threads) for job in jobs]

    def check(self, name: str, attention: str, kernels: Any, shape: str) -> None:
        """The profiler saw the attention that was asked for, in every layer, and no other."""
        if kernels is None:  # on a CPU
            return
        print(f"{name}: " + "; ".join(f"{whose} {counts}" for whose, counts in kernels.items()), flush=True)
        wanted = OWNERS.get(attention, next(iter(kernels), None))
        if set(kernels) != ({wanted} if wanted else set()):
            self.failed(f"{name} ran {kernels}, not {wanted}'s kernels")
        elif wanted == "fa2cupy":
            counts, layers = kernels[wanted], self.shapes[shape][0]
            if counts.get("flash_fwd") != layers or counts.get("flash_bwd") != layers:
                self.failed(f"{name} ran {counts}, not {layers} of each")

    # ------------------------------------------------------------------------------------------------------------------

    def times(self) -> None:
        shapes = ("2k", "8k")
        begin = time.monotonic()
        jobs = [self.job("times", attention, shapes) for attention in self.args.attentions]
        workers = dict(zip(self.args.attentions, self.start(jobs), strict=True))
        for attention in list(workers):
            self._or_drop(workers, attention, lambda worker: worker.must_answer(400))
        print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)
        turns: dict[tuple[str, str], list[float]] = {}
        peaks: dict[tuple[str, str], float | None] = {}
        names = list(workers)
        for turn in range(self.args.turns):
            for shape in shapes:
                for index in order_of_round(turn, len(names)):
                    attention = names[index]
                    question = {"shape": shape, "steps": self.args.turn_steps}
                    found = self._or_drop(workers, attention, lambda worker, q=question: worker.ask(q, 120))
                    if found:
                        turns.setdefault((shape, attention), []).append(found["ms"])
                        peaks[shape, attention] = found["peak_gb"]
        for attention in list(workers):
            for shape in shapes:
                question = {"shape": shape, "steps": 1, "profile": True}
                found = self._or_drop(workers, attention, lambda worker, q=question: worker.ask(q, 120))
                if not found:
                    continue
                self.check(f"{shape} {attention}", attention, found["kernels"], shape)
                ms = turns[shape, attention]
                what = {"shape": shape, "attention": attention, "sizes": self.shapes[shape]}
                self.record(what="time", **what, ms=[round(x, 3) for x in ms], peak_gb=peaks[shape, attention],
                            kernels=found["kernels"])  # fmt: skip
        for worker in workers.values():
            worker.end()
        print(f"times: {time.monotonic() - begin:.0f} s", flush=True)

    def _or_drop(self, workers: dict[str, Worker], attention: str, ask: Any) -> Any:
        """What a worker answers; one that fails is said and left out from then on."""
        if attention not in workers:
            return None
        try:
            return ask(workers[attention])
        except WorkerError as error:
            self.failed(error)
            workers.pop(attention).process.kill()
            return None

    # ------------------------------------------------------------------------------------------------------------------

    def curves(self) -> None:
        begin = time.monotonic()
        jobs = [
            self.job("gradients", "fa2cupy", ["124m"], kinds=CURVES, checkpoints=self.args.checkpoints),
            *(self.job("curve", a, ["124m"], seed=seed) for seed in range(self.args.seeds) for a in CURVES),
        ]
        for job, worker in list(zip(jobs, self.start(jobs), strict=True)):
            try:
                self._collect(job, worker)
            except WorkerError as error:
                self.failed(error)
        print(f"curves: {time.monotonic() - begin:.0f} s", flush=True)

    def _collect(self, job: Mapping[str, Any], worker: Worker) -> None:
        attention, seed = job["attention"], job["seed"]
        while (found := worker.answer(500)) is not None:
            if job["what"] == "curve":
                self.check(worker.name, attention, found["kernels"], "124m")
                self.record(what="curve", attention=attention, seed=seed, sizes=self.shapes["124m"], **found)
            elif "kernels" in found:
                for kind, kernels in found["kernels"].items():
                    self.check(f"gradients {kind}", kind, kernels, "124m")
            else:
                self.record(what="gradients", of=found["what"], step=found["step"], attention=found["kind"],
                            error=found["error"])  # fmt: skip


def machine(rehearse: bool) -> dict[str, str]:
    """gpu, torch, driver, date: asked in a process of its own, so that this one holds no memory of the GPU."""
    code = (
        "import json, torch; c = torch.cuda.is_available(); "
        "print(json.dumps([torch.cuda.get_device_name() if c else 'CPU', torch.__version__]))"
    )
    gpu, version = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    if gpu == "CPU" and not rehearse:
        raise SystemExit("this measures a GPU, and there is none: --rehearse runs everything on the CPU, tiny")
    return {"gpu": gpu, "torch": version, "date": results.new_run_id()[:10]}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["all", "times", "curves", "report"], default="all")
    parser.add_argument("--attentions", type=lambda text: text.split(","), default=list(TIMED), metavar=",".join(TIMED))
    parser.add_argument("--turns", type=int, default=6, help="of each attention at each shape")
    parser.add_argument("--turn-steps", type=int, default=4, help="timed steps of a turn, behind 2 that are not")
    parser.add_argument("--steps", type=int, default=300, help="of a curve")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--compile", choices=["inductor", "aot_eager", "none"], default="inductor")
    parser.add_argument("--commit", help="default: what git says")
    parser.add_argument("--out", type=Path, help="folder of the records and the picture (default: results/gpt)")
    parser.add_argument("--file", type=Path, help="report: these records (default: the only file of the folder)")
    parser.add_argument("--write", action="store_true", help="also renew the blocks of docs/torch.md and README.md")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny, written nowhere")
    args = parser.parse_args(arguments)
    unknown = set(args.attentions) - set(gpt_report.LABELS)
    if unknown:
        parser.error(f"--attentions {','.join(sorted(unknown))}: {','.join(gpt_report.LABELS)} are known")
    if args.steps < args.checkpoints:
        parser.error("--steps must be at least --checkpoints")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.what == "report":
        file = args.file or next((args.out or results.RESULTS / "gpt").glob("*.jsonl"))
        return gpt_report.report(gpt_report.load(file), file.with_suffix(".png"), write=args.write)
    driver = Driver(args)
    print(json.dumps(driver.common), flush=True)
    if args.what in ("all", "times"):
        driver.times()
    if args.what in ("all", "curves"):
        driver.curves()
    records = driver.records if driver.path is None else gpt_report.load(driver.path)
    picture = None if driver.path is None else driver.path.with_suffix(".png")
    status = gpt_report.report(records, picture, write=args.write)
    for failure in driver.failures:
        print(f"FAILED: {failure}")
    return 1 if driver.failures else 0 if args.rehearse else status


if __name__ == "__main__":
    raise SystemExit(main())
