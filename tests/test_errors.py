"""Every user error names the argument, what it was and what is allowed, and nothing was launched before it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fa2cupy
from fa2cupy import cpu
from fa2cupy.errors import (
    CompilationError,
    Fa2Error,
    InvalidArgument,
    InvalidType,
    LaunchError,
    MissingDependency,
    UnsupportedDevice,
)
from fa2cupy.frameworks import dlpack
from fa2cupy.jit import driver
from tests.dlpack_producer import Producer
from tests.fake_gpu import FakeGpu, cupy_array


@pytest.fixture(params=["numpy", "cupy"])
def make(request: pytest.FixtureRequest, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function of (shape, dtype) that makes arrays; fails the test if anything is computed."""

    def computed(*_: Any, **__: Any) -> None:
        pytest.fail("computed in spite of the error")

    monkeypatch.setattr(cpu, "forward", computed)
    monkeypatch.setattr(cpu, "backward", computed)

    def array(shape: tuple[int, ...], dtype: Any = np.float16) -> Any:
        return np.zeros(shape, dtype) if request.param == "numpy" else cupy_array(shape, dtype)

    array.library = request.param  # type: ignore[attr-defined]
    yield array
    assert not gpu.launches
    assert not gpu.allocations


def inputs(make: Any, **changes: Any) -> dict[str, Any]:
    """q (2, 5, 4, 16), k and v (2, 7, 2, 16)."""
    values = {"q": (2, 5, 4, 16), "k": (2, 7, 2, 16), "v": (2, 7, 2, 16), **changes}
    return {name: make(value) if isinstance(value, tuple) else value for name, value in values.items()}


def backward_inputs(make: Any, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "dout": make((2, 5, 4, 16)),
        **inputs(make),
        "out": make((2, 5, 4, 16)),
        "lse": make((2, 4, 5), np.float32),
    }
    return {**values, **{name: make(value) if isinstance(value, tuple) else value for name, value in changes.items()}}


def fails(kind: type[Fa2Error], *words: str, call: Callable[..., Any] = fa2cupy.attention, **arguments: Any) -> None:
    with pytest.raises(kind) as caught:
        call(**arguments)
    assert isinstance(caught.value, (ValueError, TypeError))
    for word in words:
        assert word in str(caught.value), f"{word!r} not in: {caught.value}"


def backward_fails(kind: type[Fa2Error], *words: str, **arguments: Any) -> None:
    fails(kind, *words, call=fa2cupy.attention_backward, **arguments)


# ----------------------------------------------------------------------------------------------------------------------
# Shapes


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((5, 16), "{}[None, :, None, :]"),
        ((2, 5, 16), "{}[:, :, None, :]"),
        ((2, 5, 16), "{}[None]"),
        ((2, 5, 16), "{}.reshape(2, 5, num_heads, head_dim) if its last dimension holds all heads"),
        ((2, 5, 4, 16, 1), "(batch, seqlen, num_heads, head_dim)"),
        ((), "4 are needed"),
    ],
)
def test_rank(make: Any, name: str, shape: tuple[int, ...], hint: str) -> None:
    words = name, f"{len(shape)} dimensions", str(shape), hint.format(name)
    fails(InvalidArgument, *words, **inputs(make, **{name: shape}))


def test_all_heads_in_one_dimension(make: Any) -> None:
    """(batch, seqlen, num_heads * head_dim), as a projection leaves it, is neither one head nor a batch of one."""
    for layout, named in (("bshd", ""), ("bhsd", " with layout='bshd'")):
        with pytest.raises(InvalidArgument) as caught:
            fa2cupy.attention(**inputs(make, q=(2, 5, 512)), layout=layout)
        assert f"pass q.reshape(2, 5, num_heads, head_dim){named}" in str(caught.value)
        assert "None" not in str(caught.value)


def test_rank_hint_follows_the_layout(make: Any) -> None:
    fails(InvalidArgument, "q[None, None, :, :]", **inputs(make, q=(5, 16)), layout="bhsd")
    fails(InvalidArgument, "q[:, None, :, :]", "(batch, num_heads, seqlen", **inputs(make, q=(2, 5, 16)), layout="bhsd")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": (3, 7, 2, 16)}, ("k", "batch 3", "q has 2")),
        ({"v": (3, 7, 2, 16)}, ("v", "batch 3", "q has 2")),
        ({"v": (2, 8, 2, 16)}, ("v", "seqlen 8", "k has 7", "(batch, seqlen, num_heads, head_dim)")),
        ({"v": (2, 7, 4, 16)}, ("v", "num_heads 4", "k has 2")),
        ({"k": (2, 7, 2, 32)}, ("k", "head_dim 32", "q has 16")),
        ({"k": (2, 7, 3, 16), "v": (2, 7, 3, 16)}, ("q has 4 heads", "k has 3", "multiple")),
        ({"k": (2, 7, 0, 16), "v": (2, 7, 0, 16)}, ("q has 4 heads", "k has 0", "multiple")),
        ({"q": (2, 5, 2, 16), "k": (2, 7, 4, 16), "v": (2, 7, 4, 16)}, ("q has 2 heads", "k has 4")),
        ({"q": (2, 5, 4, 0), "k": (2, 7, 2, 0), "v": (2, 7, 2, 0)}, ("q", "head_dim 0", "1 to 256")),
        ({"q": (2, 5, 4, 264), "k": (2, 7, 2, 264), "v": (2, 7, 2, 264)}, ("q", "head_dim 264", "1 to 256")),
        ({"v": (2, 7, 2, 0)}, ("v", "head_dim_v 0", "1 to 256")),
        ({"v": (2, 7, 2, 257)}, ("v", "head_dim_v 257", "1 to 256")),
    ],
)
def test_lengths(make: Any, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    fails(InvalidArgument, *words, **inputs(make, **changes))


def test_layout_is_named_where_it_matters(make: Any) -> None:
    # torch's (batch, heads, seqlen, head_dim) taken for ours: 5 "heads", 7 "key heads".
    shapes = {"q": (2, 4, 5, 16), "k": (2, 2, 7, 16), "v": (2, 2, 7, 16)}
    fails(InvalidArgument, "layout='bshd' means (batch, seqlen, num_heads, head_dim)", **inputs(make, **shapes))


@pytest.mark.parametrize("name", ["dout", "out"])
def test_shapes_in_the_backward(make: Any, name: str) -> None:
    arrays = backward_inputs(make, v=(2, 7, 2, 8))  # dout and out are as wide as v, not as q
    wrong = arrays if name == "dout" else {**arrays, "dout": make((2, 5, 4, 8))}
    backward_fails(InvalidArgument, name, "(2, 5, 4, 16)", "(2, 5, 4, 8) is needed", **wrong)
    backward_fails(
        InvalidArgument,
        name,
        "(2, 6, 4, 16)",
        "(2, 5, 4, 16) is needed",
        **backward_inputs(make, **{name: (2, 6, 4, 16)}),
    )
    backward_fails(
        InvalidArgument, name, "(2, 5, 16)", "(2, 5, 4, 16) is needed", **backward_inputs(make, **{name: (2, 5, 16)})
    )


# ----------------------------------------------------------------------------------------------------------------------
# Dtypes


@pytest.mark.parametrize("dtype", ["int32", "int8", "bool", "complex64", "uint8"])
def test_unsupported_dtypes(make: Any, dtype: str) -> None:
    arrays = {name: make(x.shape, dtype) for name, x in inputs(make).items()}
    fails(InvalidType, "q has dtype " + dtype, "float16, bfloat16, float32, float64", **arrays)


def test_precision(make: Any) -> None:
    """It is for float32, and what it may be is said."""
    arrays = inputs(make)
    for dtype in ("float16", "float64"):
        others = {name: make(x.shape, dtype) for name, x in arrays.items()}
        words = "is for float32 arrays", f"q has dtype {dtype}", "leave it out"
        fails(InvalidArgument, "precision='tf32'", *words, precision="tf32", **others)
        fails(InvalidArgument, "precision='float32'", *words, precision="float32", **others)
    arrays = {name: make(x.shape, "float32") for name, x in arrays.items()}
    allowed = "None, 'float32' or 'tf32' is needed"
    fails(InvalidArgument, "precision='highest' is unknown", allowed, precision="highest", **arrays)
    fails(InvalidType, "precision=32", allowed, precision=32, **arrays)


def test_other_byte_order(make: Any) -> None:
    if make.library == "numpy":
        fails(InvalidType, "q has dtype >f2", **{name: make(x.shape, ">f2") for name, x in inputs(make).items()})


@pytest.mark.parametrize("name", ["k", "v"])
def test_mixed_dtypes(make: Any, name: str) -> None:
    arrays = inputs(make)
    arrays[name] = make(arrays[name].shape, "uint16")
    fails(InvalidType, f"{name} has dtype uint16", "dtype='bfloat16'", **arrays)
    import ml_dtypes

    arrays[name] = make(arrays[name].shape, ml_dtypes.bfloat16)
    fails(InvalidType, f"{name} has dtype bfloat16", "q has float16", **arrays)


def test_what_uint16_holds(make: Any) -> None:
    arrays = {name: make(x.shape, "uint16") for name, x in inputs(make).items()}
    fails(InvalidType, "q has dtype uint16", "dtype='bfloat16'", **arrays)
    fails(InvalidArgument, "dtype='float16'", "'bfloat16'", **arrays, dtype="float16")
    fails(InvalidArgument, "dtype='int8'", "'bfloat16'", **arrays, dtype="int8")
    fails(InvalidType, "dtype=5", "int", "'bfloat16'", **arrays, dtype=5)
    fails(InvalidType, "dtype=", "'bfloat16'", **arrays, dtype=["bfloat16"])
    fails(InvalidArgument, "dtype='bfloat16'", "q has dtype float16", **inputs(make), dtype="bfloat16")
    arrays["v"] = make(arrays["v"].shape, "float16")
    fails((InvalidType, InvalidArgument), "v", "float16", **arrays, dtype="bfloat16")  # type: ignore[arg-type]


def test_lse(make: Any) -> None:
    wrong = make((2, 5, 4), np.float32)
    backward_fails(InvalidArgument, "lse", "(2, 5, 4)", "(2, 4, 5) is needed", **backward_inputs(make, lse=wrong))
    for dtype in ("float16", "float64"):
        wrong = make((2, 4, 5), dtype)
        backward_fails(InvalidType, f"lse has dtype {dtype}", "float32 is needed", **backward_inputs(make, lse=wrong))


def test_lse_of_float64(make: Any) -> None:
    if make.library == "numpy":
        arrays = {name: make(x.shape, "float64") for name, x in backward_inputs(make).items()}
        arrays["lse"] = make((2, 4, 5), "float32")
        backward_fails(InvalidType, "lse has dtype float32", "float64 is needed", **arrays)


# ----------------------------------------------------------------------------------------------------------------------
# Frameworks and devices


@pytest.mark.parametrize("value", [None, [[1.0]], 3.0, "q", object(), np.float16(1)])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_not_an_array(make: Any, name: str, value: object) -> None:
    fails(InvalidType, f"{name} is a ", "CuPy, PyTorch, JAX or NumPy", "__dlpack__", **inputs(make, **{name: value}))


def test_arrays_with_cuda_array_interface_only(make: Any) -> None:
    class Numba:
        __cuda_array_interface__ = {"shape": (2, 5, 4, 16)}  # noqa: RUF012

    fails(InvalidType, "q is a ", "pass cupy.asarray(q)", **inputs(make, q=Numba()))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_mixed_frameworks(make: Any, name: str) -> None:
    other = cupy_array if make.library == "numpy" else np.zeros
    arrays = inputs(make)
    arrays[name] = other(arrays[name].shape, np.float16)
    fails(InvalidType, "cupy.ndarray", "numpy.ndarray", "the same framework", **arrays)
    for output in ("out", "lse_out"):
        fails(InvalidType, output, "the same framework", **inputs(make), **{output: other((2, 5, 4, 16), np.float16)})


def test_mixed_devices(make: Any) -> None:
    if make.library == "cupy":
        k = cupy_array((2, 7, 2, 16), np.float16, 1)
        fails(InvalidArgument, "k is on cuda:1 but q is on cuda:0", "one device", **inputs(make, k=k))
        out = cupy_array((2, 5, 4, 16), np.float16, 1)
        fails(InvalidArgument, "out is on cuda:1 but q is on cuda:0", **inputs(make), out=out)


def test_masked_arrays() -> None:
    q = np.ma.masked_array(np.zeros((2, 5, 4, 16)))
    fails(InvalidType, "q is a masked array", "q.data", q=q, k=q, v=q)


@pytest.mark.parametrize("kind", [7, 10])
def test_dlpack_devices(kind: int) -> None:
    q = Producer(np.zeros((2, 5, 4, 16)), device=(kind, 0))
    fails(UnsupportedDevice, f"q is on DLPack device type {kind}", "CUDA", q=q, k=q, v=q)


def test_dlpack_producers_that_fail() -> None:
    class Broken(Producer):
        def __dlpack__(self, stream: Any = None) -> Any:
            raise RuntimeError("no such luck")

    class NoDevice(Producer):
        def __dlpack_device__(self) -> tuple[int, int]:
            raise BufferError("nowhere")

    class NoCapsule(Producer):
        def __dlpack__(self, stream: Any = None) -> Any:
            return 5

    array = np.zeros((2, 5, 4, 16))
    for broken, kind, words in (
        (Broken(array), InvalidArgument, ("q: its __dlpack__ failed", "no such luck")),
        (NoDevice(array), InvalidArgument, ("q: its __dlpack_device__ failed", "nowhere")),
        (NoCapsule(array), InvalidType, ("q: not an unconsumed DLPack capsule",)),
        (Producer(array, dtype="weird8"), InvalidType, ("q has dtype", "not supported")),
    ):
        fails(kind, *words, q=broken, k=broken, v=broken)


# ----------------------------------------------------------------------------------------------------------------------
# Keywords


@pytest.mark.parametrize("value", ["yes", 1, 0, None, 1.0, [True]])
@pytest.mark.parametrize("name", ["causal", "return_lse"])
def test_flags(make: Any, name: str, value: object) -> None:
    fails(InvalidType, f"{name}={value!r}", "True or False", **inputs(make), **{name: value})


def test_deterministic(make: Any) -> None:
    backward_fails(InvalidType, "deterministic=1", "True or False", **backward_inputs(make), deterministic=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float32("nan"), 10**400])
def test_scale_must_be_finite(make: Any, value: object) -> None:
    fails(InvalidArgument, "softmax_scale=", "finite", **inputs(make), softmax_scale=value)


@pytest.mark.parametrize("value", ["0.1", True, np.True_, 1j, [0.1], {}])
def test_scale_must_be_a_number(make: Any, value: object) -> None:
    fails(InvalidType, "softmax_scale", "number", **inputs(make), softmax_scale=value)


def test_scale_in_an_array(make: Any) -> None:
    for value in (np.array(0.1), np.ones(1), cupy_array((), np.float32)):
        fails(InvalidType, "softmax_scale is a ", "Python number", "wait", **inputs(make), softmax_scale=value)


def test_layout(make: Any) -> None:
    fails(InvalidArgument, "layout='sbhd'", "'bshd' or 'bhsd'", **inputs(make), layout="sbhd")
    fails(InvalidArgument, "layout='BSHD'", "'bshd' or 'bhsd'", **inputs(make), layout="BSHD")
    for value in (None, 5, ["bshd"]):
        fails(InvalidType, f"layout={value!r}", "'bshd' or 'bhsd'", **inputs(make), layout=value)


def test_an_option_is_checked_after_an_equal_one_was_seen(gpu: FakeGpu) -> None:
    """1 == True == 1.0 and their hashes are equal: the wrong ones must not find the prepared call of the right ones."""
    gpu.compute = False
    q = cupy_array((2, 5, 4, 16), np.float16)
    for _ in range(2):
        fa2cupy.attention(q, q, q, causal=True, softmax_scale=1.0)
        with pytest.raises(InvalidType, match="causal=1"):
            fa2cupy.attention(q, q, q, causal=1, softmax_scale=1.0)  # type: ignore[arg-type]
        with pytest.raises(InvalidType, match="softmax_scale=True"):
            fa2cupy.attention(q, q, q, causal=True, softmax_scale=True)
    assert len(gpu.launches) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Outputs

FORWARD_OUTPUTS = [("out", (2, 5, 4, 16), np.float16), ("lse_out", (2, 4, 5), np.float32)]
BACKWARD_OUTPUTS = [("dq", (2, 5, 4, 16)), ("dk", (2, 7, 2, 16)), ("dv", (2, 7, 2, 16))]


@pytest.mark.parametrize(("name", "shape", "dtype"), FORWARD_OUTPUTS)
def test_outputs_of_the_forward(make: Any, name: str, shape: tuple[int, ...], dtype: type) -> None:
    wrong = make((*shape[:-1], shape[-1] + 1), dtype)
    fails(InvalidArgument, name, str(wrong.shape), f"{shape} is needed", **inputs(make), **{name: wrong})
    fails(InvalidType, f"{name} has dtype float64", **inputs(make), **{name: make(shape, "float64")})
    other = np.float32 if dtype is np.float16 else np.float16
    fails(InvalidType, f"{name} has dtype {np.dtype(other).name}", **inputs(make), **{name: make(shape, other)})
    wrong = make((*shape[:-1], 2 * shape[-1]), dtype)[..., ::2]
    fails(InvalidArgument, name, "strides", "last dimension must be contiguous", **inputs(make), **{name: wrong})
    fails(InvalidType, f"{name} is a list", **inputs(make), **{name: [1]})


@pytest.mark.parametrize(("name", "shape"), BACKWARD_OUTPUTS)
def test_outputs_of_the_backward(make: Any, name: str, shape: tuple[int, ...]) -> None:
    wrong = make((*shape[:-1], shape[-1] + 1))
    backward_fails(
        InvalidArgument, name, str(wrong.shape), f"{shape} is needed", **backward_inputs(make), **{name: wrong}
    )
    wrong = make(shape, "float32")
    backward_fails(
        (InvalidType, InvalidArgument), f"{name} has dtype float32", **backward_inputs(make), **{name: wrong}
    )  # type: ignore[arg-type]


def test_uint16_out(make: Any) -> None:
    import ml_dtypes

    arrays = {name: make(x.shape, "uint16") for name, x in inputs(make).items()}
    out = make((2, 5, 4, 16), ml_dtypes.bfloat16)
    fails(InvalidType, "out has dtype bfloat16", "q has uint16", **arrays, out=out, dtype="bfloat16")


def test_elements_held_twice(make: Any) -> None:
    if make.library == "numpy":
        row = np.zeros((1, 1, 4, 16), np.float16)
        out: Any = np.lib.stride_tricks.as_strided(row, (2, 5, 4, 16), (0, 0, 32, 2), writeable=True)
    else:
        out = cupy_array((2, 5, 4, 16), np.float16, strides=(0, 0, 32, 2))
    fails(InvalidArgument, "out has strides (0, 0, 32, 2)", "twice", **inputs(make), out=out)


def test_readonly_out() -> None:
    out = np.zeros((2, 5, 4, 16), np.float16)
    out.flags.writeable = False
    q = np.zeros((2, 5, 4, 16), np.float16)
    fails(InvalidArgument, "out is read-only", "writable", q=q, k=q, v=q, out=out)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_out_over_an_input(make: Any, name: str) -> None:
    arrays = inputs(make, k=(2, 5, 4, 16), v=(2, 5, 4, 16))
    fails(InvalidArgument, f"out shares memory with {name}", **arrays, out=arrays[name])
    buffer = make((2, 6, 4, 16))
    arrays[name] = buffer[:, :5]
    fails(InvalidArgument, f"out shares memory with {name}", **arrays, out=buffer[:, 1:])


def test_outputs_over_each_other(make: Any) -> None:
    arrays = backward_inputs(make)
    buffer = make((2, 8, 2, 16))
    words = "dk shares memory with dv", "elements of its own"
    backward_fails(InvalidArgument, *words, **arrays, dk=buffer[:, 1:], dv=buffer[:, :7])
    backward_fails(InvalidArgument, "dq shares memory with dout", **arrays, dq=arrays["dout"])
    backward_fails(InvalidArgument, "dq shares memory with out", **arrays, dq=arrays["out"])


def test_lse_out_over_lse_bytes_of_an_input(make: Any) -> None:
    q = make((2, 5, 4, 16))
    lse_out = q.view(np.float32).reshape(-1)[:40].reshape(2, 4, 5)
    fails(InvalidArgument, "lse_out shares memory with q", **inputs(make, q=q), lse_out=lse_out)


def test_workspace(make: Any) -> None:
    arrays = backward_inputs(make)
    backward_fails(InvalidType, "workspace is a list", "is needed", **arrays, workspace=[0])
    wrong = make((64, 64), "uint8")[:, ::2]
    backward_fails(InvalidArgument, "workspace is not contiguous", **arrays, workspace=wrong)
    backward_fails(InvalidArgument, "workspace shares memory with q", **arrays, workspace=arrays["q"])
    if make.library == "cupy":
        backward_fails(InvalidType, "workspace is a numpy.ndarray", "CuPy", **arrays, workspace=np.zeros(4096))
        wrong = make((1023,), "uint8")
        backward_fails(InvalidArgument, "workspace has 1023 bytes", "at least 1024", **arrays, workspace=wrong)
        wrong = cupy_array((1024,), "uint8", offset=128)
        backward_fails(InvalidArgument, "workspace starts at", "multiple of 256", **arrays, workspace=wrong)
        wrong = cupy_array((1024,), "uint8", 1)
        backward_fails(InvalidArgument, "workspace is on cuda:1", "cuda:0", **arrays, workspace=wrong)


def test_pointer_between_elements(gpu: FakeGpu) -> None:
    q = cupy_array((2, 5, 4, 16), np.float16, offset=1)
    fails(InvalidArgument, "q starts at address", "multiple of its 2-byte elements", q=q, k=q, v=q)


# ----------------------------------------------------------------------------------------------------------------------
# CUDA graph capture with CuPy arrays


def test_capture_needs_the_outputs(gpu: FakeGpu) -> None:
    gpu.compute = False
    q = cupy_array((2, 5, 4, 16), np.float16)
    lse = cupy_array((2, 4, 5), np.float32)
    fa2cupy.attention(q, q, q)
    gpu.capturing = True
    for _ in range(2):  # known signature or not
        fails(InvalidArgument, "CUDA graph capture", "out=, lse_out=", q=q, k=q, v=q, return_lse=True)
        given = {"out": cupy_array(q.shape, q.dtype), "return_lse": True}
        fails(InvalidArgument, "CUDA graph capture", "so lse_out= must", q=q, k=q, v=q, **given)
        words = "CUDA graph capture", "dq=, dk=, dv=, workspace=", "1024 bytes"
        backward_fails(InvalidArgument, *words, dout=q, q=q, k=q, v=q, out=q, lse=lse)
    fails(InvalidArgument, "q must be copied", "capture", q=q[..., ::2], k=q[..., ::2], v=q[..., ::2])
    assert len(gpu.launches) == 1
    outputs = {name: cupy_array(q.shape, q.dtype) for name in ("dq", "dk", "dv")}
    fa2cupy.attention(q, q, q, out=outputs["dq"], lse_out=lse)
    fa2cupy.attention_backward(q, q, q, q, q, lse, **outputs, workspace=cupy_array((1024,), "uint8"))
    assert len(gpu.launches) == 3


@pytest.mark.parametrize("error", [LaunchError("cuModuleLoad: no"), CompilationError("cannot")])
def test_capture_before_the_first_call(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, error: Fa2Error) -> None:
    def bind(self: Any, device_index: int) -> Any:
        raise error

    monkeypatch.setattr("tests.fake_gpu.FakePlan.bind", bind)
    q = cupy_array((2, 5, 4, 16), np.float16)
    with pytest.raises(type(error)) as caught:
        fa2cupy.attention(q, q, q)
    assert caught.value is error
    gpu.capturing = True
    with pytest.raises(LaunchError, match="call it once"):
        fa2cupy.attention(q, q, q, out=cupy_array(q.shape, q.dtype), lse_out=cupy_array((2, 4, 5), np.float32))


# ----------------------------------------------------------------------------------------------------------------------
# What is not there


def test_gpu_below_sm80(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(index: int) -> None:
        raise UnsupportedDevice(f"device {index} (T4) has compute capability 7.5: 8.0 or newer is needed")

    monkeypatch.setattr(driver, "device_info", refuse)
    q = cupy_array((2, 5, 4, 16), np.float16, 1)
    fails(UnsupportedDevice, "T4", "8.0 or newer", q=q, k=q, v=q)
    assert not gpu.launches


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise OSError("not here")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    driver._driver.cache_clear()
    driver.device_info.cache_clear()
    q = cupy_array((2, 5, 4, 16), np.float16)
    producer = Producer(np.zeros((2, 5, 4, 16), np.float16), device=(2, 0))
    for array in (q, producer):
        with pytest.raises(MissingDependency, match="NVIDIA driver"):
            fa2cupy.attention(array, array, array)
    driver._driver.cache_clear()
    driver.device_info.cache_clear()


def test_no_cupy(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(driver, "pip_extra", lambda: "fa2cupy[cuda12]")
    producer = Producer(np.zeros((2, 5, 4, 16), np.float16), device=(2, 0))
    with pytest.raises(MissingDependency, match=r"CuPy.*pip install 'fa2cupy\[cuda12\]'"):
        fa2cupy.attention(producer, producer, producer)


def test_no_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    producer = Producer(np.zeros((2, 5, 4, 16), np.uint16), dtype="bfloat16")
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(MissingDependency, match=r"q is bfloat16.*pip install ml_dtypes"):
        dlpack.from_producer(producer, "q")
