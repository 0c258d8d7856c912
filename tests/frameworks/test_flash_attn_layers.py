"""Rotary embedding and padding of fa2cupy.flash_attn against their definitions, written out with loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fa2cupy.errors import InvalidArgument
from fa2cupy.flash_attn import bert_padding
from fa2cupy.flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
    rotate_half,
)
from fa2cupy.flash_attn.ops.triton.rotary import apply_rotary

POSITIONS, HALF, DIM = 12, 4, 11  # rotary_dim 8 of head_dim 11


def tables(positions: int = POSITIONS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * 0.7 ** torch.arange(HALF)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def turned(token: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """One token, (heads, head_dim), turned by the angles of one position."""
    result = token.clone()
    for pair in range(HALF):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + HALF)
        result[:, a] = token[:, a] * cos[pair] - token[:, b] * sin[pair]
        result[:, b] = token[:, a] * sin[pair] + token[:, b] * cos[pair]
    return result


def expected(x: Tensor, cos: Tensor, sin: Tensor, starts: list[int], interleaved: bool) -> Tensor:
    """(batch, seqlen, heads, head_dim), sequence i beginning at position starts[i]. Outside the tables: as it is."""
    result = x.clone()
    for (i, start), s in itertools.product(enumerate(starts), range(x.shape[1])):
        if 0 <= start + s < len(cos):
            result[i, s] = turned(x[i, s], cos[start + s], sin[start + s], interleaved)
    return result


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [0, 3, torch.tensor([5, 0, 9]), torch.tensor([1, -2, 4], dtype=torch.int32)])
def test_rotary(offsets: int | Tensor, interleaved: bool, inplace: bool) -> None:
    """Offset 9: the last tokens are outside the tables."""
    x, (cos, sin) = random(3, 5, 2, DIM), tables()
    starts = offsets.tolist() if isinstance(offsets, Tensor) else [offsets] * 3
    want = expected(x, cos, sin, starts, interleaved)
    given = x.clone()
    got = apply_rotary(given, cos, sin, offsets, interleaved=interleaved, inplace=inplace)
    torch.testing.assert_close(got, want)
    assert torch.equal(given, got if inplace else x)
    assert (got is given) is inplace
    back = apply_rotary(got, cos, sin, offsets, interleaved=interleaved, inplace=inplace, conjugate=True)
    torch.testing.assert_close(back, x)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [0, 2, torch.tensor([1, 0, 4])])
def test_rotary_of_packed_sequences(offsets: int | Tensor, interleaved: bool) -> None:
    lengths = [4, 0, 3]
    x, (cos, sin) = random(9, 2, DIM), tables()  # two rows of no sequence at the end
    cu_seqlens = torch.tensor([0, 4, 4, 7], dtype=torch.int32)
    want, first = x.clone(), 0
    for i, length in enumerate(lengths):
        start = int(offsets[i]) if isinstance(offsets, Tensor) else offsets
        want[first : first + length] = expected(x[None, first : first + length], cos, sin, [start], interleaved)[0]
        first += length
    got = apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets, cu_seqlens=cu_seqlens, max_seqlen=4)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, (cos, sin) = random(2, 5, 2, DIM, dtype=dtype), tables(dtype=dtype)
    want = expected(x.double(), cos.double(), sin.double(), [0, 0], False)
    got = apply_rotary(x, cos, sin)
    assert got.dtype == dtype
    assert torch.equal(got, want.float().to(dtype))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_in_the_tensor_s_own_precision(interleaved: bool) -> None:
    x, (cos, sin) = random(2, 5, 2, DIM), tables(5)
    want = expected(x, cos, sin, [0, 0], interleaved)
    torch.testing.assert_close(apply_rotary_emb_torch(x, cos, sin, interleaved), want)
    batched = apply_rotary_emb_torch(x, cos.expand(2, -1, -1), sin.expand(2, -1, -1), interleaved)
    torch.testing.assert_close(batched, want)
    assert rotate_half(torch.tensor([1, 2, 3, 4])).tolist() == [-3, -4, 1, 2]
    assert rotate_half(torch.tensor([1, 2, 3, 4]), interleaved=True).tolist() == [-2, 1, -4, 3]


def _check_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Of an orthogonal map that is linear in x: the gradient is the map's transpose."""
    leaf = x.clone().requires_grad_()
    out = function(leaf * 1.0)
    dout = random(*out.shape) + 1
    (gradient,) = torch.autograd.grad(out, [leaf], dout)
    jacobian = torch.autograd.functional.jacobian(
        lambda flat: function(flat.view(x.shape) * 1.0).flatten(), x.flatten()
    )
    torch.testing.assert_close(gradient.flatten(), jacobian.T @ dout.flatten())
    columns = torch.stack([function(e.view(x.shape).clone()).flatten() for e in torch.eye(x.numel(), dtype=x.dtype)], 1)
    torch.testing.assert_close(jacobian, columns)  # without autograd


@pytest.mark.parametrize("inplace", [False, True])
def test_gradient_of_rotary(inplace: bool) -> None:
    cos, sin = tables()
    offsets = torch.tensor([2, 10])
    _check_gradient(
        lambda x: apply_rotary_emb(x, cos, sin, True, inplace=inplace, seqlen_offsets=offsets), random(2, 3, 1, DIM)
    )


def test_gradients_of_packed_rotary() -> None:
    (cos, sin), (cos_k, sin_k) = tables(), (table.flip(0) for table in tables())
    _check_gradient(lambda x: apply_rotary_emb_qkv_(x, cos, sin, cos_k, sin_k), random(1, 2, 3, 1, DIM))
    _check_gradient(lambda x: apply_rotary_emb_qkv_(x, cos, sin, num_heads_q=2), random(1, 2, 4, DIM))
    _check_gradient(lambda x: apply_rotary_emb_kv_(x, cos, sin), random(1, 2, 2, 1, DIM))


def test_in_place_on_leaves_and_on_parts() -> None:
    """flash_attn allows both, though autograd does not for an operation that says that it is in place."""
    cos, sin = tables()
    leaf = random(1, 3, 2, DIM).requires_grad_()
    before = leaf.detach().clone()
    out = apply_rotary_emb(leaf, cos, sin, inplace=True)
    torch.testing.assert_close(leaf.detach(), expected(before, cos, sin, [0], False))
    assert out.data_ptr() == leaf.data_ptr()
    (gradient,) = torch.autograd.grad(out.sum(), [leaf])
    torch.testing.assert_close(gradient, apply_rotary(torch.ones_like(before), cos, sin, conjugate=True))
    whole = random(1, 3, 3, 2, DIM).requires_grad_()
    q, k, v = (whole * 1.0).unbind(2)
    q, k = (apply_rotary_emb(x, cos, sin, inplace=True) for x in (q, k))
    (gradient,) = torch.autograd.grad((q.sum() + k.sum() + v.sum()), [whole])
    torch.testing.assert_close(gradient[:, :, 0], apply_rotary(torch.ones_like(before), cos, sin, conjugate=True))
    assert torch.equal(gradient[:, :, 2], torch.ones_like(before))
    needed = whole.exp()  # whose gradient is the result itself
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        apply_rotary_emb_qkv_(needed, cos, sin).sum().backward()


def test_packed_rotary() -> None:
    cos, sin = tables()
    cos_k, sin_k = (table.flip(0) for table in tables())
    qkv = random(2, 5, 3, 2, DIM)
    want = qkv.clone()
    want[:, :, 0] = expected(qkv[:, :, 0], cos, sin, [1, 1], False)
    want[:, :, 1] = expected(qkv[:, :, 1], cos_k, sin_k, [1, 1], False)
    given = qkv.clone()
    assert apply_rotary_emb_qkv_(given, cos, sin, cos_k, sin_k, seqlen_offsets=1) is given
    torch.testing.assert_close(given, want)
    grouped = random(2, 5, 4 + 2 + 2, DIM)
    want = grouped.clone()
    want[:, :, :6] = expected(grouped[:, :, :6], cos, sin, [0, 0], True)
    torch.testing.assert_close(apply_rotary_emb_qkv_(grouped, cos, sin, interleaved=True, num_heads_q=4), want)
    kv = random(2, 5, 2, 2, DIM)
    want = kv.clone()
    want[:, :, 0] = expected(kv[:, :, 0], cos, sin, [0, 3], False)
    torch.testing.assert_close(apply_rotary_emb_kv_(kv, cos, sin, seqlen_offsets=torch.tensor([0, 3])), want)


def test_rotary_says_what_is_wrong() -> None:
    x, (cos, sin) = random(2, 5, 2, DIM), tables()
    cu, starts = torch.tensor([0, 5]), torch.tensor([1, 2])
    for message, call in (
        ("x has shape", lambda: apply_rotary(x[0], cos, sin)),
        (r"x has shape .* \(total, heads", lambda: apply_rotary(x, cos, sin, cu_seqlens=cu, max_seqlen=5)),
        ("max_seqlen is None", lambda: apply_rotary(x[0], cos, sin, cu_seqlens=cu)),
        ("cos has shape .* and sin", lambda: apply_rotary(x, cos, sin[:3])),
        ("rotary_dim is above x's head_dim 7", lambda: apply_rotary(x[..., :7], cos, sin)),
        ("rotary_dim is above", lambda: apply_rotary_emb_torch(x[..., :7], cos[:5], sin[:5])),
        ("12 positions, but 5 tokens begin at position 8", lambda: apply_rotary(x, cos, sin, 8)),
        ("seqlen_offsets has shape", lambda: apply_rotary(x, cos, sin, torch.tensor([1, 2, 3]))),
        ("seqlen_offsets has .* dtype torch.float32", lambda: apply_rotary(x, cos, sin, torch.tensor([1.0, 2.0]))),
        ("num_heads_q is None", lambda: apply_rotary_emb_qkv_(x, cos, sin)),
        ("num_heads_q is 1", lambda: apply_rotary_emb_qkv_(x, cos, sin, num_heads_q=1)),
        ("kv has shape", lambda: apply_rotary_emb_kv_(x, cos, sin)),
        ("the length of the tables", lambda: RotaryEmbedding(8)(random(2, 5, 3, 2, DIM), seqlen_offset=starts)),
    ):
        with pytest.raises(InvalidArgument, match=message):
            call()


# ----------------------------------------------------------------------------------------------------------------------
# The module


@pytest.mark.parametrize("interleaved", [False, True])
def test_module(interleaved: bool) -> None:
    module = RotaryEmbedding(2 * HALF, base=100.0, interleaved=interleaved)
    assert not module.state_dict()
    angles = torch.arange(9.0)[:, None] / 100.0 ** (torch.arange(0, 2 * HALF, 2) / (2 * HALF))
    cos, sin = angles.cos(), angles.sin()
    qkv = random(2, 5, 3, 2, DIM, dtype=torch.float32)
    want = qkv.clone()
    for part in (0, 1):
        want[:, :, part] = expected(qkv[:, :, part], cos, sin, [2, 2], interleaved)
    torch.testing.assert_close(module(qkv.clone(), seqlen_offset=2), want)
    q, kv = module(qkv[:, :, 0].clone(), qkv[:, :, 1:].clone(), torch.tensor([2, 2]), max_seqlen=9)
    torch.testing.assert_close(torch.cat((q[:, :, None], kv), 2), want)


def test_module_keeps_its_tables() -> None:
    module = RotaryEmbedding(2 * HALF)
    x = random(1, 5, 3, 2, DIM, dtype=torch.float32)
    module(x.clone())
    first = module._cos_cached
    module(x[:, :3].clone())
    assert module._cos_cached is first
    module(x.clone(), seqlen_offset=1)
    assert module._cos_cached is not first
    module(x.to(torch.bfloat16))
    assert module._cos_cached.dtype == torch.bfloat16


def test_module_in_bfloat16_has_float32_angles() -> None:
    module = RotaryEmbedding(2 * HALF).to(torch.bfloat16)
    module(random(1, 600, 3, 1, DIM, dtype=torch.bfloat16))
    angles = torch.arange(600.0)[:, None] * RotaryEmbedding(2 * HALF).inv_freq
    assert torch.equal(module._cos_cached, angles.cos().to(torch.bfloat16))


def test_module_with_xpos() -> None:
    module = RotaryEmbedding(2 * HALF, scale_base=512)
    module(random(1, 6, 3, 1, DIM, dtype=torch.float32))
    base = (torch.arange(0, 2 * HALF, 2) + 0.4 * 2 * HALF) / (1.4 * 2 * HALF)
    scale = base ** ((torch.arange(6.0)[:, None] - 3) / 512)
    angles = torch.arange(6.0)[:, None] * module.inv_freq
    torch.testing.assert_close(module._cos_cached, angles.cos() * scale)
    torch.testing.assert_close(module._sin_k_cached, angles.sin() / scale)


# ----------------------------------------------------------------------------------------------------------------------
# Padding


MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("mask", [MASK, MASK.bool()])
def test_unpad_and_pad(mask: Tensor) -> None:
    x = random(3, 5, 2, 4).requires_grad_()
    tokens, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask)
    assert indices.tolist() == [0, 1, 3, 10, 11, 12, 13, 14]
    assert (cu_seqlens.tolist(), cu_seqlens.dtype) == ([0, 3, 3, 8], torch.int32)
    assert (longest, type(longest)) == (5, int)
    assert (used.tolist(), used.dtype) == ([3, 0, 5], torch.int32)
    assert torch.equal(tokens, torch.stack([x[i, s] for i in range(3) for s in range(5) if mask[i, s]]))
    back = bert_padding.pad_input(tokens, indices, 3, 5)
    assert torch.equal(back, x * MASK[..., None, None])
    (gradient,) = torch.autograd.grad(back.square().sum(), [x])
    assert torch.equal(gradient, 2 * x * MASK[..., None, None])


def test_unpad_with_unused_places() -> None:
    unused = torch.tensor([[0, 0, 1, 0, 0], [1, 0, 0, 0, 0], [0] * 5])
    _, indices, cu_seqlens, longest, used = bert_padding.unpad_input(random(3, 5, 2), MASK, unused)
    assert indices.tolist() == [0, 1, 2, 3, 5, 10, 11, 12, 13, 14]
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 4, 5, 10], 5, [3, 0, 5])


def test_unpad_of_concatenated_sequences() -> None:
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = random(3, 6, 2)
    tokens, indices, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(x, lengths)
    assert indices.tolist() == [*range(5), *range(6, 11), *range(12, 18)]
    assert (cu_seqlens.tolist(), cu_seqlens.dtype, longest) == ([0, 2, 5, 8, 10, 16], torch.int32, 6)
    assert torch.equal(tokens, x.flatten(0, 1)[indices])


def test_rows_by_index() -> None:
    x, indices = random(5, 2, 3).requires_grad_(), torch.tensor([4, 0])
    rows, whole = bert_padding.index_first_axis_residual(x, indices)
    assert torch.equal(rows, bert_padding.index_first_axis(x, indices))
    assert torch.equal(rows, x[indices])
    (gradient,) = torch.autograd.grad(rows.sum() + 3 * whole.sum(), [x])
    assert gradient[:, 0, 0].tolist() == [4, 3, 3, 3, 4]
    placed = bert_padding.index_put_first_axis(rows, indices, 6)
    assert torch.equal(placed[indices], rows)
    assert math.isclose(float(placed.detach().abs().sum()), float(rows.detach().abs().sum()))
