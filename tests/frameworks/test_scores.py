"""softcap, ALiBi, sinks and dropout through torch and JAX: what is carried is right, what is not is named."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.utils import flop_counter

import fa2cupy
from fa2cupy.errors import InvalidArgument, InvalidType
from tests.reference import make_inputs

B, S, H = 2, 9, 4
INPUTS = make_inputs(1, S, S, dtype="float32", batch=B, heads=(H, 2), head_dim=8)
SLOPES = np.array([0.5, 0.25, -0.125, 0.0625], np.float32)
SINKS = np.array([1.0, -2.0, 0.5, 3.0], np.float32)
SEED = (5, 2**63 + 1)
ALL = {"softcap": 2.0, "alibi_slopes": SLOPES, "sinks": SINKS, "dropout_p": 0.3, "dropout_seed": SEED}
# By the keyword that asks for them; of doors that do not carry one it is named.
ARRAYS: dict[str, dict[str, Any]] = {
    "alibi_slopes": {"alibi_slopes": SLOPES},
    "sinks": {"sinks": SINKS},
    "dropout_p": {"dropout_p": 0.3, "dropout_seed": SEED},
    "mask": {"mask": np.tri(S, dtype=np.bool_)},
}


def to_torch(keywords: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in keywords.items()}


def seeds(seed: tuple[int, int]) -> list[np.ndarray]:
    """The same 16 bytes."""
    words = np.array([x & (2**64 - 1) for x in seed], np.uint64)
    return [words, words.view(np.int64), words.view(np.uint32)]


def test_torch_tensors_as_numpy_arrays() -> None:
    q, k, v, dout = map(torch.from_numpy, INPUTS)
    out, lse = fa2cupy.attention(q, k, v, causal=True, return_lse=True, **to_torch(ALL))
    expected, expected_lse = fa2cupy.attention(*INPUTS[:3], causal=True, return_lse=True, **ALL)
    assert (out.numpy() == expected).all() and (lse.numpy() == expected_lse).all()
    for seed in seeds(SEED):
        again = to_torch(ALL) | {"dropout_seed": torch.from_numpy(seed)}
        assert torch.equal(fa2cupy.attention(q, k, v, causal=True, **again), out), seed.dtype
    options: dict[str, Any] = {"causal": True, "grad_of": ("sinks",)}
    gradients = fa2cupy.attention_backward(dout, q, k, v, out, lse, **options, **to_torch(ALL))
    wanted = fa2cupy.attention_backward(INPUTS.dout, *INPUTS[:3], expected, expected_lse, **options, **ALL)
    assert len(gradients) == 4
    for x, y in zip(gradients, wanted, strict=True):
        assert (x.numpy() == y).all()


@pytest.mark.parametrize("way", ["grad", "compile", "watched"])
@pytest.mark.parametrize("name", ARRAYS)
def test_torchs_ways(name: str, way: str) -> None:
    """What they carry changes nothing of the result."""
    q, k, v, _ = map(torch.from_numpy, INPUTS)
    keywords = to_torch(ARRAYS[name])

    def attend(q: Any) -> Any:
        return fa2cupy.attention(q, k, v, **keywords)

    wanted = attend(q)
    if way == "compile":
        torch.compiler.reset()
        attend = torch.compile(attend, backend="aot_eager", fullgraph=True)
    mode = flop_counter.FlopCounterMode(display=False) if way == "watched" else contextlib.nullcontext()
    with mode:
        assert torch.equal(attend(q.clone().requires_grad_(way == "grad")), wanted)


def test_a_gradient_of_slopes_is_not_lost() -> None:
    """q, k and v ask for none, and autograd would see nothing."""
    q, k, v, _ = map(torch.from_numpy, INPUTS)
    slopes = torch.from_numpy(SLOPES).clone().requires_grad_()
    with pytest.raises(InvalidArgument, match=r"^alibi_slopes requires grad, and has no gradient here: pass .*detach"):
        fa2cupy.attention(q, k, v, alibi_slopes=slopes)
    with torch.no_grad():
        fa2cupy.attention(q, k, v, alibi_slopes=slopes)


@pytest.mark.parametrize("way", ["eager", "compile"])
def test_softcap_under_autograd(way: str) -> None:
    q, k, v = (torch.from_numpy(x).clone().requires_grad_() for x in INPUTS[:3])

    def attend(q: Any, k: Any, v: Any) -> Any:
        return fa2cupy.attention(q, k, v, causal=True, softcap=1.5)

    if way == "compile":
        torch.compiler.reset()
        attend = torch.compile(attend, backend="aot_eager", fullgraph=True)
    attend(q, k, v).backward(torch.from_numpy(INPUTS.dout))
    _, pullback = fa2cupy.attention_vjp(*INPUTS[:3], causal=True, softcap=1.5)
    for x, y in zip((q, k, v), pullback(INPUTS.dout), strict=True):
        np.testing.assert_allclose(x.grad.numpy(), y, rtol=1e-6, atol=1e-6)


def test_softcap_of_jax() -> None:
    arrays = tuple(map(jnp.asarray, INPUTS[:3]))
    _, pullback = jax.vjp(jax.jit(lambda *x: fa2cupy.attention(*x, causal=True, softcap=1.5)), *arrays)
    _, expected = fa2cupy.attention_vjp(*INPUTS[:3], causal=True, softcap=1.5)
    for x, y in zip(pullback(jnp.asarray(INPUTS.dout)), expected(INPUTS.dout), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mask"])
def test_what_jax_does_not_carry_is_named(name: str) -> None:
    q, k, v, dout = map(jnp.asarray, INPUTS)
    keywords = {key: jnp.asarray(x) if isinstance(x, np.ndarray) else x for key, x in ARRAYS[name].items()}
    message = f"^{name} is not supported yet for JAX arrays: leave it out"
    with pytest.raises(InvalidArgument, match=message):
        fa2cupy.attention(q, k, v, **keywords)
    with pytest.raises(InvalidArgument, match=message):
        jax.jit(lambda q: fa2cupy.attention(q, k, v, **keywords))(q)
    out, lse = fa2cupy.attention(q, k, v, return_lse=True)
    with pytest.raises(InvalidArgument, match=message):
        fa2cupy.attention_backward(dout, q, k, v, out, lse, **keywords)


@pytest.mark.parametrize("seed", [SEED, *seeds(SEED)], ids=lambda seed: str(getattr(seed, "dtype", "ints")))
def test_masks_of_other_frameworks(seed: Any) -> None:
    shape = 2, 3, 20, 40
    expected = fa2cupy.dropout_mask(*shape, 0.3, SEED)
    for like, kind in ((torch.ones(1), torch.Tensor), (jnp.ones(1), jax.Array)):
        given = seed if isinstance(seed, tuple) else torch.from_numpy(seed)
        mask = fa2cupy.dropout_mask(*shape, 0.3, given, like=like)
        assert isinstance(mask, kind) and (np.asarray(mask) == expected).all()
    key = jax.random.key_data(jax.random.key(7))
    words = np.array([int(key[0]) + (int(key[1]) << 32), 0], np.uint64).astype(np.int64)
    assert (fa2cupy.dropout_mask(*shape, 0.3, key) == fa2cupy.dropout_mask(*shape, 0.3, tuple(words.tolist()))).all()
    with pytest.raises(InvalidType, match="like is a list: an array of CuPy, PyTorch, JAX or NumPy is needed"):
        fa2cupy.dropout_mask(*shape, 0.3, SEED, like=[1])


def test_log_sum_exps_of_jax() -> None:
    """Those that jax.nn gives, of rows that see nothing too."""
    q, k, v, _ = map(jnp.asarray, INPUTS)
    mask = jnp.tril(jnp.ones((1, 1, S, S), bool), -1)  # query 0 sees no key
    _, residual = jax.nn.dot_product_attention(q, k, v, mask=mask, return_residual=True)
    lse = fa2cupy.convert_lse(residual, source="jax", target="fa2cupy")
    _, ours = fa2cupy.attention(q[:, 1:], k[:, :-1], v[:, :-1], causal=True, return_lse=True)
    assert bool(jnp.isneginf(lse[..., 0]).all())
    np.testing.assert_allclose(lse[..., 1:], ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["fa2cupy", "flash_attn", "flashinfer", "jax", "cudnn"])
def test_converted_log_sum_exps_have_gradients(target: str) -> None:
    lse = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    there = fa2cupy.convert_lse(lse, source="fa2cupy", target=target)
    back = fa2cupy.convert_lse(there, source=target, target="fa2cupy")
    torch.testing.assert_close(back, lse)
    (gradient,) = torch.autograd.grad(back.square().sum(), lse)
    torch.testing.assert_close(gradient, 2 * lse)
    total = jax.grad(lambda x: fa2cupy.convert_lse(x, source="fa2cupy", target=target).sum())(jnp.ones((2, 3, 5)))
    np.testing.assert_allclose(total, np.log2(np.e) if target == "flashinfer" else 1, rtol=1e-6)
