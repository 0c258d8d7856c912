"""softcap, ALiBi, sinks and dropout on torch tensors: gradients, torch.compile, torch.func, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fa2cupy
from fa2cupy.errors import InvalidArgument
from fa2cupy.spec import CARRIED

Tensor = torch.Tensor


def problem(dtype: torch.dtype = torch.float64, requires_grad: bool = True) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v, sinks, and the other keywords."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = [normal(2, 17, 4, 8), normal(2, 21, 2, 8), normal(2, 21, 2, 8), normal(4)]
    if requires_grad:
        tensors = [tensor.requires_grad_() for tensor in tensors]
    slopes = normal(2, 4).abs().to(torch.float64 if dtype == torch.float64 else torch.float32)
    return tensors, {"causal": True, "softcap": 2.0, "alibi_slopes": slopes, "dropout_p": 0.25, "dropout_seed": (7, 3)}


def attention(keywords: dict[str, Any]) -> Callable[..., Any]:
    return lambda q, k, v, sinks: fa2cupy.attention(q, k, v, sinks=sinks, return_lse=True, **keywords)


def gradients(function: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    out, lse = function(*tensors)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    return list(torch.autograd.grad((out.double() * weights).sum() + lse.square().sum(), tensors))


def test_gradients_are_those_of_finite_differences() -> None:
    tensors, keywords = problem()
    assert torch.autograd.gradcheck(attention(keywords), tensors, fast_mode=True)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool) -> None:
    tensors, keywords = problem()
    function = attention(keywords)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for one, other in zip(gradients(function, tensors), gradients(compiled, tensors), strict=True):
        assert torch.equal(one, other)


def test_a_seed_on_the_device_is_read_at_every_call() -> None:
    (q, k, v, _), _ = problem(requires_grad=False)
    seed = torch.tensor([7, 3])
    compiled = torch.compile(lambda: fa2cupy.attention(q, k, v, dropout_p=0.5, dropout_seed=seed), backend="aot_eager")
    first = compiled()
    assert torch.equal(first, fa2cupy.attention(q, k, v, dropout_p=0.5, dropout_seed=(7, 3)))
    seed[1] = 4
    assert not torch.equal(first, compiled())
    assert torch.equal(compiled(), fa2cupy.attention(q, k, v, dropout_p=0.5, dropout_seed=(7, 4)))


def test_sinks_alone_may_require_a_gradient() -> None:
    tensors, keywords = problem()
    *_, expected = gradients(attention(keywords), tensors)
    alone = [*(tensor.detach() for tensor in tensors[:3]), tensors[3]]
    out, lse = attention(keywords)(*alone)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    assert torch.equal(torch.autograd.grad((out * weights).sum() + lse.square().sum(), tensors[3])[0], expected)


def test_gradients_of_torch_func() -> None:
    tensors, keywords = problem(requires_grad=False)

    def loss(*tensors: Tensor) -> Tensor:
        out, lse = attention(keywords)(*tensors)
        return out.sum() + lse.square().sum()

    found = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*tensors)
    ours = [tensor.requires_grad_() for tensor in tensors]
    for one, other in zip(found, torch.autograd.grad(loss(*ours), ours), strict=True):
        assert torch.equal(one, other)


def test_the_operators_pass_opcheck() -> None:
    (q, k, v, sinks), keywords = problem()
    seed, slopes = torch.tensor([7, 3]), keywords["alibi_slopes"]
    features = "(('softcap', 2.0), ('dropout_p', 0.25))"
    given = {"alibi_slopes": slopes, "sinks": sinks, "dropout_seed": seed}
    arguments = (q, k, v, True, None, "bshd", None, False, features, *(given.get(name) for name in CARRIED))
    torch.library.opcheck(torch.ops.fa2cupy.forward.default, arguments)


def test_under_vmap() -> None:
    """Slopes of heads and sinks serve all problems; slopes of each problem become slopes of sequences."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(3, 2, 9, 4, 8, generator=generator) for _ in range(3))
    sinks, slopes = torch.randn(4, generator=generator), torch.rand(3, 4, generator=generator)
    found = torch.func.vmap(
        lambda q, k, v, slopes: fa2cupy.attention(q, k, v, sinks=sinks, alibi_slopes=slopes, softcap=3.0)
    )(q, k, v, slopes)
    for n in range(3):
        one = fa2cupy.attention(q[n], k[n], v[n], sinks=sinks, alibi_slopes=slopes[n], softcap=3.0)
        torch.testing.assert_close(found[n], one)


def test_refused() -> None:
    (q, k, v, sinks), keywords = problem()
    slopes = keywords["alibi_slopes"].clone().requires_grad_()
    for alibi in (slopes, slopes[0]):
        with pytest.raises(InvalidArgument, match="alibi_slopes requires grad, and has no gradient"):
            fa2cupy.attention(q, k, v, alibi_slopes=alibi)
    many = [tensor.detach()[None].expand(3, *tensor.shape) for tensor in (q, k, v)]
    with pytest.raises(InvalidArgument, match="dropout_seed is not supported under vmap"):
        torch.func.vmap(lambda q, k, v: fa2cupy.attention(q, k, v, dropout_p=0.5, dropout_seed=(1, 2)))(*many)
    with pytest.raises(InvalidArgument, match="sinks is mapped by vmap"):
        torch.func.vmap(lambda q, k, v, s: fa2cupy.attention(q, k, v, sinks=s))(*many, sinks.detach().expand(3, 4))
    with pytest.raises(InvalidArgument, match="sinks is not supported under vmap of a gradient"):
        torch.func.vmap(torch.func.grad(lambda q, k, v: fa2cupy.attention(q, k, v, sinks=sinks.detach()).sum()))(*many)
