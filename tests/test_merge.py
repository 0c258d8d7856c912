"""merge_attention: pieces of the keys, merged, are attention over all of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scipy import special

import fa2cupy
from fa2cupy import merged
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.frameworks import CUPY
from fa2cupy.kernels import KernelLaunch, launch
from fa2cupy.merge import merge_attention
from tests.fake_gpu import FakeGpu, gpu, host_view, to_cupy
from tests.host import build, run

__all__ = ["gpu"]


def pieces(dtype: str, cuts: tuple[int, ...]) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray, np.ndarray]:
    """outs and lses of the keys between cuts, and of all keys."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 3, 16)).astype(dtype) for n in (7, 40, 40))
    parts = [fa2cupy.attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in itertools.pairwise(cuts)]
    out, lse = fa2cupy.attention(q, k, v, return_lse=True)
    return [part[0] for part in parts], [part[1] for part in parts], out, lse


@pytest.mark.parametrize("cuts", [(0, 40), (0, 1, 40), (0, 13, 13, 29, 40), (0, 0, 40, 40)])
def test_pieces_are_the_whole(cuts: tuple[int, ...]) -> None:
    outs, lses, out, lse = pieces("float64", cuts)
    merged, merged_lse = merge_attention(outs, lses)
    np.testing.assert_allclose(merged, out, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(merged_lse, lse, rtol=1e-14)
    np.testing.assert_allclose(merged_lse, special.logsumexp(np.stack(lses), axis=0), rtol=1e-14)


def test_types() -> None:
    outs, lses, out, _ = pieces("float16", (0, 13, 40))
    merged, merged_lse = merge_attention(outs, lses)
    assert (merged.dtype, merged_lse.dtype) == (np.float16, np.float32)
    np.testing.assert_allclose(merged, out, rtol=2e-3, atol=2e-3)


def test_what_an_unseen_piece_holds_never_matters() -> None:
    outs, lses, *_ = pieces("float32", (0, 13, 40))
    nothing = np.full_like(outs[0], np.nan), np.full_like(lses[0], -np.inf)
    merged, lse = merge_attention([*outs, nothing[0]], [*lses, nothing[1]])
    wanted, wanted_lse = merge_attention(outs, lses)
    np.testing.assert_array_equal(merged, wanted)
    np.testing.assert_array_equal(lse, wanted_lse)
    unseen, unseen_lse = merge_attention([nothing[0]], [nothing[1]])
    assert not unseen.any() and np.isneginf(unseen_lse).all()


def test_large_log_sum_exps() -> None:
    out = np.ones((1, 1, 1, 2), np.float32)
    for lse in (-1e4, 1e4):
        array = np.full((1, 1, 1), lse, np.float32)
        merged, merged_lse = merge_attention([out, 3 * out], [array, array])
        np.testing.assert_allclose(merged, 2 * out)
        np.testing.assert_allclose(merged_lse, lse + np.log(2), rtol=1e-6)


def test_errors() -> None:
    outs, lses, *_ = pieces("float32", (0, 13, 40))
    with pytest.raises(InvalidArgument, match="outs has 0 pieces and lses 0"):
        merge_attention([], [])
    with pytest.raises(InvalidArgument, match="outs has 2 pieces and lses 1"):
        merge_attention(outs, lses[:1])
    with pytest.raises(InvalidArgument, match=r"piece 1 has shapes \(2, 6, 3, 16\)"):
        merge_attention([outs[0], outs[1][:, 1:]], lses)
    with pytest.raises(InvalidArgument, match=r"outs\[0\] has shape .* and lses\[0\]"):
        merge_attention(outs, [lse.swapaxes(1, 2) for lse in lses])
    with pytest.raises(InvalidType, match="piece 1 has dtypes float64 and float32"):
        merge_attention([outs[0], outs[1].astype("float64")], lses)
    with pytest.raises(InvalidType, match="arrays of one framework"):
        merge_attention([[1.0]], [[1.0]])
    with pytest.raises(InvalidType, match="outs has dtype uint16: a floating-point one is needed"):
        merge_attention([out.astype("uint16") for out in outs], lses)


# ----------------------------------------------------------------------------------------------------------------------
# By the kernel, on a GPU that is not there: plans are run by the host world, on the memory of fake CuPy arrays


def bind(launches: tuple[KernelLaunch, ...], device_index: int, context: str) -> Any:
    """As `launch.bind`."""
    assert "MergeProblem" in context

    def call(pointers: tuple[int, ...], stream: int) -> None:
        for each in launches:
            library = build.library(each.source, each.name, each.defines)
            run.launch(library, each.config, each.pack(pointers))

    return call


@pytest.fixture
def merging(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """What is bound is counted."""

    def counting(*arguments: Any) -> Any:
        gpu.binds += 1
        return bind(*arguments)

    monkeypatch.setattr(launch, "bind", counting)
    monkeypatch.setattr(merged, "_PREPARED", {})
    yield gpu


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("packed", [False, True])
def test_cupy(packed: bool, dtype: str, merging: FakeGpu) -> None:
    outs, lses, *_ = pieces(dtype, (0, 13, 13, 29, 40))
    if packed:
        outs, lses = [out[0] for out in outs], [lse[0] for lse in lses]
    wanted, wanted_lse = merge_attention(outs, lses)
    arrays = [to_cupy(out) for out in outs], [to_cupy(lse) for lse in lses]
    for _ in range(2):
        merged_out, lse = merge_attention(*arrays)
        np.testing.assert_allclose(host_view(merged_out), wanted, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(host_view(lse), wanted_lse, rtol=1e-5)
        assert merged_out.dtype == dtype and merged_out.shape == wanted.shape and merged_out.flags.c_contiguous
    assert merging.binds == 1


def test_cupy_arrays_that_lie_otherwise(merging: FakeGpu) -> None:
    """All alike in another order; pieces of one stack; no two alike, or without neighbours in a row: copied."""
    outs, lses, *_ = pieces("float32", (0, 13, 29, 40))
    wanted, wanted_lse = merge_attention(outs, lses)
    alike = [to_cupy(out, order=(0, 2, 1, 3)) for out in outs]
    stack = to_cupy(np.stack(outs)), to_cupy(np.stack(lses), order=(1, 2, 3, 0))
    orders = ((0, 1, 2, 3), (1, 0, 2, 3), (0, 1, 3, 2))
    other = [to_cupy(out, order=order) for out, order in zip(outs, orders, strict=True)]
    plain = [to_cupy(lse) for lse in lses]
    for arrays in ((alike, plain), (list(stack[0]), list(stack[1])), (other, plain), (alike, list(stack[1]))):
        merged_out, lse = merge_attention(*arrays)
        np.testing.assert_allclose(host_view(merged_out), wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(host_view(lse), wanted_lse, rtol=1e-5)


def test_cupy_errors(merging: FakeGpu) -> None:
    outs, lses, *_ = pieces("float32", (0, 13, 40))
    arrays = [to_cupy(out) for out in outs], [to_cupy(lse) for lse in lses]
    with pytest.raises(InvalidArgument, match=r"lses\[1\] is on cuda:1 but outs\[0\] on cuda:0: one device"):
        merge_attention(arrays[0], [arrays[1][0], to_cupy(lses[1], 1)])
    merging.capturing = True
    with pytest.raises(InvalidArgument, match="merge_attention inside a CUDA graph capture: CuPy's memory pool"):
        merge_attention(*arrays)


def test_what_is_left_to_the_formula(merging: FakeGpu) -> None:
    def has_kernel(count: int, dtype: str, lse_dtype: str, rows: int = 3) -> bool:
        outs = [to_cupy(np.ones((1, rows, 2, 8), dtype)) for _ in range(count)]
        lses = [to_cupy(np.ones((1, 2, rows), lse_dtype)) for _ in range(count)]
        return merged.has_kernel(CUPY, outs, lses)

    assert has_kernel(32, "float16", "float32") and has_kernel(1, "float32", "float32")
    assert not has_kernel(33, "float16", "float32")
    assert not has_kernel(2, "float64", "float64") and not has_kernel(2, "float16", "float16")
    assert not has_kernel(2, "float16", "float32", rows=0)
