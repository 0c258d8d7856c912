"""CuPy, torch and JAX arrays on the GPU: zero-copy in, the same kind out, the same bits whoever brings them."""

from __future__ import annotations

import math
from typing import Any

import cupy
import numpy as np
import pytest
import torch

import fa2cupy
from tests.gpu import oracle
from tests.gpu.cases import DTYPES, Case
from tests.gpu.runner import inputs_of

jax = pytest.importorskip("jax")

NAMES = ("q", "k", "v", "dout")
CASE = Case(150, 203, 64, "bfloat16", True, heads=(6, 3), seed=11)
NEEDS = [
    Case(64, 64, 64, dtype, causal, given=False, deterministic=True) for dtype in DTYPES for causal in (False, True)
]


def _to_cupy(x: torch.Tensor) -> Any:
    return cupy.from_dlpack(x.contiguous()).copy()


def _to_jax(x: torch.Tensor) -> Any:
    return jax.dlpack.from_dlpack(x.contiguous().clone())


def _to_torch(x: Any) -> torch.Tensor:
    if isinstance(x, torch.Tensor):
        return x
    if isinstance(x, cupy.ndarray):
        bits = torch.from_dlpack(x.view({2: cupy.int16, 4: cupy.int32}[x.itemsize]))
        return bits.view(
            torch.float32 if x.itemsize == 4 else {"float16": torch.float16}.get(str(x.dtype), torch.bfloat16)
        )
    return torch.from_dlpack(jax.block_until_ready(x))


def _is_cupy(x: Any, dtype: str) -> bool:
    return isinstance(x, cupy.ndarray) and str(x.dtype) == dtype


FRAMEWORKS = {
    "torch": (lambda x: x, lambda x, dtype: isinstance(x, torch.Tensor) and str(x.dtype) == f"torch.{dtype}"),
    "cupy": (_to_cupy, _is_cupy),
    "jax": (_to_jax, lambda x, dtype: isinstance(x, jax.Array) and str(x.dtype) == dtype),
}


def _everything(arrays: dict[str, Any], **options: Any) -> dict[str, Any]:
    q, k, v, dout = (arrays[name] for name in NAMES)
    out, lse = fa2cupy.attention(q, k, v, return_lse=True, **options)
    gradients = fa2cupy.attention_backward(dout, q, k, v, out, lse, deterministic=True, **options)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), strict=True))


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_framework_gets_its_own_kind_and_the_same_bits(dtype: str, layout: str, device: torch.device) -> None:
    case = Case(150, 203, 64, dtype, True, heads=(6, 3), seed=11, head_dim_v=96)
    inputs = inputs_of(case, device)
    lse_ref, bounds = oracle.attention(*(inputs[name] for name in NAMES), causal=True, scale=0.125)
    seen: dict[str, dict[str, torch.Tensor]] = {}
    for framework, (convert, is_kind) in FRAMEWORKS.items():
        users = {n: x if layout == "bshd" else x.transpose(1, 2).contiguous() for n, x in inputs.items()}
        arrays = {name: convert(x) for name, x in users.items()}
        before = {name: _to_torch(x).clone() for name, x in arrays.items()}
        torch.cuda.synchronize()
        results = _everything(arrays, causal=True, layout=layout)
        for name, result in results.items():
            assert is_kind(result, "float32" if name == "lse" else dtype), f"{framework} {name}: {type(result)}"
        cupy.cuda.get_current_stream().synchronize()
        seen[framework] = {
            n: x if layout == "bshd" or n == "lse" else x.transpose(1, 2)
            for n, x in ((n, _to_torch(r)) for n, r in results.items())
        }
        for name, x in before.items():
            assert torch.equal(_to_torch(arrays[name]), x), f"{framework} wrote {name}"
        judged = {name: x for name, x in seen[framework].items() if name != "lse"}
        judgements = oracle.judge(judged, seen[framework]["lse"], lse_ref, bounds, {})
        problems = [p for j in judgements.values() for p in j.problems]
        assert not problems, f"{framework}: {problems}"
    for framework in ("cupy", "jax"):
        for name, x in seen["torch"].items():
            assert torch.equal(x, seen[framework][name]), f"{framework} {name} differs from torch's"


def test_uint16_arrays_hold_bfloat16(device: torch.device) -> None:
    inputs = inputs_of(CASE, device)
    bits = {name: _to_cupy(x.view(torch.int16)).view(cupy.uint16) for name, x in inputs.items()}
    expected = _everything(inputs, causal=True)
    results = _everything(bits, causal=True, dtype="bfloat16")
    cupy.cuda.get_current_stream().synchronize()
    for name, result in results.items():
        assert str(result.dtype) == ("float32" if name == "lse" else "uint16")
        mine = _to_torch(result)
        assert torch.equal(mine, expected[name]), name
    with pytest.raises(TypeError, match="bfloat16"):
        fa2cupy.attention(bits["q"], bits["k"], bits["v"])


def test_cupy_negative_and_foreign_strides(device: torch.device) -> None:
    """Reversed sequences (negative strides), Fortran order (one copy), a view into a bigger array."""
    case = Case(96, 96, 64, "float16", False, heads=(4, 4), seed=2)
    inputs = {name: _to_cupy(x) for name, x in inputs_of(case, device).items()}
    expected = _everything(inputs)
    odd = dict(inputs)
    odd["q"] = inputs["q"][:, ::-1].copy()[:, ::-1]
    odd["k"] = cupy.asfortranarray(inputs["k"])
    odd["v"] = cupy.full((2, 96, 4, 80), math.nan, dtype=cupy.float16)[..., 8:72]
    odd["v"][...] = inputs["v"]
    assert odd["q"].strides[1] < 0 and odd["k"].strides[-1] != 2
    results = _everything(odd)
    cupy.cuda.get_current_stream().synchronize()
    for name, result in results.items():
        assert bool((result == expected[name]).all()), name


def test_cupy_results_into_given_arrays(device: torch.device) -> None:
    inputs = {name: _to_cupy(x) for name, x in inputs_of(CASE, device).items()}
    q, k, v, dout = (inputs[name] for name in NAMES)
    expected = _everything(inputs, causal=True)
    out, lse = cupy.full_like(q, math.nan), cupy.full((2, 6, 150), math.nan, dtype=cupy.float32)
    got = fa2cupy.attention(q, k, v, causal=True, return_lse=True, out=out, lse_out=lse)
    assert got[0] is out and got[1] is lse
    gradients = [cupy.full_like(x, math.nan) for x in (q, k, v)]
    size = fa2cupy.backward_workspace_bytes(q, k, v, causal=True, deterministic=True)
    workspace = cupy.full(size, 255, dtype=cupy.uint8)
    made = fa2cupy.attention_backward(
        dout, q, k, v, out, lse, causal=True, deterministic=True, workspace=workspace,
        dq=gradients[0], dk=gradients[1], dv=gradients[2],
    )  # fmt: skip
    assert all(x is y for x, y in zip(made, gradients, strict=True))
    for name, result in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), strict=True):
        assert bool((result == expected[name]).all()), name


class _Producer:
    """An array of a library that fa2cupy has never heard of."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.streams: list[object] = []

    def __dlpack__(self, *, stream: object = None, **keywords: Any) -> object:
        self.streams.append(stream)
        return self._array.__dlpack__(stream=stream, **keywords)

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self._array.__dlpack_device__()
        return device


def test_any_dlpack_producer_gets_cupy_back(device: torch.device) -> None:
    inputs = {name: _to_cupy(x) for name, x in inputs_of(CASE, device).items()}
    producers = [_Producer(inputs[name]) for name in ("q", "k", "v")]
    out = fa2cupy.attention(*producers, causal=True)
    assert _is_cupy(out, "bfloat16")
    assert all(p.streams and p.streams[0] is not None for p in producers), "a producer was not asked for our stream"
    assert bool((out == fa2cupy.attention(inputs["q"], inputs["k"], inputs["v"], causal=True)).all())


def test_jax_under_load_and_after_its_own_work(device: torch.device) -> None:
    """Inputs that XLA is still computing, results that XLA uses at once."""
    x = {name: _to_jax(t) for name, t in inputs_of(CASE, device).items()}

    @jax.jit
    def slow(a: Any) -> Any:
        big = jax.numpy.ones((4096, 4096), dtype="float32")
        for _ in range(20):
            big = big @ big * 1e-4
        return a + (0 * big[0, 0]).astype(a.dtype)

    expected = np.asarray(fa2cupy.attention(x["q"], x["k"], x["v"], causal=True).astype("float32"))
    for _ in range(3):
        out = fa2cupy.attention(slow(x["q"]), slow(x["k"]), slow(x["v"]), causal=True)
        doubled = jax.jit(lambda y: y.astype("float32") * 2)(out)
        assert (np.asarray(doubled) == 2 * expected).all()


def test_what_must_not_pass_silently(device: torch.device) -> None:
    inputs = inputs_of(CASE, device)
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    with pytest.raises(ValueError, match="no_grad"):
        fa2cupy.attention(q.clone().requires_grad_(), k, v, out=torch.empty_like(q))
    with torch.no_grad():
        fa2cupy.attention(q.clone().requires_grad_(), k, v, out=torch.empty_like(q))
    with pytest.raises(TypeError, match="same framework"):
        fa2cupy.attention(q, _to_cupy(k), _to_cupy(v))
    with pytest.raises(ValueError, match="device"):
        fa2cupy.attention(q, k.cpu(), v)
    with pytest.raises(TypeError, match="float32"):
        fa2cupy.attention(q.float(), k.float(), v.float())
    with pytest.raises(TypeError, match="softmax_scale"):
        fa2cupy.attention(q, k, v, softmax_scale=torch.ones((), device=device))


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_cpu_arrays_beside_a_gpu(framework: str) -> None:
    """CPU arrays are computed on the CPU and stay there, GPU or not."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 33, 2, 16), dtype=np.float32) for _ in range(3))
    expected = fa2cupy.attention(q, k, v, causal=True)
    if framework == "torch":
        out = fa2cupy.attention(*(torch.from_numpy(x) for x in (q, k, v)), causal=True)
        assert out.device.type == "cpu"
    else:
        cpu = jax.devices("cpu")[0]
        out = fa2cupy.attention(*(jax.device_put(x, cpu) for x in (q, k, v)), causal=True)
        assert out.devices() == {cpu}
    assert (np.asarray(out) == expected).all()
