"""The forward against float64: the plan of shapes, every head_dim and pair of heads, random combinations, bits."""

from __future__ import annotations

import pytest
import torch

import fa2cupy
from tests.gpu.cases import DTYPES, Case, groups
from tests.gpu.runner import check_all, inputs_of


@pytest.mark.parametrize("cases", groups())
def test_forward(cases: list[Case], device: torch.device) -> None:
    check_all(cases, False, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_repeat(dtype: str, device: torch.device) -> None:
    """The shape on which a shared-memory race was once found in a backward: 250 times the same bits."""
    tensors = inputs_of(Case(128, 128, 128, dtype, True, batch=60, heads=(4, 4)), device)
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    for causal in (False, True):
        first = fa2cupy.attention(q, k, v, causal=causal, return_lse=True)
        differs = torch.zeros((), dtype=torch.int64, device=device)
        for _ in range(250):
            again = fa2cupy.attention(q, k, v, causal=causal, return_lse=True)
            for x, y in zip(again, first, strict=True):
                differs += (x != y).any()
        assert int(differs) == 0
