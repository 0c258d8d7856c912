"""convert_lse: what other libraries call a log-sum-exp."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import fa2cupy
from fa2cupy.errors import InvalidArgument, InvalidType

pytestmark = pytest.mark.filterwarnings("error")

WHO = ("fa2cupy", "flash_attn", "flashinfer", "jax", "cudnn")


def ours(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    lse = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    lse[..., 1, 2] = -np.inf  # of a row that sees no key
    return lse


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 5)])
def test_what_each_of_them_has(shape: tuple[int, ...], dtype: Any) -> None:
    lse = ours(shape, dtype)
    of = {who: fa2cupy.convert_lse(lse, source="fa2cupy", target=who) for who in WHO}
    swapped = lse.swapaxes(-1, -2)
    np.testing.assert_array_equal(of["fa2cupy"], lse)
    np.testing.assert_array_equal(of["flash_attn"], np.where(np.isinf(lse), np.inf, lse))
    np.testing.assert_allclose(np.exp2(of["flashinfer"]), np.exp(swapped), rtol=1e-6)
    np.testing.assert_array_equal(of["jax"], swapped)
    np.testing.assert_array_equal(of["cudnn"], lse[..., None])
    assert {x.dtype for x in of.values()} == {np.dtype(dtype)}


@pytest.mark.parametrize(("source", "target"), list(itertools.product(WHO, WHO)))
def test_from_each_to_each(source: str, target: str) -> None:
    lse = ours((2, 3, 5), np.float64)
    theirs = fa2cupy.convert_lse(lse, source="fa2cupy", target=source)
    there = fa2cupy.convert_lse(theirs, source=source, target=target)
    np.testing.assert_allclose(there, fa2cupy.convert_lse(lse, source="fa2cupy", target=target), rtol=1e-15)
    np.testing.assert_allclose(fa2cupy.convert_lse(there, source=target, target="fa2cupy"), lse, rtol=1e-15)


def test_rows_without_keys_elsewhere() -> None:
    lse = np.array([[[1.0, -2.38e38, -np.inf, np.nan]]], np.float32)
    found = fa2cupy.convert_lse(lse, source="jax", target="flash_attn")  # jax.nn hides keys by a number
    np.testing.assert_array_equal(found[0, :, 0], [1, np.inf, np.inf, np.nan])
    lse = np.array([[[1.0, np.inf, -np.inf, np.nan]]], np.float32)
    found = fa2cupy.convert_lse(lse, source="flash_attn", target="fa2cupy")
    np.testing.assert_array_equal(found[0, 0], [1, -np.inf, -np.inf, np.nan])


def test_pieces_of_others_are_merged() -> None:
    """What it is for: pieces that FlashInfer computed, merged with one of ours."""
    q, k, v = np.random.default_rng(1).standard_normal((3, 2, 6, 2, 8))
    out, lse = fa2cupy.attention(q, k, v, return_lse=True)
    pieces = [fa2cupy.attention(q, k[:, cut], v[:, cut], return_lse=True) for cut in (slice(0, 2), slice(2, 6))]
    theirs = fa2cupy.convert_lse(pieces[0][1], source="fa2cupy", target="flashinfer")
    back = fa2cupy.convert_lse(theirs, source="flashinfer", target="fa2cupy")
    merged, merged_lse = fa2cupy.merge_attention([pieces[0][0], pieces[1][0]], [back, pieces[1][1]])
    np.testing.assert_allclose(merged, out, rtol=1e-12)
    np.testing.assert_allclose(merged_lse, lse, rtol=1e-12)


@pytest.mark.parametrize(
    ("lse", "names", "kind", "message"),
    [
        (
            ours((2, 3, 5)),
            {"source": "fa3"},
            InvalidArgument,
            "source='fa3' is unknown: one of 'fa2cupy', 'flash_attn'",
        ),
        (ours((2, 3, 5)), {"target": None}, InvalidType, "target=None is unknown"),
        ([1.0], {}, InvalidType, "lse is a list: an array of CuPy, PyTorch, JAX or NumPy is needed"),
        (np.ones((2, 3, 5), int), {}, InvalidType, "lse has dtype int64: a floating-point one is needed"),
        (np.ones(5), {}, InvalidArgument, "lse has shape (5,): (batch, num_heads, seqlen_q) is needed for source="),
        (np.ones((1, 2, 3, 4)), {}, InvalidArgument, "lse has shape (1, 2, 3, 4)"),
        (np.ones((2, 3, 5)), {"source": "cudnn"}, InvalidArgument, "(batch, num_heads, seqlen_q, 1) is needed"),
    ],
)
def test_errors(lse: Any, names: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        fa2cupy.convert_lse(lse, **{"source": "fa2cupy", "target": "jax", **names})
    assert message in str(caught.value)
