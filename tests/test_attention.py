"""`attention` and `attention_backward` from outside: NumPy on the CPU, CuPy arrays on a GPU that is not there."""

from __future__ import annotations

import threading
import warnings
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fa2cupy
import fa2cupy.jit
from fa2cupy import log, prepared
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.prepared import PREPARED
from tests.dlpack_producer import Producer
from tests.fake_gpu import FakeGpu, FakePlan, aligned_empty, cupy_array, host_view, to_cupy
from tests.reference import Inputs, as_ml_dtypes, dtype_name, expect, make_inputs

SHAPES = [(5, 7, (4, 2)), (1, 1, (1, 1)), (9, 3, (6, 3)), (3, 9, (6, 1)), (17, 17, (2, 2))]
EMPTY = [(0, 3, 2, (2, 1)), (2, 0, 3, (2, 1)), (2, 3, 0, (2, 1)), (2, 3, 3, (0, 0)), (1, 0, 0, (1, 1))]


def swap(x: Any) -> Any:
    """bshd <-> bhsd, as a view."""
    return x.transpose(0, 2, 1, 3)


def both(x: Inputs, layout: str, **keywords: Any) -> dict[str, Any]:
    """Forward and backward of x (bshd), results in bshd."""
    turn = swap if layout == "bhsd" else (lambda array: array)
    q, k, v, dout = (turn(array) for array in x)
    out, lse = fa2cupy.attention(q, k, v, layout=layout, return_lse=True, **keywords)
    dq, dk, dv = fa2cupy.attention_backward(dout, q, k, v, out, lse, layout=layout, **keywords)
    return {"out": turn(out), "lse": lse, "dq": turn(dq), "dk": turn(dk), "dv": turn(dv)}


# ----------------------------------------------------------------------------------------------------------------------
# NumPy


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_numpy(dtype: str, causal: bool, layout: str) -> None:
    for seqlen_q, seqlen_k, heads in SHAPES:
        stored = make_inputs(1, seqlen_q, seqlen_k, dtype=dtype, heads=heads, head_dim=19)
        x = Inputs(*(as_ml_dtypes(array) for array in stored))
        results = both(x, layout, causal=causal)
        assert results["lse"].dtype == (np.float64 if dtype == "float64" else np.float32)
        assert all(results[name].dtype == x.q.dtype for name in ("out", "dq", "dk", "dv"))
        expect(*stored, causal=causal).check(**{name: _stored(array) for name, array in results.items()})


def _stored(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(19, 8), (8, 19)])
def test_head_dim_of_v(head_dim: int, head_dim_v: int) -> None:
    for layout in ("bshd", "bhsd"):
        x = make_inputs(1, 7, 5, dtype="float32", heads=(4, 2), head_dim=head_dim, head_dim_v=head_dim_v)
        expect(*x, causal=True).check(**both(x, layout, causal=True))
    out, dv = np.empty((2, 7, 4, head_dim_v), np.float32), np.empty((2, 5, 2, head_dim_v), np.float32)
    assert fa2cupy.attention(*x[:3], out=out) is out
    out, lse = fa2cupy.attention(*x[:3], return_lse=True)
    assert fa2cupy.attention_backward(x.dout, *x[:3], out, lse, dv=dv)[2] is dv
    with pytest.raises(InvalidArgument, match=rf"out has shape \(2, 7, 4, {head_dim}\): .*, {head_dim_v}\) is needed"):
        fa2cupy.attention(*x[:3], out=np.empty((2, 7, 4, head_dim), np.float32))
    with pytest.raises(InvalidArgument, match=rf"dv has shape \(2, 5, 2, {head_dim}\): .*, {head_dim_v}\) is needed"):
        fa2cupy.attention_backward(x.dout, *x[:3], out, lse, dv=np.empty((2, 5, 2, head_dim), np.float32))


def test_uint16_in_uint16_out() -> None:
    x = make_inputs(2, 6, 9, dtype="bfloat16", head_dim=16)
    assert x.q.dtype == np.uint16
    results = both(x, "bshd", dtype="bfloat16")
    assert all(results[name].dtype == np.uint16 for name in ("out", "dq", "dk", "dv"))
    named = both(Inputs(*(as_ml_dtypes(array) for array in x)), "bshd")
    for name, array in results.items():
        np.testing.assert_array_equal(array, _stored(named[name]))


def test_scale() -> None:
    x = make_inputs(3, 6, 9, dtype="float32", head_dim=16)
    for scale in (0.3, 0, -0.5, np.float32(0.7)):
        results = both(x, "bshd", softmax_scale=scale)
        expect(*x, scale=float(scale)).check(**results)
    np.testing.assert_array_equal(
        fa2cupy.attention(*x[:3]),
        fa2cupy.attention(*x[:3], softmax_scale=0.25, causal=np.False_),  # type: ignore[arg-type]
    )


def test_new_arrays_are_contiguous_in_the_layout_of_the_call() -> None:
    x = make_inputs(4, 5, 7, dtype="float32", heads=(4, 2), head_dim=8)
    out, lse = fa2cupy.attention(*map(swap, x[:3]), layout="bhsd", return_lse=True)
    assert (out.shape, lse.shape) == ((2, 4, 5, 8), (2, 4, 5))
    assert out.flags.c_contiguous and lse.flags.c_contiguous


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_numpy_outputs_are_written_where_asked(layout: str) -> None:
    x = make_inputs(5, 5, 7, dtype="float32", heads=(4, 2), head_dim=8)
    turn = swap if layout == "bhsd" else (lambda array: array)
    q, k, v, dout = map(turn, x)
    wide_q, wide_k = np.full((2, 5, 12, 8), np.nan, np.float32), np.full((2, 7, 4, 8), np.nan, np.float32)
    out, dq = turn(wide_q[:, :, :4]), turn(wide_q[:, :, 4:8])
    dk, dv = turn(wide_k[:, :, ::2]), turn(wide_k[:, :, 1::2])
    lse = np.full((2, 4, 6), np.nan, np.float32)[..., :5]
    given = fa2cupy.attention(q, k, v, layout=layout, return_lse=True, out=out, lse_out=lse)
    assert given[0] is out and given[1] is lse
    assert fa2cupy.attention(q, k, v, layout=layout, out=out) is out
    gradients = fa2cupy.attention_backward(dout, q, k, v, out, lse, layout=layout, dq=dq, dk=dk, dv=dv)
    assert all(got is wanted for got, wanted in zip(gradients, (dq, dk, dv), strict=True))
    expect(*x).check(out=turn(out), lse=lse, dq=turn(dq), dk=turn(dk), dv=turn(dv))
    assert np.isnan(wide_q[:, :, 8:]).all()


def test_inputs_may_alias_and_are_not_written() -> None:
    x = make_inputs(6, 5, 5, dtype="float32", head_dim=8).q
    before = x.copy()
    x.flags.writeable = False
    out, lse = fa2cupy.attention(x, x, x, return_lse=True)
    fa2cupy.attention_backward(x, x, x, x, out, lse)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_numpy_strides(dtype: str) -> None:
    x = make_inputs(7, 6, 8, dtype=dtype, heads=(4, 2), head_dim=8)
    strided = Inputs(*(_scattered(array) for array in x))
    assert not any(array.flags.c_contiguous for array in strided)
    for name, array in both(strided, "bshd", causal=True).items():
        np.testing.assert_array_equal(array, both(x, "bshd", causal=True)[name])
    expanded = np.broadcast_to(x.k[:, :1, :1], x.k.shape)
    got = fa2cupy.attention(x.q, expanded, expanded)
    np.testing.assert_array_equal(got, fa2cupy.attention(x.q, expanded.copy(), expanded.copy()))


def _scattered(array: np.ndarray) -> np.ndarray:
    """The same values with a non-contiguous last dimension, a reversed one and odd gaps."""
    b, s, h, d = array.shape
    memory = np.full((s, b, h + 1, 3 * d), np.nan, array.dtype)
    result = memory.transpose(1, 0, 2, 3)[:, ::-1, :h, ::3]
    result[...] = array
    return result


@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k", "heads"), EMPTY)
def test_numpy_empty(batch: int, seqlen_q: int, seqlen_k: int, heads: tuple[int, int]) -> None:
    x = make_inputs(8, seqlen_q, seqlen_k, dtype="float16", batch=batch, heads=heads, head_dim=8)
    _check_empty(both(x, "bshd", causal=True), x)


def _check_empty(results: dict[str, Any], x: Inputs) -> None:
    assert results["out"].shape == results["dq"].shape == x.q.shape
    assert results["dk"].shape == results["dv"].shape == x.k.shape
    assert results["lse"].shape == (x.q.shape[0], x.q.shape[2], x.q.shape[1])
    for name in ("out", "dq", "dk", "dv"):
        assert (results[name] == 0).all()
    assert (results["lse"] == -np.inf).all()


def test_rows_without_keys() -> None:
    x = make_inputs(9, 9, 3, dtype="float32", heads=(2, 2), head_dim=8)
    results = both(x, "bshd", causal=True)
    assert (results["out"][:, :6] == 0).all() and (results["dq"][:, :6] == 0).all()
    assert (results["lse"][:, :, :6] == -np.inf).all()
    assert np.isfinite(results["lse"][:, :, 6:]).all()


def test_producers_on_the_cpu_give_numpy() -> None:
    x = make_inputs(10, 5, 7, dtype="bfloat16", heads=(4, 2), head_dim=8)
    q, k, v, dout = (Producer(as_ml_dtypes(array)) for array in x)
    out, lse = fa2cupy.attention(q, k, v, return_lse=True)
    assert type(out) is np.ndarray and out.dtype == ml_dtypes.bfloat16
    mixed = fa2cupy.attention_backward(dout, q, k, v, out, lse)  # results of ours beside arrays of theirs
    expect(*x).check(out=_stored(out), lse=lse, dq=_stored(mixed[0]), dk=_stored(mixed[1]), dv=_stored(mixed[2]))
    given = np.empty((2, 5, 4, 8), ml_dtypes.bfloat16)
    assert fa2cupy.attention(q, k, v, out=given) is given
    np.testing.assert_array_equal(_stored(given), _stored(out))


def test_workspace_of_the_cpu() -> None:
    x = make_inputs(11, 5, 5, dtype="float32", head_dim=8)
    assert fa2cupy.backward_workspace_bytes(*x[:3]) == 0
    assert fa2cupy.attention(*x[:3], workspace=np.empty(0, np.uint8)).shape == x.q.shape


# ----------------------------------------------------------------------------------------------------------------------
# CuPy arrays


def gpu_both(x: Inputs, layout: str = "bshd", **keywords: Any) -> dict[str, np.ndarray]:
    """`both` for fake CuPy arrays, the results as NumPy."""
    results = both(x, layout, **keywords)
    return {name: host_view(array).copy() for name, array in results.items()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "uint16"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_cupy(gpu: FakeGpu, dtype: str, causal: bool, layout: str) -> None:
    named = "bfloat16" if dtype == "uint16" else dtype
    for seqlen_q, seqlen_k, heads in SHAPES:
        stored = make_inputs(1, seqlen_q, seqlen_k, dtype=named, heads=heads, head_dim=19)
        arrays = stored if dtype == "uint16" else Inputs(*(as_ml_dtypes(array) for array in stored))
        x = Inputs(*(to_cupy(array) for array in arrays))
        keywords = {"dtype": "bfloat16"} if dtype == "uint16" else {}
        results = gpu_both(x, layout, causal=causal, **keywords)
        assert results["out"].dtype == results["dk"].dtype == arrays.q.dtype
        assert results["lse"].dtype == np.float32
        expect(*stored, causal=causal).check(**{name: _stored(array) for name, array in results.items()})
        problem = gpu.last.problem
        assert (problem.dtype, problem.causal, problem.head_dim) == (named, causal, 19)
        assert not problem.aligned
        assert {"deterministic": gpu.last.deterministic} == {"deterministic": False}


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(24, 16), (16, 24)])
def test_cupy_head_dim_of_v(gpu: FakeGpu, head_dim: int, head_dim_v: int, layout: str) -> None:
    stored = make_inputs(1, 7, 5, dtype="float16", heads=(4, 2), head_dim=head_dim, head_dim_v=head_dim_v)
    results = gpu_both(Inputs(*map(to_cupy, stored)), layout, causal=True)
    expect(*stored, causal=True).check(**results)
    problem = gpu.last.problem
    assert (problem.head_dim, problem.head_dim_v, problem.aligned) == (head_dim, head_dim_v, True)
    assert problem.softmax_scale == head_dim**-0.5


def test_outputs_may_interleave_with_inputs_of_another_width(gpu: FakeGpu) -> None:
    """k and dv beside each other in one buffer: their ranges meet, their elements do not."""
    stored = make_inputs(2, 5, 7, dtype="float16", heads=(2, 2), head_dim=24, head_dim_v=16)
    q, k, v, dout = map(to_cupy, stored)
    packed = cupy_array((2, 7, 2, 40), np.float16)
    host_view(packed[..., :24])[...] = stored.k
    k, dv = packed[..., :24], packed[..., 24:]
    out, lse = fa2cupy.attention(q, k, v, return_lse=True)
    dq, dk, got = fa2cupy.attention_backward(dout, q, k, v, out, lse, dv=dv)
    assert got is dv
    views = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    expect(*stored).check(**{name: host_view(array) for name, array in views.items()})
    with pytest.raises(InvalidArgument, match="dv shares memory with k"):
        fa2cupy.attention_backward(dout, q, k, v, out, lse, dv=packed[..., 23:39])


def test_one_launch_with_the_pointers_of_the_arrays(gpu: FakeGpu) -> None:
    q, k, v = (cupy_array((2, 5, 4, 16), np.float16) for _ in range(3))
    gpu.stream, gpu.compute = 0x1234, False
    for _ in range(2):
        out, lse = fa2cupy.attention(q, k, v, return_lse=True)
        assert gpu.last.pointers == {name: array.data.ptr for name, array in zip("qkv", (q, k, v), strict=True)} | {
            "out": out.data.ptr,
            "lse": lse.data.ptr,
        }
        assert gpu.last.stream == 0x1234
        gradients = fa2cupy.attention_backward(out, q, k, v, out, lse, deterministic=True)
        assert [gpu.last.pointers[name] for name in ("dq", "dk", "dv")] == [array.data.ptr for array in gradients]
        assert gpu.last.pointers["workspace"] == gpu.allocations[-1].data.ptr
        assert gpu.allocations[-1].nbytes == gpu.workspace_bytes
        assert gpu.last.deterministic is True
    assert len(gpu.launches) == 4
    assert len(gpu.plans) == 2


def test_the_arrays_device_whichever_is_current(gpu: FakeGpu) -> None:
    q = cupy_array((2, 5, 4, 16), np.float16, 3)
    gpu.current = 0
    for _ in range(2):
        out = fa2cupy.attention(q, q, q)
        assert (gpu.last.device, gpu.last.current_device, gpu.current) == (3, 3, 0)
        assert out.data.device_id == 3


def test_no_workspace_is_a_null_pointer(gpu: FakeGpu) -> None:
    gpu.workspace_bytes = 0
    q, lse = cupy_array((2, 5, 4, 16), np.float16), cupy_array((2, 4, 5), np.float32)
    gpu.compute = False
    fa2cupy.attention_backward(q, q, q, q, q, lse)
    assert gpu.last.pointers["workspace"] == 0
    fa2cupy.attention_backward(q, q, q, q, q, lse, workspace=cupy_array((0,), np.uint8))
    assert gpu.last.pointers["workspace"] == 0


def test_workspace_is_used(gpu: FakeGpu) -> None:
    gpu.compute = False
    q, lse = cupy_array((2, 5, 4, 16), np.float16), cupy_array((2, 4, 5), np.float32)
    size = fa2cupy.backward_workspace_bytes(q, q, q, causal=True)
    assert size == gpu.workspace_bytes
    for shape, dtype in (((size,), np.uint8), ((size // 4,), np.float32), ((2, size), np.uint8)):
        workspace = cupy_array(shape, dtype)
        before = len(gpu.allocations)
        fa2cupy.attention_backward(q, q, q, q, q, lse, workspace=workspace)
        assert gpu.last.pointers["workspace"] == workspace.data.ptr
        assert len(gpu.allocations) == before + 3  # dq, dk, dv


def test_outputs_are_written_where_asked(gpu: FakeGpu) -> None:
    stored = make_inputs(12, 5, 7, dtype="float16", heads=(4, 2), head_dim=8)
    q, k, v, dout = map(to_cupy, stored)
    packed_q, packed_k = cupy_array((2, 5, 8, 8), np.float16), cupy_array((2, 7, 4, 8), np.float16)
    out, dq = packed_q[:, :, ::2], packed_q[:, :, 1::2]
    dk, dv = packed_k[:, :, :2], packed_k[:, :, 2:]
    lse = cupy_array((2, 4, 6), np.float32)[..., :5]
    for _ in range(2):
        assert fa2cupy.attention(q, k, v, out=out, lse_out=lse) is out
        got = fa2cupy.attention_backward(dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv)
        assert all(a is b for a, b in zip(got, (dq, dk, dv), strict=True))
        views = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
        expect(*stored).check(**{name: host_view(array) for name, array in views.items()})
    assert len(gpu.allocations) == 2  # the two workspaces
    assert len(gpu.plans) == 2


def test_some_outputs_given(gpu: FakeGpu) -> None:
    stored = make_inputs(13, 5, 7, dtype="float16", heads=(4, 2), head_dim=8)
    q, k, v, dout = map(to_cupy, stored)
    out, lse = fa2cupy.attention(q, k, v, return_lse=True)
    for given in ("dq", "dk", "dv"):
        mine = cupy_array(q.shape if given == "dq" else k.shape, np.float16)
        gradients = dict(
            zip(("dq", "dk", "dv"), fa2cupy.attention_backward(dout, q, k, v, out, lse, **{given: mine}), strict=True)
        )
        assert gradients[given] is mine
        expect(*stored).check(**{name: host_view(array) for name, array in gradients.items()})


@pytest.mark.parametrize("name", ["q", "k", "v", "dout", "out", "lse"])
def test_one_copy_of_a_non_contiguous_input(gpu: FakeGpu, name: str) -> None:
    stored = make_inputs(14, 5, 7, dtype="float16", heads=(4, 2), head_dim=8)
    arrays = dict(zip(("q", "k", "v", "dout"), map(to_cupy, stored), strict=True))
    arrays["out"], arrays["lse"] = fa2cupy.attention(arrays["q"], arrays["k"], arrays["v"], return_lse=True)
    original = host_view(arrays[name])
    wide = cupy_array((*original.shape[:-1], 2 * original.shape[-1]), original.dtype)
    arrays[name] = wide[..., ::2]
    host_view(arrays[name])[...] = original
    for _ in range(2):
        order = [arrays[argument] for argument in ("dout", "q", "k", "v", "out", "lse")]
        gradients = dict(zip(("dq", "dk", "dv"), fa2cupy.attention_backward(*order), strict=True))
        expect(*stored).check(**{key: host_view(array) for key, array in gradients.items()})
        assert dict(gpu.last.problem.strides)[name][2] in (1, 8)
    assert len(gpu.plans) == 2


def test_reused_copies_do_not_hide_overlap(gpu: FakeGpu) -> None:
    wide = cupy_array((2, 5, 4, 32), np.float16)
    q = wide[..., ::2]
    k = cupy_array((2, 5, 4, 16), np.float16)
    with pytest.raises(fa2cupy.InvalidArgument, match="out shares memory with q"):
        fa2cupy.attention(q, k, k, out=wide[..., :16])


@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k", "heads"), EMPTY)
def test_cupy_empty(gpu: FakeGpu, batch: int, seqlen_q: int, seqlen_k: int, heads: tuple[int, int]) -> None:
    stored = make_inputs(8, seqlen_q, seqlen_k, dtype="float16", batch=batch, heads=heads, head_dim=8)
    _check_empty(gpu_both(Inputs(*map(to_cupy, stored)), causal=True), stored)


def test_producers_on_a_gpu_give_cupy(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda device=-1: type("Stream", (), {"ptr": 0}))
    stored = make_inputs(15, 5, 7, dtype="bfloat16", heads=(4, 2), head_dim=8)
    x = Inputs(*(Producer(as_ml_dtypes(array), device=(2, 1)) for array in stored))
    for _ in range(2):
        out, lse = fa2cupy.attention(x.q, x.k, x.v, return_lse=True)
        assert type(out) is cupy.ndarray and out.data.device_id == 1
        dq, _, _ = fa2cupy.attention_backward(x.dout, x.q, x.k, x.v, out, lse)
        expect(*stored).check(out=_stored(host_view(out)), lse=host_view(lse), dq=_stored(host_view(dq)))
    assert len(gpu.plans) == 2
    assert all(array.streams == [1] * len(array.streams) for array in x)


# ----------------------------------------------------------------------------------------------------------------------
# The signature of a call: whatever a plan depends on must be in it


def variants() -> list[dict[str, Any]]:
    """Calls that differ from q = k = v = (2, 6, 4, 16) float16, contiguous, in one thing each."""
    plain = {name: to_cupy(_values(name, (2, 6, 4, 16))) for name in "qkv"}
    result: list[dict[str, Any]] = [plain]
    for name in "qkv":
        values = host_view(plain[name])
        for other in (
            to_cupy(values, order=(0, 2, 1, 3)),
            to_cupy(values, order=(1, 0, 2, 3)),
            to_cupy(values, offset=2),
            to_cupy(values, offset=8),
            _gaps(values),
            _reversed(values),
        ):
            result.append({**plain, name: other})
    short = {name: plain[name][:, :5] for name in "kv"}
    result += [
        {**plain, **short},
        {**plain, "q": plain["q"][:, :5]},
        {name: array[:1] for name, array in plain.items()},
        {**plain, "k": plain["k"][:, :, :2], "v": plain["v"][:, :, :2]},
        {**plain, "causal": True},
        {**plain, "softmax_scale": 0.5},
        {**plain, "softmax_scale": -0.5},
        {**plain, "layout": "bhsd"},
        {**plain, "k": plain["q"]},
        {**plain, "lse_out": cupy_array((2, 4, 6), np.float32)},
        {**plain, "lse_out": cupy_array((2, 4, 7), np.float32)[..., :6]},
        {**plain, "lse_out": cupy_array((4, 2, 6), np.float32).transpose(1, 0, 2)},
        {**plain, "out": cupy_array((2, 6, 4, 16), np.float16)},
        {**plain, "out": cupy_array((2, 6, 4, 16), np.float16, offset=2)},
        {**plain, "out": cupy_array((2, 4, 6, 16), np.float16).transpose(0, 2, 1, 3)},
        {**plain, "out": cupy_array((2, 6, 8, 16), np.float16)[:, :, 1:5]},
    ]
    return result


def _values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(ord(name)).standard_normal(shape).astype(np.float16)


def _gaps(values: np.ndarray) -> Any:
    b, s, h, d = values.shape
    array = cupy_array((b, s, h, d + 3), values.dtype)[..., :d]
    host_view(array)[...] = values
    return array


def _reversed(values: np.ndarray) -> Any:
    array = cupy_array(values.shape, values.dtype)[:, ::-1]
    host_view(array)[...] = values
    return array


def test_every_variant_is_right_in_any_order(gpu: FakeGpu) -> None:
    cases = variants()
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(cases)), 3))
    for index in order:
        case = dict(cases[index])
        q, k, v = (case.pop(name) for name in "qkv")
        causal, scale = case.get("causal", False), case.get("softmax_scale")
        out, lse = fa2cupy.attention(q, k, v, return_lse=True, **case)
        turn = swap if case.get("layout") == "bhsd" else (lambda array: array)
        host = [turn(host_view(array)) for array in (q, k, v)]
        expect(*host, causal=causal, scale=scale).check(out=turn(host_view(out)), lse=host_view(lse))
        aligned = all(
            array.data.ptr % 16 == 0
            and all(s % 16 == 0 for n, s in zip(array.shape[:3], array.strides[:3], strict=True) if n > 1)
            for array in (q, k, v, out)
        )
        assert gpu.last.problem.aligned == aligned
    distinct = len({id(plan) for plan in gpu.plans})
    assert distinct == len(gpu.plans) <= len(cases)


def test_same_signature_same_plan(gpu: FakeGpu) -> None:
    gpu.compute = False
    for _ in range(5):
        fa2cupy.attention(*(cupy_array((2, 6, 4, 16), np.float16) for _ in range(3)))
    assert (len(gpu.plans), gpu.binds, len(PREPARED), len(gpu.launches)) == (1, 1, 1, 5)


def test_lse_that_nobody_asked_for(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is computed into scratch memory, by the same plan, and an array that was given for it is still written.

    Small ones into memory that all calls share.
    """
    x = make_inputs(17, 5, 7, dtype="float16", heads=(4, 2), head_dim=8)
    q, k, v, _ = map(to_cupy, x)
    given = cupy_array((2, 4, 5), np.float32)
    for shared_bytes in (1 << 20, 2 * 4 * 5 * 4 - 1):
        monkeypatch.setattr(prepared, "_SHARED_BYTES", shared_bytes)
        PREPARED.clear()
        before = len(gpu.allocations)
        for _ in range(2):
            out = fa2cupy.attention(q, k, v)
            both_out, lse = fa2cupy.attention(q, k, v, return_lse=True)
            assert fa2cupy.attention(q, k, v, out=out, lse_out=given) is out
            expect(*x[:3]).check(out=host_view(out), lse=host_view(lse))
            for got, wanted in ((out, both_out), (given, lse)):
                np.testing.assert_array_equal(host_view(got), host_view(wanted))
        sizes = [array.nbytes for array in gpu.allocations[before:]]
        small = sizes.count(2 * 4 * 5 * 4)  # two are lse, which was asked for
        assert (len(sizes), sizes.count(1 << 20), small) == ((7, 1, 2) if shared_bytes == 1 << 20 else (8, 0, 4))
    assert len(gpu.plans) == 1


def test_shared_scratch_is_not_made_in_a_capture(gpu: FakeGpu) -> None:
    """A graph's memory may go with the graph. Once it is there, a capture uses it like any call."""
    q, out = (cupy_array((2, 5, 4, 8), np.float16) for _ in range(2))
    lse = cupy_array((2, 4, 5), np.float32)
    fa2cupy.attention(q, q, q, out=out, lse_out=lse)
    gpu.capturing, gpu.stream = True, 5
    with pytest.raises(InvalidArgument, match=r"lse_out= must be given"):
        fa2cupy.attention(q, q, q, out=out)
    gpu.capturing = False
    PREPARED.clear()
    fa2cupy.attention(q, q, q)
    gpu.capturing = True
    made = len(gpu.allocations)
    fa2cupy.attention(q, q, q, out=out)
    assert len(gpu.allocations) == made


def test_equal_problems_share_a_plan(gpu: FakeGpu) -> None:
    """Different signatures, the same kernel: junk strides, numpy scalars, layouts of one memory."""
    gpu.compute = False
    q = cupy_array((1, 6, 1, 16), np.float16)
    junk = cupy_array((1, 6, 1, 16), np.float16, strides=(2, 32, 64, 2))
    fa2cupy.attention(q, q, q)
    fa2cupy.attention(junk, q, q)
    fa2cupy.attention(q, q, q, softmax_scale=0.25)
    fa2cupy.attention(q, q, q, softmax_scale=np.float32(0.25), causal=np.False_)  # type: ignore[arg-type]
    assert len(gpu.launches) == 4
    assert (len(gpu.plans), len(PREPARED)) == (1, 4)


def test_overlap_is_checked_at_every_call(gpu: FakeGpu) -> None:
    gpu.compute = False
    memory = aligned_empty(5 * 768)
    q, k, v, out = (_over(memory[i * 768 :], (1, 6, 4, 16)) for i in range(4))
    for _ in range(2):
        fa2cupy.attention(q, k, v, out=out)
        for shift, name in ((0, "q"), (32, "q"), (768, "k"), (736, "q"), (1536 + 32, "v"), (1536 - 32, "k")):
            with pytest.raises(fa2cupy.InvalidArgument, match=f"out shares memory with {name}"):
                fa2cupy.attention(q, k, v, out=_over(memory[shift:], (1, 6, 4, 16)))
    assert len(gpu.launches) == 2


def _over(memory: np.ndarray, shape: tuple[int, ...]) -> Any:
    import cupy

    owned = cupy.cuda.UnownedMemory(memory.ctypes.data, memory.nbytes, memory, 0)
    return cupy.ndarray(shape, np.float16, cupy.cuda.MemoryPointer(owned, 0))


def test_workspace_overlap_is_checked_at_every_call(gpu: FakeGpu) -> None:
    gpu.compute = False
    q, lse = cupy_array((2, 5, 4, 16), np.float16), cupy_array((2, 4, 5), np.float32)
    dq = cupy_array((2, 5, 4, 16), np.float16)
    for _ in range(2):
        fa2cupy.attention_backward(q, q, q, q, q, lse, dq=dq, workspace=cupy_array((1024,), np.uint8))
        with pytest.raises(fa2cupy.InvalidArgument, match="workspace shares memory with dq"):
            fa2cupy.attention_backward(q, q, q, q, q, lse, dq=dq, workspace=dq)


def test_cache_is_bounded(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.compute = False
    monkeypatch.setattr(PREPARED, "_capacity", 8)
    q = cupy_array((1, 1, 1, 16), np.float16)
    memory = cupy_array((1, 64, 1, 16), np.float16)
    for length in range(1, 33):  # a decoding loop
        fa2cupy.attention(q, memory[:, :length], memory[:, :length])
        assert gpu.last.problem.seqlen_k == length
    assert len(PREPARED) == 8
    plans = len(gpu.plans)
    fa2cupy.attention(q, memory[:, :32], memory[:, :32])
    assert len(gpu.plans) == plans


def test_kernel_family_is_part_of_the_plan(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.compute = False
    q = cupy_array((1, 6, 1, 16), np.float16)
    fa2cupy.attention(q, q, q)
    PREPARED.clear()
    monkeypatch.setenv("FA2CUPY_KERNEL", "sm80")
    fa2cupy.attention(q, q, q)
    assert len(gpu.plans) == 2
    PREPARED.clear()
    monkeypatch.setenv("FA2CUPY_KERNEL", "sm70")
    with pytest.raises(fa2cupy.InvalidArgument, match="FA2CUPY_KERNEL"):
        fa2cupy.attention(q, q, q)


def test_kernel_family_reaches_the_plan(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.compute = False
    q = cupy_array((1, 6, 1, 16), np.float16)
    for value, family in (("sm80", "sm80"), ("sm90", "sm90"), ("", None)):
        PREPARED.clear()
        monkeypatch.setenv("FA2CUPY_KERNEL", value)
        out, lse = fa2cupy.attention(q, q, q, return_lse=True)
        assert gpu.plans[-1].family == family
        fa2cupy.attention_backward(out, q, q, q, out, lse)
        assert gpu.plans[-1].family == family


GOOD, BAD = "13.0.88 CL-1", "11.8.89 CL-2"


@pytest.fixture
def wgmma(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Forward plans launch an sm_90a kernel; the list's last entry is the NVRTC that is asked for its build."""
    builds = [GOOD]
    gpu.compute, gpu.launches_of_plans = False, (SimpleNamespace(arch="sm_90a"),)
    monkeypatch.setattr(fa2cupy.jit, "expected_nvrtc_build", lambda: builds[-1])
    log.warn_once.cache_clear()
    return builds


def forwards(count: int) -> None:
    for length in range(1, count + 1):
        q = cupy_array((1, length, 1, 16), np.float16)
        fa2cupy.attention(q, q, q)


def test_good_nvrtc_says_nothing(gpu: FakeGpu, wgmma: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forwards(2)
    assert [plan.objection for plan in gpu.plans] == [""] * len(gpu.plans)
    assert gpu.binds == 2


def test_bad_nvrtc_means_sm80_kernels_and_one_warning(gpu: FakeGpu, wgmma: list[str]) -> None:
    wgmma.append(BAD)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        forwards(3)
    (warning,) = caught
    assert warning.category is fa2cupy.Fa2Warning
    for words in ("NVRTC 11.8.89", "sm_80 kernels are used", "12.9.86 or newer", "pip install"):
        assert words in str(warning.message)
    assert gpu.binds == 3
    assert [plan.objection for plan in gpu.plans if not plan.launches] == [fa2cupy.jit.wgmma_objection(BAD)] * 3


def test_bad_nvrtc_that_is_asked_for(gpu: FakeGpu, wgmma: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    wgmma.append(BAD)
    monkeypatch.setenv("FA2CUPY_KERNEL", "sm90")
    with pytest.warns(RuntimeWarning, match=r"NVRTC 11\.8\.89.* but FA2CUPY_KERNEL=sm90 asks for it"):
        forwards(2)
    assert gpu.binds == 2 and all(plan.launches for plan in gpu.plans)


def test_nvrtc_that_is_not_the_one_remembered(gpu: FakeGpu, wgmma: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache remembers a good NVRTC; compiling loads a bad one."""
    bind = FakePlan.bind

    def load_nvrtc(plan: FakePlan, device_index: int) -> Any:
        wgmma.append(BAD)
        return bind(plan, device_index)

    monkeypatch.setattr(FakePlan, "bind", load_nvrtc)
    with pytest.warns(RuntimeWarning, match="sm_80 kernels are used"):
        forwards(1)
    assert gpu.binds == 2 and not gpu.plans[-1].launches


def test_debug_logs_each_plan_once(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.compute = False
    monkeypatch.setenv("FA2CUPY_DEBUG", "1")
    q = cupy_array((1, 6, 1, 16), np.float16)
    fa2cupy.attention(q, q, q)
    fa2cupy.attention(q, q, q)
    assert [record.name for record in caplog.records if "AttentionProblem(" in record.message] == ["fa2cupy"]


def test_threads(gpu: FakeGpu) -> None:
    cases = []
    for seed in range(6):
        stored = make_inputs(seed, 5 + seed % 3, 7, dtype="float16", heads=(4, 2), head_dim=8)
        cases.append((stored, Inputs(*map(to_cupy, stored)), expect(*stored)))
    failures: list[BaseException] = []

    def work(start: int) -> None:
        try:
            for i in range(30):
                _, x, expected = cases[(start + i) % len(cases)]
                out, lse = fa2cupy.attention(x.q, x.k, x.v, return_lse=True)
                expected.check(out=host_view(out), lse=host_view(lse))
        except BaseException as error:
            failures.append(error)

    gpu.current = 0
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_big_offsets(gpu: FakeGpu) -> None:
    gpu.compute = False
    import cupy

    memory = aligned_empty(64)
    owned = cupy.cuda.UnownedMemory(memory.ctypes.data, 2**40, memory, 0)
    shape, strides = (3, 9000, 300000, 64), (2 * 9000 * 300000 * 64, 2 * 300000 * 64, 128, 2)
    q = cupy.ndarray(shape, np.float16, cupy.cuda.MemoryPointer(owned, 0), strides)
    k = cupy_array((3, 1, 1, 64), np.float16)
    fa2cupy.attention(q[:, :, :1], k, k, out=q[:, :, 1:2])
    assert dict(gpu.last.problem.strides)["q"] == (9000 * 300000 * 64, 300000 * 64, 0)


def test_results_keep_the_name_of_their_dtype(gpu: FakeGpu) -> None:
    x = make_inputs(16, 4, 4, dtype="bfloat16", head_dim=8)
    for array in (to_cupy(as_ml_dtypes(x.q)), to_cupy(x.q)):
        keywords = {"dtype": "bfloat16"} if array.dtype == np.uint16 else {}
        out = fa2cupy.attention(array, array, array, **keywords)
        assert out.dtype == array.dtype
        assert dtype_name(out) == "bfloat16"


# ----------------------------------------------------------------------------------------------------------------------
# attention_vjp


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_vjp(gpu: FakeGpu, layout: str, on_gpu: bool) -> None:
    """What attention returns, and attention_backward with the same options."""
    x = make_inputs(21, 5, 7, dtype="float16", heads=(4, 2), head_dim=16)
    q, k, v, dout = (a if layout == "bshd" else np.ascontiguousarray(a.transpose(0, 2, 1, 3)) for a in x)
    if on_gpu:
        q, k, v, dout = map(to_cupy, (q, k, v, dout))
    options = {"causal": True, "softmax_scale": 0.3, "layout": layout}
    out, lse = fa2cupy.attention(q, k, v, return_lse=True, **options)
    wanted = fa2cupy.attention_backward(dout, q, k, v, out, lse, deterministic=True, **options)
    got, pullback = fa2cupy.attention_vjp(q, k, v, deterministic=True, **options)
    (_, same), _ = fa2cupy.attention_vjp(q, k, v, return_lse=True, **options)
    see = host_view if on_gpu else np.asarray
    assert type(got) is type(q) and (see(got) == see(out)).all() and (see(same) == see(lse)).all()
    for _ in range(2):
        for mine, other in zip(pullback(dout), wanted, strict=True):
            assert type(mine) is type(q) and (see(mine) == see(other)).all()
    if on_gpu:
        assert gpu.last.deterministic
    with_dlse = fa2cupy.attention_backward(dout, q, k, v, out, lse, dlse=lse, **options)
    for mine, other in zip(pullback(dout, lse), with_dlse, strict=True):
        assert (see(mine) == see(other)).all()
    assert (see(with_dlse[0]) != see(wanted[0])).any()


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(5, 7), (7, 5), (1, 3), (4, 0)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_dlse_of_any_strides(gpu: FakeGpu, seqlen_q: int, seqlen_k: int, order: tuple[int, ...]) -> None:
    """On a GPU its strides reach the kernels; rows that see no key take nothing of it, whatever it is there."""
    x = make_inputs(22, seqlen_q, seqlen_k, dtype="float16", heads=(4, 2), head_dim=16)
    dlse = np.random.default_rng(23).standard_normal((x.q.shape[0], 4, seqlen_q)).astype(np.float32)
    wanted = expect(*x, causal=True, dlse=dlse)
    dlse[:, :, : max(0, seqlen_q - seqlen_k) if seqlen_k else seqlen_q] = np.nan
    for place in (np.asarray, to_cupy):
        q, k, v, dout = map(place, x)
        out, lse = fa2cupy.attention(q, k, v, causal=True, return_lse=True)
        given = dlse.transpose(order).copy().transpose(np.argsort(order))
        if place is to_cupy:
            given = to_cupy(dlse, order=order)
        results = fa2cupy.attention_backward(dout, q, k, v, out, lse, causal=True, dlse=given)
        see = host_view if place is to_cupy else np.asarray
        wanted.check(**{name: see(array) for name, array in zip(("dq", "dk", "dv"), results, strict=True)})
    assert gpu.last.problem.softmax is not None and "dlse" in gpu.last.pointers


def test_dlse_is_checked() -> None:
    q = np.ones((1, 3, 2, 8), np.float16)
    out, lse = fa2cupy.attention(q, q, q, return_lse=True)
    _, pullback = fa2cupy.attention_vjp(q, q, q)
    with pytest.raises(InvalidArgument, match=r"dlse has shape \(1, 3, 2\): lse's shape is needed, here \(1, 2, 3\)"):
        pullback(out, lse.transpose(0, 2, 1))
    with pytest.raises(InvalidType, match="dlse has dtype float64: float32 is needed"):
        pullback(out, lse.astype(np.float64))
    with pytest.raises(InvalidType, match="dlse is a float"):
        pullback(out, 1.0)
