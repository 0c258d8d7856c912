"""torch tensors: on the CPU for real, and CPU tensors that pose as CUDA tensors for the way to a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fa2cupy
from fa2cupy.autograd import known
from fa2cupy.errors import InvalidArgument, InvalidType, UnsupportedDevice
from fa2cupy.frameworks import TORCH, framework_of
from fa2cupy.frameworks.base import Device
from fa2cupy.prepared import PREPARED
from fa2cupy.torch import takeover
from tests.fake_gpu import FakeGpu, cupy_array
from tests.reference import Inputs, expect, make_inputs

NAMES = ("q", "k", "v", "dout")


def to_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def swap(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2)


def both(x: Inputs, layout: str = "bshd", **keywords: Any) -> dict[str, torch.Tensor]:
    """Forward and backward of bshd tensors, results in bshd."""
    turn = swap if layout == "bhsd" else (lambda tensor: tensor)
    q, k, v, dout = (turn(tensor) for tensor in x)
    out, lse = fa2cupy.attention(q, k, v, layout=layout, return_lse=True, **keywords)
    dq, dk, dv = fa2cupy.attention_backward(dout, q, k, v, out, lse, layout=layout, **keywords)
    return {"out": turn(out), "lse": lse, "dq": turn(dq), "dk": turn(dk), "dv": turn(dv)}


def inputs(seed: int, dtype: str, **keywords: Any) -> tuple[Inputs, Inputs]:
    stored = make_inputs(seed, 5, 7, dtype=dtype, heads=(4, 2), head_dim=16, **keywords)
    return stored, Inputs(*map(to_torch, stored))


# ----------------------------------------------------------------------------------------------------------------------
# On the CPU


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("causal", [False, True])
def test_cpu(dtype: str, layout: str, causal: bool) -> None:
    stored, x = inputs(1, dtype)
    results = both(x, layout, causal=causal)
    for name, tensor in results.items():
        assert type(tensor) is torch.Tensor
        expected = x.q.dtype if name != "lse" else torch.float64 if dtype == "float64" else torch.float32
        assert tensor.dtype is expected
    expect(*stored, causal=causal).check(**results)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_cpu_head_dim_of_v(layout: str) -> None:
    stored, x = inputs(1, "bfloat16", head_dim_v=24)
    expect(*stored, causal=True).check(**both(x, layout, causal=True))


def test_uint16_tensors() -> None:
    _, x = inputs(2, "bfloat16")
    bits = Inputs(*(tensor.view(torch.uint16) for tensor in x))
    results = both(bits, dtype="bfloat16")
    named = both(x)
    for name, tensor in results.items():
        assert tensor.dtype is (torch.float32 if name == "lse" else torch.uint16)
        assert torch.equal(tensor.view(named[name].dtype), named[name])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_cpu_outputs_are_written_where_asked(dtype: str) -> None:
    stored, x = inputs(3, dtype)
    packed = torch.full((2, 5, 8, 16), torch.nan, dtype=x.q.dtype)
    out, dq = packed[:, :, ::2], packed[:, :, 1::2]
    dk, dv = torch.empty_like(x.k), torch.empty_like(x.v)
    lse = torch.empty(2, 4, 5)
    assert fa2cupy.attention(x.q, x.k, x.v, out=out, lse_out=lse) is out
    got = fa2cupy.attention_backward(x.dout, x.q, x.k, x.v, out, lse, dq=dq, dk=dk, dv=dv)
    assert all(a is b for a, b in zip(got, (dq, dk, dv), strict=True))
    expect(*stored).check(out=out, lse=lse, dq=dq, dk=dk, dv=dv)


def test_autograd_notices_what_was_written() -> None:
    _, x = inputs(18, "float32")
    out = torch.zeros_like(x.q)
    weight = torch.ones_like(out).requires_grad_()
    loss = (out * weight).sum()  # saves out
    version = out._version
    fa2cupy.attention(x.q, x.k, x.v, out=out)
    assert out._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        fa2cupy.attention(x.q, x.k, x.v, out=torch.zeros_like(x.q))


def test_cpu_strides() -> None:
    stored, x = inputs(4, "float32")
    scattered = []
    for tensor in x:
        b, s, h, d = tensor.shape
        memory = torch.full((s, b, h + 1, 2 * d), torch.nan)
        view = memory.transpose(0, 1)[:, :, :h, ::2]
        view.copy_(tensor)
        scattered.append(view)
    expect(*stored).check(**both(Inputs(*scattered)))
    expanded = x.k[:, :1, :1].expand(x.k.shape)
    assert torch.equal(fa2cupy.attention(x.q, expanded, expanded), fa2cupy.attention(x.q, *2 * [expanded.clone()]))


def test_parameters_under_no_grad() -> None:
    _, x = inputs(5, "float32")
    parameter = torch.nn.Parameter(x.q)
    with torch.no_grad():
        out = fa2cupy.attention(parameter, x.k, x.v)
    assert type(out) is torch.Tensor and not out.requires_grad
    assert torch.equal(out, fa2cupy.attention(x.q, x.k, x.v))
    with torch.inference_mode():
        assert torch.equal(out, fa2cupy.attention(parameter, x.k, x.v))


def test_subclasses_without_tricks() -> None:
    class Subclass(torch.Tensor):
        pass

    _, x = inputs(6, "float32")
    out = fa2cupy.attention(x.q.as_subclass(Subclass), x.k, x.v)
    assert torch.equal(out.as_subclass(torch.Tensor), fa2cupy.attention(x.q, x.k, x.v))


# ----------------------------------------------------------------------------------------------------------------------
# Errors


def fails(kind: type[Exception], *words: str, call: Callable[..., Any] = fa2cupy.attention, **arguments: Any) -> None:
    with pytest.raises(kind) as caught:
        call(**arguments)
    for word in words:
        assert word in str(caught.value), f"{word!r} not in: {caught.value}"


@pytest.mark.parametrize("name", ["dout", "q", "k", "v", "out", "dq"])
def test_requires_grad_in_the_backward(name: str) -> None:
    _, x = inputs(9, "float32")
    out, lse = fa2cupy.attention(x.q, x.k, x.v, return_lse=True)
    arguments = {"dout": x.dout, "q": x.q, "k": x.k, "v": x.v, "out": out, "lse": lse, "dq": torch.empty_like(x.q)}
    arguments[name] = arguments[name].clone().requires_grad_()
    fails(InvalidArgument, f"{name} requires grad", "torch.no_grad()", call=fa2cupy.attention_backward, **arguments)
    with torch.no_grad():
        fa2cupy.attention_backward(**arguments)


def test_forward_mode_autograd_of_the_backward() -> None:
    _, x = inputs(10, "float32")
    out, lse = fa2cupy.attention(x.q, x.k, x.v, return_lse=True)
    with torch.autograd.forward_ad.dual_level():
        q = torch.autograd.forward_ad.make_dual(x.q, x.q)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                arguments = {"dout": x.dout, "q": q, "k": x.k, "v": x.v, "out": out, "lse": lse}
                fails(InvalidArgument, "q has a tangent", call=fa2cupy.attention_backward, **arguments)


def test_tensors_without_memory() -> None:
    q = torch.zeros(2, 5, 4, 16)
    with FakeTensorMode():
        fake = torch.zeros(2, 5, 4, 16)
        fails(InvalidType, "q is a FakeTensor", q=fake, k=fake, v=fake, out=fake)
    fails(InvalidType, "k is a FakeTensor", q=q, k=fake, v=q, out=torch.empty_like(q))
    with pytest.raises(InvalidType, match=r"q is a torch\.Tensor without memory of its own"):
        torch.func.vmap(lambda x: fa2cupy.attention(x, x, x, out=torch.empty(1, 5, 4, 16)))(q[:, None])


def test_wrappers() -> None:
    class Wrapper(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

    q = torch.zeros(2, 5, 4, 16)
    wrapper = torch.Tensor._make_wrapper_subclass(Wrapper, q.shape)
    fails(InvalidType, "Wrapper", "pass a torch.Tensor", q=wrapper, k=q, v=q, out=torch.empty_like(q))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_other_layouts_and_devices() -> None:
    q = torch.zeros(2, 5, 4, 16)
    fails(InvalidType, "q has layout torch.sparse_coo", "torch.strided", q=q.to_sparse(), k=q, v=q)
    nested = torch.nested.nested_tensor([q[0], q[1]])
    fails(InvalidType, "q is a nested tensor", q=nested, k=q, v=q)
    meta = q.to("meta")
    fails(UnsupportedDevice, "q is on device meta", "'cuda' and 'cpu'", q=meta, k=meta, v=meta, out=meta)
    negated = torch.view_as_complex(torch.zeros(2, 5, 4, 16, 2)).conj().imag
    fails(InvalidType, "q is a lazily negated view", "q.resolve_neg()", q=negated, k=q, v=q)


def test_dtypes_and_frameworks() -> None:
    q = torch.zeros(2, 5, 4, 16)
    for dtype in (torch.int32, torch.float8_e4m3fn, torch.complex64, torch.bool):
        other = q.to(dtype)
        fails(InvalidType, f"q has dtype {str(dtype)[6:]}", "float16, bfloat16", q=other, k=other, v=other)
    fails(InvalidType, "k is a numpy.ndarray but q is a torch.Tensor", q=q, k=q.numpy(), v=q)
    fails(
        InvalidType, "v is a cupy.ndarray but q is a torch.Tensor", q=q, k=q, v=cupy_array(tuple(q.shape), np.float32)
    )
    fails(InvalidType, "out is a numpy.ndarray", q=q, k=q, v=q, out=q.numpy())
    fails(
        InvalidType, "softmax_scale is a torch.Tensor", "Python number", q=q, k=q, v=q, softmax_scale=torch.tensor(0.5)
    )
    fails(InvalidType, "causal", "True or False", q=q, k=q, v=q, causal=torch.tensor(True))


def test_overlap() -> None:
    q = torch.zeros(2, 6, 4, 16)
    fails(InvalidArgument, "out shares memory with q", q=q[:, :5], k=q, v=q, out=q[:, 1:])
    expanded = torch.zeros(1, 1, 4, 16).expand(2, 6, 4, 16)
    fails(InvalidArgument, "out has strides", "twice", q=q, k=q, v=q, out=expanded)
    fails(InvalidArgument, "dtype=", "uint16", q=q, k=q, v=q, dtype="bfloat16")


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU: CPU tensors that say that they are on cuda:1


@pytest.fixture
def cuda(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    monkeypatch.setattr(TORCH, "device", lambda tensor, argument: Device("cuda", 1))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: gpu.stream + index, raising=False)
    monkeypatch.setattr(known, "torch_tools", lambda: None)  # a torch with CUDA would allocate on a real GPU
    return gpu


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_gpu(cuda: FakeGpu, dtype: str, layout: str) -> None:
    stored, x = inputs(11, dtype)
    cuda.stream = 0x1000
    for _ in range(2):
        results = both(x, layout, causal=True)
        expect(*stored, causal=True).check(**results)
        assert all(tensor.dtype is x.q.dtype for name, tensor in results.items() if name != "lse")
        assert (cuda.last.stream, cuda.last.device, cuda.last.current_device) == (0x1001, 1, 1)
        assert cuda.last.problem.dtype == dtype
    assert (len(cuda.plans), len(cuda.launches)) == (2, 4)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_gpu_sdpa_taken_over(cuda: FakeGpu, layout: str) -> None:
    """New outputs lie in memory as the operator's inputs do, without a copy."""
    stored, x = inputs(13, "float16")
    q, k, v, dout = (tensor.transpose(1, 2) for tensor in (x.q, x.k, x.v, x.dout))
    if layout == "bhsd":
        q, k, v, dout = (tensor.contiguous() for tensor in (q, k, v, dout))
    for _ in range(2):
        out, lse = takeover._forward(q, k, v, True, None)
        results = out, *takeover._backward(dout, q, k, v, out, lse, True, None)
        for made, like in zip(results, (dout, q, k, v), strict=True):
            assert (made.shape, made.stride()) == (like.shape, torch.empty_like(like).stride())
        named = {name: made.transpose(1, 2) for name, made in zip(("out", "dq", "dk", "dv"), results, strict=True)}
        expect(*stored, causal=True).check(lse=lse, **named)
    assert dict(cuda.plans[0].problem.strides)["out"] == dict(cuda.plans[1].problem.strides)["dout"]
    assert (len(cuda.plans), len(cuda.launches)) == (2, 4)


def test_gpu_uint16(cuda: FakeGpu) -> None:
    stored, x = inputs(12, "bfloat16")
    results = both(Inputs(*(tensor.view(torch.uint16) for tensor in x)), dtype="bfloat16")
    named = {name: tensor if name == "lse" else tensor.view(torch.bfloat16) for name, tensor in results.items()}
    expect(*stored).check(**named)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_gpu_in_a_compiled_function(cuda: FakeGpu, backend: str) -> None:
    stored, x = inputs(17, "float16")
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, k, v: fa2cupy.attention(q + 0, k, v, causal=True) + 0, backend=backend, fullgraph=True
    )
    for _ in range(3):
        expect(*stored[:3], causal=True).check(out=compiled(*x[:3]))
    other = [tensor.clone().requires_grad_() for tensor in x[:3]]
    out = compiled(*other)
    dq, dk, dv = torch.autograd.grad(out, other, x.dout)
    expect(*stored, causal=True).check(out=out, dq=dq, dk=dk, dv=dv)
    assert len(cuda.launches) == 5


def test_gpu_with_grad(cuda: FakeGpu) -> None:
    """Allocated and launched as `attention` and `attention_backward` do, the plans made once."""
    stored, x = inputs(19, "bfloat16")
    cuda.stream = 0x2000
    q, k, v = (tensor.clone().requires_grad_() for tensor in x[:3])
    for _ in range(2):
        out, lse = fa2cupy.attention(q, k, v, causal=True, return_lse=True)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), x.dout)
        expect(*stored, causal=True).check(out=out, lse=lse, dq=dq, dk=dk, dv=dv)
        assert (cuda.last.stream, cuda.last.device, cuda.last.deterministic) == (0x2001, 1, False)
    assert (len(cuda.plans), len(cuda.launches)) == (2, 4)
    with torch.no_grad():
        fa2cupy.attention(q, k, v, causal=True, return_lse=True)
    assert len(cuda.plans) == 2
    torch.use_deterministic_algorithms(True)
    try:
        fa2cupy.attention(q, k, v, causal=True).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert cuda.last.deterministic is True


def test_gpu_grad_is_checked_at_every_call(cuda: FakeGpu) -> None:
    _, x = inputs(13, "float16")
    with torch.no_grad():
        fa2cupy.attention(x.q, x.k, x.v)
    launches = len(cuda.launches)
    x.v.requires_grad_()
    out = torch.empty_like(x.q)
    fails(InvalidArgument, "v requires grad", q=x.q, k=x.k, v=x.v, out=out)
    assert len(cuda.launches) == launches
    with torch.no_grad():
        fa2cupy.attention(x.q, x.k, x.v, out=out)
    fails(InvalidArgument, "v requires grad", q=x.q, k=x.k, v=x.v, out=out)
    assert fa2cupy.attention(x.q, x.k, x.v).requires_grad


def test_gpu_variants_are_right_in_any_order(cuda: FakeGpu) -> None:
    """Whatever a plan depends on is in the signature."""
    stored, x = inputs(14, "float16")
    cases: list[dict[str, Any]] = [{}]
    for name in ("q", "k", "v"):
        tensor = getattr(x, name)
        b, s, h, d = tensor.shape
        gaps = torch.empty(b, s, h, d + 3, dtype=tensor.dtype)[..., :d].copy_(tensor)
        turned = tensor.transpose(1, 2).contiguous().transpose(1, 2)
        shifted = torch.empty(tensor.numel() + 8, dtype=tensor.dtype)[1 : 1 + tensor.numel()].view(tensor.shape)
        strided = torch.empty(b, s, h, 2 * d, dtype=tensor.dtype)[..., ::2].copy_(tensor)
        cases += [{name: other} for other in (gaps, turned, shifted.copy_(tensor), strided)]
    cases += [
        {"causal": True},
        {"softmax_scale": 0.5},
        {"lse_out": torch.empty(2, 4, 9)[..., :5]},
        {"lse_out": torch.empty(4, 2, 5).transpose(0, 1)},
        {"out": torch.empty(2, 4, 5, 16, dtype=torch.float16).transpose(1, 2)},
    ]
    for index in np.random.default_rng(0).permutation(np.repeat(np.arange(len(cases)), 3)):
        case = {"q": x.q, "k": x.k, "v": x.v, **cases[index]}
        out, lse = fa2cupy.attention(return_lse=True, **case)
        options = {"causal": case.get("causal", False), "scale": case.get("softmax_scale")}
        expect(*stored[:3], **options).check(out=out, lse=lse)
        assert out.is_contiguous() or out is case.get("out")


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_gpu_types_are_told_apart(cuda: FakeGpu) -> None:
    """A prepared call for tensors does not run for what only looks like one."""
    _, x = inputs(15, "float16")
    fa2cupy.attention(x.q, x.k, x.v)
    with FakeTensorMode():
        fake = torch.empty(x.k.shape, dtype=x.k.dtype)
    fails(InvalidType, "k is a FakeTensor", q=x.q, k=fake, v=x.v, out=torch.empty_like(x.q))
    fails(InvalidType, "k is a numpy.ndarray", q=x.q, k=x.k.numpy(), v=x.v)
    with torch.no_grad():
        out = fa2cupy.attention(torch.nn.Parameter(x.q), x.k, torch.nn.Parameter(x.v))
    assert type(out) is torch.Tensor
    assert len(cuda.launches) == 2
    assert (len(cuda.plans), len(PREPARED)) == (1, 2)


def test_gpu_workspace(cuda: FakeGpu) -> None:
    _, x = inputs(16, "float16")
    out, lse = fa2cupy.attention(x.q, x.k, x.v, return_lse=True)
    size = fa2cupy.backward_workspace_bytes(x.q, x.k, x.v)
    memory = torch.empty(size + 512, dtype=torch.uint8)
    start = -memory.data_ptr() % 256
    workspace = memory[start : start + size]
    fa2cupy.attention_backward(x.dout, x.q, x.k, x.v, out, lse, workspace=workspace)
    assert cuda.last.pointers["workspace"] == workspace.data_ptr()
    version = out._version
    fa2cupy.attention(x.q, x.k, x.v, out=out)
    assert out._version == version + 1
    with pytest.raises(InvalidArgument, match=r"workspace has 1023 bytes: at least 1024"):
        fa2cupy.attention_backward(x.dout, x.q, x.k, x.v, out, lse, workspace=workspace[1:])


def test_framework() -> None:
    assert framework_of(torch.zeros(1)) is TORCH
    assert framework_of(torch.nn.Parameter(torch.zeros(1))) is TORCH


@pytest.mark.parametrize("shape", [(2, 3, 1, 8), (1, 1, 1), (2, 0, 4, 8), (0,), (7,)])
def test_allocator(shape: tuple[int, ...]) -> None:
    """New tensors are ordinary and contiguous, in and out of inference mode, wherever the allocator was made."""
    for made_in_inference in (False, True):
        with torch.inference_mode(made_in_inference):
            allocate = TORCH.allocator(shape, "bfloat16", torch.zeros(1))
        for inference in (False, True):
            with torch.inference_mode(inference):
                first, second = allocate(), allocate()
            plain = torch.empty(shape, dtype=torch.bfloat16)
            assert (first.shape, first.stride(), first.dtype) == (plain.shape, plain.stride(), plain.dtype)
            assert first.untyped_storage().nbytes() == plain.untyped_storage().nbytes()
            assert (first.is_inference(), first.requires_grad) == (inference, False)
            assert not first.numel() or first.data_ptr() != second.data_ptr()


def test_allocator_in_the_order_of_the_other_layout() -> None:
    for shape in ((2, 3, 4, 8), (1, 1, 5, 8), (2, 3, 1, 7)):
        first, second, third, fourth = shape
        made = TORCH.allocator(shape, "float16", torch.zeros(1), True)()
        plain = torch.empty(first, third, second, fourth, dtype=torch.float16)
        assert (made.shape, made.stride()) == (shape, plain.transpose(1, 2).stride())
        assert made.untyped_storage().nbytes() == plain.untyped_storage().nbytes()


def test_gpu_contiguous_and_not_are_told_apart(cuda: FakeGpu) -> None:
    """The signature asks for strides only where they do not follow from the shape; junk of size 1 does not count."""
    cuda.compute = False
    q = torch.zeros(1, 6, 1, 16, dtype=torch.float16)
    junk = q.as_strided(q.shape, (3, 16, 5, 1))
    gaps = torch.zeros(1, 6, 2, 16, dtype=torch.float16)[:, :, :1]
    for tensor, strides in ((q, (0, 16, 0)), (junk, (0, 16, 0)), (gaps, (0, 32, 0)), (q, (0, 16, 0))):
        fa2cupy.attention(tensor, tensor, tensor)
        assert dict(cuda.last.problem.strides)["q"] == strides
    assert (len(cuda.plans), len(PREPARED)) == (2, 2)
