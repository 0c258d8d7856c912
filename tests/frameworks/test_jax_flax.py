"""flax's own modules with fa2cupy's attention: the same outputs and gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import pytest

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


def test_linen_dropout_is_an_error() -> None:
    module = linen.MultiHeadDotProductAttention(num_heads=HEADS, attention_fn=flax_attention, dropout_rate=0.1)
    weights = linen.MultiHeadDotProductAttention(num_heads=HEADS).init(jax.random.key(0), INPUTS)
    with pytest.raises(ValueError, match=r"dropout_rate=0\.1 is not supported yet"):
        module.apply(weights, INPUTS, deterministic=False, rngs={"dropout": jax.random.key(1)})
    assert module.apply(weights, INPUTS, deterministic=True).shape == INPUTS.shape


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
