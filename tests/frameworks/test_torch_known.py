"""Calls under autograd that come again (`autograd/known.py`), on a GPU that is not there.

CPU tensors pass for CUDA's, and plans compute from the pointers that they are given. Whatever a call finds changed, it
must give what one gives to whom nothing is known.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import fa2cupy
from fa2cupy.autograd import known, launching
from fa2cupy.autograd.known import KINDS
from fa2cupy.errors import InvalidArgument
from fa2cupy.frameworks import TORCH
from fa2cupy.frameworks.base import Device
from fa2cupy.jit import driver
from fa2cupy.torch import takeover
from tests.fake_gpu import FakeGpu, gpu

__all__ = ["gpu"]

Tensors = list[torch.Tensor]


class World:
    """long: the operations that went the long way. memory: what workspaces were given, and not given back."""

    def __init__(self, fake: FakeGpu) -> None:
        self.gpu, self.long = fake, []
        self.device = 0
        self.memory: dict[int, Any] = {}
        self.allocated: list[tuple[int, int]] = []

    def allocate(self, size: int, stream: int) -> int:
        self.allocated.append((size, stream))
        block = (ctypes.c_char * (size + 512))()
        address = -(-ctypes.addressof(block) // 512) * 512
        self.memory[address] = block
        return address

    def free(self, address: int) -> None:
        del self.memory[address]

    def tools(self, **changed: Any) -> known._Tools:
        guards = torch._C._dynamo.guards
        tools = known._Tools(
            lambda: self.device, lambda index: self.gpu.stream, guards._empty_strided_cpu, self.allocate, self.free,
            guards.TensorGuards,
        )  # fmt: skip
        return tools._replace(**changed)

    def went(self, long: list[str], function: Callable[[], Any]) -> Any:
        """What a function returns, in which these passes, and no others, go the long way."""
        self.long.clear()
        results = function()
        assert self.long == long
        return results


@pytest.fixture
def world(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World(gpu)
    gpu.current, gpu.stream = 0, 7
    real = launching.call

    def call(operation: Any, *arguments: Any) -> Any:
        world.long.append("backward" if operation.is_backward else "forward")
        return real(operation, *arguments)

    monkeypatch.setattr(launching, "call", call)
    monkeypatch.setattr(takeover, "call", call)
    monkeypatch.setattr(type(TORCH), "device", lambda self, array, argument: Device("cuda", 0))
    monkeypatch.setattr(type(TORCH), "stream", lambda self, index: lambda index: gpu.stream)
    monkeypatch.setattr(driver, "device_guard", gpu.guard)
    tools = world.tools()
    monkeypatch.setattr(known, "torch_tools", lambda: tools)
    KINDS.clear()
    yield world
    KINDS.clear()
    assert not world.memory


def make(seed: int = 0, seqlen: int = 6, dtype: torch.dtype = torch.float16) -> tuple[Tensors, torch.Tensor]:
    """q, k, v that require grad, and dout."""
    generator = torch.Generator().manual_seed(seed)
    *qkv, dout = (torch.randn(2, seqlen, heads, 8, generator=generator).to(dtype) for heads in (4, 2, 2, 4))
    return [x.requires_grad_() for x in qkv], dout


def gradients(qkv: Tensors, dout: torch.Tensor, **keywords: Any) -> tuple[torch.Tensor, ...]:
    """out and what torch.autograd.grad gives for it."""
    out = fa2cupy.attention(*qkv, **{"causal": True, **keywords})
    return out.detach(), *torch.autograd.grad(out, [x for x in qkv if x.requires_grad], dout)


def unknown(monkeypatch: pytest.MonkeyPatch, function: Callable[[], Any]) -> Any:
    """What a function returns where nothing is known."""
    with monkeypatch.context() as patch:
        patch.setattr(known, "KINDS", known._Kinds())
        patch.setattr("fa2cupy.autograd.function.KINDS", known._Kinds())
        patch.setattr(takeover, "KINDS", known._Kinds())
        patch.setattr(known, "torch_tools", lambda: None)
        return function()


BOTH = ["forward", "backward"]


def test_what_came_before_goes_the_short_way(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.went(BOTH, lambda: gradients(*make()))
    for seed in (1, 2):
        got = world.went([], lambda seed=seed: gradients(*make(seed)))
        wanted = unknown(monkeypatch, lambda seed=seed: gradients(*make(seed)))
        assert all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(got, wanted, strict=True))
    qkv, dout = make(1)
    exact = [x.detach().float().transpose(1, 2).requires_grad_() for x in qkv]
    out = torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    for x, y in zip(
        gradients(qkv, dout), (out, *torch.autograd.grad(out, exact, dout.float().transpose(1, 2))), strict=True
    ):
        assert_close(x.float(), y.transpose(1, 2), rtol=0.02, atol=0.02)
    assert world.allocated == [(world.gpu.workspace_bytes, 7)] * 3
    assert [launch.stream for launch in world.gpu.launches] == [7] * len(world.gpu.launches)


def test_with_lse(world: World) -> None:
    """lse is an output then, which autograd hands back as one that requires grad; its gradient goes the long way."""
    wanted = gradients(*make(1))
    qkv, dout = make(1)
    for long in (["backward"], []):
        out, lse = world.went([], lambda: fa2cupy.attention(*qkv, causal=True, return_lse=True))
        assert lse.grad_fn is out.grad_fn and (lse.dtype, lse.shape) == (torch.float32, (2, 4, 6))
        of_out = world.went(long, lambda out=out: torch.autograd.grad(out, qkv, dout, retain_graph=True))
        douts = dout, torch.zeros_like(lse)
        both = world.went(["backward"], lambda x=(out, lse), douts=douts: torch.autograd.grad(x, qkv, douts))
        for x, y, z in zip(of_out, both, wanted[1:], strict=True):
            assert torch.equal(x, z) and torch.equal(y, z)


def test_lse_is_an_output_only_if_it_is_asked_for(world: World) -> None:
    for _ in range(2):
        assert len(fa2cupy.attention(*make()[0]).grad_fn._input_metadata) == 1
        assert len(fa2cupy.attention(*make()[0], return_lse=True)[0].grad_fn._input_metadata) == 2


def _strides(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _unaligned(x: torch.Tensor) -> torch.Tensor:
    block = torch.empty(x.numel() + 1, dtype=x.dtype)
    return block[1:].view(x.shape).copy_(x)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize("change", [_strides, _unaligned, _rows], ids=["strides", "unaligned", "rows"])
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("swapped", [False, True])
def test_tensors_that_are_not_alike(
    world: World, monkeypatch: pytest.MonkeyPatch, change: Any, which: int, swapped: bool
) -> None:
    """New ones, or the memory of an old one swapped between forward and backward."""
    gradients(*make())
    for _ in range(2):  # the second time they may be known

        def call() -> Any:
            qkv, dout = make(3)
            tensors = [*qkv, dout]
            if swapped:
                out = fa2cupy.attention(*qkv, causal=True)
            with torch.no_grad():
                tensors[which].data = change(tensors[which].detach())
            out = out if swapped else fa2cupy.attention(*qkv, causal=True)
            return out.detach(), *torch.autograd.grad(out, qkv, dout)

        assert all(torch.equal(x, y) for x, y in zip(call(), unknown(monkeypatch, call), strict=True))


def test_data_of_other_values(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses are asked anew: the backward takes what .data is then, as one does that nothing is known of."""
    gradients(*make())

    def call() -> Any:
        qkv, dout = make(3)
        out = fa2cupy.attention(*qkv, causal=True)
        qkv[1].data = 2 * qkv[1].data
        return torch.autograd.grad(out, qkv, dout)

    got = world.went([], call)
    assert all(torch.equal(x, y) for x, y in zip(got, unknown(monkeypatch, call), strict=True))


def test_dtypes_and_lengths_have_kinds_of_their_own(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [make(4, seqlen, dtype) for seqlen in (6, 5) for dtype in (torch.float16, torch.bfloat16)]
    for case in cases:
        world.went(BOTH, lambda case=case: gradients(*case))
    for case in cases:
        got = world.went([], lambda case=case: gradients(*case))
        wanted = unknown(monkeypatch, lambda case=case: gradients(*case))
        assert all(torch.equal(x, y) and x.dtype is y.dtype for x, y in zip(got, wanted, strict=True))


def test_who_requires_grad(world: World) -> None:
    gradients(*make())
    qkv, dout = make(1)
    wanted = gradients(qkv, dout)
    for i in range(3):
        some = [x.detach().requires_grad_(i == j) for j, x in enumerate(qkv)]
        for long in (BOTH, []):
            got = world.went(long, lambda some=some: gradients(some, dout))
            assert torch.equal(got[1], wanted[1 + i])


def test_options_have_kinds_of_their_own(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make()
    every = ({}, {"causal": False}, {"softmax_scale": 0.5}, {"softmax_scale": 1.0}, {"deterministic": True})
    for keywords in every:
        world.went(BOTH, lambda keywords=keywords: gradients(*case, **keywords))
    for keywords in every:
        got = world.went([], lambda keywords=keywords: gradients(*case, **keywords))
        wanted = unknown(monkeypatch, lambda keywords=keywords: gradients(*case, **keywords))
        assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
    for keywords, match in (
        ({"causal": 1}, "causal=1"), ({"softmax_scale": True}, "softmax_scale=True"), ({"layout": ["bshd"]}, "layout"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=match):
            gradients(*case, **keywords)


def test_the_deterministic_switch_is_asked_at_each_backward(world: World) -> None:
    qkv, dout = make()
    for long in (["forward", "backward", "backward"], []):

        def call() -> list[bool]:
            out = fa2cupy.attention(*qkv, causal=True)
            seen = []
            for switch in (False, True):
                torch.use_deterministic_algorithms(switch)
                try:
                    torch.autograd.grad(out, qkv, dout, retain_graph=True)
                finally:
                    torch.use_deterministic_algorithms(False)
                seen.append(world.gpu.last.deterministic)
            return seen

        assert world.went(long, call) == [False, True]


def test_hooks_on_saved_tensors(world: World) -> None:
    wanted = gradients(*make(1))
    qkv, dout = make(1)
    packed: Tensors = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (packed.append(x), x.clone())[1], _strides_of_four):
        out = fa2cupy.attention(*qkv, causal=True)
    assert len(packed) == 5
    for x, y in zip(torch.autograd.grad(out, qkv, dout), wanted[1:], strict=True):
        assert torch.equal(x, y)


def _strides_of_four(x: torch.Tensor) -> torch.Tensor:
    return _strides(x) if x.dim() == 4 else x


def test_changed_in_place(world: World) -> None:
    gradients(*make())
    qkv, dout = make(1)
    out = fa2cupy.attention(*qkv, causal=True)
    with torch.no_grad():
        qkv[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, qkv, dout)


@pytest.mark.parametrize("which", range(4))
def test_freed_storages(world: World, which: int) -> None:
    """As FSDP frees them."""
    gradients(*make())
    qkv, dout = make(1)
    out = fa2cupy.attention(*qkv, causal=True)
    tensors = [*qkv, dout]
    tensors[which].untyped_storage().resize_(0)
    with pytest.raises(InvalidArgument, match="has no memory"):
        torch.autograd.grad(out, qkv, dout)
    if which < 3:
        with pytest.raises(InvalidArgument, match=f"{'qkv'[which]} has no memory"):
            fa2cupy.attention(*qkv, causal=True)


def test_another_current_device(world: World) -> None:
    """What allocates on the current device is not asked then."""
    wanted = gradients(*make(1))
    world.device = 1
    got = world.went(BOTH, lambda: gradients(*make(1)))
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


def test_one_tensor_three_times(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards want different tensors: never known, and soon nothing is learned any more."""
    q, dout = torch.randn(2, 6, 2, 8).half().requires_grad_(), torch.randn(2, 6, 2, 8).half()
    wanted = unknown(monkeypatch, lambda: gradients([q] * 3, dout))
    made: list[int] = []
    guards = torch._C._dynamo.guards.TensorGuards
    tools = world.tools(guards=lambda *x, **y: (made.append(1), guards(*x, **y))[1])
    monkeypatch.setattr(known, "torch_tools", lambda: tools)
    for _ in range(40):
        got = world.went(BOTH, lambda: gradients([q] * 3, dout))
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
    assert 0 < len(made) < 20


def test_expanded_gradients_are_copied(world: World) -> None:
    """Those of sum(); the next contiguous one is learned from all the same."""
    qkv, dout = make()
    wanted = gradients(qkv, torch.ones_like(dout))
    for seed in range(6):
        some, _ = make(0 if seed == 5 else seed)
        out = fa2cupy.attention(*some, causal=True)
        got = world.went(["backward"], lambda out=out, some=some: torch.autograd.grad(out.sum(), some))
    assert all(torch.equal(x, y) for x, y in zip(got, wanted[1:], strict=True))
    world.went([], lambda: gradients(qkv, dout))


def test_whoever_watches_is_shown_an_operator(world: World) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    gradients(*make())
    qkv, dout = make(1)
    out = fa2cupy.attention(*qkv, causal=True)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out, qkv, dout, retain_graph=True)
    assert list(counter.get_flop_counts()["Global"]) == [torch.ops.fa2cupy.backward]
    (dq,) = torch.autograd.grad(out, qkv[0], dout, create_graph=True)
    with pytest.raises(InvalidArgument, match="no double backward"):
        dq.sum().backward()


def test_batched_gradients(world: World) -> None:
    gradients(*make())
    qkv, dout = make(1)
    out = fa2cupy.attention(*qkv, causal=True)
    batched = torch.autograd.grad(out, qkv, torch.stack([dout, 2 * dout]), is_grads_batched=True, retain_graph=True)
    for x, y in zip(batched, torch.autograd.grad(out, qkv, dout), strict=True):
        assert_close(x[0], y, rtol=1e-3, atol=1e-3)


def test_a_workspace_is_given_back_when_a_launch_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients(*make())
    qkv, dout = make(1)
    out = fa2cupy.attention(*qkv, causal=True)

    def fails(self: Any) -> None:
        raise RuntimeError("no launch")

    monkeypatch.setattr("tests.fake_gpu.Launch.run", fails)
    with pytest.raises(RuntimeError, match="no launch"):
        world.went([], lambda: torch.autograd.grad(out, qkv, dout))
    assert world.allocated and not world.memory


def test_no_workspace(world: World) -> None:
    world.gpu.workspace_bytes = 0
    world.went(BOTH, lambda: gradients(*make()))
    world.went([], lambda: gradients(*make()))
    assert world.gpu.last.pointers["workspace"] == 0 and not world.allocated


@pytest.mark.parametrize("ignored", ["shape", "stride", "dtype", "type", "device", "is_neg", "is_inference", None])
def test_guards_that_do_not_tell_all_are_not_used(world: World, ignored: str | None) -> None:
    class Guards:
        def __init__(self, *tensors: torch.Tensor, **keywords: Any) -> None:
            self.seen = [self.of(x) for x in tensors]

        def of(self, x: torch.Tensor) -> dict[str, Any]:
            seen = {
                "shape": x.shape, "stride": x.stride(), "dtype": x.dtype, "type": type(x), "device": x.device,
                "is_neg": x.is_neg(), "is_inference": torch.is_inference_mode_enabled(),
            }  # fmt: skip
            return {name: value for name, value in seen.items() if name != ignored}

        def check(self, *tensors: torch.Tensor) -> bool:
            return [self.of(x) for x in tensors] == self.seen

    assert known.guards_tell_all(world.tools(guards=Guards)) == (ignored is None)
    assert not known.guards_tell_all(world.tools(guards=lambda *x, **y: SimpleNamespace(check=lambda *x: False)))
    assert not known.guards_tell_all(world.tools(guards=None))


@pytest.mark.parametrize("inference", [False, True])
def test_torchs_guards_tell_all(world: World, inference: bool) -> None:
    with torch.inference_mode(inference), torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        assert known.guards_tell_all(world.tools())


def test_a_torch_that_lacks_something(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("_cuda_getDevice", "_cuda_getCurrentRawStream", *(f"_cuda_cudaCachingAllocator_raw_{x}" for x in _MEMORY))
    for name in names:
        monkeypatch.setattr(torch._C, name, lambda *arguments: 0, raising=False)
    assert known.torch_tools.__wrapped__() is not None
    for name in names:
        with monkeypatch.context() as patch:
            patch.delattr(torch._C, name)
            assert known.torch_tools.__wrapped__() is None


_MEMORY = ("alloc", "delete")


def test_kinds_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "_MAX_KINDS", 3)
    kinds = known._Kinds()
    made = [kinds[number] for number in range(5)]
    assert len(kinds) == 3 and kinds[4] is made[4] and kinds[0] is not made[0]


# ----------------------------------------------------------------------------------------------------------------------
# SDPA taken over


def taken(name: str, seed: int, layout: str, causal: bool = True, scale: float | None = None, seqlen_k: int = 6) -> Any:
    """The results of our two kernels for SDPA's operators of this name, the backward's after the forward's."""
    generator = torch.Generator().manual_seed(seed)
    lengths = ((4, 6), (2, seqlen_k), (2, seqlen_k), (4, 6))
    tensors = [torch.randn(2, heads, length, 8, generator=generator).half() for heads, length in lengths]
    q, k, v, dout = (_strides(x) if layout == "bshd" else x for x in tensors)

    def native(why: str, *arguments: Any, **keywords: Any) -> Any:
        raise AssertionError(why)

    operators = takeover._OPERATORS["cuda"]
    forward, backward = (operators[f"_scaled_dot_product_{name}_attention{end}"](native) for end in ("", "_backward"))
    if name == "flash":
        results = forward(None, q, k, v, 0.0, causal, False, scale=scale)
        out, lse, cum_q, cum_k, max_q, max_k, seed_, offset, _ = results
        rest = cum_q, cum_k, max_q, max_k, 0.0, causal, seed_, offset
    else:
        results = forward(None, q, k, v, None, True, 0.0, causal, False, scale=scale)
        out, lse, cum_q, cum_k, max_q, max_k, seed_, offset, _ = results
        rest = seed_, offset, None, cum_q, cum_k, max_q, max_k, 0.0, causal
    return *results, *backward(None, dout, q, k, v, out, lse, *rest, scale=scale)


def alike(got: Any, wanted: Any) -> None:
    """Seed, offset and the mask have no values."""
    for i, (x, y) in enumerate(zip(got, wanted, strict=True)):
        if isinstance(y, torch.Tensor):
            assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
            assert i in (6, 7, 8) or torch.equal(x, y)
        else:
            assert x == y


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("name", ["flash", "cudnn"])
def test_taken_over(world: World, monkeypatch: pytest.MonkeyPatch, name: str, layout: str) -> None:
    every: tuple[dict[str, Any], ...] = ({}, {"causal": False}, {"scale": 0.5}, {"scale": 1.0})
    for keywords in every:
        world.went(BOTH, lambda keywords=keywords: taken(name, 1, layout, **keywords))
    fa2cupy.report(reset=True)
    for keywords in every:
        got = world.went([], lambda keywords=keywords: taken(name, 2, layout, **keywords))
        alike(got, unknown(monkeypatch, lambda keywords=keywords: taken(name, 2, layout, **keywords)))
    rows = {(row.door, row.kernel): row.calls for row in fa2cupy.report(reset=True)}
    assert rows == {("torch's SDPA", "fa2cupy"): 8, ("torch's SDPA, backward", "fa2cupy"): 8}
    other = "bhsd" if layout == "bshd" else "bshd"
    alike(taken(name, 2, other), unknown(monkeypatch, lambda: taken(name, 2, other)))


def test_keys_that_are_cut_off_go_the_long_way(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's causal is aligned top-left; flash attention's is not, and knows calls like this."""
    for _ in range(2):
        got = world.went(BOTH, lambda: taken("cudnn", 3, "bhsd", seqlen_k=9))
    alike(got, unknown(monkeypatch, lambda: taken("cudnn", 3, "bhsd", seqlen_k=9)))
    taken("flash", 3, "bhsd", seqlen_k=9)
    got = world.went([], lambda: taken("flash", 4, "bhsd", seqlen_k=9))
    alike(got, unknown(monkeypatch, lambda: taken("flash", 4, "bhsd", seqlen_k=9)))


def test_taken_over_with_the_deterministic_switch(world: World) -> None:
    for long in (BOTH, []):
        for switch in (False, True):
            torch.use_deterministic_algorithms(switch)
            try:
                passes = long if not switch else long[1:]
                world.went(passes, lambda: taken("flash", 5, "bhsd"))
            finally:
                torch.use_deterministic_algorithms(False)
            assert world.gpu.last.deterministic is switch
