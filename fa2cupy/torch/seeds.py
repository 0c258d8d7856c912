"""Where the doors whose callers give no dropout_seed have one from: torch's generator.

torch.compile traces this file: it holds nothing that Dynamo cannot follow.
"""

from __future__ import annotations

from typing import Any

import torch

from fa2cupy.checks import DROPOUT_STEPS

__all__ = ["MOST", "draw", "rounded", "with_dropout", "with_seed"]

# From here on a dropout_p is rounded to 1, which has nothing left.
MOST = 1 - 0.5 / DROPOUT_STEPS


def draw(device: Any, shape: tuple[int, ...] = (2,), generator: Any = None) -> Any:
    """Random int64 numbers on `device`, by default a dropout_seed. Nobody waits, and torch's generator goes on: so
    torch.manual_seed repeats them, checkpointing has them again, and each replay of a CUDA graph new ones.
    """
    return torch.randint(2**63 - 1, shape, dtype=torch.int64, device=device, generator=generator)


def rounded(dropout_p: float) -> float:
    """As `fa2cupy.attention` rounds it: to a multiple of 2^-15."""
    return round(dropout_p * DROPOUT_STEPS) / DROPOUT_STEPS


def with_dropout(features: tuple[tuple[str, Any], ...], dropout_p: float) -> tuple[tuple[str, Any], ...]:
    """Options of a launch, and dropout behind them if there is any."""
    p = rounded(dropout_p)
    return (*features, ("dropout_p", p)) if p else features


def with_seed(features: tuple[tuple[str, Any], ...], seed: Any, **more: Any) -> dict[str, Any]:
    """Arrays of keywords by name, in the table's order: the seed if there is dropout, and what else there is.

    Seed and offset of cuDNN's and of memory-efficient attention are two tensors: all is in the first, int64 (); as
    uint32 (2,) it has offset 0.
    """
    extra = {name: array for name, array in more.items() if array is not None}
    if features and features[-1][0] == "dropout_p":
        extra = {"dropout_seed": seed if seed.dim() else seed.reshape(1).view(torch.uint32), **extra}
    return extra
