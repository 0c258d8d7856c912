"""Host microseconds of a small call: ours with torch tensors and with CuPy arrays, beside torch's flash SDPA.

    python benchmarks/host_cost.py [--rounds 30] [--json PATH]

[batch 1, seqlen 128, 8 heads, head_dim 64], causal, bfloat16; 16 sets of buffers in turn, outputs allocated afresh:
the forward without gradients, then forward and backward through torch's autograd, last with SDPA taken over. The
contestants take turns; the GPU is idle when a round starts and always faster than the host.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BUFFER_SETS = 16
CALLS = 20 * BUFFER_SETS  # of a round: fewer than a driver queues before it makes the host wait
SHAPE = (1, 128, 8, 64)


def measure(
    contestants: dict[str, Callable[[int], Any]],
    synchronize: Callable[[], Any],
    rounds: int,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Microseconds per call, one number a round. A contestant is called with the number of the buffer set."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(-2, rounds):  # the first two warm up
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            call = contestants[name]
            synchronize()
            start = now()
            for number in range(CALLS):
                call(number % BUFFER_SETS)
            elapsed = now() - start
            if turn >= 0:
                times[name].append(1e6 * elapsed / CALLS)
    synchronize()
    return times


def contestants() -> dict[str, Callable[[int], Any]]:
    import cupy
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    import fa2cupy

    tensors = [
        tuple(torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16) for _ in range(3)) for _ in range(BUFFER_SETS)
    ]
    arrays = [tuple(cupy.from_dlpack(x).copy() for x in qkv) for qkv in tensors]
    by_head = [tuple(x.transpose(1, 2) for x in qkv) for qkv in tensors]

    def ours(buffers: Sequence[tuple[Any, ...]]) -> Callable[[int], Any]:
        attention = fa2cupy.attention

        def call(number: int) -> Any:
            q, k, v = buffers[number]
            return attention(q, k, v, causal=True)

        return call

    def flash(number: int) -> Any:
        q, k, v = by_head[number]
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    return {"fa2cupy, torch tensors": ours(tensors), "fa2cupy, CuPy arrays": ours(arrays), "torch flash SDPA": flash}


def grad_contestants() -> dict[str, Callable[[int], Any]]:
    """Forward and backward through autograd; the gradients are returned, not accumulated."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    import fa2cupy

    def leaves() -> tuple[Any, ...]:
        return tuple(torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    buffers = [leaves() for _ in range(BUFFER_SETS)]
    by_head = [tuple(x.detach().transpose(1, 2).requires_grad_() for x in qkv) for qkv in buffers]
    douts = [torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16) for _ in range(BUFFER_SETS)]
    turned = [dout.transpose(1, 2) for dout in douts]
    attention, grad = fa2cupy.attention, torch.autograd.grad

    def ours(number: int) -> Any:
        q, k, v = qkv = buffers[number]
        return grad(attention(q, k, v, causal=True), qkv, douts[number])

    def flash(number: int) -> Any:
        q, k, v = qkv = by_head[number]
        return grad(scaled_dot_product_attention(q, k, v, is_causal=True), qkv, turned[number])

    return {"fa2cupy": ours, "torch flash SDPA": flash}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="also write the medians here")
    args = parser.parse_args(arguments)
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from fa2cupy.torch import sdpa

    results: dict[str, dict[str, list[float]]] = {}
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with torch.no_grad():
            results["forward"] = measure(contestants(), torch.cuda.synchronize, args.rounds)
        results["forward + backward"] = measure(grad_contestants(), torch.cuda.synchronize, args.rounds)
        with sdpa():
            results["forward + backward, SDPA taken over"] = measure(
                grad_contestants(), torch.cuda.synchronize, args.rounds
            )
    medians = {
        what: {name: statistics.median(values) for name, values in times.items()} for what, times in results.items()
    }
    print(f"{torch.cuda.get_device_name()}, {SHAPE} bfloat16 causal, host microseconds per call")
    for what, by_name in medians.items():
        print(what)
        for name, us in by_name.items():
            fastest, ratio = min(results[what][name]), us / by_name["torch flash SDPA"]
            print(f"  {name:24s} {us:6.1f}  (fastest round {fastest:.1f})  {ratio:5.2f} of torch flash")
    if args.json:
        rounded = {what: {name: round(us, 2) for name, us in names.items()} for what, names in medians.items()}
        args.json.write_text(json.dumps(rounded) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
