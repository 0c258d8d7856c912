"""flash_attn's functions on the GPU: the bits of fa2cupy.attention, packed or not, and flash_attn's own conventions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fa2cupy
from fa2cupy.flash_attn import extension, flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from fa2cupy.flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward
from fa2cupy.flash_attn.layers.rotary import RotaryEmbedding
from tests.gpu.cases import DTYPES, Case
from tests.gpu.runner import inputs_of

NEEDS = [Case(150, 150, 64, dtype, True, given=False, deterministic=True) for dtype in DTYPES]
NAMES = ("q", "k", "v", "dout")


def _expected(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    out, lse = fa2cupy.attention(q, k, v, causal=True, return_lse=True)
    return out, lse, *fa2cupy.attention_backward(dout, q, k, v, out, lse, causal=True, deterministic=True)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_or_not_the_same_bits(dtype: str, compiled: bool, device: torch.device) -> None:
    inputs = inputs_of(Case(150, 150, 64, dtype, True, seed=5), device)
    q, k, v, dout = (inputs[name] for name in NAMES)
    out, lse, dq, dk, dv = _expected(q, k, v, dout)
    options = {"causal": True, "deterministic": True, "return_attn_probs": True}
    calls = (
        (flash_attn_func, [q, k, v], [dq, dk, dv]),
        (flash_attn_kvpacked_func, [q, torch.stack((k, v), 2)], [dq, torch.stack((dk, dv), 2)]),
        (flash_attn_qkvpacked_func, [torch.stack((q, k, v), 2)], [torch.stack((dq, dk, dv), 2)]),
    )
    for function, arrays, gradients in calls:
        arrays = [x.detach().requires_grad_() for x in arrays]
        run = torch.compile(function, backend="aot_eager", fullgraph=True) if compiled else function
        results = run(*arrays, **options)
        assert torch.equal(results[0], out), function
        assert torch.equal(results[1], lse), function
        for found, gradient in zip(torch.autograd.grad(results[0], arrays, dout), gradients, strict=True):
            assert torch.equal(found, gradient), function
            assert found.is_contiguous(), function


def test_functions_below_and_rows_without_keys(device: torch.device) -> None:
    """Their log-sum-exp is +inf, which comes back in the backward."""
    inputs = inputs_of(Case(150, 97, 64, "bfloat16", True, heads=(6, 3), seed=6), device)
    q, k, v, dout = (inputs[name] for name in NAMES)
    out, lse, dq, dk, dv = _expected(q, k, v, dout)
    common = (0.0, None, True, -1, -1, 0.0, None)
    found_out, found_lse, dmask, _ = _flash_attn_forward(q, k, v, *common, False)
    assert torch.equal(found_out, out)
    assert torch.equal(found_lse, lse.where(lse > -math.inf, math.inf))
    assert (dmask.numel(), int(found_lse.isposinf().sum())) == (0, 2 * 6 * 53)
    gradients = [torch.full_like(x, math.nan) for x in (q, k, v)]
    softmax_d = _flash_attn_backward(dout, q, k, v, out, found_lse, *gradients, *common, True)
    for found, gradient in zip(gradients, (dq, dk, dv), strict=True):
        assert torch.equal(found, gradient)
    expected_d = (dout.double() * out.double()).sum(-1).transpose(1, 2)
    torch.testing.assert_close(softmax_d[:, :, :150].double(), expected_d, rtol=1e-5, atol=1e-4)
    by_position = extension.fwd(q, k, v, None, None, *common[:-1], False, None)
    assert torch.equal(by_position[0], out)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved: bool, device: torch.device) -> None:
    """The GPU's result is the CPU's, but for sums that are rounded differently."""
    qkv = torch.randn(2, 33, 3, 4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    on_gpu = RotaryEmbedding(32, interleaved=interleaved, device=device)(qkv.clone().to(device))
    on_cpu = RotaryEmbedding(32, interleaved=interleaved)(qkv.clone())
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=2**-7, atol=1e-5)
