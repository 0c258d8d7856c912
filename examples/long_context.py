"""One layer of attention learns to copy over 16,384 and 65,536 tokens: the second half asks for the first, in order.

    python examples/long_context.py                      # on a GPU: bfloat16, 16 heads of 64
    python examples/long_context.py --tiny               # 512 tokens on the CPU, seconds

Each symbol is random, so whoever does not find the one place among all has 1 in 16 right. Queries and keys come from a
binary code of the place within a half, values from the symbols; that equal places belong together is learned.
"""

import argparse
import time

import torch
from torch import nn

import fa2cupy

SYMBOLS = 16  # and one more that asks


class Copier(nn.Module):
    def __init__(self, half, heads, dtype, head_dim=64):
        super().__init__()
        bits = (half - 1).bit_length()
        code = ((torch.arange(half)[:, None] >> torch.arange(bits)) & 1).float() * 2 - 1
        self.register_buffer("places", code.repeat(2, 1))
        self.heads, self.dtype, width = heads, dtype, heads * head_dim
        self.q, self.k = (nn.Linear(bits, width, bias=False) for _ in range(2))
        nn.init.normal_(self.q.weight, std=bits**-0.5)
        self.k.load_state_dict(self.q.state_dict())  # keys begin as queries do
        self.v, self.head = nn.Embedding(SYMBOLS + 1, width), nn.Linear(width, SYMBOLS)

    def forward(self, symbols):
        """(batch, half) -> logits of the second half."""
        batch, half = symbols.shape
        tokens = torch.cat([symbols, torch.full_like(symbols, SYMBOLS)], 1)
        places = self.places.expand(batch, -1, -1)
        q, k, v = (
            x.to(self.dtype).unflatten(-1, (self.heads, -1)) for x in (self.q(places), self.k(places), self.v(tokens))
        )
        out = fa2cupy.attention(q, k, v, causal=True)  # no score is ever stored
        return self.head(out[:, half:].flatten(2).float())


def learn(tokens, heads, steps, device, dtype):
    """Steps until a batch is right by 99%, or all; the share that is right of a sequence never seen."""
    torch.manual_seed(0)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    half, begin = tokens // 2, 0.0
    model = Copier(half, heads, dtype).to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(steps + 1):
        symbols = torch.randint(SYMBOLS, (1, half), device=device)
        logits = model(symbols)
        right = (logits.argmax(-1) == symbols).float().mean().item()
        if step % 20 == 0 or right > 0.99 or step == steps:
            print(f"{tokens:6,} tokens, step {step:3d}: {right:6.1%} right", flush=True)
        if right > 0.99 or step == steps:  # before it was trained on this one
            break
        nn.functional.cross_entropy(logits.flatten(0, 1), symbols.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        begin = begin or time.perf_counter()  # kernels are compiled in the first step
    ms = 1e3 * (time.perf_counter() - begin) / max(step - 1, 1)
    cost = f"{ms:.0f} ms a step"
    if device == "cuda":
        cost += f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB at the peak"
    print(f"{tokens:6,} tokens: {right:.1%} right after {step} steps, chance {1 / SYMBOLS:.1%}; {cost}")
    return right


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tiny", action="store_true", help="512 tokens, 1 head, float32 on the CPU")
    args = parser.parse_args()
    where = (1, args.steps, "cpu", torch.float32) if args.tiny else (16, args.steps, "cuda", torch.bfloat16)
    for tokens in [512] if args.tiny else args.tokens:
        assert learn(tokens, *where) > 4 / SYMBOLS, f"it has not learned to copy over {tokens} tokens"


if __name__ == "__main__":
    main()
