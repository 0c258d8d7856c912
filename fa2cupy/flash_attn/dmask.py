"""S_dmask, which flash_attn returns of its probabilities under dropout, for tests and for debugging.

In plain torch on the tensors' device, a head at a time, beside the kernels and not by them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fa2cupy import dynamo, philox
from fa2cupy.autograd.dispatch import cast
from fa2cupy.checks import DROPOUT_STEPS

__all__ = ["BLOCK_SIZE_N", "s_dmask"]

# Keys between two maxima that S_dmask is relative to: all of them.
BLOCK_SIZE_N = 2**30
_ROUNDED_TO = 128
_LOW = 2**32 - 1


@dynamo.leave
def s_dmask(q: Tensor, k: Tensor, options: dict[str, Any]) -> Tensor:
    """(batch, heads, seqlen_q, seqlen_k), both lengths rounded up to multiples of 128, in the dtype of q: exp(s - the
    row's largest s), negative where dropout drops it, 0 where the query does not see the key.

    options: the keywords of `fa2cupy.attention`, with dropout. Of packed sequences the lengths are max_seqlen_q and
    max_seqlen_k, which are read if they are tensors.
    """
    with torch.no_grad():
        q, k = cast(q, k)
        sides = [_Side(x, options, name) for x, name in ((q, "q"), (k, "k"))]
        batch = max(side.batch for side in sides)
        i, j = (torch.arange(side.longest, device=q.device) for side in sides)
        shape = [-(-side.longest // _ROUNDED_TO) * _ROUNDED_TO for side in sides]
        result = q.new_zeros(batch, q.shape[-2], *shape)
        tweaks = _tweaks(options["dropout_seed"], batch, q.shape[-2])
        for b in range(batch):
            (queries, length_q), (keys, length_k) = (side.sequence(b) for side in sides)
            seen, distance = _seen(i, j, length_q, length_k, b, options)
            for h in range(q.shape[-2]):
                scores = _scores(queries[:, h], keys[:, h * k.shape[-2] // q.shape[-2]], options)
                slopes = options.get("alibi_slopes")
                if slopes is not None:
                    scores = scores - (slopes[h] if slopes.ndim == 1 else slopes[b, h]) * distance
                scores = scores.masked_fill(~seen, -math.inf)
                largest = scores.amax(1, keepdim=True) if scores.shape[1] else scores.new_zeros(len(scores), 1)
                weights = (scores - largest.masked_fill(largest.isneginf(), 0)).exp()
                kept = _kept([t[b, h] for t in tweaks], i, j, options["dropout_p"])
                result[b, h, : len(queries), : len(keys)] = torch.where(kept, weights, -weights)
        return result


class _Side:
    """Queries or keys, dense or packed."""

    def __init__(self, x: Tensor, options: dict[str, Any], name: str) -> None:
        self.x, self.starts, self.used = x, options.get(f"cu_seqlens_{name}"), options.get(f"seqused_{name}")
        packed = self.starts is not None
        self.batch = self.starts.numel() - 1 if self.starts is not None else x.shape[0]
        self.longest = int(options[f"max_seqlen_{name}"]) if packed else x.shape[1]

    def sequence(self, b: int) -> tuple[Tensor, Any]:
        """Rows of a sequence and, of them, its length; those behind it hold anything."""
        if self.starts is None:
            rows, length = self.x[b], self.longest
        else:
            places = self.starts[b] + torch.arange(self.longest, device=self.x.device)
            rows, length = self.x[places.clamp(0, max(0, len(self.x) - 1))], self.starts[b + 1] - self.starts[b]
        return rows, length if self.used is None else self.used[b]


def _seen(i: Tensor, j: Tensor, length_q: Any, length_k: Any, b: int, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Which keys queries see, and how far from each key they stand."""
    i, j = i[:, None], j[None]
    beside = i + length_k - length_q
    seen = (i < length_q) & (j < length_k)
    first = options.get("leftpad_k")
    if first is not None:
        seen = seen & (j >= first[b])
    left, right = options.get("window_size", (-1, -1))
    right = 0 if options["causal"] else right
    if left >= 0:
        seen = seen & (j >= beside - left)
    if right >= 0:
        seen = seen & (j <= beside + right)
    return seen, (beside - j).abs()


def _scores(queries: Tensor, keys: Tensor, options: dict[str, Any]) -> Tensor:
    scale, softcap = options["softmax_scale"], options.get("softcap")
    dtype = torch.promote_types(queries.dtype, torch.float32)
    scores = queries.to(dtype) @ keys.to(dtype).T * (queries.shape[1] ** -0.5 if scale is None else scale)
    return scores if softcap is None else softcap * (scores / softcap).tanh()


# ----------------------------------------------------------------------------------------------------------------------
# `philox.py` on a device: words of 32 bits in int64


def _mul(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    product = x * factor  # modulo 2^64
    return (product >> 32) & _LOW, product & _LOW


def _tweaks(seed: Tensor, batch: int, heads: int) -> tuple[Tensor, Tensor]:
    """`philox.tweaks` of seed and offset, int64 (2,): (batch, heads) each."""
    (key_lo, offset_lo), (key_hi, offset_hi) = seed & _LOW, (seed >> 32) & _LOW
    b, h = torch.arange(batch, device=seed.device)[:, None], torch.arange(heads, device=seed.device)
    c0, c1, c2, c3 = torch.broadcast_tensors(offset_lo, offset_hi, b, h)
    for number in range(10):
        keys = [(key + number * step) & _LOW for key, step in zip((key_lo, key_hi), philox.KEY_STEPS, strict=True)]
        (high0, low0), (high2, low2) = _mul(philox.MULTIPLIERS[0], c0), _mul(philox.MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ keys[0], low2, high0 ^ c3 ^ keys[1], low0
    return c0, c1


def _kept(tweak: list[Tensor], i: Tensor, j: Tensor, dropout_p: float) -> Tensor:
    """`philox.kept` of one head: bool, (queries, keys)."""
    i, j = i[:, None], j[None]
    c0, c1 = ((x // 16 * 8 + x % 8) ^ t for x, t in zip((i, j), tweak, strict=True))
    for number in range(7):
        high, low = _mul(philox.MULTIPLIER, c0)
        c0, c1 = high ^ ((philox.KEY_STEPS[0] * (number + 1)) & _LOW) ^ c1, low
    word = torch.where(i % 16 < 8, c0, c1)
    return (word >> torch.where(j % 16 < 8, 0, 16)) & 0x7FFF >= round(dropout_p * DROPOUT_STEPS)
