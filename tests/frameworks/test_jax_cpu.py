"""JAX arrays: on the CPU for real, and CPU arrays for which XLA calls the GPU's handler, without a GPU."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fa2cupy
from fa2cupy import first_call
from fa2cupy.errors import InvalidArgument, InvalidType, UnsupportedDevice
from fa2cupy.frameworks import JAX, framework_of
from fa2cupy.frameworks.base import Device
from fa2cupy.frameworks.jax import is_traced
from fa2cupy.kernels import planner
from fa2cupy.prepared import PLAIN, PREPARED
from fa2cupy.xla import door, ffi, transforms
from tests.fake_gpu import FakeGpu
from tests.frameworks.jax_versions import x64
from tests.reference import Inputs, as_ml_dtypes, expect, make_inputs


def inputs(seed: int, dtype: str, **keywords: Any) -> tuple[Inputs, Inputs]:
    stored = make_inputs(seed, 5, 7, dtype=dtype, heads=(4, 2), head_dim=16, **keywords)
    return stored, Inputs(*(jnp.asarray(as_ml_dtypes(array)) for array in stored))


def swap(x: Any) -> Any:
    return x.transpose(0, 2, 1, 3)


def both(x: Inputs, layout: str = "bshd", **keywords: Any) -> dict[str, Any]:
    turn = swap if layout == "bhsd" else (lambda array: array)
    q, k, v, dout = (turn(array) for array in x)
    out, lse = fa2cupy.attention(q, k, v, layout=layout, return_lse=True, **keywords)
    dq, dk, dv = fa2cupy.attention_backward(dout, q, k, v, out, lse, layout=layout, **keywords)
    return {"out": turn(out), "lse": lse, "dq": turn(dq), "dk": turn(dk), "dv": turn(dv)}


def check(stored: Inputs, results: dict[str, Any], dtype: str, **keywords: Any) -> None:
    for name, array in results.items():
        assert isinstance(array, jax.Array)
        assert array.dtype == ("float32" if name == "lse" else dtype)
    expect(*stored, **keywords).check(**results)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("causal", [False, True])
def test_cpu(dtype: str, layout: str, causal: bool) -> None:
    stored, x = inputs(1, dtype)
    check(stored, both(x, layout, causal=causal), dtype, causal=causal)


def test_cpu_head_dim_of_v() -> None:
    stored, x = inputs(1, "float32", head_dim_v=8)
    check(stored, both(x, causal=True), "float32", causal=True)


def test_cpu_float64() -> None:
    with x64():
        stored, x = inputs(2, "float64")
        results = both(x)
        assert results["lse"].dtype == results["out"].dtype == "float64"
        expect(*stored).check(**results)


def test_uint16() -> None:
    _, x = inputs(3, "bfloat16")
    results = both(Inputs(*(array.view("uint16") for array in x)), dtype="bfloat16")
    named = both(x)
    assert results["out"].dtype == "uint16"
    for name, array in results.items():
        np.testing.assert_array_equal(np.asarray(array).view(named[name].dtype), named[name])


def test_closed_over_arrays_inside_jit() -> None:
    q = jnp.ones((2, 5, 4, 16))
    result = jax.jit(lambda x: x + fa2cupy.attention(q, q, q))(q)
    np.testing.assert_allclose(result, 2)


@pytest.mark.parametrize("name", ["out", "lse_out", "workspace"])
def test_immutable(name: str) -> None:
    q = jnp.zeros((2, 5, 4, 16))
    with pytest.raises(InvalidArgument, match=f"{name} cannot be given for JAX arrays.*immutable"):
        fa2cupy.attention(q, q, q, **{name: q})


def test_errors() -> None:
    q = jnp.zeros((2, 5, 4, 16))
    gone = jnp.zeros((2, 5, 4, 16))
    gone.delete()
    with pytest.raises(InvalidArgument, match="k was deleted or donated"):
        fa2cupy.attention(q, gone, q)
    with pytest.raises(InvalidType, match=r"k is a numpy\.ndarray but q is a \w+\.ArrayImpl"):
        fa2cupy.attention(q, np.asarray(q), q)
    with pytest.raises(InvalidType, match=r"softmax_scale is a .*Python number"):
        fa2cupy.attention(q, q, q, softmax_scale=jnp.float32(0.5) + 0)
    with pytest.raises(InvalidType, match="q has dtype int32"):
        fa2cupy.attention(*3 * [q.astype(jnp.int32)])
    keys = jax.random.split(jax.random.key(0), 2)
    with pytest.raises(InvalidType, match=r"q (is a jax\.PRNGKeyArray|has dtype key)"):
        fa2cupy.attention(keys, keys, keys)


def test_devices_of_other_processes_do_not_count() -> None:
    class Ours:
        platform, id, local_hardware_id = "gpu", 4, 1

    class Array:
        class sharding:  # noqa: N801
            addressable_devices = frozenset({Ours})
            memory_kind = "device"

        def devices(self) -> set[Any]:
            raise AssertionError("the first of all devices may be another process's, which has no number here")

    assert JAX.device(Array(), "q") == Device("cuda", 1)


# ----------------------------------------------------------------------------------------------------------------------
# The second call of a signature


def test_checked_signatures_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    q = jnp.ones((2, 5, 4, 16), "float16")
    PREPARED.clear()
    PLAIN.clear()
    first = both(Inputs(q, q, q, q))
    assert len(PREPARED) == 2  # the forward by the door of all functions, and by its own
    assert [len(functions) for functions in PLAIN.values()] == [1]
    with monkeypatch.context() as patch:
        patch.setattr(first_call, "first_call", None)
        again = both(Inputs(q + 0, q + 0, q + 0, q + 0))
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    gone = q + 0
    gone.delete()
    with pytest.raises(InvalidArgument, match="v was deleted or donated"):
        fa2cupy.attention(q, q, gone, return_lse=True)
    with pytest.raises(InvalidArgument, match=r"workspace cannot be given for JAX arrays.*immutable"):
        fa2cupy.attention(q, q, q, return_lse=True, workspace=q)
    for raises, change in ((InvalidType, {"causal": 0}), (InvalidType, {"softmax_scale": q})):
        with pytest.raises(raises):
            fa2cupy.attention(q, q, q, return_lse=True, **change)
    with pytest.raises(InvalidType, match=r"k is a numpy\.ndarray"):
        fa2cupy.attention(q, np.asarray(q), q, return_lse=True)
    with pytest.raises(InvalidType, match=r"k has dtype float32 but q has float16"):
        fa2cupy.attention(q, q.astype("float32"), q, return_lse=True)
    fa2cupy.attention(q, q, q, return_lse=True)
    assert len(PREPARED) == 2 and [len(functions) for functions in PLAIN.values()] == [1]


@pytest.mark.parametrize("causal", [False, True])
def test_defaults_have_a_key_of_their_own(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q = jnp.asarray(np.random.default_rng(5).standard_normal((2, 5, 4, 16)), "float16")
    PREPARED.clear()
    PLAIN.clear()
    right = fa2cupy.attention(q, q, q, causal=causal)
    assert causal in PLAIN[q.dtype] and (not causal) not in PLAIN[q.dtype]
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["fa2cupy.attention"], "call", None)
        np.testing.assert_array_equal(fa2cupy.attention(q, q, q, causal=causal), right)
    for wrong in (int(causal), float(causal)):
        with pytest.raises(InvalidType, match="causal"):
            fa2cupy.attention(q, q, q, causal=wrong)
    for option in ({"softmax_scale": 0.5}, {"layout": "bhsd"}, {"causal": not causal}):
        assert not np.array_equal(fa2cupy.attention(q, q, q, **{"causal": causal, **option}), right)
    out, _ = fa2cupy.attention(q, q, q, causal=causal, return_lse=True)
    np.testing.assert_array_equal(out, right)


@pytest.mark.parametrize("return_lse", [False, True])
def test_new_arrays_at_the_door_of_known_ones(return_lse: bool) -> None:
    """Checked while they are traced, or by JAX; then in our words all the same, and each time."""
    q = jnp.ones((2, 5, 4, 16), "float16")
    ours = functools.partial(fa2cupy.attention, return_lse=return_lse)
    ours(q, q, q)
    stored, x = inputs(4, "float16")
    for _ in range(2):
        found = ours(x.q, x.k, x.v)
        for name, array in zip(("out", "lse"), found if return_lse else (found,), strict=False):
            expect(*stored).check(**{name: np.asarray(array)})
        with pytest.raises(InvalidArgument, match=r"head_dim|shape"):
            ours(q, q[..., :8], q)
        with pytest.raises(InvalidArgument, match="dimensions"):
            ours(q[0], q, q)
        with pytest.raises(InvalidType, match="v has dtype float32 but q has float16"):
            ours(q, q, q.astype("float32"))
        for causal in (1, q):
            with pytest.raises(InvalidType, match="causal"):
                ours(q, q, q, causal=causal)
        with pytest.raises(InvalidType, match="softmax_scale"):
            ours(q, q, q, softmax_scale=q)
        with pytest.raises(InvalidArgument, match="out cannot be given for JAX arrays"):
            ours(q, q, q, out=q)


def test_arrays_on_several_devices() -> None:
    """An array that was put on a device stays there; JAX moves others to it."""
    first, second = jax.devices()[:2]
    q = jnp.ones((2, 5, 4, 16))
    here, there = jax.device_put(q, first), jax.device_put(q, second)
    PREPARED.clear()
    for _ in range(2):
        with pytest.raises(InvalidArgument, match="k is on cpu:1 but q is on the CPU"):
            fa2cupy.attention(here, there, q)
        out, lse = fa2cupy.attention(there, q, q, return_lse=True)
        assert out.devices() == {second}
        with pytest.raises(ValueError, match=r"devices|is on"):
            fa2cupy.attention_backward(out, q, here, q, out, lse)
        assert fa2cupy.attention_backward(out, q, q, q, out, lse)[0].devices() == {second}
        fa2cupy.attention(q, q, q)


def test_host_memory_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time: on a GPU it is refused, which depends on where an array is."""
    q = jnp.ones((2, 5, 4, 16))
    if not hasattr(q.aval, "memory_space"):
        pytest.skip("before JAX 0.7 a traced array does not know its memory")
    in_host = jax.device_put(q, jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host"))
    fa2cupy.attention(q, q, q)
    asked: list[str] = []
    device_of = JAX.device
    monkeypatch.setattr(JAX, "device", lambda array, name: asked.append(is_traced(array)) or device_of(array, name))
    for _ in range(2):
        asked.clear()
        np.testing.assert_array_equal(fa2cupy.attention(q, in_host, q), fa2cupy.attention(q, q, q))
        assert False in asked


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_are_as_deterministic_as_asked(deterministic: bool) -> None:
    q = jnp.ones((2, 5, 4, 16))
    derived = jax.jit(jax.grad(lambda q: fa2cupy.attention(q, q, q, deterministic=deterministic).sum()))
    text = derived.lower(q).as_text()
    assert text.count(r"\22deterministic\22:") == 2
    assert text.count(rf"\22deterministic\22:{str(deterministic).lower()}") == 2


def test_float64_is_not_remembered() -> None:
    """Whether it is computed as float64 depends on a scope, and not on the arrays."""
    with x64():
        q = jnp.ones((2, 5, 4, 16), "float64")
    PREPARED.clear()
    for enabled in (True, False, True):
        with x64(enabled):
            assert fa2cupy.attention(q, q, q).dtype == "float64"
    assert not len(PREPARED)


def test_traced_and_concrete_arrays_have_calls_of_their_own() -> None:
    q = jnp.ones((2, 5, 4, 16))
    PREPARED.clear()
    PLAIN.clear()
    fa2cupy.attention(q, q, q)
    gradient = jax.grad(lambda k: fa2cupy.attention(q, k, q).sum())(2 * q)
    assert gradient.shape == q.shape and len(PREPARED) == 1


def test_framework() -> None:
    assert framework_of(jnp.zeros(1)) is JAX


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU: CPU arrays that say that they are on cuda:1. XLA's callback, buffers and outputs are the real ones.


@pytest.fixture
def cuda(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    assert door.first_call  # imported, so that the real target is registered under its own name
    register_gpu_handler_for_cpu()
    monkeypatch.setattr(ffi, "TARGET", "fa2cupy_gpu_test")
    monkeypatch.setattr(ffi, "_gpus", lambda: (1,))
    monkeypatch.setattr(ffi, "stream_of", lambda frame: 0x77)
    device_of = JAX.device

    def device(array: Any, argument: str) -> Device:
        return device_of(array, argument) if is_traced(array) else Device("cuda", 1)

    monkeypatch.setattr(JAX, "device", device)
    ffi.forget()
    transforms.clear_caches()
    jax.clear_caches()
    yield gpu
    transforms.clear_caches()
    jax.clear_caches()


@functools.cache
def register_gpu_handler_for_cpu() -> None:
    jax.ffi.register_ffi_target("fa2cupy_gpu_test", ffi.capsule("CUDA"), platform="cpu")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "uint16"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("workspace_bytes", [0, 1024])
def test_gpu(cuda: FakeGpu, dtype: str, layout: str, workspace_bytes: int) -> None:
    cuda.workspace_bytes = workspace_bytes
    stored, x = inputs(4, "bfloat16" if dtype == "uint16" else dtype)
    keywords = {}
    if dtype == "uint16":
        x, keywords = Inputs(*(array.view("uint16") for array in x)), {"dtype": "bfloat16"}
    for _ in range(2):
        results = both(x, layout, causal=True, **keywords)
        check(stored, {name: jax.block_until_ready(array) for name, array in results.items()}, dtype, causal=True)
        assert (cuda.last.stream, cuda.last.device, cuda.last.current_device) == (0x77, 1, 1)
        assert bool(cuda.last.pointers["workspace"]) == bool(workspace_bytes)
        assert cuda.last.pointers["workspace"] % 256 == 0
    assert len(cuda.launches) == 4
    assert len(ffi._prepared) == 2


def test_gpu_plans_are_of_shape_and_dtype(cuda: FakeGpu) -> None:
    """Calls that differ in nothing but lengths, heads or dtype, in one process, each with its own plan."""
    for seqlens, heads, dtype in (((5, 7), (4, 2), "float16"), ((9, 3), (4, 2), "float16"),
                                  ((5, 7), (4, 4), "float16"), ((5, 7), (4, 2), "bfloat16")):  # fmt: skip
        stored = make_inputs(4, *seqlens, dtype=dtype, heads=heads, head_dim=16)
        x = Inputs(*(jnp.asarray(as_ml_dtypes(array)) for array in stored))
        check(stored, jax.block_until_ready(both(x)), dtype)
    assert len(ffi._prepared) == 8


def test_gpu_of_several(cuda: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call asks on which device it runs: streams come and go."""
    monkeypatch.setattr(ffi, "_gpus", lambda: (0, 1))
    ordinals = iter([0, 1, 1, 0])
    monkeypatch.setattr(ffi, "device_ordinal", lambda frame: next(ordinals))
    _, x = inputs(4, "float16")
    run = jax.jit(fa2cupy.attention)
    for _ in range(4):
        jax.block_until_ready(run(x.q, x.k, x.v))
    assert [launch.device for launch in cuda.launches] == [0, 1, 1, 0]
    assert cuda.binds == 2  # while it was traced


def test_gpu_kernels_are_loaded_while_tracing(cuda: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every GPU: XLA may be recording a command buffer when it calls first."""
    monkeypatch.setattr(ffi, "_gpus", lambda: (0, 1))
    _, x = inputs(4, "float16")
    jax.jit(fa2cupy.attention).lower(x.q, x.k, x.v)
    assert cuda.binds == 2 and not cuda.launches


def test_gpu_workspace_bytes(cuda: FakeGpu) -> None:
    _, x = inputs(5, "float16")
    assert fa2cupy.backward_workspace_bytes(x.q, x.k, x.v) == cuda.workspace_bytes


def test_gpu_dtypes(cuda: FakeGpu) -> None:
    q = jnp.zeros((2, 5, 4, 16))
    with pytest.raises(InvalidType, match=r"q has dtype float32.*on a GPU \(for now\) float16, bfloat16"):
        fa2cupy.attention(q, q, q)
    # Traced, nobody knows yet where it will run: then XLA's call says so.
    with pytest.raises(Exception, match=r"INVALID_ARGUMENT: fa2cupy: q has dtype float32.*on a GPU \(for now\)"):
        jax.block_until_ready(jax.jit(lambda x: fa2cupy.attention(x, x, x))(q))
    assert not cuda.launches


def test_gpu_workspace_of_another_machine(cuda: FakeGpu) -> None:
    """An executable from a cache may have been compiled for a GPU whose plan needs less."""
    _, x = inputs(6, "float16")
    cuda.workspace_bytes = 256
    run = jax.jit(jax.grad(lambda q: fa2cupy.attention(q, x.k, x.v).astype("float32").sum())).lower(x.q).compile()
    cuda.workspace_bytes = 4096
    planner.bound_plan.cache_clear()
    with pytest.raises(Exception, match=r"was compiled with a workspace of 511 bytes but needs 4351"):
        jax.block_until_ready(run(x.q))


def test_devices() -> None:
    class Elsewhere:
        platform, id, local_hardware_id = "tpu", 0, 0

    class Array:
        class sharding:  # noqa: N801
            addressable_devices = frozenset({Elsewhere})

    with pytest.raises(UnsupportedDevice, match=r"q is on a tpu device: CUDA GPUs and the CPU"):
        JAX.device(Array(), "q")
