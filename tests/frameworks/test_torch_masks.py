"""Masks through torch's autograd: gradients, whoever's arrays it has, and where it is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fa2cupy
from fa2cupy import BlockMask
from fa2cupy.errors import InvalidArgument

DENSE = np.random.default_rng(0).random((2, 1, 150, 200)) < 0.4
SINKS = torch.linspace(-1, 1, 4)


def tensors(grad: bool = True) -> list[Any]:
    torch.manual_seed(0)
    shapes = ((2, 150, 4, 8), (2, 200, 2, 8), (2, 200, 2, 8))
    return [torch.randn(shape, requires_grad=grad) for shape in shapes]


def plain(q: Any, k: Any, v: Any) -> Any:
    """By torch's own operations; rows that see nothing have their sink alone."""
    k, v = (x.repeat_interleave(2, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~torch.from_numpy(DENSE), -torch.inf)
    weights = torch.cat([scores, SINKS[None, :, None, None].expand(*scores.shape[:3], 1)], -1).softmax(-1)[..., :-1]
    return torch.einsum("bhij,bjhd->bihd", weights, v)


@pytest.mark.parametrize(
    "mask",
    [BlockMask.from_dense(DENSE), BlockMask.from_dense(torch.from_numpy(DENSE)), torch.from_numpy(DENSE)],
    ids=["of NumPy's", "of torch's", "array"],
)
def test_gradients(mask: Any) -> None:
    q, k, v = tensors()
    expected = plain(q, k, v)
    dout = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (q, k, v), dout)
    out = fa2cupy.attention(q, k, v, mask=mask, sinks=SINKS)
    found = torch.autograd.grad(out, (q, k, v), dout)
    torch.testing.assert_close(out, expected)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_compiled_and_watched() -> None:
    """As an operator, whose schema it is part of."""
    mask, (q, k, v) = BlockMask.from_dense(torch.from_numpy(DENSE)), tensors(False)
    wanted = fa2cupy.attention(q, k, v, mask=mask)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        out = fa2cupy.attention(q, k, v, mask=mask)
    assert (out == wanted).all() and counter.get_total_flops() > 0


def test_refused() -> None:
    mask, (q, k, v) = BlockMask.from_dense(torch.from_numpy(DENSE)), tensors()
    for each in (mask, torch.from_numpy(DENSE)):
        with pytest.raises(InvalidArgument, match="mask is not supported under vmap"):
            torch.func.vmap(lambda q, each=each: fa2cupy.attention(q, k, v, mask=each))(q.detach()[None])
