"""flax's own modules with fa2cupy's attention: the same outputs and gradients."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from fa2cupy import dropout_mask
from tests.frameworks.jax_problems import assert_close, normal

linen = pytest.importorskip("flax.linen", reason="flax is not installed")
nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")

from fa2cupy.jax import flax_attention  # noqa: E402

HEADS, FEATURES = 4, 32
INPUTS = normal(0, 2, 3, 8, FEATURES)  # two dimensions of batch


def loss_and_gradients(loss: Any, weights: Any) -> Any:
    return jax.jit(jax.value_and_grad(loss))(weights)


def test_linen() -> None:
    results = []
    for attention in (linen.dot_product_attention, flax_attention):
        module = linen.MultiHeadDotProductAttention(num_heads=HEADS, attention_fn=attention)
        weights = module.init(jax.random.key(0), INPUTS)

        def loss(weights: Any, module: Any = module) -> Any:
            return (module.apply(weights, INPUTS, INPUTS) ** 2).sum()

        results.append(loss_and_gradients(loss, weights))
    assert_close(results[1], results[0], 1e-4)


def test_linen_causal() -> None:
    """flax says causal by a mask, fa2cupy by a keyword."""
    plain = linen.MultiHeadDotProductAttention(num_heads=HEADS)
    ours = linen.MultiHeadDotProductAttention(
        num_heads=HEADS, attention_fn=functools.partial(flax_attention, causal=True)
    )
    weights = plain.init(jax.random.key(0), INPUTS)
    mask = linen.make_causal_mask(INPUTS[..., 0])
    assert_close(ours.apply(weights, INPUTS), plain.apply(weights, INPUTS, mask=mask), 1e-4)
    with pytest.raises(ValueError, match=r"mask.*not supported yet"):
        ours.apply(weights, INPUTS, mask=mask)


def masked(query: Any, key: Any, value: Any, *, dropout_rng: Any, dropout_rate: float, **_: Any) -> Any:
    """The plain formula, with the mask that fa2cupy says it draws."""
    *batch, rows, heads, _ = query.shape
    kept = dropout_mask(math.prod(batch), heads, rows, key.shape[-3], dropout_rate, dropout_rng, like=query)
    weights = linen.dot_product_attention_weights(query, key) * kept.reshape(*batch, *kept.shape[1:])
    rounded = round(dropout_rate * 2**15) / 2**15
    return jnp.einsum("...hqk,...khd->...qhd", weights / (1 - rounded), value)


def test_linen_dropout() -> None:
    """flax gives the key, and the places are those of dropout_mask. Its default, one mask for all heads, is refused."""
    plain = linen.MultiHeadDotProductAttention(num_heads=HEADS)
    weights = plain.init(jax.random.key(0), INPUTS)
    module = linen.MultiHeadDotProductAttention(num_heads=HEADS, attention_fn=flax_attention, dropout_rate=0.3)
    how: dict[str, Any] = {"deterministic": False, "rngs": {"dropout": jax.random.key(1)}}
    with pytest.raises(ValueError, match=r"broadcast_dropout=True with dropout_rate=0\.3: .*=False"):
        module.apply(weights, INPUTS, **how)
    assert_close(module.apply(weights, INPUTS, deterministic=True), plain.apply(weights, INPUTS), 1e-4)
    ours, formula = (module.clone(broadcast_dropout=False, attention_fn=each) for each in (flax_attention, masked))
    out = formula.apply(weights, INPUTS, **how)
    assert_close(jax.jit(lambda: ours.apply(weights, INPUTS, **how))(), out, 1e-4)
    assert bool((abs(out - plain.apply(weights, INPUTS)) > 1e-2).any())


def test_nnx_dropout() -> None:
    outs = []
    for attention in (flax_attention, masked):
        module = nnx.MultiHeadAttention(
            HEADS, in_features=FEATURES, attention_fn=attention, decode=False, dropout_rate=0.3,
            broadcast_dropout=False, rngs=nnx.Rngs(0, dropout=2),
        )  # fmt: skip
        outs.append(module(INPUTS, deterministic=False))
    assert_close(outs[0], outs[1], 1e-4)


@pytest.mark.parametrize("is_causal", [False, True])
def test_nnx(is_causal: bool) -> None:
    results = []
    for attention in (nnx.dot_product_attention, flax_attention):
        module = nnx.MultiHeadAttention(
            HEADS, in_features=FEATURES, attention_fn=attention, decode=False, rngs=nnx.Rngs(0)
        )

        def loss(module: Any) -> Any:
            return (module(INPUTS, is_causal=is_causal) ** 2).sum()

        value, gradients = nnx.jit(nnx.value_and_grad(loss))(module)
        results.append((value, nnx.state(gradients)))
    assert_close(jax.tree.leaves(results[1]), jax.tree.leaves(results[0]), 1e-4)
