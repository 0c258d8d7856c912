"""How far out, lse, dq, dk and dv are from float64: ours, torch's flash attention (FA2) and cuDNN, in one table.

    python benchmarks/numerics.py [--json PATH] > table.md

Causal and full; float16 and bfloat16; S 512 to 4,096; head_dim 64 and 128; normal inputs, and normal inputs with rare
outliers of 10 times the size. Each number is a root mean square error relative to the size of what it belongs to (of
lse: absolute). The references are float64 on the same inputs; every backward is given its own forward's out and lse.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

RESULTS = ("out", "lse", "dq", "dk", "dv")
SEQLENS, HEAD_DIMS, DTYPES, INPUTS = (512, 1024, 2048, 4096), (64, 128), ("float16", "bfloat16"), ("normal", "outliers")
BATCH, HEADS = 1, 4


def reference(q: Any, k: Any, v: Any, dout: Any, causal: bool) -> dict[str, Any]:
    """float64, (batch, heads, seqlen, head_dim)."""
    import torch

    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    scale = q.shape[3] ** -0.5
    s = q @ k.mT * scale
    if causal:
        s = s.masked_fill(torch.ones(s.shape[2:], dtype=torch.bool, device=s.device).triu(1), -math.inf)
    p = s.softmax(3)
    out = p @ v
    ds = p * (dout @ v.mT - (dout * out).sum(3, keepdim=True)) * scale
    return {"out": out, "lse": s.logsumexp(3), "dq": ds @ k, "dk": ds.mT @ q, "dv": p.mT @ dout}


def inputs(seqlen: int, head_dim: int, dtype: str, kind: str, device: str) -> list[Any]:
    """q, k, v, dout."""
    import torch

    generator = torch.Generator(device).manual_seed(seqlen + head_dim)
    shape = (BATCH, HEADS, seqlen, head_dim)
    tensors = []
    for _ in range(4):
        x = torch.randn(shape, device=device, generator=generator)
        if kind == "outliers" and len(tensors) < 3:
            rare = torch.rand(shape, device=device, generator=generator) < 1e-3
            x = x + 10 * torch.randn(shape, device=device, generator=generator) * rare
        tensors.append(x.to(getattr(torch, dtype)))
    return tensors


def ours(q: Any, k: Any, v: Any, dout: Any, causal: bool) -> tuple[Any, ...]:
    import fa2cupy

    (out, lse), pullback = fa2cupy.attention_vjp(q, k, v, causal=causal, layout="bhsd", return_lse=True)
    return out, lse, *pullback(dout)


def flash(q: Any, k: Any, v: Any, dout: Any, causal: bool) -> tuple[Any, ...]:
    import torch

    aten = torch.ops.aten
    results = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    out, lse, *rest = results[:8]
    return (
        out,
        lse,
        *aten._scaled_dot_product_flash_attention_backward(dout, q, k, v, out, lse, *rest[:4], 0.0, causal, *rest[4:]),
    )


def cudnn(q: Any, k: Any, v: Any, dout: Any, causal: bool) -> tuple[Any, ...]:
    import torch

    aten = torch.ops.aten
    results = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)
    out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = results
    gradients = aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, causal
    )
    return out, lse.reshape(q.shape[:3]), *gradients


PEERS: dict[str, Callable[..., tuple[Any, ...]]] = {"fa2cupy": ours, "FA2": flash, "cuDNN": cudnn}


def errors(results: Sequence[Any], exact: dict[str, Any]) -> dict[str, float]:
    """By name of the result."""
    measured = {}
    for name, got in zip(RESULTS, results, strict=True):
        error = (got.double() - exact[name]).square().mean().sqrt()
        size = 1.0 if name == "lse" else exact[name].square().mean().sqrt()
        measured[name] = float(error / size)
    return measured


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each case and result: the error of each peer, and ours to the smaller of theirs."""
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    lines = [f"| case | | {' | '.join(peers)} | ours to the better |", "|---|---|" + "---:|" * (len(peers) + 1)]
    for case, group in itertools.groupby(rows, key=lambda row: row["case"]):
        by_peer = {row["peer"]: row["errors"] for row in group}
        for name in RESULTS:
            numbers = [by_peer[peer][name] for peer in peers]
            best = min(numbers[1:], default=math.nan)
            cells = " | ".join(f"{number:.2e}" for number in numbers)
            lines.append(f"| {case} | {name} | {cells} | {numbers[0] / best if best else math.nan:.2f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args(arguments)
    rows = []
    for dtype, head_dim, seqlen, kind, causal in itertools.product(DTYPES, HEAD_DIMS, SEQLENS, INPUTS, (False, True)):
        tensors = inputs(seqlen, head_dim, dtype, kind, "cuda")
        exact = reference(*tensors, causal)
        case = f"{dtype}, head_dim {head_dim}, S {seqlen}, {'causal' if causal else 'full'}, {kind}"
        for name, peer in PEERS.items():
            rows.append({"case": case, "peer": name, "errors": errors(peer(*tensors, causal), exact)})
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
