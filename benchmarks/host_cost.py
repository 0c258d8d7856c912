"""Host microseconds of small calls: ours with torch tensors and with CuPy arrays, beside torch's flash SDPA.

    python benchmarks/host_cost.py [--rounds 30] [--json PATH]
    python benchmarks/host_cost.py --against REV        this tree and another one (against.py); status 1 if not level

[batch 1, seqlen 128, 8 heads, head_dim 64], causal, bfloat16; 16 sets of buffers in turn, outputs allocated afresh, no
gradients; forward, and of ours the backward as well. Then forward and backward through torch's autograd, ours and
SDPA, the second time with SDPA taken over. The contestants take turns; the GPU is idle when a round starts and always
faster than the host.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import against, results

BUFFER_SETS = 16
CALLS = 20 * BUFFER_SETS  # of a round: fewer than a driver queues before it makes the host wait
BACKWARD_CALLS = 5 * BUFFER_SETS  # which is of several launches
BACKWARD, GRAD = "bwd:", "grad:"  # how the names of their contestants begin
TAKEN = f"{GRAD}torch SDPA, taken over"  # must run inside fa2cupy.torch.sdpa()
SHAPE = (1, 128, 8, 64)


def measure(
    contestants: dict[str, Callable[[int], Any]],
    synchronize: Callable[[], Any],
    rounds: int,
    now: Callable[[], float] = time.perf_counter,
    inside: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None,
) -> dict[str, list[float]]:
    """Microseconds per call, one number a round. A contestant is called with the number of the buffer set, inside the
    context that `inside` has for it."""
    contexts = inside or {}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(-2, rounds):  # the first two warm up
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            call = contestants[name]
            calls = BACKWARD_CALLS if name.startswith((BACKWARD, GRAD)) else CALLS
            with contexts.get(name, nullcontext)():
                synchronize()
                start = now()
                for number in range(calls):
                    call(number % BUFFER_SETS)
                elapsed = now() - start
            if turn >= 0:
                times[name].append(1e6 * elapsed / calls)
    synchronize()
    return times


def contestants(packages: Mapping[str, Any]) -> dict[str, Callable[[int], Any]]:
    """'fwd:<package>, torch tensors' and so on, of each package by its name."""
    import cupy
    import torch

    tensors = [
        tuple(torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16) for _ in range(4)) for _ in range(BUFFER_SETS)
    ]
    arrays = [tuple(cupy.from_dlpack(x).copy() for x in each) for each in tensors]

    def forward(package: Any, sets: Sequence[tuple[Any, ...]]) -> Callable[[int], Any]:
        attention = package.attention

        def call(number: int) -> Any:
            q, k, v, _ = sets[number]
            return attention(q, k, v, causal=True)

        return call

    def backward(package: Any, sets: Sequence[tuple[Any, ...]]) -> Callable[[int], Any]:
        gradient = package.attention_backward
        saved = [package.attention(q, k, v, causal=True, return_lse=True) for q, k, v, _ in sets]

        def call(number: int) -> Any:
            q, k, v, dout = sets[number]
            out, lse = saved[number]
            return gradient(dout, q, k, v, out, lse, causal=True)

        return call

    return {
        f"{mode}{package}, {kind}": make(packages[package], sets)
        for mode, make in (("fwd:", forward), (BACKWARD, backward))
        for kind, sets in (("torch tensors", tensors), ("CuPy arrays", arrays))
        for package in packages
    }


def torch_flash() -> Callable[[int], Any]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    tensors = [
        tuple(torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
        for _ in range(BUFFER_SETS)
    ]

    def flash(number: int) -> Any:
        q, k, v = tensors[number]
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    return flash


def with_grad() -> dict[str, Callable[[int], Any]]:
    """Forward and backward through torch's autograd; the gradients are returned, not accumulated."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    import fa2cupy

    def tensors() -> list[Any]:
        return [torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16) for _ in range(4)]

    sets = [[x.requires_grad_() for x in tensors()[:3]] for _ in range(BUFFER_SETS)]
    turned = [[x.detach().transpose(1, 2).requires_grad_() for x in each] for each in sets]
    douts = [tensors()[3] for _ in range(BUFFER_SETS)]
    turned_douts = [x.transpose(1, 2) for x in douts]
    attention, grad = fa2cupy.attention, torch.autograd.grad

    def ours(number: int) -> Any:
        q, k, v = sets[number]
        return grad(attention(q, k, v, causal=True), (q, k, v), douts[number])

    def flash(number: int) -> Any:
        q, k, v = turned[number]
        return grad(scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), turned_douts[number])

    return {f"{GRAD}{results.OURS}": ours, f"{GRAD}torch flash SDPA": flash, TAKEN: flash}


def compare(
    packages: Mapping[str, Any],
    synchronize: Callable[[], Any],
    rounds: int,
    now: Callable[[], float] = time.perf_counter,
) -> list[against.Times]:
    """The repeats of two packages: each kind of call -> median microseconds of the first and of the second."""
    first, second = packages
    made = contestants(packages)
    kinds = [name for name in made if f"{first}, " in name]
    repeats = []
    for _ in range(against.REPEATS):
        us = {name: statistics.median(each) for name, each in measure(made, synchronize, rounds, now).items()}
        repeats.append({name.replace(f"{first}, ", ""): (us[name], us[name.replace(first, second)]) for name in kinds})
    return repeats


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="also write the medians here")
    parser.add_argument("--against", metavar="REV", help="a commit, or a directory with its tree, as the only peer")
    args = parser.parse_args(arguments)
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    import fa2cupy
    from fa2cupy.torch import sdpa

    if args.against:
        other, name = against.load(args.against)
        packages = {results.OURS: fa2cupy, against.OTHER: other}
        with torch.no_grad():
            repeats = compare(packages, torch.cuda.synchronize, args.rounds)
        verdict, commit = against.judge(repeats), results.commit()
        if args.json:
            against.write(args.json, repeats, verdict, commit=commit, against=name, gpu=torch.cuda.get_device_name())
        print(f"commit {commit} against {name}, {torch.cuda.get_device_name()}, host microseconds of {SHAPE}")
        for kind, (ours, theirs) in repeats[-1].items():
            print(f"{kind:20s} {ours:6.1f} {theirs:6.1f}")
        print(f"\n{verdict}")
        return 0 if verdict.ok else 1
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        made = {**contestants({results.OURS: fa2cupy}), "torch flash SDPA": torch_flash()}
        times = measure(made, torch.cuda.synchronize, args.rounds)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        times |= measure(with_grad(), torch.cuda.synchronize, args.rounds, inside={TAKEN: sdpa})
    medians = {name: statistics.median(values) for name, values in times.items()}
    torch_us, grad_us = medians["torch flash SDPA"], medians[f"{GRAD}torch flash SDPA"]
    print(f"{torch.cuda.get_device_name()}, {SHAPE} bfloat16 causal, host microseconds per call")
    for name, us in medians.items():
        of_torch = us / (grad_us if name.startswith(GRAD) else torch_us)
        share = "" if name.startswith(BACKWARD) else f"  {of_torch:5.2f} of torch flash"
        print(f"{name:28s} {us:6.1f}  (fastest round {min(times[name]):.1f}){share}")
    if args.json:
        args.json.write_text(json.dumps({name: round(us, 2) for name, us in medians.items()}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
