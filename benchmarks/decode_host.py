"""What a call of attention on a KV cache costs the host: `bench.py --cases decode --host`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks import host_cost
from benchmarks.host_cost import BUFFER_SETS

# Of the host's time of torch's flash SDPA in the same run, at most.
BARS = {"attend(out=)": 0.64, "attend()": 0.76}
_SDPA = "torch flash SDPA"


def calls(device: str) -> dict[str, Callable[[int], Any]]:
    """Small calls: one query of two sequences, lengths on the device; on a GPU it is faster than the host."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    import fa2cupy

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    sets = []
    for _ in range(BUFFER_SETS):
        q, k, v = (torch.randn((2, n, 8, 64), device=device, dtype=dtype) for n in (1, 128, 128))
        sets.append((q, k, v, fa2cupy.KVCache(k, v), torch.empty_like(q)))
    turned = [[x.transpose(1, 2) for x in each[:3]] for each in sets]
    lengths = torch.full((2,), 128, dtype=torch.int32, device=device)

    def given(i: int) -> Any:
        q, _, _, cache, out = sets[i]
        return cache.attend(q, cache_seqlens=lengths, causal=True, out=out)

    def fresh(i: int) -> Any:
        q, _, _, cache, _ = sets[i]
        return cache.attend(q, cache_seqlens=lengths, causal=True)

    def function(i: int) -> Any:
        q, k, v, _, _ = sets[i]
        return fa2cupy.attention_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True)

    def sdpa(i: int) -> Any:
        return scaled_dot_product_attention(*turned[i])

    return {"attend(out=)": given, "attend()": fresh, "attention_with_kvcache": function, _SDPA: sdpa}


def measure(
    contestants: dict[str, Callable[[int], Any]], synchronize: Callable[[], Any], rounds: int
) -> dict[str, list[float]]:
    """Microseconds of a call, one number a round; torch's SDPA by its flash kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return host_cost.measure(contestants, synchronize, rounds)


def report(times: dict[str, list[float]]) -> int:
    """Medians, and of rounds the median ratio to torch's; 1 if one is above its bar."""
    missed = 0
    for name, each in times.items():
        ratio = statistics.median(x / y for x, y in zip(each, times[_SDPA], strict=True))
        bar = BARS.get(name)
        over = bar is not None and ratio > bar
        missed |= over
        text = "" if bar is None else f", at most {bar:.2f}" + " (missed)" * over
        print(f"{name:24s} {statistics.median(each):6.1f} us  {ratio:.2f} of torch's{text}")
    return int(missed)
