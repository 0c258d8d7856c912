"""A GPT in plain PyTorch, trained with fa2cupy or with torch's own attention, on the standard library's sources.

    python examples/gpt_torch.py --tiny                                  # on a CPU: the same losses as SDPA's math
    python examples/gpt_torch.py --attention fa2cupy --shape 124m --steps 300 --json curve.json
    python examples/gpt_torch.py --attention cudnn --shape 8k --steps 20   # 12 x 2,048, heads of 128, S 8,192

Weights are float32, the computation is bfloat16 by autocast (float32 with --tiny). The tokens are bytes. One process
trains with one attention: what torch.compile caches does not know which one SDPA took.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import sysconfig
import time
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa2cupy
import fa2cupy.torch

# layers, width, heads, sequence, batch, vocabulary (padded), learning rate
SHAPES = {
    "tiny": (2, 64, 4, 128, 2, 256, 1e-3),
    "124m": (12, 768, 12, 1024, 32, 50304, 6e-4),
    "2k": (12, 2048, 16, 2048, 8, 50304, 3e-4),
    "8k": (12, 2048, 16, 8192, 2, 50304, 3e-4),
}
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
PEAK_FLOPS = 989e12  # of an H100 or H200, dense bfloat16


def data():
    """The bytes of the standard library's sources, without its tests: nine tenths to train, the rest to validate."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "site-packages", "dist-packages", "idle_test"}
    paths = sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))
    tokens = b"\n".join(path.read_bytes() for path in paths)
    print(f"{len(tokens) / 1e6:.1f} MB of sources, sha256 {hashlib.sha256(tokens).hexdigest()[:16]}")
    tokens = np.frombuffer(tokens, np.uint8)
    return np.split(tokens, [len(tokens) * 9 // 10])


def batches(tokens, rng, batch, seqlen, device):
    """Inputs and targets, without end."""
    while True:
        starts = rng.integers(0, len(tokens) - seqlen - 1, batch)
        rows = torch.from_numpy(np.stack([tokens[i : i + seqlen + 1] for i in starts]).astype(np.int64))
        rows = rows.to(device, non_blocking=True)
        yield rows[:, :-1], rows[:, 1:]


def attend(kind, q, k, v):
    """(batch, seqlen, heads, head_dim)"""
    if kind == "fa2cupy":
        return fa2cupy.attention(q, k, v, causal=True)
    if kind == "none":  # what everything else costs
        return v
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, width, heads, attention):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        q, k, v = (y.unflatten(2, (self.heads, -1)) for y in self.qkv(self.norm1(x)).chunk(3, 2))
        x = x + self.out(attend(self.attention, q, k, v).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Head(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x, weight, targets):
        logits = functional.linear(self.norm(x), weight)
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class GPT(nn.Module):
    def __init__(self, shape, attention):
        super().__init__()
        layers, width, heads, seqlen, _, vocabulary, _ = SHAPES[shape]
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(seqlen, width)
        self.blocks = nn.ModuleList(Block(width, heads, attention) for _ in range(layers))
        self.head = Head(width)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                back = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers) if back else 0.02)

    def forward(self, inputs, targets):
        """The mean loss of the next token."""
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(x, self.tokens.weight, targets)


def train(shape, attention, steps, seed, device, tokens, *, compiled=True, profile=False):
    """Losses and gradient norms of every step, and the median seconds of a step after warming up."""
    *_, seqlen, batch, _, rate = SHAPES[shape]
    torch.manual_seed(seed)
    model = GPT(shape, attention).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), rate, (0.9, 0.95), weight_decay=0.1, fused=device == "cuda")
    if compiled:
        for module in (*model.blocks, model.head):
            module.compile(fullgraph=True)
    feed = batches(tokens, np.random.default_rng(seed), batch, seqlen, device)

    def step(n):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (n + 1) / 20, 1.1 - n / steps)
        inputs, targets = next(feed)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(inputs, targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), norm

    curves, marks = [], []
    with chosen(attention):
        for n in range(steps):
            curves.append(step(n))
            marks.append(torch.cuda.Event(enable_timing=True) if device == "cuda" else time.perf_counter())
            if device == "cuda":
                marks[-1].record()
        losses, norms = ([float(x) for x in curve] for curve in zip(*curves, strict=True))  # waits for the GPU
        if profile:
            check_kernels(attention, lambda: step(steps))
    pairs = zip(marks[steps // 3 :], marks[steps // 3 + 1 :], strict=False)
    seconds = [a.elapsed_time(b) / 1e3 if device == "cuda" else b - a for a, b in pairs]
    weights = sum(p.numel() for p in model.parameters()) - model.positions.weight.numel()
    return {"losses": losses, "norms": norms, "seconds": float(np.median(seconds)), "weights": weights}


def chosen(attention):
    """torch's SDPA as asked for: one of its backends, ours behind it ("enabled"), or its own choice."""
    if attention == "enabled":
        return fa2cupy.torch.sdpa()
    return sdpa_kernel(BACKENDS[attention]) if attention in BACKENDS else contextlib.nullcontext()


def check_kernels(attention, step):
    """Run a step under the profiler, and raise unless this attention's kernels ran, and nobody else's."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    names = {event.name for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA}
    found = {"fa2cupy": sorted(names & {"flash_fwd", "flash_bwd"})}
    found["flash"] = [name for name in names if "pytorch_flash" in name]
    found["cudnn"] = [name for name in names if "cudnn" in name and "sdpa" in name]
    ran = [kind for kind, kernels in found.items() if kernels]
    wanted = {"enabled": ["fa2cupy"], "sdpa": ran, "math": [], "none": []}.get(attention, [attention])
    assert ran == wanted, f"{attention}: {found}"
    print(f"attention kernels: {found}")


def tiny():
    """float32 on the CPU, 20 steps: fa2cupy's losses and gradient norms are those of SDPA's math."""
    tokens, _ = data()
    runs = {kind: train("tiny", kind, 20, 0, "cpu", tokens, compiled=False) for kind in ("math", "fa2cupy")}
    for what in ("losses", "norms"):
        gap = max(abs(a - b) for a, b in zip(runs["math"][what], runs["fa2cupy"][what], strict=True))
        print(
            f"{what}: {runs['fa2cupy'][what][0]:.4f} to {runs['fa2cupy'][what][-1]:.4f}, gap to SDPA's math {gap:.1e}"
        )
        assert gap < 1e-5, what


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--attention", default="fa2cupy", choices=["fa2cupy", "enabled", "sdpa", *BACKENDS, "none"])
    parser.add_argument("--shape", default="124m", choices=SHAPES)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write losses, norms and times here")
    args = parser.parse_args()
    if args.tiny:
        tiny()
        return
    run = train(args.shape, args.attention, args.steps, args.seed, "cuda", data()[0], profile=True)
    layers, width, _, seqlen, batch, *_ = SHAPES[args.shape]
    rate = batch * seqlen / run["seconds"]
    causal, full = (rate * (6 * run["weights"] + n * layers * seqlen * width) / PEAK_FLOPS for n in (6, 12))
    gpu, gib = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated() / 2**30
    print(f"{args.attention}, {gpu}: loss {run['losses'][0]:.3f} to {run['losses'][-1]:.3f}, {gib:.1f} GiB")
    print(f"{1e3 * run['seconds']:.1f} ms a step, {rate:,.0f} tokens/s")
    print(f"{causal:.1%} of the peak, causal attention counted as it is; {full:.1%} counted as if it were full")
    if args.json:
        run |= {"shape": args.shape, "attention": args.attention, "seed": args.seed, "gpu": gpu, "gib": gib}
        args.json.write_text(json.dumps(run | {"mfu": causal, "mfu_full": full}) + "\n")


if __name__ == "__main__":
    main()
