"""A small transformer writes tokens from a paged KV cache, one captured graph for all of them, beside torch's SDPA.

    python examples/decode.py                 on a GPU: tokens/s at batch 1 and 64, and whether both write the same
    python examples/decode.py --tiny          seconds, on the CPU too, without graphs

Weights are random: what is written means nothing, what it costs does. SDPA has a static cache and a mask of the keys in
use, as it is used in a graph; both start from the same prompt.
"""

import argparse
import time

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

import fa2cupy

PAGE = 16


class Model:
    """Llama's layers with random weights. attend: what takes (layer, q, k, v) of new tokens and returns out."""

    def __init__(self, layers: int, width: int, heads: int, heads_k: int, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.heads, self.heads_k, self.head_dim = heads, heads_k, width // heads
        self.embedding = torch.randn(512, width, device=device, dtype=dtype)

        def weight(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, device=device, dtype=dtype) * rows**-0.5

        columns = (heads + 2 * heads_k) * self.head_dim
        self.layers = [
            (weight(width, columns), weight(width, width), weight(width, 4 * width), weight(4 * width, width))
            for _ in range(layers)
        ]

    def next_tokens(self, tokens: torch.Tensor, attend) -> torch.Tensor:
        """(batch, 1) behind (batch, n) tokens."""
        x = self.embedding[tokens]
        sizes = (self.heads, self.heads_k, self.heads_k)
        for number, (into, out_of, up, down) in enumerate(self.layers):
            qkv = (rms_norm(x, x.shape[-1:]) @ into).unflatten(-1, (-1, self.head_dim))
            out = attend(number, *qkv.split(sizes, dim=2))
            x = x + out.flatten(2) @ out_of
            x = x + silu(rms_norm(x, x.shape[-1:]) @ up) @ down
        return (rms_norm(x[:, -1:], x.shape[-1:]) @ self.embedding.T).argmax(-1)


class Paged:
    """Caches in pages, by fa2cupy: keys are turned, written and seen in the launch that computes."""

    def __init__(self, model: Model, batch: int, capacity: int, turns: tuple[torch.Tensor, torch.Tensor]) -> None:
        like, pages = model.embedding, batch * capacity // PAGE
        table = torch.randperm(pages, device=like.device).int().view(batch, -1)
        shape = (pages, PAGE, model.heads_k, model.head_dim)
        self.caches = [
            fa2cupy.KVCache(like.new_zeros(shape), like.new_zeros(shape), block_table=table) for _ in model.layers
        ]
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=like.device)
        self.rotary = (*turns, "neox")

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.caches[layer].attend(q, k=k, v=v, cache_seqlens=self.lengths, rotary=self.rotary, causal=True)


class Static:
    """One array for each layer, all of which torch's SDPA sees through a mask."""

    def __init__(self, model: Model, batch: int, capacity: int, turns: tuple[torch.Tensor, torch.Tensor]) -> None:
        like, shape = model.embedding, (batch, model.heads_k, capacity, model.head_dim)
        self.caches = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in model.layers]
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=like.device)
        self.turns, self.places = turns, torch.arange(capacity, device=like.device)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        own = self.lengths[0] + self.places[: q.shape[1]]  # all sequences are as long here
        q, k, v = self._turned(q, own), self._turned(k, own), v.transpose(1, 2)
        for cache, new in zip(self.caches[layer], (k, v), strict=True):
            cache.index_copy_(2, own, new)
        mask = self.places <= own[:, None]
        return scaled_dot_product_attention(q, *self.caches[layer], attn_mask=mask, enable_gqa=True).transpose(1, 2)

    def _turned(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        cos, sin = (table[places] for table in self.turns)
        first, second = x.transpose(1, 2).float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


@torch.no_grad()
def write(model: Model, attend, prompt: torch.Tensor, count: int) -> tuple[torch.Tensor, float]:
    """(batch, count) tokens behind the prompt, and how many a second."""
    tokens = model.next_tokens(prompt, attend)
    attend.lengths.fill_(prompt.shape[1])

    def step() -> None:
        written = model.next_tokens(tokens, attend)
        attend.lengths.add_(1)
        tokens.copy_(written)

    run = step
    if prompt.is_cuda:
        kept = tokens.clone()
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        tokens.copy_(kept)
        attend.lengths.fill_(prompt.shape[1])
        run = graph.replay
        torch.cuda.synchronize()
    found, start = [tokens.clone()], time.perf_counter()
    for _ in range(count - 1):
        run()
        found.append(tokens.clone())
    result = torch.cat(found, 1).cpu()
    return result, len(prompt) * (count - 1) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    sizes, prompt_length, count = ((2, 64, 4, 2), 5, 20) if tiny else ((8, 2048, 16, 4), 1024, 512)
    model = Model(*sizes, device, dtype)
    capacity = -(-(prompt_length + count) // PAGE) * PAGE
    frequencies = 10000.0 ** -(torch.arange(model.head_dim // 2, device=device) * 2 / model.head_dim)
    angles = torch.arange(capacity, device=device)[:, None] * frequencies
    for batch in (1, 3) if tiny else (1, 64):
        prompt = torch.randint(0, 512, (batch, prompt_length), device=device)
        turns = (angles.cos(), angles.sin())
        ours, rate = write(model, Paged(model, batch, capacity, turns), prompt, count)
        theirs, their_rate = write(model, Static(model, batch, capacity, turns), prompt, count)
        same = int((ours == theirs).int().cumprod(1).sum(1).min())
        print(f"batch {batch}: fa2cupy {rate:,.0f} tokens/s, SDPA {their_rate:,.0f}; the same {same} of {count} tokens")
        if device == "cpu":
            assert same == count, "float32 has no ties here"


if __name__ == "__main__":
    main()
