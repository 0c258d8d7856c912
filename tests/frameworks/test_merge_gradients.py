"""merge_attention through torch and JAX: the gradients of the merged pieces are those of the whole."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from fa2cupy.merge import merge_attention

CUTS = (0, 5, 5, 12)


def attention(xp: Any, q: Any, k: Any, v: Any) -> Any:
    """out (b, s, h, d) and lse (b, h, s) by the formula; with no keys 0 and -inf."""
    if not k.shape[1]:
        lse = xp.full((q.shape[0], q.shape[2], q.shape[1]), -float("inf"))
        return xp.zeros_like(q), lse
    scores = xp.einsum("bqhd,bkhd->bhqk", q, k)
    lse = (jax.nn if xp is jnp else torch).logsumexp(scores, -1)
    return xp.einsum("bhqk,bkhd->bqhd", xp.exp(scores - lse[..., None]), v), lse


def loss(xp: Any, q: Any, k: Any, v: Any, cuts: tuple[int, ...]) -> Any:
    parts = [attention(xp, q, k[:, a:b], v[:, a:b]) for a, b in itertools.pairwise(cuts)]
    out, lse = merge_attention([part[0] for part in parts], [part[1] for part in parts])
    return (out**2).sum() + xp.sin(lse).sum()


def arrays() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal((2, n, 3, 4)).astype("float32") for n in (6, 12, 12)]


def test_jax() -> None:
    x = [jnp.asarray(a) for a in arrays()]
    derive = jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=(0, 4))
    for got, wanted in zip(*(derive(jnp, *x, cuts) for cuts in (CUTS, (0, 12))), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


def test_torch() -> None:
    results = []
    for cuts in (CUTS, (0, 12)):
        x = [torch.tensor(a, requires_grad=True) for a in arrays()]
        loss(torch, *x, cuts).backward()
        results.append([a.grad for a in x])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)


def test_what_an_unseen_piece_holds_never_matters() -> None:
    """Not even NaN, and not to a gradient either."""
    for xp, grad in ((jnp, None), (torch, torch.autograd.grad)):
        seen = [np.ones((1, 2, 1, 3), "float32"), np.zeros((1, 1, 2), "float32")]
        unseen = [np.full((1, 2, 1, 3), np.nan, "float32"), np.full((1, 1, 2), -np.inf, "float32")]

        def loss(*x: Any, xp: Any = xp) -> Any:
            out, lse = merge_attention([x[0], x[2]], [x[1], x[3]])
            return (out**2).sum() + xp.sin(lse).sum()

        if grad is None:
            gradients = jax.grad(loss, (0, 1, 2, 3))(*map(jnp.asarray, seen + unseen))
        else:
            tensors = [torch.tensor(a, requires_grad=True) for a in seen + unseen]
            gradients = grad(loss(*tensors), tensors)
        for gradient, wanted in zip(gradients, (2, 1, 0, 0), strict=True):
            np.testing.assert_allclose(gradient, np.full(gradient.shape, wanted), atol=1e-6)
