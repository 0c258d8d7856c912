"""Host microseconds of small calls with JAX arrays: eager, jitted, one more inside a jit; beside jax.nn's cuDNN.

    python benchmarks/host_cost_jax.py [--rounds 28] [--json PATH]

[batch 1, seqlen 128, 8 heads, head_dim 64], causal, bfloat16. "One more" is what a jitted chain of 17 attentions costs
more than one of 1, over 16; without and with XLA's command buffers (CUDA graphs), which a process chooses when it
starts, so each has one of its own. The contestants take turns, everybody right after everybody else equally often:
what ran before has filled the caches with its own code. The GPU is idle when a round starts. Times are of the host
alone: until the last call has returned. What is compared is the median ratio of the rounds. "launches": how often XLA
called fa2cupy in one call of the chain.

On a machine without a GPU it runs with jax.nn's plain formula in cuDNN's place: a rehearsal, whose numbers say nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import results
from benchmarks.timing import order_of_round

SHAPE = (1, 128, 8, 64)
MORE = 16  # attentions of the long chain beyond the first
CALLS = 20  # of a round: with what a chain launches fewer than a driver queues before it makes the host wait
MODES = {"without": "--xla_gpu_enable_command_buffer=", "with": ""}
# what -> (at most, over what or None for microseconds)
BARS = {
    "one more, without command buffers": (15.0, None),
    "one more, with command buffers": (2.0, None),
    "forward and backward, ours": (1.0, "forward and backward, jax.nn"),
    "eager": (1.05, "jitted"),
}


def contestants() -> dict[str, Callable[[], Any]]:
    import jax
    import numpy as np

    import fa2cupy.jax

    rng = np.random.default_rng(0)
    shape, dtype, implementation = (
        (SHAPE, "bfloat16", "cudnn") if jax.default_backend() == "gpu" else ((1, 8, 1, 8), "float32", "xla")
    )
    q, k, v, dout = (jax.numpy.asarray(rng.standard_normal(shape), dtype) for _ in range(4))
    ours = functools.partial(fa2cupy.attention, causal=True)
    theirs = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=implementation)

    def chain(attention: Any, length: int) -> Callable[[], Any]:
        @jax.jit
        def run(q: Any, k: Any, v: Any) -> Any:
            for _ in range(length):
                q = attention(q, k, v)
            return q

        return lambda: run(q, k, v)

    def gradients(attention: Any) -> Callable[[], Any]:
        @jax.jit
        def run(q: Any, k: Any, v: Any, dout: Any) -> Any:
            out, pullback = jax.vjp(attention, q, k, v)
            return out, *pullback(dout)

        return lambda: run(q, k, v, dout)

    return {
        "eager": lambda: fa2cupy.attention(q, k, v, causal=True),  # as one calls it: a partial costs as much as a frame
        "jitted": chain(ours, 1),
        "jitted chain": chain(ours, 1 + MORE),
        "jitted, jax.nn": chain(theirs, 1),
        "jitted chain, jax.nn": chain(theirs, 1 + MORE),
        "forward and backward, ours": gradients(ours),
        "forward and backward, jax.nn": gradients(theirs),
    }


def measure(calls: dict[str, Callable[[], Any]], rounds: int, wait: Callable[[Any], Any]) -> dict[str, list[float]]:
    """Microseconds per call, one number a round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(-2, rounds):  # the first two warm up
        for index in order_of_round(turn % (2 * len(names)), len(names)):
            name = names[index]
            call = calls[name]
            for _ in range(3):
                wait(call())
            start = time.perf_counter()
            for _ in range(CALLS):
                last = call()
            elapsed = time.perf_counter() - start
            wait(last)
            if turn >= 0:
                times[name].append(1e6 * elapsed / CALLS)
    return times


def launches(call: Callable[[], Any], wait: Callable[[Any], Any]) -> int | None:
    """How often XLA calls fa2cupy in one call that is warm; None without a GPU."""
    from fa2cupy.xla import ffi

    if not ffi._prepared:
        return None
    seen = []
    kept = dict(ffi._prepared)
    for key, prepared in kept.items():

        def counted(pointers: Any, stream: int, launch: Any = prepared.launchable) -> None:
            seen.append(stream)
            launch(pointers, stream)

        ffi._prepared[key] = dataclasses.replace(prepared, launchable=counted)
    ffi._sites.clear()  # which hold the calls as they were
    for _ in range(10):
        wait(call())
    ffi._prepared.update(kept)
    ffi._sites.clear()
    return round(len(seen) / 10)


def child(rounds: int) -> dict[str, Any]:
    """All that is measured in a process."""
    import jax

    calls = contestants()
    times = measure(calls, rounds, jax.block_until_ready)
    found = {name: statistics.median(each) for name, each in times.items()}
    for whose in ("", ", jax.nn"):
        pairs = zip(times[f"jitted chain{whose}"], times[f"jitted{whose}"], strict=True)
        found[f"one more{whose}"] = statistics.median((many - one) / MORE for many, one in pairs)
    ratios = {
        f"{name} over {other}": statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))
        for name, (_, other) in BARS.items()
        if other is not None
    }
    device = jax.devices()[0]
    return {
        "gpu": device.device_kind if device.platform == "gpu" else "CPU",
        "jax": jax.__version__,
        "us": found,
        "ratios": ratios,
        "launches": launches(calls["jitted chain"], jax.block_until_ready),
    }


def in_process(mode: str, rounds: int) -> dict[str, Any]:
    flags = " ".join(filter(None, (os.environ.get("XLA_FLAGS"), MODES[mode])))
    environment = {**os.environ, "XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if not flags:
        del environment["XLA_FLAGS"]
    command = [sys.executable, __file__, "--child", "--rounds", str(rounds)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def verdicts(
    us: dict[str, dict[str, float]], ratios: dict[str, dict[str, float]]
) -> list[tuple[str, float, float, bool]]:
    """(bar, found, at most, held)."""
    all_times = {f"{name}, {mode} command buffers": t for mode, row in us.items() for name, t in row.items()}
    found = []
    for name, (most, over) in BARS.items():
        if over is None:
            found.append((f"{name}, us", all_times[name], most))
        else:
            what = f"{name} over {over}"
            found += [(f"{what}, {mode} command buffers", row[what], most) for mode, row in ratios.items()]
    return [(*each, each[1] <= each[2]) for each in found]


def table(us: dict[str, dict[str, float]]) -> str:
    lines = ["| us | " + " | ".join(f"{mode} command buffers" for mode in us) + " |", "|---|" + "---:|" * len(us)]
    for name in next(iter(us.values())):
        lines.append(f"| {name} | " + " | ".join(f"{row[name]:.1f}" for row in us.values()) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=28)
    parser.add_argument("--json", type=Path, help="append the record there")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        print(json.dumps(child(args.rounds)))
        return 0
    found = {mode: in_process(mode, args.rounds) for mode in MODES}
    us, ratios = ({mode: each[what] for mode, each in found.items()} for what in ("us", "ratios"))
    first = next(iter(found.values()))
    record = {
        "run": results.new_run_id(),
        "gpu": first["gpu"],
        "jax": first["jax"],
        "commit": results.commit(),
        "command": results.command("host_cost_jax.py", sys.argv[1:] if arguments is None else arguments),
        "us": us,
        "ratios": ratios,
        "launches": {mode: each["launches"] for mode, each in found.items()},
    }
    print(f"{record['gpu']}, jax {record['jax']}, {record['run']}, `{record['command']}`, commit {record['commit']}\n")
    print(table(us))
    print(f"\nlaunches by fa2cupy in a chain of {1 + MORE}: {record['launches']}\n")
    held = verdicts(us, ratios)
    for text, value, most, ok in held:
        print(f"{text}: {value:.2f}, at most {most:g}: {'held' if ok else 'MISSED'}")
    if args.json:
        with args.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    return 0 if record["gpu"] == "CPU" or all(ok for *_, ok in held) else 1


if __name__ == "__main__":
    raise SystemExit(main())
