"""Training in torch on the GPU: gradients through autograd, CUDA graphs, compiled functions, SDPA taken over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._inductor.utils import fresh_cache
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fa2cupy
from fa2cupy.torch import disable_sdpa, enable_sdpa, sdpa
from tests.gpu.cases import DTYPES, Case
from tests.gpu.runner import forget_calls, inputs_of

Tensor = torch.Tensor

NEEDS = [
    Case(64, 64, head_dim, dtype, causal, heads=(8, 2), given=False, deterministic=deterministic)
    for head_dim, dtypes in ((64, ("bfloat16",)), (128, DTYPES), (256, ("bfloat16",)))
    for dtype in dtypes
    for causal in (False, True)
    for deterministic in (False, True)
]
OURS = {"flash_fwd", "flash_bwd", "flash_bwd_preprocess", "flash_bwd_postprocess", "fill_unseen"}


NEEDS_SM80 = [  # of the kernels that every GPU has, each choice at least once
    Case(64, 64, head_dim, dtype, causal, heads=(8, 2), given=False, deterministic=deterministic)
    for head_dim, dtype, causal, deterministic in (
        (64, "bfloat16", True, False),
        (128, "bfloat16", False, True),
        (128, "float16", True, True),
        (256, "float16", False, False),
    )
]
KERNELS = [
    (family, case.dtype, case.head_dim, case.causal, case.deterministic)
    for family, cases in (("", NEEDS), ("sm80", NEEDS_SM80))
    for case in cases
]


@pytest.fixture(params=["", "sm80"])
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[str]:
    """The kernels that this GPU takes by itself, and those that every GPU has."""
    if request.param:
        if torch.cuda.get_device_capability(device) != (9, 0):
            pytest.skip("these are the kernels that the GPU takes by itself")
        monkeypatch.setenv("FA2CUPY_KERNEL", request.param)
    forget_calls()
    yield request.param
    forget_calls()


def leaves(
    device: torch.device, *, seed: int = 5, dtype: str = "bfloat16", head_dim: int = 128, **sizes: Any
) -> list[Tensor]:
    """q, k, v that require grad, dout; bshd."""
    shape = {"seqlen_q": 333, "seqlen_k": 512, "heads": (8, 2), **sizes}
    inputs = inputs_of(Case(head_dim=head_dim, dtype=dtype, causal=True, seed=seed, **shape), device)
    return [*(inputs[name].requires_grad_() for name in ("q", "k", "v")), inputs["dout"]]


def reference(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """bshd out and lse in float64 by the formula."""
    group = q.shape[2] // k.shape[2]
    q, k, v = q.double(), k.double().repeat_interleave(group, 2), v.double().repeat_interleave(group, 2)
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(s.shape[-1] - s.shape[-2] + 1)
        s = s.masked_fill(hidden, -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v), s.logsumexp(-1)


def relative_rms(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def kernels_of(function: Callable[[], Any]) -> list[str]:
    """The names of what ran on the GPU, without copies and fills, as torch's profiler has them."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in names if not name.startswith(("Mem", "Activity"))]


def attention_kernels(names: list[str]) -> set[str]:
    """Those of attention, ours or others': everything that is not a simple operation of torch's own."""
    simple = ("vectorized_elementwise", "elementwise_kernel", "FillFunctor", "reduce_kernel", "triton_", "distribution")
    return {name for name in names if not any(word in name for word in simple)}


# ----------------------------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_attention_backward(device: torch.device, causal: bool, head_dim: int) -> None:
    q, k, v, dout = leaves(device, head_dim=head_dim)
    out, lse = fa2cupy.attention(q, k, v, causal=causal, return_lse=True, deterministic=True)
    got = torch.autograd.grad(out, (q, k, v), dout)
    with torch.no_grad():
        out2, lse2 = fa2cupy.attention(q, k, v, causal=causal, return_lse=True)
        wanted = fa2cupy.attention_backward(dout, q, k, v, out2, lse2, causal=causal, deterministic=True)
    assert torch.equal(out, out2) and torch.equal(lse, lse2)
    for x, y in zip(got, wanted, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("family", "dtype", "head_dim", "causal", "deterministic"), KERNELS, indirect=["family"])
def test_gradient_through_lse(
    device: torch.device, family: str, dtype: str, head_dim: int, causal: bool, deterministic: bool
) -> None:
    """dlse alone, and beside dout; some rows see no key (causal) and their dlse counts for nothing."""
    q, k, v, dout = leaves(device, dtype=dtype, head_dim=head_dim, seqlen_q=333, seqlen_k=300, heads=(8, 2))
    dlse = torch.randn(2, 8, 333, device=device, generator=torch.Generator(device).manual_seed(1))
    seen = slice(33, None) if causal else slice(None)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out64, lse64 = reference(exact[0][:, seen], *exact[1:], causal)
    out, lse = fa2cupy.attention(q, k, v, causal=causal, return_lse=True, deterministic=deterministic)
    assert torch.isneginf(lse[:, :, : 33 if causal else 0]).all()
    tolerance = 0.01 if dtype == "bfloat16" else 0.0015
    for douts in ((None, dlse), (dout, dlse)):
        outputs = [(out, douts[0]), (lse, douts[1])]
        given = [(x, d) for x, d in outputs if d is not None]
        got = torch.autograd.grad([x for x, _ in given], (q, k, v), [d for _, d in given], retain_graph=True)
        loss = (lse64 * dlse[:, :, seen]).sum()
        if douts[0] is not None:
            loss = loss + (out64 * dout[:, seen].double()).sum()
        wanted = torch.autograd.grad(loss, exact, retain_graph=True, allow_unused=True)
        for name, x, y in zip("qkv", got, wanted, strict=True):
            if y is None:
                assert not x.any(), name
            else:
                assert relative_rms(x, y) < tolerance, name
        if causal:
            assert not got[0][:, :33].any()


def test_strided_dlse(device: torch.device, family: str) -> None:
    """An expanded gradient, as lse.sum() has, is the same as its copy."""
    q, k, v, dout = leaves(device)
    out, lse = (x.detach() for x in fa2cupy.attention(q, k, v, return_lse=True))
    q, k, v = (x.detach() for x in (q, k, v))
    results = [
        fa2cupy.attention_backward(dout, q, k, v, out, lse, dlse=dlse, deterministic=True)
        for dlse in (torch.ones_like(lse), torch.ones((), device=device).expand(lse.shape))
    ]
    none = fa2cupy.attention_backward(dout, q, k, v, out, lse, deterministic=True)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert not torch.equal(results[0][0], none[0])
    zero = fa2cupy.attention_backward(dout, q, k, v, out, lse, dlse=torch.zeros_like(lse), deterministic=True)
    assert all(torch.equal(x, y) for x, y in zip(zero, none, strict=True))


def test_what_runs(device: torch.device) -> None:
    q, k, v, dout = leaves(device)
    names = kernels_of(lambda: torch.autograd.grad(fa2cupy.attention(q, k, v, causal=True), (q, k, v), dout))
    assert attention_kernels(names) <= OURS
    assert {"flash_fwd", "flash_bwd"} <= set(names)


def test_autocast_and_float32_masters(device: torch.device) -> None:
    q, k, v, dout = leaves(device)
    masters = [x.detach().float().requires_grad_() for x in (q, k, v)]
    with torch.autocast("cuda", torch.bfloat16):
        out = fa2cupy.attention(*masters, causal=True, deterministic=True)
    plain = fa2cupy.attention(q, k, v, causal=True, deterministic=True)
    assert torch.equal(out, plain)
    for got, wanted in zip(
        torch.autograd.grad(out, masters, dout), torch.autograd.grad(plain, (q, k, v), dout), strict=True
    ):
        assert got.dtype is torch.float32 and torch.equal(got, wanted.float())


@pytest.mark.alone
def test_the_stream_of_the_forward(device: torch.device) -> None:
    """autograd runs the backward on the stream of the forward, in a thread of its own, and nothing waits."""
    q, k, v, dout = leaves(device)
    wanted = torch.autograd.grad(fa2cupy.attention(q, k, v, deterministic=True), (q, k, v), dout)
    side = torch.cuda.Stream(device)
    late = [torch.full_like(x, math.nan).requires_grad_() for x in (q, k, v)]
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            for x, y in zip(late, (q, k, v), strict=True):
                x.copy_(y)
        got = torch.autograd.grad(fa2cupy.attention(*late, deterministic=True), late, dout)
        still_queued = not side.query()
    side.synchronize()
    assert still_queued, "the call waited for the GPU"
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# CUDA graphs and compiled functions


class Block(torch.nn.Module):
    """A projection, attention and a projection back."""

    def __init__(self, heads: int = 8, head_dim: int = 64) -> None:
        super().__init__()
        self.heads, width = heads, heads * head_dim
        self.qkv, self.back = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, s, width = x.shape
        q, k, v = (y.view(b, s, self.heads, -1) for y in self.qkv(x).chunk(3, -1))
        return x + self.back(fa2cupy.attention(q, k, v, causal=True, deterministic=True).reshape(b, s, width))


def block(device: torch.device) -> tuple[Block, list[Tensor]]:
    torch.manual_seed(0)
    module = Block().to(device, torch.bfloat16)
    return module, [torch.randn(2, 256, 512, device=device, dtype=torch.bfloat16) for _ in range(4)]


def trained(module: Any, parameters: list[Tensor], x: Tensor) -> list[Tensor]:
    """out and the gradients of its square's sum."""
    out = module(x)
    return [out.detach().clone(), *(g.clone() for g in torch.autograd.grad(out.float().square().sum(), parameters))]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_training(device: torch.device, mode: str) -> None:
    module, batches = block(device)
    parameters = list(module.parameters())
    wanted = [trained(module, parameters, x) for x in batches]
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, mode=mode)
    for _ in range(3):  # warm-up, recording, replaying
        for x, right in zip(batches, wanted, strict=True):
            torch.compiler.cudagraph_mark_step_begin()
            for got, want in zip(trained(compiled, parameters, x), right, strict=True):
                torch.testing.assert_close(got, want, rtol=0.05, atol=0.05 * float(want.float().std()))
    names = attention_kernels(kernels_of(lambda: trained(compiled, parameters, batches[0])))
    assert {"flash_fwd", "flash_bwd"} <= names
    assert not any("pytorch_flash" in name or "cudnn" in name or "fmha" in name for name in names)


def test_make_graphed_callables(device: torch.device) -> None:
    module, batches = block(device)
    parameters = list(module.parameters())
    wanted = [trained(module, parameters, x) for x in batches]
    graphed = torch.cuda.make_graphed_callables(module, (batches[0].clone(),))
    for _ in range(2):
        for x, right in zip(batches, wanted, strict=True):
            for got, want in zip(trained(graphed, parameters, x), right, strict=True):
                torch.testing.assert_close(got, want, rtol=0.05, atol=0.05 * float(want.float().std()))


def test_a_training_step_in_one_graph(device: torch.device) -> None:
    """Forward and backward through autograd, captured whole and replayed with new inputs."""
    static = leaves(device)
    other = leaves(device, seed=6)

    def step(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        out, lse = fa2cupy.attention(q, k, v, causal=True, return_lse=True, deterministic=True)
        return out, lse, *torch.autograd.grad(out, (q, k, v), dout)

    right = [[x.detach().clone() for x in step(*tensors)] for tensors in (static, other)]
    first = [x.detach().clone() for x in static]
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*static)
    for turn in range(6):
        with torch.no_grad():
            for x, y in zip(static, other if turn % 2 else first, strict=True):
                x.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(captured, right[turn % 2], strict=True)), f"replay {turn}"


# ----------------------------------------------------------------------------------------------------------------------
# SDPA taken over


@pytest.fixture
def counted() -> Iterator[Callable[[], dict[tuple[str, str], int]]]:
    def rows() -> dict[tuple[str, str], int]:
        return {(row.door, row.kernel): row.calls for row in fa2cupy.report(reset=True)}

    fa2cupy.report(reset=True)
    yield rows
    disable_sdpa()


OURS_ONLY = {("torch's SDPA", "fa2cupy"): 1, ("torch's SDPA, backward", "fa2cupy"): 1}
BACKENDS = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def by_head(device: torch.device, **sizes: Any) -> list[Tensor]:
    """bhsd views of bshd leaves, and dout."""
    return [x.detach().transpose(1, 2).requires_grad_(i < 3) for i, x in enumerate(leaves(device, **sizes))]


def call_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def run_sdpa(call: Callable[..., Tensor], tensors: list[Tensor], backend: str) -> list[Tensor]:
    q, k, v, dout = tensors
    chosen = BACKENDS[backend]
    if chosen is None:
        out = call(q, k, v)
    else:
        with sdpa_kernel(chosen):
            out = call(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def close(got: list[Tensor], wanted: list[Tensor]) -> None:
    for x, y in zip(got, wanted, strict=True):
        assert relative_rms(x, y.double()) < 0.01
        assert x.stride() == y.stride()


@pytest.mark.parametrize(
    ("backend", "head_dim"), [("default", 64), ("default", 128), ("flash", 64), ("flash", 128), ("cudnn", 128)]
)
def test_sdpa_taken_over(device: torch.device, counted: Any, backend: str, head_dim: int) -> None:
    tensors = by_head(device, seqlen_q=512, seqlen_k=512, heads=(8, 8), head_dim=head_dim)
    native = run_sdpa(call_sdpa, tensors, backend)
    assert counted() == {}
    with sdpa():
        close(run_sdpa(call_sdpa, tensors, backend), native)
        assert counted() == OURS_ONLY
        names = kernels_of(lambda: run_sdpa(call_sdpa, tensors, backend))
    assert attention_kernels(names) <= OURS and {"flash_fwd", "flash_bwd"} <= set(names)
    if head_dim == 128:
        assert not attention_kernels(kernels_of(lambda: run_sdpa(call_sdpa, tensors, backend))) & OURS


@pytest.mark.parametrize(("backend", "before"), [("default", True), ("flash", True), ("cudnn", False)])
def test_sdpa_taken_over_compiled(device: torch.device, counted: Any, backend: str, before: bool) -> None:
    """Compiled with ours enabled, and compiled (and cached by Inductor) before.

    Against torch's SDPA uncompiled: compiled, torch 2.11's had wrong gradients for these strides. A cache of its own,
    since Inductor's key does not have the backend.
    """
    with fresh_cache():
        torch.compiler.reset()
        _taken_over_compiled(device, counted, backend, before)


def _taken_over_compiled(device: torch.device, counted: Any, backend: str, before: bool) -> None:
    tensors = by_head(device, seqlen_q=512, seqlen_k=512, heads=(8, 8))
    compiled = torch.compile(call_sdpa, fullgraph=True)
    native = run_sdpa(call_sdpa, tensors, backend)
    if before:
        run_sdpa(compiled, tensors, backend)
    assert counted() == {}
    enable_sdpa()
    close(run_sdpa(compiled, tensors, backend), native)
    assert counted() == OURS_ONLY
    if before:  # and from the cache on the disk, into a new function
        torch.compiler.reset()
        close(run_sdpa(torch.compile(call_sdpa, fullgraph=True), tensors, backend), native)
        assert counted() == OURS_ONLY


def test_sdpa_in_reduce_overhead(device: torch.device, counted: Any) -> None:
    torch.compiler.reset()
    tensors = by_head(device, seqlen_q=512, seqlen_k=512, heads=(8, 8))
    native = run_sdpa(call_sdpa, tensors, "default")
    with sdpa():
        compiled = torch.compile(lambda q, k, v: call_sdpa(q * 1, k, v) * 1, fullgraph=True, mode="reduce-overhead")
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            got = [x.clone() for x in run_sdpa(compiled, tensors, "default")]
    for x, y in zip(got, native, strict=True):
        assert relative_rms(x, y.double()) < 0.01


@pytest.mark.parametrize("lengths", [(256, 512), (512, 256)])
def test_sdpa_of_cudnn_with_lengths_that_differ(device: torch.device, counted: Any, lengths: tuple[int, int]) -> None:
    """Top-left aligned: ours with fewer queries, cuDNN's with more."""
    tensors = by_head(device, seqlen_q=lengths[0], seqlen_k=lengths[1], heads=(8, 8))
    try:
        native = run_sdpa(call_sdpa, tensors, "cudnn")
    except RuntimeError as error:
        pytest.skip(f"this torch does not send it to cuDNN: {error}")
    with sdpa():
        got = run_sdpa(call_sdpa, tensors, "cudnn")
    for x, y in zip(got, native, strict=True):
        assert relative_rms(x, y.double()) < 0.01
    kernels = {kernel for _, kernel in counted()}
    assert (kernels == {"fa2cupy"}) == (lengths[0] < lengths[1])


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_sdpa_with_dropout(device: torch.device, counted: Any, backend: str) -> None:
    """By torch's generator, whose seed the backward drops by; under checkpointing the same again."""
    q, k, v, dout = by_head(device, seqlen_q=512, seqlen_k=512, heads=(8, 8))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def run(*tensors: Any) -> Any:
        return functional.scaled_dot_product_attention(*tensors, dropout_p=0.25)

    torch.manual_seed(3)
    numbers = torch.randint(2**63 - 1, (2,) if backend == "flash" else (), device=device)
    seed = numbers if backend == "flash" else torch.stack([numbers, torch.zeros_like(numbers)])
    expected = fa2cupy.attention(*leaves, layout="bhsd", dropout_p=0.25, dropout_seed=seed, deterministic=True)
    wanted = torch.autograd.grad(expected, leaves, dout)
    with sdpa(), sdpa_kernel(BACKENDS[backend]):
        for again in (False, True):
            torch.manual_seed(3)
            out = checkpoint(run, *leaves, use_reentrant=False) if again else run(*leaves)
            assert torch.equal(out, expected)
            for x, y in zip(torch.autograd.grad(out, leaves, dout), wanted, strict=True):
                assert relative_rms(x, y.double()) < 1e-3
    assert {kernel for _, kernel in counted()} == {"fa2cupy"}


def test_sdpa_disabled_between_forward_and_backward(device: torch.device, counted: Any) -> None:
    for backend in ("flash", "cudnn"):
        tensors = by_head(device, seqlen_q=512, seqlen_k=512, heads=(8, 8))
        native = run_sdpa(call_sdpa, tensors, backend)
        q, k, v, dout = tensors
        with sdpa(), sdpa_kernel(BACKENDS[backend]):
            out = call_sdpa(q, k, v)
        close([out.detach(), *torch.autograd.grad(out, (q, k, v), dout)], native)
        with sdpa_kernel(BACKENDS[backend]):
            out = call_sdpa(q, k, v)
        with sdpa():
            close([out.detach(), *torch.autograd.grad(out, (q, k, v), dout)], native)


def test_torchs_own_register(device: torch.device, counted: Any) -> None:
    from torch.nn import attention

    if not hasattr(attention, "activate_flash_attention_impl"):
        pytest.skip("this torch has no register of flash attentions")
    tensors = by_head(device, seqlen_q=512, seqlen_k=512, heads=(8, 8))
    attention.activate_flash_attention_impl("fa2cupy")
    try:
        run_sdpa(call_sdpa, tensors, "flash")
    finally:
        attention.restore_flash_attention_impl()
    assert counted() == OURS_ONLY
    run_sdpa(call_sdpa, tensors, "flash")
    assert counted() == {}
