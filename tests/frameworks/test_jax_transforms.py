"""fa2cupy.attention under JAX's transformations, on the CPU: what runs is our FFI target, and how often."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fa2cupy
import fa2cupy.jax
from fa2cupy import host
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.xla import ffi
from tests.frameworks.jax_versions import set_mesh, x64

B, S, H, HK, D = 2, 16, 4, 2, 8
BATCH_AND_HEADS = P("data", None, "model", None)


def normal(seed: int, *shape: int, dtype: str = "float32") -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.fixture(scope="module")
def x() -> tuple[Any, Any, Any, Any]:
    """q, k, v and a weight for every element of out."""
    return normal(0, B, S, H, D), normal(1, B, S, HK, D), normal(2, B, S, HK, D), normal(3, B, S, H, D)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """What XLA asks of us: the direction and the shape of q."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    for name in ("forward", "backward"):
        original = getattr(host, name)

        def spy(framework: Any, arrays: Any, *rest: Any, name: str = name, original: Any = original) -> Any:
            seen.append((name, arrays["q"].shape))
            return original(framework, arrays, *rest)

        monkeypatch.setattr(host, name, spy)
    yield seen


ours = functools.partial(fa2cupy.attention, causal=True)
theirs = functools.partial(jax.nn.dot_product_attention, is_causal=True)


def weighted(attention: Callable[..., Any], weight: Any) -> Callable[..., Any]:
    return lambda q, k, v: (attention(q, k, v) * weight).sum()


def gradients(attention: Callable[..., Any], weight: Any) -> Callable[..., Any]:
    return jax.grad(weighted(attention, weight), (0, 1, 2))


def assert_close(got: Any, wanted: Any, tolerance: float = 2e-5) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_jit(x: Any, calls: Any) -> None:
    q, k, v, _ = x
    run = jax.jit(ours)
    assert_close(run(q, k, v), theirs(q, k, v))
    assert_close(run(2 * q, k, v), theirs(2 * q, k, v))
    assert calls == [("forward", q.shape)] * 2
    assert f'custom_call_target="{ffi.TARGET}"' in run.lower(q, k, v).compile().as_text()


def test_value_and_grad(x: Any, calls: Any) -> None:
    q, k, v, weight = x
    both = jax.jit(jax.value_and_grad(weighted(ours, weight), (0, 1, 2)))
    assert_close(both(q, k, v), jax.value_and_grad(weighted(theirs, weight), (0, 1, 2))(q, k, v))
    assert calls == [("forward", q.shape), ("backward", q.shape)]


@pytest.mark.parametrize("causal", [False, True])
def test_gradient_of_lse(x: Any, causal: bool) -> None:
    q, k, v, weight = x
    of_lse = normal(4, B, H, S)

    def plain(q: Any, k: Any, v: Any) -> Any:
        k, v = (jnp.repeat(each, H // HK, 2) for each in (k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * D**-0.5
        if causal:
            scores = jnp.where(jnp.tril(jnp.ones((S, S), bool)), scores, -jnp.inf)
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, -1), v)
        return out, jax.nn.logsumexp(scores, -1)

    def loss(attention: Callable[..., Any], of_out: float) -> Callable[..., Any]:
        def value(*arrays: Any) -> Any:
            out, lse = attention(*arrays)
            return of_out * (out * weight).sum() + (lse * of_lse).sum()

        return jax.grad(value, (0, 1, 2))

    with_lse = functools.partial(fa2cupy.attention, causal=causal, return_lse=True)
    for of_out in (0.0, 1.0):
        assert_close(loss(with_lse, of_out)(q, k, v), loss(plain, of_out)(q, k, v))


def test_vmap_is_one_call(x: Any, calls: Any) -> None:
    q, k, v, weight = x
    qs, ks = jnp.stack([q, 2 * q, -q]), jnp.stack([k, k, 3 * k])
    assert_close(jax.jit(jax.vmap(ours, (0, 0, None)))(qs, ks, v), jax.vmap(theirs, (0, 0, None))(qs, ks, v))
    assert calls == [("forward", (3 * B, S, H, D))]
    vs = jnp.stack([v, v, v])
    assert_close(jax.vmap(gradients(ours, weight))(qs, ks, vs), jax.vmap(gradients(theirs, weight))(qs, ks, vs))
    doubly = tuple(each[None] for each in (qs, ks, vs))
    assert_close(jax.vmap(jax.vmap(ours))(*doubly), jax.vmap(jax.vmap(theirs))(*doubly))


def test_gradient_through_vmap(x: Any) -> None:
    q, k, v, weight = x
    stacked = tuple(jnp.stack([each, -each]) for each in (q, k, v))

    def total(attention: Callable[..., Any]) -> Callable[..., Any]:
        return jax.grad(lambda *arrays: jax.vmap(weighted(attention, weight))(*arrays).sum(), (0, 1, 2))

    assert_close(total(ours)(*stacked), total(theirs)(*stacked))


def test_scan_and_donation(x: Any) -> None:
    q, k, v, _ = x

    def thrice(attention: Callable[..., Any]) -> Callable[..., Any]:
        return lambda q: jax.lax.scan(lambda carry, _: (attention(carry, k, v), None), q, None, 3)[0]

    assert_close(jax.jit(thrice(ours), donate_argnums=0)(q + 0), thrice(theirs)(q))


def test_remat(x: Any, calls: Any) -> None:
    q, k, v, _ = x
    names = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    for policy, wanted in ((None, 3), (names, 2)):  # forward, forward again, backward
        block = jax.checkpoint(lambda q, k, v: ours(jnp.sin(q), k, v), policy=policy)
        run = jax.jit(jax.value_and_grad(lambda *arrays, block=block: block(*arrays).sum()))
        lowered = run.lower(q, k, v)
        assert lowered.as_text().count(f"custom_call @{ffi.TARGET}") == wanted
        assert_close(lowered.compile()(q, k, v)[1], jax.grad(lambda q: theirs(jnp.sin(q), k, v).sum())(q))


def test_forward_mode_raises_in_our_words(x: Any) -> None:
    q, k, v, _ = x
    of_scale: Callable[[Any], Any] = lambda scale: ours(q * scale, k, v).sum()  # noqa: E731
    twice = jax.grad(lambda q: jax.grad(lambda q: (ours(q, k, v) ** 2).sum())(q).sum())
    for derive in (
        lambda: jax.jvp(lambda q: ours(q, k, v), (q,), (q,)),
        lambda: jax.hessian(of_scale)(1.0),
        lambda: twice(q),
    ):
        with pytest.raises(InvalidType, match=r"forward-mode derivatives .*of fa2cupy\.attention do not exist"):
            derive()


def test_empty_batch_and_no_keys() -> None:
    q = jnp.zeros((0, S, H, D))
    assert jax.jit(ours)(q, q, q).shape == q.shape
    q, k = normal(5, 1, 3, 2, D), jnp.zeros((1, 0, 2, D))
    out, lse = jax.jit(functools.partial(fa2cupy.attention, return_lse=True))(q, k, k)
    assert not out.any() and bool((lse == -jnp.inf).all())


def test_float64_keeps_its_type_outside_the_scope_that_made_it() -> None:
    with x64():
        q = jnp.asarray(np.random.default_rng(6).standard_normal((1, 5, 2, D)))
        assert fa2cupy.attention(q, q, q).dtype == "float64"
    out, lse = fa2cupy.attention(q, q, q, return_lse=True)
    assert out.dtype == lse.dtype == "float64"
    assert all(d.dtype == "float64" for d in fa2cupy.attention_backward(out, q, q, q, out, lse))


# ----------------------------------------------------------------------------------------------------------------------
# Shardings


def mesh_of(kind: str) -> Any:
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(getattr(jax.sharding.AxisType, kind),) * 2)


COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute")


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_auto_mesh_needs_no_collective(x: Any, calls: Any, layout: str) -> None:
    *arrays, weight = x
    attention = ours
    spec = BATCH_AND_HEADS
    if layout == "bhsd":
        spec = P("data", "model", None, None)

        def attention(q: Any, k: Any, v: Any) -> Any:
            return fa2cupy.attention(q, k, v, causal=True, layout="bhsd")

    def turn(array: Any) -> Any:
        return array.swapaxes(1, 2) if layout == "bhsd" else array

    placed = [jax.device_put(turn(array), NamedSharding(mesh_of("Auto"), spec)) for array in arrays]
    derived = gradients(attention, turn(weight))
    for run, wanted in ((attention, theirs(*arrays)), (derived, gradients(theirs, weight)(*arrays))):
        compiled = jax.jit(run).lower(*placed).compile()
        assert_close(jax.tree.map(turn, compiled(*placed)), wanted)
        assert not [word for word in COLLECTIVES if word in compiled.as_text()]
    shard = (1, S, H // 2, D) if layout == "bshd" else (1, H // 2, S, D)
    assert {shape for _, shape in calls} == {shard}


def test_sequence_shards_are_gathered(x: Any, calls: Any) -> None:
    *arrays, _ = x
    placed = [jax.device_put(array, NamedSharding(mesh_of("Auto"), P("data", "model"))) for array in arrays]
    assert_close(jax.jit(ours)(*placed), theirs(*arrays))
    assert {shape for _, shape in calls} <= {(1, S, H, D), (B, S, H, D)}


def test_explicit_mesh(x: Any) -> None:
    *arrays, weight = x
    mesh = mesh_of("Explicit")
    wanted = theirs(*arrays), gradients(theirs, weight)(*arrays)
    with set_mesh(mesh):
        sharding = NamedSharding(mesh, BATCH_AND_HEADS)
        placed = [jax.device_put(np.asarray(array), sharding) for array in (*arrays, weight)]
        assert_close(jax.jit(ours)(*placed[:3]), wanted[0])
        assert_close(jax.jit(gradients(ours, placed[3]))(*placed[:3]), wanted[1])


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(x: Any, check_vma: bool) -> None:
    *arrays, weight = x
    mapped = jax.shard_map(
        ours, mesh=mesh_of("Auto"), in_specs=(BATCH_AND_HEADS,) * 3, out_specs=BATCH_AND_HEADS, check_vma=check_vma
    )
    assert_close(jax.jit(mapped)(*arrays), theirs(*arrays))
    assert_close(jax.jit(gradients(mapped, weight))(*arrays), gradients(theirs, weight)(*arrays))


@pytest.mark.parametrize("causal", [False, True])
def test_ring_attention(x: Any, causal: bool) -> None:
    *arrays, weight = x
    mesh = jax.make_mesh((4,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = P(None, "sequence")
    ring = jax.shard_map(
        functools.partial(fa2cupy.jax.ring_attention, axis_name="sequence", causal=causal),
        mesh=mesh,
        in_specs=(spec,) * 3,
        out_specs=spec,
    )
    plain = functools.partial(jax.nn.dot_product_attention, is_causal=causal)
    assert_close(jax.jit(ring)(*arrays), plain(*arrays))
    assert_close(jax.jit(gradients(ring, weight))(*arrays), gradients(plain, weight)(*arrays))


# ----------------------------------------------------------------------------------------------------------------------
# Other processes


def test_export(x: Any) -> None:
    q, k, v, _ = x
    export = pytest.importorskip("jax.export")  # which an old JAX writes with absl, and does not require
    allowed = [export.DisabledSafetyCheck.custom_call(ffi.TARGET)]
    exported = export.export(jax.jit(ours), disabled_checks=allowed)(q, k, v)
    assert_close(export.deserialize(exported.serialize()).call(q, k, v), theirs(q, k, v))


def test_persistent_cache_in_another_process(tmp_path: Path) -> None:
    """The second process takes the executable from the cache: the call's attribute says all that is needed."""
    script = (
        "import jax, jax.numpy as jnp, fa2cupy, fa2cupy.jax\n"
        "import jax.monitoring\n"
        "hits = []\n"
        "jax.monitoring.register_event_listener(lambda event, **_: 'cache_hits' in event and hits.append(1))\n"
        "q = jnp.arange(64.).reshape(1, 4, 2, 8) / 64\n"
        "print(float(jax.jit(lambda q: fa2cupy.attention(q, q, q) * 3)(q).sum()), len(hits))\n"
    )
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    lines = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, **settings},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for _ in range(2)
    ]
    assert lines[0][0] == lines[1][0]
    assert int(lines[1][1]) > int(lines[0][1])


def test_errors_are_xla_errors(x: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that escaped the callback would end the process."""
    q, k, v, _ = x

    def fails(*_: Any) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(host, "forward", fails)
    with pytest.raises(Exception, match="fa2cupy: KeyError: 'planted'"):
        jax.block_until_ready(jax.jit(ours)(q, k, v))


# ----------------------------------------------------------------------------------------------------------------------
# Drop-ins


@pytest.mark.parametrize("is_causal", [False, True])
def test_dot_product_attention(x: Any, is_causal: bool) -> None:
    q, k, v, _ = x
    ours, residual = fa2cupy.jax.dot_product_attention(q, k, v, is_causal=is_causal, scale=0.3, return_residual=True)
    assert_close(ours, jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, scale=0.3))
    assert residual.shape == (B, S, H)
    single = fa2cupy.jax.dot_product_attention(q[0], k[0], v[0], is_causal=is_causal)
    assert_close(single, jax.nn.dot_product_attention(q[0], k[0], v[0], is_causal=is_causal))


def test_dot_product_attention_never_misaligns(x: Any) -> None:
    q, k, v, _ = x
    with pytest.raises(InvalidArgument, match=r"16 queries and 8 keys: jax\.nn aligns them at the first key"):
        fa2cupy.jax.dot_product_attention(q, k[:, :8], v[:, :8], is_causal=True)
    with pytest.raises(InvalidArgument, match="is_causal=True with query_seq_lengths or key_value_seq_lengths"):
        fa2cupy.jax.dot_product_attention(q, k, v, is_causal=True, key_value_seq_lengths=jnp.asarray([3, 4]))
    with pytest.raises(ValueError, match=r"bias.*not supported yet"):
        fa2cupy.jax.dot_product_attention(q, k, v, bias=jnp.zeros((1, 1, S, S)))


def test_flax_attention(x: Any) -> None:
    q, k, v, _ = x
    out = fa2cupy.jax.flax_attention(q[None], k[None], v[None], causal=True, dtype="bfloat16")
    assert out.shape == (1, *q.shape) and out.dtype == "bfloat16"
    assert_close(out[0].astype("float32"), theirs(q, k, v), 3e-2)
    with pytest.raises(InvalidArgument, match=r"dropout_rate=0\.1 is not supported yet"):
        fa2cupy.jax.flax_attention(q, k, v, dropout_rate=0.1)
    fa2cupy.jax.flax_attention(q, k, v, dropout_rate=0.1, deterministic=True)
