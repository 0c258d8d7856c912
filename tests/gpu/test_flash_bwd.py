"""Forward and backward against float64: the plan of shapes, every head_dim and pair of heads, random ones, bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fa2cupy
from tests.gpu.cases import Case, groups
from tests.gpu.runner import check_all, inputs_of


@pytest.mark.parametrize("cases", groups())
def test_backward(cases: list[Case], device: torch.device) -> None:
    check_all(cases, True, device)


# (60, 128, 128): where a race was once found. The others have several key blocks per row of dq, GQA, a wide head, and
# few or enough key blocks: from one query head of a group in each thread block to all of them.
REPEATED = [
    (Case(128, 128, 128, "bfloat16", False, batch=60, heads=(4, 4)), 1000),
    (Case(128, 128, 128, "float16", True, batch=60, heads=(4, 4)), 250),
    (Case(1023, 1024, 64, "bfloat16", True, batch=2, heads=(8, 2)), 1000),
    (Case(512, 640, 256, "bfloat16", False, batch=2, heads=(6, 3)), 1000),
    (Case(700, 900, 192, "float16", True, batch=2, heads=(6, 3)), 1000),
    (Case(333, 999, 59, "float16", True, batch=3, heads=(4, 1)), 50),
    (Case(1000, 2048, 128, "bfloat16", True, batch=1, heads=(32, 1)), 50),
    (Case(500, 4096, 128, "float16", False, batch=1, heads=(32, 1)), 50),
    (Case(1024, 1024, 64, "bfloat16", True, batch=16, heads=(8, 2)), 50),
]
NEEDS = [replace(case, given=False, deterministic=mode) for case, _ in REPEATED for mode in (False, True)]


@pytest.mark.parametrize(("case", "repeats"), REPEATED, ids=str)
def test_bits_repeat_when_deterministic(case: Case, repeats: int, device: torch.device) -> None:
    tensors = inputs_of(case, device)
    q, k, v, dout = (tensors[name] for name in ("q", "k", "v", "dout"))
    out, lse = fa2cupy.attention(q, k, v, causal=case.causal, return_lse=True)

    def gradients(deterministic: bool) -> tuple[torch.Tensor, ...]:
        return fa2cupy.attention_backward(dout, q, k, v, out, lse, causal=case.causal, deterministic=deterministic)

    first = gradients(True)
    differs = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(repeats):
        for x, y in zip(gradients(True), first, strict=True):
            differs += (x != y).any()
    assert int(differs) == 0
    # The other mode adds dq up in any order: the same but for float32 rounding, which the last bit may show.
    usual = gradients(False)
    for name, x, y in zip(("dq", "dk", "dv"), usual, first, strict=True):
        assert torch.allclose(x.float(), y.float(), rtol=2**-6, atol=1e-3), name
