"""float32 and float64 on a GPU: what the doors pass on, what is planned, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import fa2cupy
from fa2cupy.errors import InvalidArgument
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.kernels import plan_backward, plan_forward
from fa2cupy.kernels.params import BwdParams, FwdParams
from fa2cupy.kernels.tiles import SHARED_MEMORY
from fa2cupy.prepared import PREPARED
from fa2cupy.spec import of_dtype
from tests.fake_gpu import FakeGpu, cupy_array, to_cupy
from tests.gpu.cases import Case
from tests.plan_cases import A100, H200, backward_problem, problem
from tests.reference import Inputs, expect, make_inputs
from tests.scores import Features

A10 = DeviceInfo(0, "A10", (8, 6), 72, SHARED_MEMORY["sm_86"], 6 << 20)


def both(x: Inputs, **keywords: Any) -> dict[str, Any]:
    out, lse = fa2cupy.attention(x.q, x.k, x.v, return_lse=True, **keywords)
    gradients = fa2cupy.attention_backward(x.dout, x.q, x.k, x.v, out, lse, **keywords)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), strict=True))


def on_gpu(dtype: str, **keywords: Any) -> tuple[Inputs, Inputs]:
    stored = make_inputs(1, 5, 7, dtype=dtype, heads=(4, 2), head_dim=19, **keywords)
    return stored, Inputs(*map(to_cupy, stored))


# ----------------------------------------------------------------------------------------------------------------------
# CuPy arrays


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cupy_arrays(gpu: FakeGpu, dtype: str) -> None:
    """As they come; results are of their dtype, and so is lse of float64."""
    stored, x = on_gpu(dtype)
    results = both(x, causal=True)
    assert results["lse"].dtype == dtype
    assert all(array.dtype == dtype for array in results.values())
    expect(*stored, causal=True).check(**{name: as_host(array) for name, array in results.items()})
    assert [launch.problem.dtype for launch in gpu.launches] == [dtype, dtype]


def as_host(array: Any) -> np.ndarray:
    from tests.fake_gpu import host_view

    return host_view(array).copy()


def test_scores_of_float64(gpu: FakeGpu) -> None:
    """Slopes of its own type or of float32, sinks of either."""
    stored, x = on_gpu("float64")
    for kind in (np.float32, np.float64):
        slopes, sinks = (np.linspace(*ends, 4).astype(kind) for ends in ((0.5, 0.1), (-1.0, 1.0)))
        results = both(x, alibi_slopes=to_cupy(slopes), sinks=to_cupy(sinks), softcap=3.0)
        features = Features(softcap=3.0, slopes=slopes, sinks=sinks)
        expect(*stored, features=features).check(**{name: as_host(array) for name, array in results.items()})


def test_precision_is_part_of_the_plan(gpu: FakeGpu) -> None:
    """None and "float32" are one arithmetic; "tf32" another, and neither is found in the place of the other."""
    gpu.compute = False
    q = cupy_array((2, 5, 4, 16), np.float32)
    for precision in (None, "float32", "tf32", None, "tf32"):
        fa2cupy.attention(q, q, q, precision=precision)
    assert [launch.problem.arithmetic for launch in gpu.launches] == ["float32", "float32", "tf32", "float32", "tf32"]
    lse = cupy_array((2, 4, 5), np.float32)
    fa2cupy.attention_backward(q, q, q, q, q, lse, precision="tf32")
    assert gpu.last.problem.arithmetic == "tf32"
    assert len(PREPARED) >= 4


def test_precision_on_the_cpu_is_that_of_float32() -> None:
    x = make_inputs(2, 5, 7, dtype="float32", heads=(4, 2), head_dim=16)
    plain, tf32 = both(x), both(x, precision="tf32")
    for name, array in plain.items():
        np.testing.assert_array_equal(array, tf32[name])


def test_workspace_bytes(gpu: FakeGpu) -> None:
    gpu.compute = False
    q = cupy_array((2, 5, 4, 16), np.float64)
    assert fa2cupy.backward_workspace_bytes(q, q, q) == gpu.workspace_bytes


# ----------------------------------------------------------------------------------------------------------------------
# Plans


@pytest.mark.parametrize("device", [A100, A10, H200], ids=lambda device: f"sm_{device.cc[0]}{device.cc[1]}")
@pytest.mark.parametrize("precision, arithmetic", [(None, "float32"), ("tf32", "tf32"), (None, "float64")])
def test_plans(device: DeviceInfo, precision: str | None, arithmetic: str) -> None:
    """Of sm_80's kernels on every GPU, with parameters of the right size, which say so to the kernel."""
    dtype = "float32" if arithmetic == "tf32" else arithmetic
    forward = plan_forward(problem(dtype=dtype, precision=precision), device)
    backward = plan_backward(backward_problem(300, 300, 64, dtype, False, precision=precision), device, False)
    assert forward.family == backward.family == "sm80"
    for plan, params in ((forward, FwdParams), (backward, BwdParams)):
        for launch in plan.launches:
            assert launch.defines["FA2_FLOAT_BITS"] == (64 if dtype == "float64" else 32)
            assert len(launch.params) == launch.defines["FA2_PARAMS_BYTES"]
            assert of_dtype(params, dtype) is params or dtype == "float64"
            if launch.source.startswith("sm80/"):
                products = launch.defines.get("FA2_TF32_PRODUCTS")
                assert products == {"float32": 3, "tf32": 1, "float64": None}[arithmetic]
    assert forward.launches[-1].config.shared_mem_bytes <= device.shared_mem_optin


@pytest.mark.parametrize(
    "device, dtype, most", [(A10, "float32", 224), (A10, "float64", 160), (A100, "float64", 192)], ids=str
)
def test_heads_that_are_too_wide_for_a_backward(device: DeviceInfo, dtype: str, most: int) -> None:
    """The forward has room for all. Both widths are looked at."""
    for more in ({}, {"head_dim_v": 64}):
        case: dict[str, Any] = dict(head_dim=most, dtype=dtype, **more)
        plan_backward(backward_problem(70, 90, causal=False, **case), device, False)
        case["head_dim"] = most + 1
        kilobytes = device.shared_mem_optin // 1024
        words = f"^head_dim {most + 1} of {dtype} arrays needs more shared memory than the {kilobytes} KB of this GPU"
        with pytest.raises(InvalidArgument, match=f"{words}: {most} is the most$"):
            plan_backward(backward_problem(70, 90, causal=False, **case), device, False)
        plan_forward(problem(70, 90, 256, dtype), device)
    with pytest.raises(InvalidArgument, match=rf"^head_dim_v {most + 1} of"):
        plan_backward(backward_problem(70, 90, 64, dtype, False, head_dim_v=most + 1), device, False)


def test_sixteen_bits_know_nothing_of_it() -> None:
    for dtype in ("bfloat16", "float16"):
        for device in (A100, A10, H200):
            plans = (
                plan_forward(problem(dtype=dtype), device),
                plan_backward(backward_problem(300, 300, 64, dtype, False), device, False),
            )
            names = {name for plan in plans for launch in plan.launches for name in launch.defines}
            assert names.isdisjoint({"FA2_FLOAT_BITS", "FA2_TF32_PRODUCTS", "FA2_PROMOTE", "FA2_ROW_WARPS"})


def test_alignment_is_that_of_sixteen_bytes() -> None:
    """4 floats, 2 doubles: head_dims that are not multiples of 8 are read in pieces, too."""
    for dtype, head_dim, aligned in (
        ("float32", 20, True), ("float32", 18, False), ("float64", 18, True), ("float64", 19, False),
    ):  # fmt: skip
        assert problem(head_dim=head_dim, dtype=dtype).aligned is aligned
    assert not problem(head_dim=20, dtype="float32", pad=2).aligned
    assert Case(5, 5, 64, "float64", False).lse_dtype == "float64"


def test_scale() -> None:
    """float64 has scales that float32 has not."""
    with pytest.raises(InvalidArgument, match=r"softmax_scale=1e\+39 is not supported on a GPU"):
        problem(dtype="float32", scale=1e39)
    assert dataclasses.replace(problem(dtype="float64", scale=1e39)).softmax_scale == 1e39
