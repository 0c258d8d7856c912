"""merge_attention: pieces of the keys, merged, are attention over all of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import special

import fa2cupy
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.merge import merge_attention


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
