"""fa2cupy.flash_attn's functions against the plain formula in float64, and what they refuse."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fa2cupy
from fa2cupy.autograd import launching
from fa2cupy.errors import Fa2Error, InvalidArgument
from fa2cupy.flash_attn import (
    bert_padding,
    extension,
    fa3,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from fa2cupy.flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    _get_block_size_n,
)
from fa2cupy.flash_attn.translate import keywords

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
BATCH, HEADS, HEADS_K, DIM = 2, 4, 2, 24


def formula(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """out and lse in float64; differentiable. Rows without keys: out 0, lse +inf, as flash_attn has it."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    sq, sk = scores.shape[-2:]
    hidden = torch.ones(sq, sk, dtype=torch.bool).triu(sk - sq + 1) if causal else torch.zeros(sq, sk, dtype=torch.bool)
    lse = scores.masked_fill(hidden, -math.inf).logsumexp(-1)
    lse = lse.masked_fill(hidden.all(-1), math.inf)
    p = (scores - lse[..., None]).exp().masked_fill(hidden, 0)
    return (p @ v).transpose(1, 2), lse


def make(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Errors relative to the largest value; infinite values in the same places."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    assert torch.equal(actual.isinf(), expected.isinf())
    finite = ~expected.isinf()
    if not finite.any():
        return
    error = (actual[finite] - expected[finite]).abs().max()
    assert error <= tolerance * expected[finite].abs().max().clamp(min=1), error


def check(
    function: Callable[..., Any],
    inputs: list[Tensor],
    separate: Callable[..., tuple[Tensor, ...]],
    causal: bool,
    scale: float | None = None,
) -> None:
    """The function's out, lse and gradients, against the formula's over the same leaves."""
    tolerance = TOLERANCE[inputs[0].dtype]
    out, lse, dmask = function(*inputs, 0.0, scale, causal, return_attn_probs=True)
    expected_out, expected_lse = formula(*separate(*inputs), causal, scale)
    assert (out.dtype, lse.dtype, dmask.numel(), dmask.dtype) == (inputs[0].dtype, torch.float32, 0, inputs[0].dtype)
    close(out, expected_out, tolerance)
    close(lse, expected_lse, 2e-5)
    assert torch.equal(function(*inputs, softmax_scale=scale, causal=causal), out)
    (dout,) = make(tuple(out.shape), dtype=out.dtype, seed=1)
    gradients = torch.autograd.grad(out, inputs, dout)
    expected = torch.autograd.grad(expected_out, inputs, dout.double())
    for gradient, value, x in zip(gradients, expected, inputs, strict=True):
        assert gradient.dtype == x.dtype
        assert gradient.is_contiguous()
        close(gradient, value, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("sq", "sk"), [(17, 17), (9, 30), (30, 9)])  # the last: causal, rows without keys
def test_separate(sq: int, sk: int, causal: bool, dtype: torch.dtype) -> None:
    inputs = make((BATCH, sq, HEADS, DIM), *[(BATCH, sk, HEADS_K, DIM)] * 2, dtype=dtype)
    check(flash_attn_func, inputs, lambda *x: x, causal)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("causal", [False, True])
def test_kvpacked(causal: bool, dtype: torch.dtype) -> None:
    inputs = make((BATCH, 13, HEADS, DIM), (BATCH, 21, 2, HEADS_K, DIM), dtype=dtype)
    check(flash_attn_kvpacked_func, inputs, lambda q, kv: (q, *kv.unbind(2)), causal, scale=0.3)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("causal", [False, True])
def test_qkvpacked(causal: bool, dtype: torch.dtype) -> None:
    inputs = make((BATCH, 19, 3, HEADS, DIM), dtype=dtype)
    check(flash_attn_qkvpacked_func, inputs, lambda qkv: qkv.unbind(2), causal)


@pytest.mark.parametrize("compiled", [False, True])
def test_packed_gradients_are_one_buffer(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels write dq, dk and dv into it: nothing is stacked afterwards."""
    written: list[list[Tensor]] = []
    real = launching.call

    def call(operation: Any, arrays: list[Any], *rest: Any) -> Any:
        if operation.is_backward:
            written.append(arrays[6:9])
        return real(operation, arrays, *rest)

    monkeypatch.setattr(launching, "call", call)
    (qkv,) = make((BATCH, 19, 3, HEADS, DIM))
    function = flash_attn_qkvpacked_func
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(function(qkv, causal=True).sum(), [qkv])
    ((dq, dk, dv),) = written
    size = HEADS * DIM * qkv.element_size()
    assert [x.data_ptr() - gradient.data_ptr() for x in (dq, dk, dv)] == [0, size, 2 * size]
    assert dq.stride() == gradient[:, :, 0].stride()


@pytest.mark.parametrize("packed", [False, True])
def test_gradient_through_lse(packed: bool) -> None:
    """Which flash_attn leaves out silently."""
    (qkv,) = make((BATCH, 11, 3, HEADS, DIM))
    function, inputs = (flash_attn_qkvpacked_func, (qkv,)) if packed else (flash_attn_func, qkv.unbind(2))
    for weight in (0.0, 1.0):
        out, lse, _ = function(*inputs, causal=True, return_attn_probs=True)
        (gradient,) = torch.autograd.grad((lse.square().sum() + out.sum()) if weight else lse.square().sum(), [qkv])
        expected_out, expected_lse = formula(*qkv.unbind(2), True)
        loss = expected_lse.square().sum() + weight * expected_out.sum()
        close(gradient, torch.autograd.grad(loss, [qkv])[0], 2e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_autocast(packed: bool) -> None:
    (qkv,) = make((BATCH, 11, 3, HEADS, DIM))
    function, inputs = (flash_attn_qkvpacked_func, (qkv,)) if packed else (flash_attn_func, qkv.unbind(2))
    with torch.autocast("cpu", torch.bfloat16):
        out = function(*inputs)
    assert out.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(out.float().square().sum(), [qkv])
    assert gradient.dtype == torch.float32
    close(gradient, torch.autograd.grad(formula(*qkv.unbind(2), False)[0].square().sum(), [qkv])[0], 2e-2)


def test_compiled_in_one_graph() -> None:
    (qkv,) = make((BATCH, 11, 3, HEADS, DIM))

    def both(qkv: Tensor) -> Tensor:
        out, lse, _ = flash_attn_func(*qkv.unbind(2), causal=True, return_attn_probs=True)
        return out * flash_attn_qkvpacked_func(qkv, window_size=(-1, 0)) + lse.sum()

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    values, gradients = zip(
        *((out, torch.autograd.grad(out.square().sum(), [qkv])[0]) for out in (both(qkv), compiled(qkv))), strict=True
    )
    close(values[1], values[0], 1e-6)
    close(gradients[1], gradients[0], 1e-6)


def test_calls_are_counted() -> None:
    fa2cupy.report(reset=True)
    (qkv,) = make((BATCH, 5, 3, HEADS, DIM))
    flash_attn_qkvpacked_func(qkv)
    flash_attn_func(*qkv.unbind(2))
    _flash_attn_forward(*qkv.unbind(2), 0.0, None, False, -1, -1, 0.0, None, False)
    with pytest.raises(Fa2Error):
        flash_attn_func(*qkv.unbind(2), dropout_p=1.0)
    assert [(row.door, row.kernel, row.calls) for row in fa2cupy.report(reset=True)] == [("flash_attn", "fa2cupy", 3)]


def test_inputs_that_are_not_contiguous() -> None:
    q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in make(*[(BATCH, HEADS, 11, DIM)] * 3))
    check(flash_attn_func, [q, k, v], lambda *x: x, True)


def test_no_grad_and_mixed_requires_grad() -> None:
    q, k, v = make(*[(BATCH, 11, HEADS, DIM)] * 3)
    with torch.no_grad():
        assert not flash_attn_func(q, k, v).requires_grad
    out = flash_attn_func(q, k.detach(), v.detach())
    (dq,) = torch.autograd.grad(out.sum(), [q])
    (expected,) = torch.autograd.grad(formula(q, k, v, False)[0].sum(), [q])
    close(dq, expected, 2e-5)


def test_differentiating_twice_is_refused() -> None:
    q, k, v = make(*[(BATCH, 11, HEADS, DIM)] * 3)
    (qkv,) = make((BATCH, 11, 3, HEADS, DIM))
    for out, x in ((flash_attn_func(q, k, v), q), (flash_attn_qkvpacked_func(qkv), qkv)):
        (gradient,) = torch.autograd.grad((out**2).sum(), [x], create_graph=True)
        with pytest.raises(Fa2Error, match="no double backward"):
            gradient.sum().backward()


# ----------------------------------------------------------------------------------------------------------------------
# Below the public functions


@pytest.mark.parametrize(("sq", "sk"), [(9, 30), (30, 9), (130, 130)])
def test_forward_and_backward_below(sq: int, sk: int) -> None:
    """As ring-flash-attention calls them: by the names of their parameters, gradients into slices of buffers."""
    q, k, v = make((BATCH, sq, HEADS, DIM), *[(BATCH, sk, HEADS_K, DIM)] * 2)
    common = {
        "dropout_p": 0.0,
        "softmax_scale": 0.2,
        "causal": True,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
    }
    out, lse, dmask, rng_state = _flash_attn_forward(q=q, k=k, v=v, return_softmax=False, **common)
    expected_out, expected_lse = formula(q, k, v, True, 0.2)
    close(out, expected_out, 2e-5)
    close(lse, expected_lse, 2e-5)
    assert not out.requires_grad
    assert (dmask.numel(), rng_state.dtype, rng_state.shape) == (0, torch.int64, (2,))
    (dout,) = make(tuple(out.shape), seed=1)
    buffers = [torch.full((BATCH, x.shape[1] + 5, *x.shape[2:]), math.nan) for x in (q, k, v)]
    dq, dk, dv = (buffer[:, : x.shape[1]] for buffer, x in zip(buffers, (q, k, v), strict=True))
    softmax_d = _flash_attn_backward(
        dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse, dq=dq, dk=dk, dv=dv, deterministic=False, **common
    )
    for gradient, value in zip((dq, dk, dv), torch.autograd.grad(expected_out, [q, k, v], dout.double()), strict=True):
        close(gradient, value, 2e-5)
    assert softmax_d.shape == (BATCH, HEADS, -(-sq // 128) * 128)
    close(softmax_d[:, :, :sq], (dout.double() * expected_out).sum(-1).transpose(1, 2), 2e-5)
    assert not softmax_d[:, :, sq:].any()


def test_extension_by_position() -> None:
    q, k, v = make((BATCH, 5, HEADS, DIM), *[(BATCH, 8, HEADS_K, DIM)] * 2)
    given = torch.empty(BATCH, 5, HEADS, DIM)
    out, lse, _, rng_state = extension.fwd(q, k, v, given, None, 0.0, 0.2, True, -1, -1, 0.0, False, None)
    assert out is given
    close(out, formula(q, k, v, True, 0.2)[0], 2e-5)
    gradients = extension.bwd(
        out, q, k, v, out, lse, None, None, None, None, 0.0, 0.2, True, -1, -1, 0.0, False, None, rng_state
    )
    expected = torch.autograd.grad(formula(q, k, v, True, 0.2)[0], [q, k, v], out.double())
    for gradient, value in zip(gradients[:3], expected, strict=True):
        close(gradient, value, 2e-5)


def test_softmax_d_of_packed_rows() -> None:
    dout, out = (x.detach() for x in make((6, 2, 8), (6, 2, 8)))
    for options, kept in (({}, 1), ({"dropout_p": 0.25}, 0.75)):
        close(extension._softmax_d(dout, out, options), kept * (dout.double() * out.double()).sum(-1).T, 2e-5)


def test_kvcache_that_is_full() -> None:
    q, k, v = make((BATCH, 3, HEADS, DIM), *[(BATCH, 12, HEADS_K, DIM)] * 2)
    out, lse = flash_attn_with_kvcache(q, k, v, causal=True, return_softmax_lse=True)
    close(out, formula(q, k, v, True)[0], 2e-5)
    close(lse, formula(q, k, v, True)[1], 2e-5)
    assert not out.requires_grad
    assert torch.equal(fa3.flash_attn_with_kvcache(q, k, v, causal=True), out)


# ----------------------------------------------------------------------------------------------------------------------
# What is asked for


def test_neutral_values_ask_for_nothing() -> None:
    plain = {"causal": False, "softmax_scale": None}
    assert keywords() == plain
    assert keywords(0.0, None, False, (-1, -1), 0.0, None, None) == plain
    assert keywords(window_size=None) == plain
    assert keywords(window_size=(-5, -7), softcap=-1.0) == plain
    assert keywords(window_size=torch.tensor([-1, -1])) == plain
    assert keywords(window_size=(-1, 0)) == {"causal": True, "softmax_scale": None}  # flash_attn's other causal
    assert keywords(causal=1) == {"causal": True, "softmax_scale": None}
    assert keywords(causal=True, window_size=(3, 9))["window_size"] == (3, -1)  # causal is right = 0
    assert keywords(causal="yes")["causal"] == "yes"  # fa2cupy.attention says what is wrong with it


@pytest.mark.parametrize(("sq", "sk"), [(3, 3), (2, 4), (4, 2), (1, 3), (3, 1)])
def test_windows_that_hide_nothing_are_left_out(sq: int, sk: int) -> None:
    i, j = torch.arange(sq)[:, None], torch.arange(sk)

    def hidden(left: int, right: int) -> Tensor:
        before, after = j < i + sk - sq - left, j > i + sk - sq + right
        return (before & (left >= 0)) | (after & (right >= 0))

    for left, right in itertools.product(range(-1, 6), repeat=2):
        options = keywords(window_size=(left, right), sizes=(sq, sk))
        kept_left, kept_right = options.get("window_size", (-1, -1))
        kept_right = 0 if options["causal"] else kept_right
        assert torch.equal(hidden(left, right), hidden(kept_left, kept_right)), (left, right)
        assert hidden(left, right).any() or "window_size" not in options


@pytest.mark.parametrize(("causal", "window"), [(False, (1, 2)), (True, (1, 7)), (False, (-3, 1)), (False, (0, 0))])
def test_windows(causal: bool, window: tuple[int, int]) -> None:
    """A negative end is unlimited to flash_attn, and causal leaves nothing of the right one."""
    q, k, v = make((BATCH, 5, HEADS, DIM), *[(BATCH, 7, HEADS_K, DIM)] * 2)
    weights = torch.randn(BATCH, 5, HEADS, DIM, generator=torch.Generator().manual_seed(1))
    arrays = [x.requires_grad_() for x in (q, k, v)]
    out, lse, _ = flash_attn_func(q, k, v, causal=causal, window_size=window, return_attn_probs=True)
    gradients = torch.autograd.grad((out * weights).sum() + lse.sum(), arrays)
    left, right = (None if end < 0 else end for end in window)
    distance = torch.arange(7) - torch.arange(2, 7)[:, None]
    hidden = (distance > (0 if causal else right)) | (distance < -(9 if left is None else left))
    k, v = (x.repeat_interleave(HEADS // HEADS_K, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * DIM**-0.5
    scores = scores.masked_fill(hidden, -math.inf)
    expected, expected_lse = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v), scores.logsumexp(-1)
    close(out, expected, 2e-5)
    close(lse, expected_lse, 2e-5)
    wanted = torch.autograd.grad((expected * weights).sum() + expected_lse.sum(), arrays)
    for found, gradient in zip(gradients, wanted, strict=True):
        close(found, gradient, 5e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Packed sequences

STARTS_Q, STARTS_K = ([0, 5, 5, 9, 20], [0, 3, 7, 7, 19])


def starts(numbers: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(numbers, dtype=dtype)


def by_sequence(
    q: Tensor, k: Tensor, v: Tensor, cu_q: list[int], cu_k: list[int], causal: bool
) -> tuple[Tensor, Tensor]:
    """`formula` of each, end to end: out (total, heads, head_dim), lse (heads, total)."""
    pieces = [
        formula(q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], causal)
        for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)
    ]
    return torch.cat([out[0] for out, _ in pieces]), torch.cat([lse[0] for _, lse in pieces], 1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(causal: bool, dtype: torch.dtype) -> None:
    cu = starts(STARTS_Q), starts(STARTS_K)

    def separate(*arguments: Any, **keywords: Any) -> Any:
        return flash_attn_varlen_func(*arguments[:3], *cu, 11, torch.tensor(12), *arguments[3:], **keywords)

    def kvpacked(*arguments: Any, **keywords: Any) -> Any:
        return flash_attn_varlen_kvpacked_func(*arguments[:2], *cu, 11, 12, *arguments[2:], **keywords)

    def qkvpacked(*arguments: Any, **keywords: Any) -> Any:
        return flash_attn_varlen_qkvpacked_func(arguments[0], cu[0], torch.tensor(0), *arguments[1:], **keywords)

    for function, shapes, parts, cu_k in (
        (separate, [(20, HEADS, DIM), *[(19, HEADS_K, DIM)] * 2], lambda *x: x, STARTS_K),
        (kvpacked, [(20, HEADS, DIM), (19, 2, HEADS_K, DIM)], lambda q, kv: (q, *kv.unbind(1)), STARTS_K),
        (qkvpacked, [(20, 3, HEADS, DIM)], lambda qkv: qkv.unbind(1), STARTS_Q),
    ):
        inputs = make(*shapes, dtype=dtype)
        out, lse, dmask = function(*inputs, 0.0, None, causal, return_attn_probs=True)
        expected_out, expected_lse = by_sequence(*parts(*inputs), STARTS_Q, cu_k, causal)
        assert (out.dtype, lse.dtype, dmask.numel()) == (dtype, torch.float32, 0)
        close(out, expected_out, TOLERANCE[dtype])
        close(lse, expected_lse, 2e-5)
        assert torch.equal(function(*inputs, causal=causal), out)
        (dout,) = make(tuple(out.shape), dtype=dtype, seed=1)
        wanted = torch.autograd.grad(expected_out, inputs, dout.double())
        for gradient, value in zip(torch.autograd.grad(out, inputs, dout, retain_graph=True), wanted, strict=True):
            assert gradient.is_contiguous()
            close(gradient, value, TOLERANCE[dtype])
        with pytest.raises(InvalidArgument, match="no double backward"):
            first = torch.autograd.grad(out, inputs, dout, create_graph=True)[0]
            torch.autograd.grad(first.sum(), inputs)


def test_windows_over_packed_sequences_with_one_gradient() -> None:
    """Of (total, 3, heads, head_dim) with a window, also where an operator takes the backward."""
    (qkv,) = make((20, 3, HEADS, DIM))
    cu = starts(STARTS_Q)
    out = flash_attn_varlen_qkvpacked_func(qkv, cu, 11, window_size=(2, 1))
    pieces = [qkv[a:b].unbind(1) for a, b in itertools.pairwise(STARTS_Q)]
    expected = torch.cat([flash_attn_func(*(x[None] for x in piece), window_size=(2, 1))[0] for piece in pieces])
    close(out, expected, 1e-6)
    (dout,) = make(tuple(out.shape), seed=1)
    (wanted,) = torch.autograd.grad(expected, qkv, dout)
    close(torch.autograd.grad(out, qkv, dout, retain_graph=True)[0], wanted, 1e-5)
    close(torch.autograd.grad(out, qkv, dout, create_graph=True)[0], wanted, 1e-5)


def test_unpadded_attention_is_padded_attention() -> None:
    """bert_padding's way: pack, attend, pad; beside fa2cupy's own with used lengths."""
    mask = torch.tensor([[1] * 7 + [0] * 3, [1] * 10, [0] * 10, [1] + [0] * 9], dtype=torch.bool)
    q, k, v = make((4, 10, HEADS, DIM), *[(4, 10, HEADS_K, DIM)] * 2)
    packed = [bert_padding.unpad_input(x, mask) for x in (q, k, v)]
    _, indices, cu, longest, used = packed[0]
    out = flash_attn_varlen_func(*(tokens for tokens, *_ in packed), cu, cu, longest, longest, causal=True)
    padded = bert_padding.pad_input(out, indices, 4, 10)
    direct = fa2cupy.attention(q, k, v, causal=True, seqused_q=used.int(), seqused_k=used.int())
    close(padded, direct, 1e-6)
    (dout,) = make(tuple(direct.shape), seed=1)
    for found, wanted in zip(*(torch.autograd.grad(x, (q, k, v), dout) for x in (padded, direct)), strict=True):
        close(found, wanted, 1e-6)


def test_packed_sequences_below_autograd() -> None:
    """What ring attention calls, with lse as flash_attn has it, and the compiled module's functions."""
    q, k, v = make((20, HEADS, DIM), *[(19, HEADS_K, DIM)] * 2)
    cu = starts(STARTS_Q), starts(STARTS_K)
    below = (0.0, DIM**-0.5, True)
    out, lse, _, _ = _flash_attn_varlen_forward(q, k, v, *cu, 11, 12, *below)
    expected, expected_lse = by_sequence(q, k, v, STARTS_Q, STARTS_K, True)
    close(out, expected, 2e-5)
    close(lse, expected_lse, 2e-5)
    (dout,) = make(tuple(out.shape), seed=1)
    gradients = [torch.full_like(x, math.nan) for x in (q, k, v)]
    softmax_d = _flash_attn_varlen_backward(
        dout, q, k, v, out, lse, *gradients, *cu, 11, 12, *below, -1, -1, 0.0, None, False
    )
    for found, wanted in zip(gradients, torch.autograd.grad(expected, (q, k, v), dout.double()), strict=True):
        close(found, wanted, 2e-5)
    d = (dout * out).sum(-1).T
    assert softmax_d.shape == (HEADS, 20 + 4 * 128)
    close(softmax_d[:, 9 + 2 * 128 + 128 :][:, :11], d[:, 9:], 2e-5)
    used, pad = starts([2, 3, 0, 9]), starts([1, 0, 0, 4])
    out, lse, _, _ = extension.varlen_fwd(
        q, k, v, None, *cu, used, pad, None, None, 11, 12, *below[:2], False, False, -1, -1, 0.0, False
    )
    pieces = [(5, 1, 2), (0, 3, 6), (4, 7, 7), (11, 11, 16)]  # queries, first key and the one behind the last
    keys = [(k[a:b], v[a:b]) for _, a, b in pieces]
    wanted_out = by_sequence(q, *(torch.cat(x) for x in zip(*keys, strict=True)), STARTS_Q, [0, 1, 4, 4, 9], False)[0]
    close(out, wanted_out, 2e-5)


def test_compiled_packed_sequences() -> None:
    q, k, v = make((20, HEADS, DIM), *[(19, HEADS_K, DIM)] * 2)
    cu = starts(STARTS_Q), starts(STARTS_K, torch.int64)
    torch.compiler.reset()
    compiled = torch.compile(flash_attn_varlen_func, backend="aot_eager", fullgraph=True)
    out = compiled(q, k, v, *cu, torch.tensor(11), 12, causal=True, window_size=(3, 0))
    assert torch.equal(out, flash_attn_varlen_func(q, k, v, *cu, 11, 12, causal=True, window_size=(3, 0)))


# ----------------------------------------------------------------------------------------------------------------------
# softcap, ALiBi, sinks, dropout

Q = torch.zeros(1, 4, 2, 8)
CU = torch.tensor([0, 4], dtype=torch.int32)
SLOPES = torch.tensor([[0.5, 0.25, 0.125, 1.0], [0.3, 0.2, 0.1, 0.0]])
SCORES: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 1.5},
    "alibi_slopes": {"alibi_slopes": SLOPES},
    "alibi_slopes of heads": {"alibi_slopes": SLOPES[0]},
    "dropout_p": {"dropout_p": 0.3},
    "all": {"softcap": 1.5, "alibi_slopes": SLOPES, "dropout_p": 0.3, "window_size": (6, 0)},
}


def probabilities(q: Tensor, k: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    """P in float64, before dropout, and exp(s - the largest of its row), of dense sequences with causal masks."""
    slopes, softcap = keywords.get("alibi_slopes"), keywords.get("softcap")
    q, k = (x.detach().double().transpose(1, 2) for x in (q, k))
    s = q @ k.repeat_interleave(2, 1).mT * DIM**-0.5
    s = softcap * (s / softcap).tanh() if softcap else s
    distance = torch.arange(s.shape[2])[:, None] + s.shape[3] - s.shape[2] - torch.arange(s.shape[3])
    if slopes is not None:
        s = s - (slopes if slopes.ndim == 2 else slopes[None])[..., None, None] * distance.abs()
    left, _ = keywords.get("window_size", (-1, -1))
    s = s.masked_fill((distance < 0) | ((left >= 0) & (distance > left)), -math.inf)
    return s.softmax(3), (s - s.amax(3, keepdim=True)).exp()


@pytest.mark.parametrize("name", SCORES)
def test_scores_and_dropout(name: str) -> None:
    """By the formula, with what S_dmask says is dropped; packed in one tensor with one gradient, and as sequences."""
    keywords = {**SCORES[name], "causal": True}
    q, kv = make((BATCH, 9, HEADS, DIM), (BATCH, 20, 2, HEADS_K, DIM))
    k, v = kv.unbind(2)
    torch.manual_seed(4)
    out, lse, dmask = flash_attn_func(q, k, v, **keywords, return_attn_probs=True)
    p, unnormalised = probabilities(q, k, **keywords)
    kept = torch.ones_like(p, dtype=torch.bool)
    if "dropout_p" in keywords:
        assert (dmask.shape, dmask.dtype) == ((BATCH, HEADS, 128, 128), q.dtype)
        assert not dmask[:, :, 9:].any() and not dmask[:, :, :, 20:].any()
        found = dmask[:, :, :9, :20]
        close(found.abs(), unnormalised, 1e-5)
        kept = ~found.signbit()
        torch.manual_seed(4)
        seed = torch.randint(2**63 - 1, (2,))
        assert torch.equal(kept, fa2cupy.dropout_mask(BATCH, HEADS, 9, 20, 0.3, seed, like=q))
        p = p * kept / (1 - round(0.3 * 2**15) / 2**15)
    else:
        assert dmask.numel() == 0
    close(out, (p @ v.detach().double().transpose(1, 2).repeat_interleave(2, 1)).transpose(1, 2), 2e-5)
    (dout,) = make(tuple(out.shape), seed=1)
    gradients = torch.autograd.grad(out, (q, kv), dout)
    torch.manual_seed(4)
    together = flash_attn_kvpacked_func(q, kv, **keywords)
    assert torch.equal(together, out)
    for x, y in zip(gradients, torch.autograd.grad(together, (q, kv), dout), strict=True):
        assert torch.equal(x, y)
    starts_q, starts_k = (torch.arange(BATCH + 1, dtype=torch.int32) * n for n in (9, 20))
    for function, tensors in (
        (flash_attn_varlen_func, (q, k, v)), (flash_attn_varlen_kvpacked_func, (q, kv)),
    ):  # fmt: skip
        torch.manual_seed(4)
        flat = (x.flatten(0, 1) for x in tensors)
        packed, packed_lse, packed_dmask = function(
            *flat, starts_q, starts_k, 9, torch.tensor(20), **keywords, return_attn_probs=True
        )
        close(packed.unflatten(0, (BATCH, 9)), out, 1e-6)
        close(packed_lse.unflatten(1, (BATCH, 9)).transpose(0, 1), lse, 1e-6)
        close(packed_dmask, dmask, 1e-6)
        assert torch.equal(packed_dmask.signbit(), dmask.signbit())
        for x, y in zip(torch.autograd.grad(packed, (q, kv), dout.flatten(0, 1)), gradients, strict=True):
            close(x, y, 1e-5)


def test_dropout_of_one_tensor_of_all() -> None:
    """Everything at once, by position."""
    (qkv,) = make((BATCH, 11, 3, HEADS, DIM))
    starts = torch.tensor([0, 11, 22], dtype=torch.int32)
    results = []
    for function, more, shape in (
        (flash_attn_qkvpacked_func, (), (BATCH, 11)), (flash_attn_varlen_qkvpacked_func, (starts, 11), (22,)),
    ):  # fmt: skip
        torch.manual_seed(8)
        x = qkv.detach().reshape(*shape, 3, HEADS, DIM).requires_grad_()
        out = function(x, *more, 0.5, None, True, (5, 5), 2.0, SLOPES, True)
        (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
        results.append((out.reshape(BATCH, 11, HEADS, DIM), gradient.reshape(qkv.shape)))
    for one, other in zip(*results, strict=True):
        close(one, other, 1e-5)


def test_batched_gradients_of_one_tensor() -> None:
    """Gradients that have no memory of their own go through the operator."""
    (qkv,) = make((BATCH, 11, 3, HEADS, DIM))
    out = flash_attn_qkvpacked_func(qkv, causal=True, softcap=1.5, alibi_slopes=SLOPES)
    douts = torch.stack([torch.ones_like(out), out.detach()])
    (found,) = torch.autograd.grad(out, qkv, douts, is_grads_batched=True, retain_graph=True)
    for gradient, dout in zip(found, douts, strict=True):
        close(gradient, torch.autograd.grad(out, qkv, dout, retain_graph=True)[0], 1e-6)


def test_sinks() -> None:
    """s_aux in flash_attn 2's and 3's functions, with its gradient."""
    q, k, v, sinks = make((BATCH, 9, HEADS, DIM), *[(BATCH, 12, HEADS_K, DIM)] * 2, (HEADS,))
    out, lse = fa2cupy.attention(q, k, v, causal=True, sinks=sinks, return_lse=True)
    (dout,) = make(tuple(out.shape), seed=1)
    wanted = torch.autograd.grad(out, (q, k, v, sinks), dout)
    cu = [torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (9, 12)]
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    for result in (
        flash_attn_func(q, k, v, causal=True, return_attn_probs=True, s_aux=sinks)[:2],
        fa3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True, s_aux=sinks),
        flash_attn_varlen_func(*flat, *cu, 9, 12, causal=True, return_attn_probs=True, s_aux=sinks)[:2],
        fa3.flash_attn_varlen_func(*flat, *cu, 9, 12, causal=True, return_attn_probs=True, s_aux=sinks),
    ):
        close(result[0].reshape(out.shape), out, 1e-6)
        found = result[1] if result[1].ndim == 3 else result[1].unflatten(1, (BATCH, 9)).transpose(0, 1)
        close(found, lse, 1e-6)
        for x, y in zip(torch.autograd.grad(result[0].reshape(out.shape), (q, k, v, sinks), dout), wanted, strict=True):
            close(x, y, 1e-5)


def test_scores_of_flash_attention_3_and_of_caches() -> None:
    q, k, v = make((BATCH, 9, HEADS, DIM), *[(BATCH, 12, HEADS_K, DIM)] * 2)
    wanted = fa2cupy.attention(q, k, v, softcap=1.5, alibi_slopes=SLOPES)
    assert torch.equal(flash_attn_with_kvcache(q, k, v, softcap=1.5, alibi_slopes=SLOPES), wanted)
    wanted = fa2cupy.attention(q, k, v, softcap=1.5)
    assert torch.equal(fa3.flash_attn_func(q, k, v, softcap=1.5), wanted)
    assert torch.equal(fa3.flash_attn_with_kvcache(q, k, v, softcap=1.5), wanted)


def test_dropout_below_autograd() -> None:
    """rng_state of the forward is what the backward drops by; a generator of one's own."""
    q, k, v = (x.detach() for x in make((BATCH, 9, HEADS, DIM), *[(BATCH, 12, HEADS_K, DIM)] * 2))
    below = (0.25, None, True, -1, -1, 2.0, SLOPES)
    torch.manual_seed(6)
    out, lse, dmask, rng_state = _flash_attn_forward(q, k, v, *below, True)
    torch.manual_seed(6)
    assert torch.equal(rng_state, torch.randint(2**63 - 1, (2,)))
    options: dict[str, Any] = {"causal": True, "softcap": 2.0, "alibi_slopes": SLOPES, "dropout_p": 0.25}
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = fa2cupy.attention(*leaves, **options, dropout_seed=rng_state)
    assert torch.equal(out, expected) and dmask.shape == (BATCH, HEADS, 128, 128)
    (dout,) = make(tuple(out.shape), seed=1)
    wanted = torch.autograd.grad(expected, leaves, dout)
    found = [torch.empty_like(x) for x in (q, k, v)]
    softmax_d = _flash_attn_backward(dout, q, k, v, out, lse, *found, *below, False, rng_state)
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y)
    close(softmax_d[:, :, :9], 0.75 * (dout * out).sum(-1).transpose(1, 2), 1e-5)
    generator = torch.Generator().manual_seed(6)
    cu = [torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (9, 12)]
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    packed, _, packed_dmask, state = extension.varlen_fwd(
        *flat, None, *cu, None, None, None, SLOPES, 9, 12, 0.25, None, False, True, -1, -1, 2.0, True, generator
    )
    assert torch.equal(state, rng_state) and torch.equal(packed_dmask.signbit(), dmask.signbit())
    close(packed.unflatten(0, (BATCH, 9)), out, 1e-6)
    used = torch.tensor([7, 12], dtype=torch.int32), torch.tensor([2, 0], dtype=torch.int32)
    generator.manual_seed(6)
    *_, partly, _ = extension.varlen_fwd(
        *flat, None, *cu, *used, None, None, 9, 12, 0.25, None, False, False, -1, -1, 0.0, True, generator
    )
    seen = torch.zeros(BATCH, HEADS, 128, 128, dtype=torch.bool)
    seen[0, :, :9, 2:7], seen[1, :, :9, :12] = True, True
    assert torch.equal(partly != 0, seen)
    for call in (
        lambda: _flash_attn_backward(dout, q, k, v, out, lse, *found, *below, False),
        lambda: extension.fwd(q, k, v, None, None, 0.0, None, True, -1, -1, 0.0, True),
    ):
        with pytest.raises(InvalidArgument, match=r"dropout_p is given without rng_state|without dropout_p"):
            call()


def test_dropout_compiled_and_checkpointed() -> None:
    q, k, v = make((BATCH, 9, HEADS, DIM), *[(BATCH, 12, HEADS_K, DIM)] * 2)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = flash_attn_func(q, k, v, 0.5, causal=True, softcap=1.5, alibi_slopes=SLOPES)
        return out

    results = []
    torch.compiler.reset()
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True), checkpointed(run)):
        torch.manual_seed(3)
        out = function(q, k, v)
        torch.manual_seed(8)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert torch.equal(x, y)


def checkpointed(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *tensors: checkpoint(function, *tensors, use_reentrant=False)


def test_what_is_wrong_with_scores_is_said() -> None:
    for asked, words in (
        ({"dropout_p": 1.0}, "dropout_p=1.0 is not supported"),
        ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes has shape \(3,\)"),
        ({"alibi_slopes": torch.ones(2, dtype=torch.float16)}, "alibi_slopes"),
        ({"alibi_slopes": torch.ones(2, requires_grad=True)}, "alibi_slopes requires grad, and has no gradient"),
    ):
        with pytest.raises(Fa2Error, match=words):
            flash_attn_func(Q, Q, Q, **asked)
        with pytest.raises(Fa2Error, match=words):
            flash_attn_qkvpacked_func(torch.zeros(1, 4, 3, 2, 8, requires_grad=True), **asked)


def test_the_block_of_s_dmask_is_the_row() -> None:
    """As flash_attn's tests split scores by it."""
    size = _get_block_size_n(torch.device("cpu"), 64, True, False)
    assert len(torch.zeros(3, 300).split(size, dim=-1)) == 1


# ----------------------------------------------------------------------------------------------------------------------
# What is not there


def test_shapes_of_packed_tensors() -> None:
    with pytest.raises(InvalidArgument, match=r"qkv has shape \(1, 4, 2, 2, 8\): \(batch, seqlen, 3, num_heads"):
        flash_attn_qkvpacked_func(torch.zeros(1, 4, 2, 2, 8))
    with pytest.raises(InvalidArgument, match=r"kv has shape \(1, 4, 2, 8\)"):
        flash_attn_kvpacked_func(Q, Q.new_zeros(1, 4, 2, 8))


def test_what_is_no_tensor_or_no_window() -> None:
    array: Any = Q.numpy()
    for name, call in (
        ("q", lambda: flash_attn_func(array, Q, Q)),
        ("k", lambda: flash_attn_func(Q, [1], Q)),
        ("kv", lambda: flash_attn_kvpacked_func(Q, array)),
        ("qkv", lambda: flash_attn_qkvpacked_func(None)),
        ("qkv", lambda: fa3.flash_attn_qkvpacked_func(array)),
        ("v_cache", lambda: flash_attn_with_kvcache(Q, Q, array)),
    ):
        with pytest.raises(TypeError, match=f"{name} is a .*: a torch.Tensor is needed"):
            call()
    for window in (128, (1, 2, 3)):
        with pytest.raises(InvalidArgument, match=r"window_size=.*: \(left, right\) is needed"):
            flash_attn_func(Q, Q, Q, window_size=window)
    assert keywords(None, window_size=[-1, -1], softcap=None) == {"causal": False, "softmax_scale": None}
    with pytest.raises(InvalidArgument, match="q has 3 dimensions"):
        flash_attn_func(Q[0], Q[0], Q[0])


# ----------------------------------------------------------------------------------------------------------------------
# FlashAttention-3's names


def test_flash_attention_3() -> None:
    q, k, v = make((BATCH, 9, HEADS, DIM), *[(BATCH, 5, HEADS_K, DIM)] * 2)
    out, lse = fa3.flash_attn_func(q, k, v, 0.2, True, return_attn_probs=True)
    expected_out, expected_lse = formula(q, k, v, True, 0.2)
    close(out, expected_out, 2e-5)
    close(lse, expected_lse.where(~expected_lse.isinf(), -expected_lse), 2e-5)
    assert torch.equal(lse.isneginf(), expected_lse.isposinf())
    assert torch.equal(fa3.flash_attn_func(q, k, v, 0.2, True), out)
    with pytest.raises(InvalidArgument, match="flash_attn_func: q_descale is given, which is not supported yet"):
        fa3.flash_attn_func(q, k, v, q_descale=torch.ones(1))
    with pytest.raises(InvalidArgument, match="attention_chunk"):
        fa3.flash_attn_func(q, k, v, attention_chunk=4)


def test_flash_attention_3_packed_with_fewer_key_heads() -> None:
    (qkv,) = make((BATCH, 9, HEADS + 2 * HEADS_K, DIM))
    out = fa3.flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=HEADS)
    expected = formula(*qkv.split((HEADS, HEADS_K, HEADS_K), 2), True)[0]
    close(out, expected, 2e-5)
    (dout,) = make(tuple(out.shape), seed=1)
    (gradient,) = torch.autograd.grad(out, [qkv], dout)
    close(gradient, torch.autograd.grad(expected, [qkv], dout.double())[0], 2e-5)
    with pytest.raises(InvalidArgument, match="num_heads_q is None"):
        fa3.flash_attn_qkvpacked_func(qkv)


def test_flash_attention_3_packed_sequences() -> None:
    """With used lengths, which its function for packed sequences has."""
    q, k, v = make((20, HEADS, DIM), *[(19, HEADS_K, DIM)] * 2)
    cu, used_q, used_k = (starts(STARTS_Q), starts(STARTS_K)), starts([4, 0, 4, 3]), starts([3, 4, 0, 10])
    out, lse = fa3.flash_attn_varlen_func(q, k, v, *cu, 11, 12, used_q, used_k, causal=True, return_attn_probs=True)
    for n, (q0, k0) in enumerate(zip(STARTS_Q, STARTS_K[:-1], strict=False)):
        i, j = int(used_q[n]), int(used_k[n])
        rest = slice(q0 + i, STARTS_Q[n + 1])
        assert not out[rest].any() and lse[:, rest].isneginf().all()
        if i == 0:
            continue
        expected, expected_lse = formula(q[None, q0 : q0 + i], k[None, k0 : k0 + j], v[None, k0 : k0 + j], True)
        close(out[q0 : q0 + i], expected[0], 2e-5)
        close(lse[:, q0 : q0 + i], expected_lse[0].where(~expected_lse[0].isinf(), -expected_lse[0]), 2e-5)
