"""fa2cupy.attention under JAX's transformations, on the CPU: what runs is our FFI target, and how often."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fa2cupy
import fa2cupy.jax
from fa2cupy import host
from fa2cupy.errors import InvalidType
from fa2cupy.xla import ffi
from tests.frameworks.jax_problems import HK, B, D, H, S, X, assert_close, gradients, normal, ours, theirs, weighted
from tests.frameworks.jax_versions import x64


def test_jit(host_calls: Any) -> None:
    q, k, v, _ = X
    run = jax.jit(ours)
    assert_close(run(q, k, v), theirs(q, k, v))
    assert_close(run(2 * q, k, v), theirs(2 * q, k, v))
    assert host_calls == [("forward", q.shape)] * 2
    assert f'custom_call_target="{ffi.TARGET}"' in run.lower(q, k, v).compile().as_text()


def test_value_and_grad(host_calls: Any) -> None:
    q, k, v, weight = X
    both = jax.jit(jax.value_and_grad(weighted(ours, weight), (0, 1, 2)))
    assert_close(both(q, k, v), jax.jit(jax.value_and_grad(weighted(theirs, weight), (0, 1, 2)))(q, k, v))
    assert host_calls == [("forward", q.shape), ("backward", q.shape)]


@pytest.mark.parametrize("causal", [False, True])
def test_gradient_of_lse(causal: bool) -> None:
    q, k, v, weight = X
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


def test_vmap_is_one_call(host_calls: Any) -> None:
    q, k, v, weight = X
    qs, ks = jnp.stack([q, 2 * q, -q]), jnp.stack([k, k, 3 * k])
    assert_close(jax.jit(jax.vmap(ours, (0, 0, None)))(qs, ks, v), jax.vmap(theirs, (0, 0, None))(qs, ks, v))
    assert host_calls == [("forward", (3 * B, S, H, D))]
    vs = jnp.stack([v, v, v])
    assert_close(
        jax.vmap(gradients(ours, weight))(qs, ks, vs), jax.jit(jax.vmap(gradients(theirs, weight)))(qs, ks, vs)
    )
    doubly = tuple(each[None] for each in (qs, ks, vs))
    assert_close(jax.vmap(jax.vmap(ours))(*doubly), jax.vmap(jax.vmap(theirs))(*doubly))


def test_gradient_of_what_is_not_mapped() -> None:
    q, k, v, weight = X
    qs = jnp.stack([q, 2 * q, -q])

    def total(attention: Callable[..., Any]) -> Callable[..., Any]:
        return jax.grad(
            lambda q, k, v: jax.vmap(weighted(attention, weight), (0, None, None))(q, k, v).sum(), (0, 1, 2)
        )

    assert_close(jax.jit(total(ours))(qs, k, v), jax.jit(total(theirs))(qs, k, v), 1e-4)


def test_gradient_through_vmap() -> None:
    q, k, v, weight = X
    stacked = tuple(jnp.stack([each, -each]) for each in (q, k, v))

    def total(attention: Callable[..., Any]) -> Callable[..., Any]:
        return jax.grad(lambda *arrays: jax.vmap(weighted(attention, weight))(*arrays).sum(), (0, 1, 2))

    assert_close(total(ours)(*stacked), jax.jit(total(theirs))(*stacked))


def test_scan_and_donation() -> None:
    q, k, v, _ = X

    def thrice(attention: Callable[..., Any]) -> Callable[..., Any]:
        return lambda q: jax.lax.scan(lambda carry, _: (attention(carry, k, v), None), q, None, 3)[0]

    assert_close(jax.jit(thrice(ours), donate_argnums=0)(q + 0), thrice(theirs)(q))


def test_remat(host_calls: Any) -> None:
    q, k, v, _ = X
    names = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    for policy, wanted in ((None, 3), (names, 2)):  # forward, forward again, backward
        block = jax.checkpoint(lambda q, k, v: ours(jnp.sin(q), k, v), policy=policy)
        run = jax.jit(jax.value_and_grad(lambda *arrays, block=block: block(*arrays).sum()))
        lowered = run.lower(q, k, v)
        assert lowered.as_text().count(f"custom_call @{ffi.TARGET}") == wanted
        assert_close(lowered.compile()(q, k, v)[1], jax.grad(lambda q: theirs(jnp.sin(q), k, v).sum())(q))


def test_forward_mode_raises_in_our_words() -> None:
    q, k, v, _ = X
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
# Other processes


def test_export() -> None:
    q, k, v, _ = X
    export = pytest.importorskip("jax.export")  # which an old JAX writes with absl, and does not require
    allowed = [export.DisabledSafetyCheck.custom_call(ffi.TARGET)]
    exported = export.export(jax.jit(ours), disabled_checks=allowed)(q, k, v)
    assert_close(export.deserialize(exported.serialize()).call(q, k, v), theirs(q, k, v))


def test_export_to_another_process(tmp_path: Path) -> None:
    """Which imports fa2cupy.jax and needs nothing else: not the function, nor its options."""
    export = pytest.importorskip("jax.export")
    q, k, v, weight = X
    allowed = [export.DisabledSafetyCheck.custom_call(ffi.TARGET)]
    exported = export.export(jax.jit(gradients(ours, weight)), disabled_checks=allowed)(q, k, v)
    (tmp_path / "program").write_bytes(exported.serialize())
    np.savez(tmp_path / "arrays.npz", q, k, v)
    script = (
        "import sys, jax.export, numpy as np, fa2cupy.jax\n"
        "program = jax.export.deserialize(bytearray(open(sys.argv[1] + '/program', 'rb').read()))\n"
        "arrays = np.load(sys.argv[1] + '/arrays.npz')\n"
        "np.savez(sys.argv[1] + '/results.npz', *program.call(*(arrays[name] for name in arrays.files)))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parents[2], check=True)
    results = np.load(tmp_path / "results.npz")
    assert_close([results[name] for name in results.files], gradients(theirs, weight)(q, k, v))


def test_ahead_of_time() -> None:
    q, k, v, weight = X
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (q, k, v)]
    compiled = jax.jit(gradients(ours, weight)).lower(*shapes).compile()
    assert_close(compiled(q, k, v), gradients(theirs, weight)(q, k, v))


def test_symbolic_shapes_are_refused() -> None:
    """A plan is of one shape. JAX says it, by what compares two lengths first."""
    export = pytest.importorskip("jax.export")
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("b, 8, 2, 8"), jnp.float32)
    with pytest.raises(Exception, match=r"Symbolic dimension comparison .* is inconclusive"):
        export.export(jax.jit(lambda q: fa2cupy.attention(q, q, q)))(shape)


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


def test_errors_are_xla_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that escaped the callback would end the process."""
    q, k, v, _ = X

    def fails(*_: Any) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(host, "forward", fails)
    with pytest.raises(Exception, match="fa2cupy: KeyError: 'planted'"):
        jax.block_until_ready(jax.jit(ours)(q, k, v))
