"""merge_attention through torch and JAX: the gradients of the merged pieces are those of the whole."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fa2cupy import merged
from fa2cupy.autograd import merging
from fa2cupy.frameworks import TORCH
from fa2cupy.frameworks.base import Device
from fa2cupy.jit import driver
from fa2cupy.kernels import KernelLaunch, launch
from fa2cupy.merge import _by_torch, merge_attention
from tests.host import build, run

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


# ----------------------------------------------------------------------------------------------------------------------
# By the kernels, on a GPU that is not there: CPU tensors pass for CUDA's, plans are run by the host world


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that have run."""
    names: list[str] = []

    def bind(launches: tuple[KernelLaunch, ...], device_index: int, context: str) -> Any:
        def call(pointers: tuple[int, ...], stream: int) -> None:
            for each in launches:
                names.append(each.name)
                run.launch(build.library(each.source, each.name, each.defines), each.config, each.pack(pointers))

        return call

    info = driver.DeviceInfo(0, "made up", (9, 0), 132, 227 * 1024, 50 << 20)
    monkeypatch.setattr(launch, "bind", bind)
    monkeypatch.setattr(merged, "_PREPARED", {})
    monkeypatch.setattr(merging, "on_a_gpu", lambda tensor: True)
    monkeypatch.setattr(TORCH, "device", lambda tensor, argument: Device("cuda", 0))
    monkeypatch.setattr(TORCH, "stream", lambda index: lambda index: 0)
    monkeypatch.setattr(driver, "device_info", lambda index: info)
    monkeypatch.setattr(driver, "context_check", lambda index: lambda: True)
    return names


def some_pieces(dtype: torch.dtype = torch.float32, count: int = 3) -> list[torch.Tensor]:
    """Three outs, three lses; the second has seen nothing, in some rows, where it holds NaN."""
    generator = torch.Generator().manual_seed(3)
    outs = [torch.randn(2, 9, 3, 16, generator=generator).to(dtype) for _ in range(count)]
    lses = [torch.randn(2, 3, 9, generator=generator) for _ in range(count)]
    lses[1][..., :4] = -float("inf")
    outs[1][:, :4] = float("nan")
    return [*outs, *lses]


def gradients_of(
    merge: Any, pieces: list[torch.Tensor], wanted: tuple[int, ...], of_lse: bool
) -> tuple[torch.Tensor, ...]:
    leaves = [piece.clone().requires_grad_(place in wanted) for place, piece in enumerate(pieces)]
    out, lse = merge(leaves[:3], leaves[3:])
    loss = (out.float() ** 2 * torch.linspace(0, 1, 16)).sum() + (torch.sin(lse).sum() if of_lse else 0)
    return torch.autograd.grad(loss, [leaves[place] for place in wanted])


@pytest.mark.parametrize("wanted", [(0, 1, 2, 3, 4, 5), (2, 4), (3,)])
@pytest.mark.parametrize("of_lse", [False, True])
def test_torch_kernels(wanted: tuple[int, ...], of_lse: bool, kernels: list[str]) -> None:
    found = gradients_of(merge_attention, some_pieces(), wanted, of_lse)
    assert kernels == ["merge", "merge_bwd"]
    for got, expected in zip(found, gradients_of(_by_torch, some_pieces(), wanted, of_lse), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_torch_kernel_in_16_bits(kernels: list[str]) -> None:
    """And where nobody wants a gradient."""
    pieces = some_pieces(torch.bfloat16)
    out, lse = merge_attention(pieces[:3], pieces[3:])
    expected, expected_lse = _by_torch(pieces[:3], pieces[3:])
    assert kernels == ["merge"] and out.dtype is torch.bfloat16 and not out.requires_grad
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse)
    found = gradients_of(merge_attention, pieces, (0, 4), True)
    for got, wanted in zip(found, gradients_of(_by_torch, pieces, (0, 4), True), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2**-5, atol=2**-5)


def test_torch_second_derivatives(kernels: list[str]) -> None:
    """By the formula."""

    def second(merge: Any) -> tuple[torch.Tensor, ...]:
        leaves = [piece.clone().requires_grad_() for piece in some_pieces()]
        out, lse = merge(leaves[:3], leaves[3:])
        first = torch.autograd.grad((out**2).sum() + torch.sin(lse).sum(), (leaves[0], leaves[5]), create_graph=True)
        return torch.autograd.grad((first[0] ** 2).sum() + first[1].sum(), (leaves[2], leaves[5]))

    found = second(merge_attention)
    assert kernels == ["merge", "merge_bwd"]  # the latter for what the first derivative takes from out
    for got, wanted in zip(found, second(_by_torch), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-4)


def test_torch_where_somebody_watches(kernels: list[str]) -> None:
    """torch.func, and gradients in batches."""
    pieces = some_pieces()

    def loss(out: torch.Tensor) -> torch.Tensor:
        merged_out, lse = merge_attention([out, *pieces[1:3]], pieces[3:])
        return (merged_out**2).sum() + lse.sum()

    by_func = torch.func.grad(loss)(pieces[0])
    assert kernels == []
    leaf = pieces[0].clone().requires_grad_()
    (by_kernel,) = torch.autograd.grad(loss(leaf), leaf)
    assert kernels == ["merge", "merge_bwd"]
    torch.testing.assert_close(by_func, by_kernel, rtol=2e-5, atol=2e-5)
    out, _ = merge_attention([leaf, *pieces[1:3]], pieces[3:])
    (batched,) = torch.autograd.grad(out, leaf, torch.stack([2 * out.detach()] * 2), is_grads_batched=True)
    (wanted,) = torch.autograd.grad(_by_torch([leaf, *pieces[1:3]], pieces[3:])[0], leaf, 2 * out.detach())
    torch.testing.assert_close(batched[1], wanted, rtol=2e-5, atol=2e-5)


def test_torch_what_is_left_to_the_formula(kernels: list[str]) -> None:
    pieces = [piece.double().requires_grad_() for piece in some_pieces()]
    out, _ = merge_attention(pieces[:3], pieces[3:])
    assert kernels == [] and out.dtype is torch.float64 and out.requires_grad
