"""Arrays in keywords, under every transformation: dummies that scale q, which no feature's own rule knows."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fa2cupy
from fa2cupy import cpu, problem
from fa2cupy.errors import InvalidType
from fa2cupy.keywords import FUNCTIONS, KEYWORDS, Keyword
from fa2cupy.problem import ARRAY_RULES, ArrayRule
from fa2cupy.spec import MASK_ARRAYS
from fa2cupy.xla.arrays import ROLES
from tests.frameworks.jax_problems import B, D, H, S, X, assert_close, theirs

OF_HEAD, OF_BATCH = jnp.asarray([1.0, 2.0, -1.0, 0.5]), jnp.asarray([3, 2], "int32")


def scaled(q: Any, of_head: Any, of_batch: Any) -> Any:
    q = q if of_head is None else q * of_head[:, None]
    return q if of_batch is None else q * of_batch.reshape(-1, 1, 1, 1)


@pytest.fixture(autouse=True)
def dummies(monkeypatch: pytest.MonkeyPatch) -> None:
    """`of_head`, (num_heads,) float32, and `of_batch`, (batch,) or (1,) int32."""
    for name, shapes, dtype, forms in (
        ("of_head", lambda sizes: ((sizes.num_heads,),), "float32", ("h",)),
        ("of_batch", lambda sizes: ((sizes.batch,), (1,)), "int32", ("b",)),
    ):
        keyword = Keyword(name, "A | None", None, tuple(FUNCTIONS), "a dummy", "0.2")
        monkeypatch.setitem(KEYWORDS, name, keyword)
        monkeypatch.setitem(problem.ARRAY_RULES, name, ArrayRule("such", shapes, lambda _, d=dtype: (d,)))
        monkeypatch.setitem(ROLES, name, forms)
    forward, backward = cpu.forward, cpu.backward

    def scaled_forward(q: Any, *rest: Any, of_head: Any = None, of_batch: Any = None, **known: Any) -> None:
        forward(scaled(q, of_head, of_batch), *rest, **known)

    def scaled_backward(
        dout: Any, q: Any, *rest: Any, dq: Any, of_head: Any = None, of_batch: Any = None, **known: Any
    ) -> None:
        backward(dout, scaled(q, of_head, of_batch), *rest, dq=dq, **known)
        dq[...] = scaled(dq, of_head, of_batch)

    monkeypatch.setattr(cpu, "forward", scaled_forward)
    monkeypatch.setattr(cpu, "backward", scaled_backward)


def ours(q: Any, k: Any, v: Any, of_head: Any, of_batch: Any, **more: Any) -> Any:
    return fa2cupy.attention(q, k, v, causal=True, of_head=of_head, of_batch=of_batch, **more)


def plain(q: Any, k: Any, v: Any, of_head: Any, of_batch: Any) -> Any:
    return theirs(scaled(q, of_head, of_batch), k, v)


def derived(attention: Any) -> Any:
    """The gradients of q, k, v."""

    def of_all(*arrays: Any) -> Any:
        return jax.grad(lambda q, k, v: (attention(q, k, v, *arrays[3:]) ** 2).sum(), (0, 1, 2))(*arrays[:3])

    return of_all


def test_every_array_has_roles() -> None:
    to_come = {"mask", *MASK_ARRAYS}  # refused by name: test_scores.py
    assert set(ARRAY_RULES) - set(ROLES) == to_come


def test_new_values_do_not_recompile() -> None:
    run = jax.jit(derived(ours))
    for factor in (1, 2):
        arrays = (*X[:3], factor * OF_HEAD, factor * OF_BATCH)
        assert_close(run(*arrays), derived(plain)(*arrays), 1e-4)
    assert run._cache_size() == 1
    assert_close(ours(*arrays), plain(*arrays))  # eager
    out, lse = ours(*arrays, return_lse=True)
    gradients = fa2cupy.attention_backward(
        2 * out, *X[:3], out, lse, causal=True, of_head=2 * OF_HEAD, of_batch=2 * OF_BATCH, dlse=jnp.zeros_like(lse)
    )
    assert_close(gradients, derived(plain)(*arrays), 1e-4)


def test_they_have_no_gradient() -> None:
    with pytest.raises(InvalidType, match=r"of_head has no gradient: pass jax\.lax\.stop_gradient\(of_head\)"):
        jax.grad(lambda of_head: ours(*X[:3], of_head, OF_BATCH).sum())(OF_HEAD)
    stopped = jax.grad(lambda q, h: ours(q, *X[1:3], jax.lax.stop_gradient(h), None).sum(), (0, 1))(X[0], OF_HEAD)
    assert bool(stopped[0].any()) and not stopped[1].any()


@pytest.mark.parametrize(
    ("mapped", "calls"),
    [
        ((0, None, None, None, None), 1),
        ((0, 0, 0, None, 0), 1),
        ((None, None, None, None, 0), 1),
        ((0, 0, None, 0, None), 3),  # an array (num_heads,) for each: there is no form with a batch
    ],
)
def test_vmap(mapped: tuple[Any, ...], calls: int, host_calls: Any) -> None:
    arrays = (*X[:3], OF_HEAD, OF_BATCH)
    stacked = [a if m is None else jnp.stack([a, -a, 2 * a]) for a, m in zip(arrays, mapped, strict=True)]
    got = jax.jit(jax.vmap(ours, mapped))(*stacked)
    assert_close(got, jax.vmap(plain, mapped)(*stacked), 1e-4)
    assert len(host_calls) == calls
    assert_close(jax.jit(jax.vmap(derived(ours), mapped))(*stacked), jax.vmap(derived(plain), mapped)(*stacked), 1e-3)


def test_vmap_of_what_is_broadcast(host_calls: Any) -> None:
    """(1,) for all sequences: shared by all it stays so, of each it becomes (size * batch,)."""
    one = OF_BATCH[:1]
    qs = jnp.stack([X[0], -X[0]])
    run = functools.partial(jax.vmap, in_axes=(0, None, None, None, 0))
    assert_close(
        jax.vmap(lambda q: ours(q, *X[1:3], None, one))(qs), jax.vmap(lambda q: plain(q, *X[1:3], None, one))(qs)
    )
    ones = jnp.stack([one, 2 * one])
    arguments = (qs, *X[1:3], OF_HEAD, ones)
    assert_close(run(ours)(*arguments), run(plain)(*arguments))
    assert [shape for _, shape in host_calls] == [(2 * B, S, H, D)] * 2


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_shardings(kind: str, host_calls: Any) -> None:
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(getattr(jax.sharding.AxisType, kind),) * 2)

    def put(array: Any, *spec: Any) -> Any:
        return jax.device_put(np.asarray(array), NamedSharding(mesh, P(*spec)))

    tensors = [put(array, "data", None, "model") for array in X[:3]]
    arrays = (*X[:3], OF_HEAD, OF_BATCH)
    run = jax.jit(derived(ours))
    for extra in ((put(OF_HEAD, "model"), put(OF_BATCH, "data")), (put(OF_HEAD), put(OF_BATCH))):
        assert_close(run(*tensors, *extra), derived(plain)(*arrays), 1e-4)
    one = OF_BATCH[:1]
    assert_close(run(*tensors, put(OF_HEAD), put(one)), derived(plain)(*X[:3], OF_HEAD, one), 1e-4)
    assert {shape for _, shape in host_calls} == {(1, S, H // 2, D)}


def test_shard_map_and_remat() -> None:
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tensor = P("data", None, "model")
    block = jax.checkpoint(ours)
    mapped = jax.shard_map(block, mesh=mesh, in_specs=(tensor,) * 3 + (P("model"), P("data")), out_specs=tensor)
    arrays = (*X[:3], OF_HEAD, OF_BATCH)
    assert_close(jax.jit(derived(mapped))(*arrays), derived(plain)(*arrays), 1e-4)
