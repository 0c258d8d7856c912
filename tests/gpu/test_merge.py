"""merge_attention's kernels: beside the formula in float64, and pieces of the keys beside the whole."""

from __future__ import annotations

import itertools

import cupy
import pytest
import torch

import fa2cupy
from fa2cupy import merged
from fa2cupy.frameworks import TORCH
from fa2cupy.merge import _by_torch, merge_attention

Tensor = torch.Tensor
# batch, seqlen, heads, head_dim_v, pieces
SHAPES = (
    (2, 333, 6, 128, 4),
    (1, 1, 32, 64, 2),
    (3, 40, 2, 59, 3),
    (1, 1000, 4, 256, 8),
    (1, 70, 2, 576, 2),
    (2, 9, 3, 8, 32),
)
EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22}


def pieces_of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """NaN where a piece sees nothing; some rows see nothing in any."""
    batch, seqlen, heads, width, count = shape
    generator = torch.Generator(device=device).manual_seed(seqlen)
    outs = [
        torch.randn((batch, seqlen, heads, width), device=device, generator=generator).to(dtype) for _ in range(count)
    ]
    lses = [3 * torch.randn((batch, heads, seqlen), device=device, generator=generator) for _ in range(count)]
    for place, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        unseen = min(seqlen - 1, 3 + 5 * (place % 2))
        lse[..., :unseen] = -torch.inf
        out[:, :unseen] = torch.nan
    return outs, lses


def close(name: str, got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    error = (got.double() - wanted).abs() - 2 * EPSILON[dtype] * wanted.abs()
    assert torch.isfinite(got).all() and float(error.max()) <= 2e-5, name


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merge(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    outs, lses = pieces_of(shape, dtype, device)
    assert merged.has_kernel(TORCH, outs, lses)
    leaves = [x.clone().requires_grad_() for x in (*outs, *lses)]
    exact = [x.double().requires_grad_() for x in (*outs, *lses)]
    count = len(outs)
    out, lse = merge_attention(leaves[:count], leaves[count:])
    wanted, wanted_lse = _by_torch(exact[:count], exact[count:])
    close("out", out, wanted, dtype)
    finite = torch.isfinite(wanted_lse)
    assert torch.equal(torch.isneginf(lse), ~finite)
    torch.testing.assert_close(lse[finite].double(), wanted_lse[finite], rtol=1e-6, atol=1e-5)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    found = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    expected = torch.autograd.grad((wanted, wanted_lse), exact, (dout.double(), dlse.double()))
    for place, (x, y) in enumerate(zip(found, expected, strict=True)):
        if place < count:
            close("dout", x, y, dtype)
        else:  # out, as it is saved, was rounded
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=4 * EPSILON[dtype] * shape[3] ** 0.5 + 1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_pieces_are_the_whole(causal: bool, device: torch.device) -> None:
    """Keys cut in four, gradients too; with a causal mask a piece is what a window of the whole sees of it."""
    q, k, v = (torch.randn(2, n, 4, 64, device=device, dtype=torch.bfloat16) for n in (200, 1000, 1000))
    cuts = (0, 250, 500, 777, 1000)

    def by_pieces(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for first, end in itertools.pairwise(cuts):
            last = end == 1000
            parts.append(
                fa2cupy.attention(q, k[:, first:end], v[:, first:end], causal=causal and last, return_lse=True)
            )
        return merge_attention([part[0] for part in parts], [part[1] for part in parts])

    results = []
    for function in (by_pieces, lambda q, k, v: fa2cupy.attention(q, k, v, causal=causal, return_lse=True)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = function(*leaves)
        loss = (out.float() ** 2).sum() + torch.sin(lse).sum()
        results.append((out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)))
    for x, y in zip(*results, strict=True):
        assert float((x.double() - y.double()).norm() / y.double().norm()) < 1e-2


def test_other_layouts_and_frameworks(device: torch.device) -> None:
    """One stack; heads before rows; no two alike; packed; CuPy; a captured graph."""
    outs, lses = pieces_of((2, 77, 3, 64, 3), torch.float16, device)
    wanted, wanted_lse = merge_attention(outs, lses)
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in outs]
    stack, lse_stack = torch.stack(outs), torch.stack(lses, -1)
    for some_outs, some_lses in (
        (swapped, lses),
        (list(stack), list(lse_stack.unbind(-1))),
        ([outs[0], *swapped[1:]], lses),
        ([x.repeat_interleave(2, -1)[..., ::2] for x in outs], lses),
    ):
        out, lse = merge_attention(some_outs, some_lses)
        assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)
    one, one_lse = merge_attention([x[1] for x in outs], [x[1] for x in lses])
    assert torch.equal(one, wanted[1]) and torch.equal(one_lse, wanted_lse[1])
    by_cupy = merge_attention([cupy.asarray(x) for x in outs], [cupy.asarray(x) for x in lses])
    assert torch.equal(torch.as_tensor(by_cupy[0], device=device), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = merge_attention(outs, lses)
    for x in outs:
        x.mul_(2)
    graph.replay()
    torch.testing.assert_close(captured, 2 * wanted, equal_nan=True)


def test_more_pieces_than_the_kernel_takes(device: torch.device) -> None:
    outs, lses = pieces_of((1, 9, 2, 32, 40), torch.bfloat16, device)
    assert not merged.has_kernel(TORCH, outs, lses)
    out, _ = merge_attention(outs, lses)
    wanted, _ = _by_torch([x.double() for x in outs], [x.double() for x in lses])
    torch.testing.assert_close(out.double(), wanted, rtol=2**-7, atol=1e-5)
