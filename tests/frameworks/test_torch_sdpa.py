"""torch's SDPA by our kernels: as a function, and taken over in the dispatcher.

The kernels for CUDA's operators are called with CPU tensors; what they return must have the shapes and strides of
torch's own meta functions, which compiled code asserts. The CPU's operators are taken over for real.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch._inductor.utils import fresh_cache
from torch.nn import functional
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, list_flash_attention_impls, sdpa_kernel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fa2cupy
from fa2cupy.errors import InvalidArgument, MissingDependency, NotTaken
from fa2cupy.torch import disable_sdpa, efficient, enable_sdpa, scaled_dot_product_attention, sdpa, takeover

aten = torch.ops.aten
OURS, BACKWARD = ("torch's SDPA", "fa2cupy", ""), ("torch's SDPA, backward", "fa2cupy", "")


@pytest.fixture(autouse=True)
def from_scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FA2CUPY_STRICT", raising=False)
    torch.compiler.reset()
    fa2cupy.report(reset=True)
    yield
    disable_sdpa(device="cpu")


def counted() -> dict[tuple[str, str, str], int]:
    return {(row.door, row.kernel, row.why): row.calls for row in fa2cupy.report()}


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: str = "", scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """bhsd out and lse in float64; causal: "", "top-left" or "bottom-right"."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    s = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    if causal:
        offset = s.shape[3] - s.shape[2] if causal == "bottom-right" else 0
        s = s.masked_fill(torch.ones(s.shape[2:], dtype=torch.bool).triu(offset + 1), -math.inf)
    return s.softmax(3) @ v, s.logsumexp(3)


def tensors(
    seqlen_q: int = 7,
    seqlen_k: int = 7,
    heads: tuple[int, int] = (4, 2),
    head_dim_v: int = 8,
    dtype: Any = torch.float16,
) -> list[torch.Tensor]:
    """q, k, v, dout: bhsd, C-contiguous."""
    torch.manual_seed(seqlen_q + seqlen_k)
    shapes = (
        (2, heads[0], seqlen_q, 8),
        (2, heads[1], seqlen_k, 8),
        (2, heads[1], seqlen_k, head_dim_v),
        (2, heads[0], seqlen_q, head_dim_v),
    )
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def with_gaps(x: torch.Tensor) -> torch.Tensor:
    """As a piece of packed q, k, v."""
    b, h, s, d = x.shape
    return torch.empty(b, s, 3, h, d, dtype=x.dtype)[:, :, 1].copy_(x.transpose(1, 2)).transpose(1, 2)


def seqlen_first(x: torch.Tensor) -> torch.Tensor:
    return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


def expanded(x: torch.Tensor) -> torch.Tensor:
    """The same values in every batch and head."""
    return x[:1, :1].expand(x.shape)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bhsd": lambda x: x,
    "bshd": transposed,
    "packed": with_gaps,
    "sbhd": seqlen_first,
    "expanded": expanded,
}


def kernel(name: str, calls: list[Any] | None = None) -> Callable[..., Any]:
    """Our kernel for an operator; what it hands on to torch's goes to `calls`."""

    def native(why: str, keyset: Any, *arguments: Any, **keywords: Any) -> Any:
        assert calls is not None, why
        calls.append((why, arguments, keywords))

    make = takeover._OPERATORS["cuda"][name](native)
    return lambda *arguments, **keywords: make(None, *arguments, **keywords)


def like_meta(results: Any, operator: Any, *arguments: Any, **keywords: Any) -> None:
    """The results have the shapes, strides and dtypes that torch's meta function gives the arguments."""
    shadows = [
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, torch.Tensor) else x
        for x in arguments
    ]
    for got, wanted in zip(results, operator(*shadows, **keywords), strict=True):
        if isinstance(wanted, torch.Tensor):
            assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
            for length, stride, other in zip(got.shape, got.stride(), wanted.stride(), strict=True):
                assert stride == other or length < 2
        else:
            assert got == wanted


def check(results: Any, wanted: Any) -> None:
    for got, want in zip(results, wanted, strict=True):
        assert_close(got.double(), want, rtol=4e-3, atol=4e-3)


# ----------------------------------------------------------------------------------------------------------------------
# The kernels behind CUDA's operators


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_flash(layout: str, causal: bool) -> None:
    """Bottom-right aligned, as flash attention is; lengths differ."""
    q, k, v, dout = (LAYOUTS[layout](x) for x in tensors(5, 9))
    arguments = (q, k, v, 0.0, causal)
    results = kernel("_scaled_dot_product_flash_attention")(*arguments, scale=0.3)
    like_meta(results, aten._scaled_dot_product_flash_attention, *arguments, scale=0.3)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = reference(*leaves, "bottom-right" if causal else "", 0.3)
    check(results[:2], (out, lse))
    saved = (dout, q, k, v, results[0], results[1], None, None, 5, 9, 0.0, causal, *results[6:8])
    gradients = kernel("_scaled_dot_product_flash_attention_backward")(*saved, scale=0.3)
    for got, x in zip(gradients, (q, k, v), strict=True):
        assert got.stride() == torch.empty_like(x).stride()
    check(gradients, torch.autograd.grad(out, leaves, dout.double()))
    assert counted() == {OURS: 1, BACKWARD: 1}


@pytest.mark.parametrize("lengths", [(7, 7), (5, 9), (9, 5)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cudnn(layout: str, causal: bool, lengths: tuple[int, int]) -> None:
    """Top-left aligned; head_dim_v of its own."""
    q, k, v, dout = (LAYOUTS[layout](x) for x in tensors(*lengths, head_dim_v=16))
    arguments = (q, k, v, None, True, 0.0, causal)
    results = kernel("_scaled_dot_product_cudnn_attention")(*arguments)
    like_meta(results, aten._scaled_dot_product_cudnn_attention, *arguments)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = reference(*leaves, "top-left" if causal else "")
    check((results[0], results[1].reshape(lse.shape)), (out, lse))
    saved = (dout, q, k, v, results[0], results[1], *results[6:8], None, None, None, *lengths, 0.0, causal)
    gradients = kernel("_scaled_dot_product_cudnn_attention_backward")(*saved)
    for got, x in zip(gradients, (q, k, v), strict=True):
        assert got.stride() == torch.empty_like(x).stride()
    check(gradients, torch.autograd.grad(out, leaves, dout.double()))


@pytest.mark.parametrize("lengths", [(7, 7), (5, 40), (40, 5)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_efficient(layout: str, causal: bool, lengths: tuple[int, int]) -> None:
    """What torch takes for float32: top-left aligned, its lse padded with +inf."""
    q, k, v, dout = (LAYOUTS[layout](x.float()) for x in tensors(*lengths, (4, 4), 16))
    arguments = (q, k, v, None, True, 0.0, causal)
    results = kernel("_scaled_dot_product_efficient_attention")(*arguments)
    like_meta(results, aten._scaled_dot_product_efficient_attention, *arguments)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = reference(*leaves, "top-left" if causal else "")
    check((results[0], results[1][:, :, : lengths[0]]), (out, lse))
    assert (results[1][:, :, lengths[0] :] == torch.inf).all()
    saved = (dout, q, k, v, None, *results, 0.0, [True, True, True, False], causal)
    gradients = kernel("_scaled_dot_product_efficient_attention_backward")(*saved)
    like_meta(gradients, aten._scaled_dot_product_efficient_attention_backward, *saved)
    check(gradients[:3], torch.autograd.grad(out, leaves, dout.double()))
    assert counted() == {OURS: 1, BACKWARD: 1}
    no_lse = kernel("_scaled_dot_product_efficient_attention")(q, k, v, None, False)
    like_meta(no_lse, aten._scaled_dot_product_efficient_attention, q, k, v, None, False)


def test_memory_efficient_of_others_is_not_seen() -> None:
    """16 bits, biases, and GPUs on which nobody has measured it stay torch's, and nobody hears of it; what cannot be
    computed is told."""
    q, k, v, _ = tensors(7, 7, (4, 4))
    for whose, why in (((q, k, v, None, True), ""), ((*(x.float() for x in (q, k, v)), q.float(), True), "")):
        calls: list[Any] = []
        kernel("_scaled_dot_product_efficient_attention", calls)(*whose)
        assert [call[0] for call in calls] == [why]
    calls = []
    kernel("_scaled_dot_product_efficient_attention", calls)(*(x.float() for x in (q, k, v)), None, True, 1.0)
    assert "dropout of everything" in calls[0][0]


def test_memory_efficient_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU float32 is ours where somebody has seen that it is faster."""

    class OnGpu:
        dtype, device, shape = torch.float32, torch.device("cuda", 0), (1, 4, 7, 16)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(efficient, "objection", lambda *arguments: "")
    x = OnGpu()
    assert efficient._objection(x, x, x, None, 0.0) == ""
    monkeypatch.setattr(efficient, "FASTER_ON", frozenset({(9, 0)}))
    assert efficient._objection(x, x, x, None, 0.0) is None


@pytest.mark.parametrize("causal", [False, True])
def test_memory_efficient_dropout(causal: bool) -> None:
    """The backward goes by the seed that the forward returned: the same elements are dropped."""
    q, k, v, dout = (x.float() for x in tensors(7, 9, (4, 4), 16))
    results = kernel("_scaled_dot_product_efficient_attention")(q, k, v, None, True, 0.25, causal)
    seed = int(results[2])
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    kept = torch.from_numpy(fa2cupy.dropout_mask(2, 4, 7, 9, 0.25, (seed, 0))) / 0.75
    scores = leaves[0] @ leaves[1].mT * 8**-0.5
    if causal:
        scores = scores.masked_fill(torch.ones(7, 9, dtype=torch.bool).triu(1), -torch.inf)
    out = (scores.softmax(-1) * kept) @ leaves[2]
    check((results[0],), (out,))
    saved = (dout, q, k, v, None, *results, 0.25, [True, True, True, False], causal)
    gradients = kernel("_scaled_dot_product_efficient_attention_backward")(*saved)
    check(gradients[:3], torch.autograd.grad(out, leaves, dout.double()))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_flash_of_its_own(layout: str, causal: bool) -> None:
    """aten::_flash_attention_forward takes bshd."""
    q, k, v, dout = (LAYOUTS[layout](x).transpose(1, 2) for x in tensors(5, 9))
    arguments = (q, k, v, None, None, 5, 9, 0.0, causal, False)
    results = kernel("_flash_attention_forward")(*arguments, scale=None, window_size_left=-1, window_size_right=None)
    like_meta(results, aten._flash_attention_forward, *arguments)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = reference(*(x.transpose(1, 2) for x in leaves), "bottom-right" if causal else "")
    check(results[:2], (out.transpose(1, 2), lse))
    saved = (dout, q, k, v, results[0], results[1], None, None, 5, 9, 0.0, causal, *results[2:4])
    gradients = kernel("_flash_attention_backward")(*saved)
    for got, x in zip(gradients, (q, k, v), strict=True):
        assert got.stride() == torch.empty_like(x).stride()
    check(gradients, torch.autograd.grad(out.transpose(1, 2), leaves, dout.double()))


@pytest.mark.parametrize("window", [(None, None), (2, 1), (-1, 0), (3, -1)])
@pytest.mark.parametrize("causal", [False, True])
def test_flash_with_a_window(causal: bool, window: tuple[int | None, int | None]) -> None:
    """Dense and packed alike: one sequence of each row."""
    q, k, v, dout = (transposed(x).transpose(1, 2) for x in tensors(5, 9))
    ends = {"scale": None, "window_size_left": window[0], "window_size_right": window[1]}
    results = kernel("_flash_attention_forward")(q, k, v, None, None, 5, 9, 0.0, causal, False, **ends)
    backward = kernel("_flash_attention_backward")
    gradients = backward(dout, q, k, v, *results[:2], None, None, 5, 9, 0.0, causal, *results[2:4], **ends)
    left, right = (-1 if end is None else end for end in window)
    expected, _ = fa2cupy.attention(
        q, k, v, causal=causal, window_size=(left, -1 if causal else right), return_lse=True
    )
    assert torch.equal(results[0], expected)
    flat = [x.flatten(0, 1) for x in (q, k, v, dout)]
    starts = torch.tensor([0, 5, 10], dtype=torch.int32), torch.tensor([0, 9, 18], dtype=torch.int32)
    arguments = (*flat[:3], *starts, 5, 9, 0.0, causal, False)
    packed = kernel("_flash_attention_forward")(*arguments, **ends)
    like_meta(packed, aten._flash_attention_forward, *arguments, **ends)
    assert torch.equal(packed[0], results[0].flatten(0, 1))
    assert torch.equal(packed[1], results[1].transpose(0, 1).flatten(1))
    again = backward(flat[3], *flat[:3], *packed[:2], *starts, 5, 9, 0.0, causal, *packed[2:4], **ends)
    for got, wanted in zip(again, gradients, strict=True):
        assert torch.equal(got, wanted.flatten(0, 1))
    assert counted() == {OURS: 2, BACKWARD: 2}


def test_packed_flash() -> None:
    """Any strides, int64 starts, keys in use; results lie in memory as torch's meta functions say."""
    q, k, v, dout = (
        torch.randn(h, n, 8, dtype=torch.bfloat16).transpose(0, 1) for h, n in ((4, 7), (2, 9), (2, 9), (4, 7))
    )
    starts = torch.tensor([0, 3, 3, 7]), torch.tensor([0, 4, 6, 9])
    used = torch.tensor([2, 2, 0], dtype=torch.int32)
    arguments = (q, k, v, *starts, 4, 4, 0.0, True, False)
    results = kernel("_flash_attention_forward")(*arguments, seqused_k=used)
    like_meta(results, aten._flash_attention_forward, *arguments)
    expected = fa2cupy.attention(
        q, k, v, causal=True, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], seqused_k=used, return_lse=True
    )
    assert torch.equal(results[0], expected[0]) and torch.equal(results[1], expected[1])
    (
        out,
        lse,
        *_,
    ) = kernel("_flash_attention_forward")(*arguments)
    gradients = kernel("_flash_attention_backward")(dout, q, k, v, out, lse, *starts, 4, 4, 0.0, True, None, None)
    for got, x in zip(gradients, (q, k, v), strict=True):
        assert got.stride() == torch.empty_like(x).stride()
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    again = fa2cupy.attention(*leaves, causal=True, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1])
    for got, wanted in zip(gradients, torch.autograd.grad(again, leaves, dout), strict=True):
        assert torch.equal(got, wanted)


def dropped(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[Any, ...]:
    """An operator's arguments with dropout, by its forward; and those of its backward behind lse, by what came back."""
    sizes = q.shape[2], k.shape[2]
    if name == "_flash_attention":
        return (q, k, v, None, None, *sizes, 0.3, causal, False), (None, None, *sizes, 0.3, causal)
    if name == "_scaled_dot_product_cudnn_attention":
        return (q, k, v, None, True, 0.3, causal), (None, None, None, *sizes, 0.3, causal)
    return (q, k, v, 0.3, causal), (None, None, *sizes, 0.3, causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "name", ["_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention", "_flash_attention"]
)
def test_dropout_of_operators(name: str, causal: bool) -> None:
    """What a forward returns of its random numbers is what the backward drops by, and what torch's generator gave."""
    lengths = (9, 7) if "cudnn" in name else (7, 7)  # top-left: a window
    q, k, v, dout = tensors(*lengths)
    own = "_flash_attention_forward" if name == "_flash_attention" else name
    if name == "_flash_attention":
        q, k, v, dout = (x.transpose(1, 2) for x in (q, k, v, dout))
    forward, rest = dropped(name, q, k, v, causal)
    torch.manual_seed(1)
    results = kernel(own)(*forward)
    like_meta(results, getattr(aten, own), *forward)
    seed, offset = results[2:4] if name == "_flash_attention" else results[6:8]
    torch.manual_seed(1)
    given = seed
    if "cudnn" in name:
        assert int(seed) == int(torch.randint(2**63 - 1, ()))
        given = torch.tensor([int(seed), 0])
    else:
        assert torch.equal(seed.view(torch.int64), torch.randint(2**63 - 1, (2,)))
    again = kernel(own)(*forward)  # the generator goes on
    assert not torch.equal(again[0], results[0])
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    layout = "bshd" if name == "_flash_attention" else "bhsd"
    options: dict[str, Any] = {"causal": causal, "layout": layout, "dropout_p": 0.3, "dropout_seed": given}
    if "cudnn" in name and causal:
        options |= {"causal": False, "window_size": (-1, 2)}
    out, lse = fa2cupy.attention(*leaves, return_lse=True, **options)
    assert torch.equal(results[0], out) and torch.equal(results[1].reshape(lse.shape), lse)
    saved = (dout, q, k, v, *results[:2])
    behind = (*rest, seed, offset) if "cudnn" not in name else (seed, offset, *rest)
    gradients = kernel(own.replace("_forward", "") + "_backward")(*saved, *behind)
    for got, wanted in zip(gradients, torch.autograd.grad(out, leaves, dout), strict=True):
        assert torch.equal(got, wanted)
    assert counted() == {OURS: 2, BACKWARD: 1}


def test_dropout_of_packed_flash() -> None:
    q, k, v, dout = (torch.randn(n, h, 8, dtype=torch.float16) for h, n in ((4, 7), (2, 9), (2, 9), (4, 7)))
    starts = torch.tensor([0, 3, 3, 7], dtype=torch.int32), torch.tensor([0, 4, 6, 9], dtype=torch.int32)
    window = {"window_size_left": 2, "window_size_right": 1}
    arguments = (*starts, 4, 4, 0.5, False)
    out, lse, seed, offset, _ = kernel("_flash_attention_forward")(q, k, v, *arguments, False, **window)
    gradients = kernel("_flash_attention_backward")(dout, q, k, v, out, lse, *arguments, seed, offset, **window)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    options: dict[str, Any] = {"window_size": (2, 1), "dropout_p": 0.5, "dropout_seed": seed.view(torch.int64)}
    wanted = fa2cupy.attention(*leaves, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], **options)
    assert torch.equal(out, wanted)
    for got, one in zip(gradients, torch.autograd.grad(wanted, leaves, dout), strict=True):
        assert torch.equal(got, one)


def test_dropout_that_is_rounded_away_draws_nothing() -> None:
    q, k, v, _ = tensors()
    before = torch.random.get_rng_state()
    for name, more in (
        ("_scaled_dot_product_flash_attention", ()),
        ("_scaled_dot_product_cudnn_attention", (None, True)),
    ):
        results = kernel(name)(q, k, v, *more, 1e-5, True)
        assert torch.equal(results[0], fa2cupy.attention(q, k, v, causal=True, layout="bhsd"))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_goes_on_to_torch() -> None:
    """With all arguments as they came, and why."""
    q, k, v, _ = tensors()
    wide = torch.zeros(1, 1, 2, 264, dtype=torch.float16)
    lengths = torch.tensor([0, 4])
    for name, words, arguments, keywords in (
        ("_scaled_dot_product_flash_attention", "dropout of", (q, k, v, 0.99999, True, False), {"scale": 0.1}),
        ("_scaled_dot_product_flash_attention", "a debug mask", (q, k, v, 0.0, True, True), {"scale": None}),
        ("_scaled_dot_product_flash_attention", "head_dim", (wide, wide, wide, 0.0, True, False), {"scale": None}),
        ("_scaled_dot_product_flash_attention", "int32", (q.int(), k.int(), v.int(), 0.0, True, False), {"scale": 1.0}),
        ("_scaled_dot_product_cudnn_attention", "bias", (q, k, v, q, True, 0.0, True, False), {"scale": None}),
        ("_scaled_dot_product_cudnn_attention", "debug", (q, k, v, None, True, 0.0, True, True), {"scale": None}),
        ("_scaled_dot_product_cudnn_attention_backward", "dropout",
         (q, q, k, v, q, q, q, q, None, None, None, 7, 7, 1.0, True), {"scale": None}),
        ("_scaled_dot_product_flash_attention_backward", "dropout",
         (q, q, k, v, q, q, None, None, 7, 7, 1.0, True, q, q), {"scale": None}),
        ("_flash_attention_forward", "one packed side",
         (q[0], k, v, lengths, None, 4, 4, 0.0, True, False), {"scale": None}),
        ("_flash_attention_forward", "seqused_k",
         (q, k, v, None, None, 4, 4, 0.0, True, False), {"scale": None, "seqused_k": lengths}),
        ("_flash_attention_forward", "alibi_slopes",
         (q, k, v, None, None, 4, 4, 0.0, True, False), {"scale": None, "alibi_slopes": q}),
        ("_flash_attention_backward", "dropout",
         (q, q, k, v, q, q, lengths, lengths, 4, 4, 1.0, True, q, q), {"scale": None, "window_size_left": None}),
    ):  # fmt: skip
        handed_on: list[Any] = []
        kernel(name, handed_on)(*arguments, **keywords)
        [(why, got, options)] = handed_on
        assert words in why
        assert len(got) == len(arguments) and all(a is b or a == b for a, b in zip(got, arguments, strict=True))
        assert options == keywords
    assert counted() == {}


def test_every_operator_is_known_to_this_torch() -> None:
    for device, operators in takeover._OPERATORS.items():
        for name in operators:
            assert hasattr(aten, name), device


# ----------------------------------------------------------------------------------------------------------------------
# The CPU's operators, taken over


def both_ways(call: Callable[..., torch.Tensor], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    q, k, v, dout = tensors(dtype=dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = call(*leaves)
    return [out, *torch.autograd.grad(out, leaves, dout)]


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_taken_over(dtype: torch.dtype, layout: str) -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return plain(*(LAYOUTS[layout](x) for x in (q, k, v)))

    native = both_ways(call, dtype)
    assert counted() == {}
    with sdpa(device="cpu"):
        ours = both_ways(call, dtype)
    assert counted() == {OURS: 1, BACKWARD: 1}
    for got, wanted in zip(ours, native, strict=True):
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float64: 1e-12}[dtype]
        assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    for got, wanted in zip(both_ways(call, dtype), native, strict=True):
        assert torch.equal(got, wanted)
    assert counted() == {OURS: 1, BACKWARD: 1}


def test_lengths_that_differ() -> None:
    for lengths in ((5, 9), (9, 5)):
        q, k, v, _ = tensors(*lengths, dtype=torch.float32, heads=(2, 2))
        with sdpa(device="cpu"), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0]
        assert_close(out.double(), reference(q, k, v, "top-left")[0], rtol=1e-5, atol=1e-5)
        assert counted() == {OURS: 1}
        fa2cupy.report(reset=True)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str) -> None:
    native = both_ways(plain)
    with sdpa(device="cpu"):
        ours = both_ways(torch.compile(plain, backend=backend, fullgraph=True))
    assert counted() == {OURS: 1, BACKWARD: 1}
    for got, wanted in zip(ours, native, strict=True):
        assert_close(got, wanted)


def test_compiled_before_it_was_enabled() -> None:
    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    native = both_ways(compiled)
    assert counted() == {}
    enable_sdpa(device="cpu")
    for got, wanted in zip(both_ways(compiled), native, strict=True):
        assert_close(got, wanted)
    assert counted() == {OURS: 1, BACKWARD: 1}


def test_compiled_from_a_cache_made_before(tmp_path: Path) -> None:
    """Inductor's cache knows nothing of the kernels behind an operator, and need not."""
    hits = torch._dynamo.utils.counters["aot_autograd"]
    with fresh_cache(dir=str(tmp_path)):
        hits.clear()
        native = both_ways(torch.compile(plain, backend="inductor", fullgraph=True))
        assert counted() == {} and hits["autograd_cache_hit"] == 0
        torch.compiler.reset()
        enable_sdpa(device="cpu")
        ours = both_ways(torch.compile(plain, backend="inductor", fullgraph=True))
        assert hits["autograd_cache_hit"] == 1
    assert counted() == {OURS: 1, BACKWARD: 1}
    for got, wanted in zip(ours, native, strict=True):
        assert_close(got, wanted)


def test_enabling_and_disabling() -> None:
    q, k, v, _ = tensors(dtype=torch.float32)
    for _ in range(2):
        enable_sdpa(device="cpu")
    with sdpa(device="cpu"):
        plain(q, k, v)
    plain(q, k, v)
    assert counted() == {OURS: 2}
    for _ in range(2):
        disable_sdpa(device="cpu")
    plain(q, k, v)
    with pytest.raises(KeyError), sdpa(device="cpu"):
        plain(q, k, v)
        raise KeyError
    plain(q, k, v)
    assert counted() == {OURS: 3}
    with pytest.raises(InvalidArgument, match="device='tpu' is not supported: 'cuda' or 'cpu'"):
        enable_sdpa(device="tpu")


@pytest.mark.skipif(torch.version.cuda is not None, reason="a build without CUDA")
def test_a_torch_without_cuda() -> None:
    assert "fa2cupy" in list_flash_attention_impls()
    for enable in (enable_sdpa, lambda: activate_flash_attention_impl("fa2cupy")):
        with pytest.raises(
            MissingDependency, match=r"has no kernel aten::_scaled_dot_product_flash_attention for CUDA"
        ):
            enable()
    assert not takeover._enabled


def test_fallbacks_are_counted_said_once_and_forbidden(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    q, k, v, _ = tensors(dtype=torch.float32, heads=(2, 2))
    mask = torch.zeros(7, 7)
    wanted = functional.scaled_dot_product_attention(q, k, v, mask)
    operator = "aten::_scaled_dot_product_flash_attention_for_cpu"
    with sdpa(device="cpu"), caplog.at_level(logging.WARNING, "fa2cupy"):
        for _ in range(3):
            assert torch.equal(functional.scaled_dot_product_attention(q, k, v, mask), wanted)
        assert counted() == {("torch's SDPA", operator, "attn_mask is not supported yet"): 3}
        assert [record.message for record in caplog.records] == [
            f"torch's SDPA runs {operator}: attn_mask is not supported yet"
        ]
        monkeypatch.setenv("FA2CUPY_STRICT", "1")
        with pytest.raises(NotTaken, match="attn_mask is not supported yet, and FA2CUPY_STRICT forbids it"):
            functional.scaled_dot_product_attention(q, k, v, mask)
        plain(q, k, v)


def test_the_report_is_a_table() -> None:
    assert str(fa2cupy.report()) == "no calls through fa2cupy's doors"
    q, k, v, _ = tensors(heads=(2, 2))
    scaled_dot_product_attention(q, k, v)
    scaled_dot_product_attention(q, k, v)
    scaled_dot_product_attention(q, k, v, torch.zeros(7, 7, dtype=q.dtype))
    report = fa2cupy.report(reset=True)
    assert [(row.kernel, row.calls) for row in report] == [("fa2cupy", 2), ("torch's SDPA", 1)]
    lines = str(report).splitlines()
    assert lines[0].split() == ["door", "kernel", "calls", "why", "not", "fa2cupy"]
    assert lines[2].endswith("1      attn_mask is not supported yet")
    assert len(fa2cupy.report()) == 0


# ----------------------------------------------------------------------------------------------------------------------
# The function


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(7, 7), (5, 9), (9, 5)])
def test_function(lengths: tuple[int, int], causal: bool) -> None:
    q, k, v, dout = tensors(*lengths, head_dim_v=16, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    results = []
    for function in (functional.scaled_dot_product_attention, scaled_dot_product_attention):
        out = function(q, k, v, is_causal=causal, scale=0.3, enable_gqa=True)
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    for got, wanted in zip(results[1], results[0], strict=True):
        assert_close(got, wanted)
    assert [row.kernel for row in fa2cupy.report()] == ["fa2cupy"]


def test_function_compiled_for_any_lengths() -> None:
    """Top-left alignment of more queries than keys is a window, whose size is then a number of the graph."""
    compiled = torch.compile(scaled_dot_product_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths in ((9, 5), (12, 5), (5, 9), (7, 7)):
        q, k, v, _ = tensors(*lengths, dtype=torch.float32, heads=(2, 2))
        assert_close(
            compiled(q, k, v, is_causal=True), functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        )


def test_what_the_function_leaves_to_torch() -> None:
    q, k, v, _ = tensors(dtype=torch.float32, heads=(2, 2))
    for why, arguments, keywords in (
        ("attn_mask is not supported yet", (q, k, v, torch.zeros(7, 7)), {}),
        ("shapes that broadcast are not supported", (q, k[:1], v[:1]), {}),
        ("tensors of other than 4 dimensions are not supported", (q[0], k[0], v[0]), {}),
        ("dropout of everything is not supported", (q, k, v), {"dropout_p": 0.99999}),
        ("fewer key heads than query heads without enable_gqa are not supported", (q, k[:, :1], v[:, :1]), {}),
    ):
        fa2cupy.report(reset=True)
        out = scaled_dot_product_attention(*arguments, **keywords)
        assert [row.why for row in fa2cupy.report()] == [why]
        if not keywords:
            assert torch.equal(out, functional.scaled_dot_product_attention(*arguments))


def drop(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = scaled_dot_product_attention(q, k, v, None, 0.25, True, enable_gqa=True)
    return out


def test_function_with_dropout() -> None:
    """By torch's generator; what is dropped is the same when checkpointing computes it again, and in the gradient."""
    q, k, v, dout = tensors(dtype=torch.float64)
    torch.manual_seed(2)
    out = drop(q, k, v)
    torch.manual_seed(2)
    seed = torch.randint(2**63 - 1, (2,))
    keywords: dict[str, Any] = {"causal": True, "dropout_p": 0.25, "dropout_seed": seed, "layout": "bhsd"}
    assert torch.equal(out, fa2cupy.attention(q, k, v, **keywords))
    assert not torch.equal(out, drop(q, k, v))
    assert counted() == {("fa2cupy.torch.scaled_dot_product_attention", "fa2cupy", ""): 2}
    leaves = [x.requires_grad_() for x in (q, k, v)]
    wanted = torch.autograd.grad(fa2cupy.attention(*leaves, **keywords), leaves, dout)
    torch.manual_seed(2)
    found = [drop(*leaves)]
    for reentrant in (False, True):
        torch.manual_seed(2)
        found.append(checkpoint(drop, *leaves, use_reentrant=reentrant))
    torch.manual_seed(9)
    for one in found:
        assert torch.equal(one, out)
        one.backward(dout)
        for leaf, gradient in zip(leaves, wanted, strict=True):
            assert leaf.grad is not None and torch.equal(leaf.grad, gradient)
            leaf.grad = None


def test_function_with_dropout_compiled() -> None:
    """One graph, with torch's generator in it: checkpointed, its gradient drops what its forward does."""
    q, k, *_ = (x.requires_grad_() for x in tensors(dtype=torch.float64))
    basis = torch.eye(7, dtype=torch.float64).expand(2, 2, 7, 7).clone().requires_grad_()  # out is P then

    def run(q: torch.Tensor, k: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = checkpoint(drop, q, k, basis, use_reentrant=False)
        return out

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    first, second = compiled(q, k, basis), compiled(q, k, basis)
    assert not torch.equal(first == 0, second == 0)
    (gradient,) = torch.autograd.grad(first, basis, torch.ones_like(first))
    sums = (
        first.detach().sum(2).reshape(2, 2, 2, 7).sum(2)
    )  # of P over queries, and over the heads that share a key head
    assert_close(gradient, sums[..., None].expand(2, 2, 7, 7))


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_dropout_under_vmap_is_refused(randomness: str) -> None:
    many = [x[None].expand(3, *x.shape) for x in tensors(dtype=torch.float32)[:3]]
    words = "random operation while in randomness error mode" if randomness == "error" else "dropout_seed is not supp"
    with pytest.raises((RuntimeError, InvalidArgument), match=words):
        torch.func.vmap(drop, randomness=randomness)(*many)


def test_function_under_autocast() -> None:
    q, k, v, _ = tensors(dtype=torch.float32, heads=(2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        out = scaled_dot_product_attention(q, k.half(), v)
    assert out.dtype is torch.bfloat16
    check([out.float()], [functional.scaled_dot_product_attention(*(x.bfloat16().double() for x in (q, k.half(), v)))])
    assert [row.kernel for row in fa2cupy.report()] == ["fa2cupy"]


def test_function_compiled() -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    native = both_ways(plain)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        for got, wanted in zip(both_ways(compiled), native, strict=True):
            assert_close(got, wanted)
    assert [(row.kernel, row.calls) for row in fa2cupy.report()] == [("fa2cupy", 1)]
