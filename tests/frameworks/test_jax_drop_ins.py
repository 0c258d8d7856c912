"""Functions with the signatures of jax.nn and flax."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fa2cupy.jax
from fa2cupy.errors import InvalidArgument
from tests.frameworks.jax_problems import B, H, S, X, assert_close, theirs


@pytest.mark.parametrize("is_causal", [False, True])
def test_dot_product_attention(is_causal: bool) -> None:
    q, k, v, _ = X
    ours, residual = fa2cupy.jax.dot_product_attention(q, k, v, is_causal=is_causal, scale=0.3, return_residual=True)
    assert_close(ours, jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, scale=0.3))
    assert residual.shape == (B, S, H)
    single = fa2cupy.jax.dot_product_attention(q[0], k[0], v[0], is_causal=is_causal)
    assert_close(single, jax.nn.dot_product_attention(q[0], k[0], v[0], is_causal=is_causal))


def by_jax(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
    """jax.nn's, which before 0.7 forgets a window that nothing else is beside."""
    mask = jnp.ones((1, 1, q.shape[1], k.shape[1]), bool)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, **options)


@pytest.mark.parametrize("window", [3, (2, 1), (0, 0), (100, 2)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_windows(is_causal: bool, window: int | tuple[int, int]) -> None:
    """And their gradients."""

    def loss(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
        return (function(*arrays, is_causal=is_causal, local_window_size=window) * weights).sum()

    q, k, v, weights = X
    functions = fa2cupy.jax.dot_product_attention, by_jax
    ours, expected = (jax.value_and_grad(functools.partial(loss, each), (0, 1, 2))(q, k, v) for each in functions)
    assert_close(ours[0], expected[0])
    for found, wanted in zip(ours[1], expected[1], strict=True):
        assert_close(found, wanted)


@pytest.mark.parametrize(("queries", "keys"), [(16, 5), (5, 16)])
@pytest.mark.parametrize("window", [None, 3, (0, 2), (12, 0)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_first_query_stands_beside_the_first_key(
    queries: int, keys: int, window: int | tuple[int, int] | None, is_causal: bool
) -> None:
    q, k, v = X[0][:, :queries], X[1][:, :keys], X[2][:, :keys]
    options = {"is_causal": is_causal, "local_window_size": window}
    expected = by_jax(q, k, v, **options)
    if window is not None:  # rows that see no key are 0 here, and something there
        left = window if isinstance(window, int) else window[0]
        expected = expected.at[:, keys + left :].set(0.0)
    ours, residual = fa2cupy.jax.dot_product_attention(q, k, v, **options, return_residual=True)
    assert_close(ours, expected)
    assert bool((jnp.isneginf(residual) == (ours == 0).all(-1)).all())


def test_lengths_by_sequence() -> None:
    q, k, v, _ = X
    lengths = {"query_seq_lengths": jnp.asarray([16, 9]), "key_value_seq_lengths": jnp.asarray([4, 16])}
    ours = fa2cupy.jax.dot_product_attention(q, k, v, **lengths)
    expected = jax.nn.dot_product_attention(q, k, v, **lengths)
    assert_close(ours[0], expected[0])
    assert_close(ours[1, :9], expected[1, :9])
    assert not ours[1, 9:].any()


def test_dot_product_attention_never_misaligns() -> None:
    q, k, v, _ = X
    with pytest.raises(InvalidArgument, match="is_causal=True with query_seq_lengths or key_value_seq_lengths"):
        fa2cupy.jax.dot_product_attention(q, k, v, is_causal=True, key_value_seq_lengths=jnp.asarray([3, 4]))
    with pytest.raises(ValueError, match=r"bias.*not supported yet"):
        fa2cupy.jax.dot_product_attention(q, k, v, bias=jnp.zeros((1, 1, S, S)))


def test_flax_attention() -> None:
    q, k, v, _ = X
    out = fa2cupy.jax.flax_attention(q[None], k[None], v[None], causal=True, dtype="bfloat16")
    assert out.shape == (1, *q.shape) and out.dtype == "bfloat16"
    assert_close(out[0].astype("float32"), theirs(q, k, v), 3e-2)
    with pytest.raises(InvalidArgument, match=r"broadcast_dropout=True with dropout_rate=0\.1"):
        fa2cupy.jax.flax_attention(q, k, v, dropout_rate=0.1)
    with pytest.raises(InvalidArgument, match=r"dropout_rng=None with dropout_rate=0\.1: a key is needed"):
        fa2cupy.jax.flax_attention(q, k, v, broadcast_dropout=False, dropout_rate=0.1)
    key = jax.random.key(3)
    dropped = fa2cupy.jax.flax_attention(q, k, v, broadcast_dropout=False, dropout_rate=0.1, dropout_rng=key)
    assert_close(dropped, fa2cupy.attention(q, k, v, dropout_p=0.1, dropout_seed=key), 0)
    fa2cupy.jax.flax_attention(q, k, v, dropout_rate=0.1, deterministic=True)
    assert_close(fa2cupy.jax.flax_attention(q, k, v, is_causal=True), theirs(q, k, v))
    for queries, keys in ((16, 8), (5, 16)):
        arrays = q[:, :queries], k[:, :keys], v[:, :keys]
        assert_close(fa2cupy.jax.flax_attention(*arrays, is_causal=True), theirs(*arrays))
    with pytest.raises(InvalidArgument, match="is_causal=True beside causal= or window_size="):
        fa2cupy.jax.flax_attention(q, k, v, is_causal=True, causal=True)


def test_dot_product_attention_takes_numpy_arrays() -> None:
    q, k, v, _ = map(np.asarray, X)
    out = fa2cupy.jax.dot_product_attention(q, k, v, is_causal=True)
    assert isinstance(out, jax.Array)
    assert_close(out, theirs(q, k, v))


def test_packed_sequences_by_segments() -> None:
    """A packed batch equals the unpacked one."""
    q, k, v, _ = X
    ids = jnp.asarray([[0] * 5 + [1] * 11, [7] * 16], "int32")
    out = fa2cupy.jax.flax_attention(q, k, v, causal=True, segment_ids=ids)
    assert_close(out[1], theirs(q, k, v)[1])
    for first, end in ((0, 5), (5, 16)):
        assert_close(out[:1, first:end], theirs(*(x[:1, first:end] for x in (q, k, v))))
