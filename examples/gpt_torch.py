"""A small GPT in plain torch, trained with fa2cupy or with torch's own attention, on the standard library's sources.

    python examples/gpt_torch.py --tiny                                 # on a CPU: the same losses as the plain formula
    python examples/gpt_torch.py --attention fa2cupy --shape 124m --steps 300 --json curve.json
    python examples/gpt_torch.py --attention sdpa-cudnn --shape 8k --steps 20       # 12 x 2,048, heads of 128, S 8,192

Weights are float32, the computation is bfloat16 (float32 with --tiny), the blocks and the loss are compiled. The tokens
are bytes. `benchmarks/gpt.py` measures this model.
"""

import argparse
import contextlib
import json
import time
from pathlib import Path

import torch
from gpt_data import SHAPES, VOCABULARY, batches, tokens
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa2cupy
import fa2cupy.torch
from fa2cupy.flash_attn import flash_attn_qkvpacked_func

SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
ATTENTIONS = ("fa2cupy", "fa2cupy-packed", "fa2cupy-sdpa", "sdpa-default", *SDPA, "none")


def attend(kind, qkv):
    """(batch, length, 3, heads, head_dim) -> (batch, length, heads, head_dim), causal.

    "fa2cupy-packed" leaves qkv in one piece, and so its gradient, which the others stack from dq, dk and dv. "none" is
    what all the rest costs: the values as they are.
    """
    if kind == "fa2cupy-packed":
        return flash_attn_qkvpacked_func(qkv, causal=True)
    q, k, v = qkv.unbind(2)
    if kind == "fa2cupy":
        return fa2cupy.attention(q, k, v, causal=True)
    if kind == "none":
        return v
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def choice(kind, device):
    """What must hold while the model is compiled and runs, for SDPA to be computed by this kind."""
    if kind == "fa2cupy-sdpa":
        return fa2cupy.torch.sdpa(device=device)
    return sdpa_kernel(SDPA[kind]) if kind in SDPA else contextlib.nullcontext()


class Weight(nn.Module):
    """A matrix kept in float32 and multiplied by in the dtype of what it is given."""

    def __init__(self, inputs, outputs, scale=0.02):
        super().__init__()
        self.weight = nn.Parameter(scale * torch.randn(outputs, inputs))

    def forward(self, x):
        return functional.linear(x, self.weight.to(x.dtype))


class Block(nn.Module):
    def __init__(self, width, heads, layers, kind, dtype):
        super().__init__()
        self.heads, self.kind, self.dtype = heads, kind, dtype
        residual = 0.02 / (2 * layers) ** 0.5
        self.norm1, self.norm2 = (nn.RMSNorm(width, eps=1e-6) for _ in range(2))
        self.qkv, self.out = Weight(width, 3 * width), Weight(width, width, residual)
        self.up, self.down = Weight(width, 4 * width), Weight(4 * width, width, residual)

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x).to(self.dtype)).view(batch, length, 3, self.heads, width // self.heads)
        x = x + self.out(attend(self.kind, qkv).reshape(batch, length, width))
        hidden = functional.gelu(self.up(self.norm2(x).to(self.dtype)), approximate="tanh")
        return x + self.down(hidden)


class Head(nn.Module):
    """The mean loss of the next tokens; the embedding's weights are the head's too."""

    def __init__(self, width, dtype):
        super().__init__()
        self.norm, self.dtype = nn.RMSNorm(width, eps=1e-6), dtype

    def forward(self, x, embedding, targets):
        logits = functional.linear(self.norm(x).to(self.dtype), embedding.to(self.dtype)).float()
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class GPT(nn.Module):
    """batch (batch, length + 1), int64 -> the mean loss. Compile it before the first call, if at all."""

    def __init__(self, layers, width, heads, length, kind, dtype=torch.bfloat16, vocabulary=VOCABULARY):
        super().__init__()
        self.tokens = nn.Parameter(0.02 * torch.randn(vocabulary, width))
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width, heads, layers, kind, dtype) for _ in range(layers))
        self.head = Head(width, dtype)

    def forward(self, batch):
        x = functional.embedding(batch[:, :-1], self.tokens) + self.positions[: batch.shape[1] - 1]
        for block in self.blocks:
            x = block(x)
        return self.head(x, self.tokens, batch[:, 1:])

    def compile_parts(self, **options):
        """Each block, which all share what is compiled, and the head."""
        for part in (*self.blocks, self.head):
            part.compile(fullgraph=True, dynamic=False, **options)


class Trainer:
    """AdamW with a warm-up, and the norm of the gradients clipped to 1."""

    def __init__(self, model, rate=6e-4, warm_up=20, fused=True):
        self.model, self.rate, self.warm_up, self.number = model, rate, warm_up, 0
        parameters = list(model.parameters())
        matrices = [{"params": [p for p in parameters if (p.ndim > 1) == decays], "weight_decay": decay}
                    for decays, decay in ((True, 0.1), (False, 0.0))]  # fmt: skip
        self.optimizer = torch.optim.AdamW(matrices, rate, betas=(0.9, 0.95), fused=fused)

    def step(self, batch):
        """Loss and norm of the gradients, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, (self.number + 1) / self.warm_up)
        loss = self.model(batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.number += 1
        return loss.detach(), norm


def train(args, kind, data):
    *sizes, batch_size = SHAPES[args.shape]
    length, tiny = sizes[-1], args.shape == "tiny"
    torch.manual_seed(args.seed)
    model = GPT(*sizes, kind, torch.float32 if tiny else torch.bfloat16, 256 if tiny else VOCABULARY).to(args.device)
    if args.device == "cuda":
        model.compile_parts()
    trainer, source = Trainer(model, args.rate), batches(data, args.seed, batch_size, length)
    losses, norms, times = [], [], []
    with choice(kind, args.device):
        for number in range(args.steps):
            batch = torch.from_numpy(next(source)).to(args.device)
            begin = time.perf_counter()
            loss, norm = trainer.step(batch)
            losses.append(float(loss))  # which waits for the step
            norms.append(float(norm))
            times.append(time.perf_counter() - begin)
            if number % 20 == 0 or number == args.steps - 1:
                print(f"step {number:4d}  loss {losses[-1]:.4f}  gradient {norms[-1]:.3f}  {1e3 * times[-1]:.1f} ms")
    times = sorted(times[min(5, len(times) // 2) :])
    return {"losses": losses, "norms": norms, "ms": 1e3 * times[len(times) // 2]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", choices=ATTENTIONS, default="fa2cupy")
    parser.add_argument("--shape", choices=SHAPES, default="124m")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", help="write losses, gradient norms and the median step time there")
    parser.add_argument("--tiny", action="store_true", help="20 steps in float32 on the CPU beside SDPA's math")
    args, data = parser.parse_args(), tokens()
    if args.tiny:
        args.shape, args.steps, args.device = "tiny", 20, "cpu"
        right = train(args, "sdpa-math", data)["losses"]
        for kind in ("fa2cupy", "fa2cupy-packed", "fa2cupy-sdpa"):
            worst = max(abs(a - b) for a, b in zip(train(args, kind, data)["losses"], right, strict=True))
            print(f"{kind}: largest difference of a loss from that of SDPA's math: {worst:.1e}")
            assert worst <= 1e-5
        return
    result = train(args, args.attention, data)
    print(f"{args.attention}: {result['ms']:.1f} ms a step")
    if args.json:
        Path(args.json).write_text(json.dumps({"attention": args.attention, "seed": args.seed, **result}))


if __name__ == "__main__":
    main()
