"""A small problem for JAX's transformations, and what the plain formula makes of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fa2cupy

B, S, H, HK, D = 2, 16, 4, 2, 8


def normal(seed: int, *shape: int, dtype: str = "float32") -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


# q, k, v and a weight for every element of out
X = normal(0, B, S, H, D), normal(1, B, S, HK, D), normal(2, B, S, HK, D), normal(3, B, S, H, D)

ours = functools.partial(fa2cupy.attention, causal=True)
theirs = jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=True))


def weighted(attention: Callable[..., Any], weight: Any) -> Callable[..., Any]:
    return lambda q, k, v: (attention(q, k, v) * weight).sum()


def gradients(attention: Callable[..., Any], weight: Any) -> Callable[..., Any]:
    return jax.jit(jax.grad(weighted(attention, weight), (0, 1, 2)))


def assert_close(got: Any, wanted: Any, tolerance: float = 2e-5) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
