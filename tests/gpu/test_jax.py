"""fa2cupy.attention under JAX's transformations on a GPU: XLA's stream, workspaces, command buffers; our kernels."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fa2cupy
from tests.gpu.cases import Case

jax = pytest.importorskip("jax")
jnp = jax.numpy

pytestmark = pytest.mark.skipif(not any(d.platform == "gpu" for d in jax.devices()), reason="JAX has no GPU here")

SHAPES = {
    "128": ((2, 300, 6, 128), (2, 300, 3, 128)),
    "64 wide batch": ((3, 130, 4, 64), (3, 257, 4, 64)),
    "256": ((1, 200, 4, 256), (1, 333, 2, 256)),
    "72 unaligned": ((1, 150, 2, 72), (1, 150, 2, 72)),
    "64 even": ((2, 130, 4, 64), (2, 130, 2, 64)),
}

NEEDS = [
    Case(q[1], k[1], q[3], "bfloat16", causal, q[0], (q[2], k[2]), given=False, deterministic=deterministic)
    for q, k in SHAPES.values()
    for causal, deterministic in ((True, False), (False, False), (True, True))
]


def normal(seed: int, *shape: int, dtype: str = "bfloat16") -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32), dtype)


def inputs(name: str, dtype: str = "bfloat16") -> tuple[Any, Any, Any, Any, Any]:
    """q, k, v, a weight for every element of out and one for every element of lse."""
    q_shape, k_shape = SHAPES[name]
    batch, rows, heads, _ = q_shape
    statistics = normal(4, batch, heads, rows, dtype="float32")
    return (*(normal(i, *s, dtype=dtype) for i, s in enumerate((q_shape, k_shape, k_shape, q_shape))), statistics)


def loss(attention: Any, of_lse: float, q: Any, k: Any, v: Any, weight: Any, statistics: Any) -> Any:
    out, lse = attention(q, k, v)
    return (out.astype("float32") * weight.astype("float32")).sum() + of_lse * (lse * statistics).sum()


def plain(q: Any, k: Any, v: Any, causal: bool) -> tuple[Any, Any]:
    """The formula in float32, bottom-right aligned."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.astype("float32") for x in (q, jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") * q.shape[3] ** -0.5
    if causal:
        sees = jnp.tril(jnp.ones(scores.shape[2:], bool), scores.shape[3] - scores.shape[2])
        scores = jnp.where(sees, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, -1)
    out = jnp.einsum("bhqk,bkhd->bqhd", jnp.exp(scores - lse[..., None]), v, precision="highest")
    return out, lse


def error(a: Any, b: Any) -> float:
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize(
    ("name", "causal", "of_lse"),
    [
        ("128", True, 1.0),
        ("128", False, 0.0),
        ("64 wide batch", True, 1.0),
        ("256", False, 1.0),
        ("72 unaligned", True, 1.0),
    ],
)
def test_jitted_gradients(name: str, causal: bool, of_lse: float) -> None:
    x = inputs(name)
    ours = functools.partial(fa2cupy.attention, causal=causal, return_lse=True)
    derived = jax.jit(jax.value_and_grad(functools.partial(loss, ours, of_lse), (0, 1, 2)))
    value, gradients = derived(*x)
    formula = functools.partial(plain, causal=causal)
    wanted, wanted_gradients = jax.jit(jax.value_and_grad(functools.partial(loss, formula, of_lse), (0, 1, 2)))(*x)
    assert abs(value - wanted) <= 0.05 * abs(float(wanted)) + 5
    for got, right in zip(gradients, wanted_gradients, strict=True):
        assert got.dtype == "bfloat16" and error(got, right) < 1.5e-2
    assert 'custom_call_target="fa2cupy"' in derived.lower(*x).compile().as_text()


def test_jitted_is_eager_bit_for_bit() -> None:
    q, k, v, *_ = inputs("128")
    eager = fa2cupy.attention(q, k, v, causal=True)
    jitted = jax.jit(functools.partial(fa2cupy.attention, causal=True))
    for _ in range(5):  # from the second on perhaps within a command buffer
        assert bool((jitted(q, k, v) == eager).all())


def test_many_calls_in_one_program_and_other_buffers() -> None:
    """A chain long enough for a command buffer, run with inputs at other addresses."""
    q, k, v, *_ = inputs("128", "float16")

    def chain(attention: Any, q: Any) -> Any:
        for _ in range(8):
            q = q + attention(q, k, v)
        return q

    run = jax.jit(functools.partial(chain, functools.partial(fa2cupy.attention, causal=True)))
    for seed in range(4):
        start = normal(10 + seed, *q.shape, dtype="float16")
        by_hand = start
        for _ in range(8):
            by_hand = by_hand + fa2cupy.attention(by_hand, k, v, causal=True)
        assert bool((run(start) == by_hand).all())


def test_segments_are_packed_sequences() -> None:
    """Under jit and grad, with other ids in the same program; where they are padding, nothing."""
    q, k, v, weight, _ = inputs("128")
    rows = q.shape[1]

    @jax.jit
    def derived(qkv: Any, ids: Any) -> Any:
        def total(*qkv: Any) -> Any:
            out = fa2cupy.attention(*qkv, causal=True, segment_ids=(ids, ids), deterministic=True)
            return (out.astype("float32") * weight.astype("float32")).sum()

        return jax.value_and_grad(total, (0, 1, 2))(*qkv)

    def packed(starts: Any) -> Any:
        def total(*qkv: Any) -> Any:
            flat = (x.reshape(-1, *x.shape[2:]) for x in qkv)
            out = fa2cupy.attention(*flat, causal=True, cu_seqlens_q=starts, cu_seqlens_k=starts, deterministic=True)
            return (out.astype("float32") * weight.reshape(out.shape).astype("float32")).sum()

        return jax.value_and_grad(total, (0, 1, 2))(q, k, v)

    for length in (100, 7, 300):
        ids = jnp.broadcast_to(jnp.arange(rows, dtype="int32") // length, q.shape[:2])
        starts = [b * rows + first for b in range(q.shape[0]) for first in range(0, rows, length)]
        value, gradients = derived((q, k, v), ids)
        wanted, wanted_gradients = packed(jnp.asarray([*starts, q.shape[0] * rows], "int32"))
        assert abs(value - wanted) <= 1e-3 * abs(float(wanted)) + 1
        for got, right in zip(gradients, wanted_gradients, strict=True):
            assert error(got, right) < 1e-2
    value, gradients = derived((q, k, v), jnp.full(q.shape[:2], -1, "int32"))
    assert value == 0 and not any(bool(x.any()) for x in gradients)


def with_features(q: Any, k: Any, v: Any, sinks: Any, slopes: Any, keep: Any, softcap: float, p: float) -> Any:
    """The formula in float32 with softcap, ALiBi, sinks and a dropout mask, causal; as many queries as keys."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.astype("float32") for x in (q, jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") * q.shape[3] ** -0.5
    scores = softcap * jnp.tanh(scores / softcap)
    i = jnp.arange(scores.shape[3])
    scores -= slopes[..., None, None] * abs(i[:, None] - i)
    scores = jnp.where(i[:, None] >= i, scores, -jnp.inf)
    own = jnp.broadcast_to(sinks.astype("float32")[:, None, None], (*scores.shape[:3], 1))
    lse = jax.nn.logsumexp(jnp.concatenate([scores, own], -1), -1)
    kept = jnp.exp(scores - lse[..., None]) * keep / (1 - round(p * 2**15) / 2**15)
    return jnp.einsum("bhqk,bkhd->bqhd", kept, v, precision="highest"), lse


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_and_dropout(dtype: str) -> None:
    """softcap, ALiBi, sinks and dropout together, by a key that is an operand; dtype: of the sinks."""
    x = inputs("128")
    batch, rows, heads, _ = x[0].shape
    sinks, slopes = jnp.linspace(-1, 2, heads).astype(dtype), 2.0 ** -normal(7, batch, heads, dtype="float32") / 16
    softcap, p = 5.0, 0.2

    def ours(sinks: Any, key: Any, *qkv: Any) -> Any:
        of = {"sinks": sinks, "alibi_slopes": slopes, "softcap": softcap, "dropout_p": p, "dropout_seed": key}
        return fa2cupy.attention(*qkv, causal=True, return_lse=True, deterministic=True, **of)

    def formula(sinks: Any, keep: Any, *qkv: Any) -> Any:
        return with_features(*qkv, sinks, slopes, keep, softcap, p)

    def derived(function: Any) -> Any:
        def total(q: Any, k: Any, v: Any, sinks: Any, drawn: Any) -> Any:
            return loss(functools.partial(function, sinks, drawn), 1.0, q, k, v, *x[3:])

        return jax.jit(jax.grad(total, (0, 1, 2, 3)))

    run, by_formula = derived(ours), derived(formula)
    for key in jax.random.split(jax.random.key(3), 2):
        keep = jnp.asarray(fa2cupy.dropout_mask(batch, heads, rows, rows, p, key))
        got = run(*x[:3], sinks, key)
        for mine, right in zip(got, by_formula(*x[:3], sinks, keep), strict=True):
            assert mine.dtype == right.dtype and error(mine, right) < 2e-2
        assert got[3].dtype == dtype
        for again, first in zip(run(*x[:3], sinks, key), got, strict=True):
            assert bool((again == first).all())
    assert run._cache_size() == 1


def test_keys_in_a_command_buffer() -> None:
    """A chain long enough for one, with a key for each link: other keys are read anew, without a recompilation."""
    q, k, v, *_ = inputs("128")
    attend = functools.partial(fa2cupy.attention, causal=True, dropout_p=0.3)

    def chain(q: Any, keys: Any) -> Any:
        for key in keys:
            q = q + attend(q, k, v, dropout_seed=key)
        return q

    run, results = jax.jit(chain), []
    for seed in (0, 1, 0):
        keys = jax.random.split(jax.random.key(seed), 8)
        results.append(run(q, keys))
        by_hand = q
        for key in keys:
            by_hand = by_hand + attend(by_hand, k, v, dropout_seed=key)
        assert bool((results[-1] == by_hand).all())
    assert bool((results[0] == results[2]).all()) and bool((results[0] != results[1]).any())
    assert run._cache_size() == 1


def test_vmap_is_a_larger_batch() -> None:
    q, k, v, *_ = inputs("64 wide batch")
    qs, ks, vs = (jnp.stack([x, -x]) for x in (q, k, v))
    mapped = jax.jit(jax.vmap(fa2cupy.attention))(qs, ks, vs)
    for i in range(2):
        assert bool((mapped[i] == fa2cupy.attention(qs[i], ks[i], vs[i])).all())


def test_deterministic_gradients_repeat() -> None:
    x = inputs("128")
    ours = functools.partial(fa2cupy.attention, causal=True, return_lse=True, deterministic=True)
    derived = jax.jit(jax.grad(functools.partial(loss, ours, 1.0), (0, 1, 2)))
    first = derived(*x)
    for _ in range(20):
        for a, b in zip(derived(*x), first, strict=True):
            assert bool((a == b).all())


def test_float32_is_refused_before_it_runs() -> None:
    q = normal(0, 1, 8, 2, 64, dtype="float32")
    with pytest.raises(TypeError, match="float32"):
        fa2cupy.attention(q, q, q)
    with pytest.raises(Exception, match="INVALID_ARGUMENT: fa2cupy: q has dtype float32"):
        jax.block_until_ready(jax.jit(lambda q: fa2cupy.attention(q, q, q))(q))


def test_persistent_cache(tmp_path: Path) -> None:
    script = (
        "import jax, jax.numpy as jnp, fa2cupy, fa2cupy.jax\n"
        "q = (jnp.arange(2 * 128 * 2 * 64) % 7).reshape(2, 128, 2, 64).astype('bfloat16')\n"
        "f = jax.jit(jax.grad(lambda q: (fa2cupy.attention(q, q, q, causal=True).astype('float32') ** 2).sum()))\n"
        "print(float(f(q).astype('float32').sum()))\n"
    )
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, **settings},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        outputs.append(float(done.stdout.split()[-1]))
    assert list(tmp_path.iterdir()) and abs(outputs[0] - outputs[1]) <= 1e-2 * abs(outputs[0])


def test_exported_program_in_another_process(tmp_path: Path) -> None:
    """Nothing is traced there: the handler's first call may be one that XLA records, in a chain of this length."""
    export = pytest.importorskip("jax.export")
    q, k, v, *_ = inputs("128")

    def chain(q: Any, k: Any, v: Any) -> Any:
        for _ in range(8):
            q = fa2cupy.attention(q, k, v, causal=True)
        return q.astype("float32")

    allowed = [export.DisabledSafetyCheck.custom_call("fa2cupy")]
    (tmp_path / "program").write_bytes(export.export(jax.jit(chain), disabled_checks=allowed)(q, k, v).serialize())
    np.savez(tmp_path / "arrays.npz", *(np.asarray(x.astype("float32")) for x in (q, k, v)))
    script = (
        "import sys, jax.export, jax.numpy as jnp, numpy as np, fa2cupy.jax\n"
        "program = jax.export.deserialize(bytearray(open(sys.argv[1] + '/program', 'rb').read()))\n"
        "arrays = np.load(sys.argv[1] + '/arrays.npz')\n"
        "arrays = [jnp.asarray(arrays[name], 'bfloat16') for name in arrays.files]\n"
        "run = jax.jit(program.call)\n"
        "for _ in range(3): result = run(*arrays)\n"
        "np.save(sys.argv[1] + '/result.npy', result)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_array_equal(np.load(tmp_path / "result.npy"), np.asarray(chain(q, k, v)))


@pytest.mark.skipif(len(jax.devices()) < 2, reason="one GPU: shardings are tested on four devices of the CPU")
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_over_two_gpus(kind: str) -> None:
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((2,), ("gpus",), devices=jax.devices()[:2], axis_types=(getattr(jax.sharding.AxisType, kind),))
    x = inputs("128")
    ours = functools.partial(fa2cupy.attention, causal=True, return_lse=True)
    derived = jax.jit(jax.grad(functools.partial(loss, ours, 1.0), (0, 1, 2)))
    wanted = derived(*x)
    placed = [jax.device_put(np.asarray(y), NamedSharding(mesh, PartitionSpec("gpus"))) for y in x]
    for _ in range(3):
        for got, right in zip(derived(*placed), wanted, strict=True):
            assert got.sharding.spec[0] == "gpus" and error(got, right) < 1e-2


@pytest.mark.skipif(len(jax.devices()) < 2, reason="one GPU: shardings are tested on four devices of the CPU")
@pytest.mark.parametrize("dimension", [0, 2])
def test_dropout_and_sinks_over_two_gpus(dimension: int) -> None:
    """Sharded by batch and by heads, dropout drops what it drops on one GPU."""
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((2,), ("gpus",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    q, k, v, weight, _ = inputs("64 even")
    sinks, key = jnp.linspace(-1, 2, q.shape[2]), jax.random.key(5)

    @jax.jit
    def derived(q: Any, k: Any, v: Any, weight: Any, sinks: Any) -> Any:
        def attend(q: Any, k: Any, v: Any, sinks: Any) -> Any:
            how = {"deterministic": True, "dropout_p": 0.3, "dropout_seed": key}
            return fa2cupy.attention(q, k, v, causal=True, sinks=sinks, **how)

        out, pullback = jax.vjp(attend, q, k, v, sinks)
        return out, *pullback(weight)

    wanted = derived(q, k, v, weight, sinks)
    spec = PartitionSpec(*("gpus" if i == dimension else None for i in range(4)))
    placed = [jax.device_put(np.asarray(y), NamedSharding(mesh, spec)) for y in (q, k, v, weight)]
    of_heads = NamedSharding(mesh, PartitionSpec("gpus" if dimension == 2 else None))
    got = derived(*placed, jax.device_put(np.asarray(sinks), of_heads))
    for mine, right in zip(got, wanted, strict=True):  # perhaps by other tiles, and never by another mask
        assert error(mine, right) < 1e-2


def test_an_eager_call_is_remembered() -> None:
    from fa2cupy.prepared import PREPARED

    q, k, v, *_ = inputs("128")
    first = fa2cupy.attention(q, k, v, causal=True)
    known = len(PREPARED)
    assert known and bool((fa2cupy.attention(q + 0, k, v, causal=True) == first).all())
    assert len(PREPARED) == known


@pytest.mark.parametrize("page", [0, 16])
def test_a_kv_cache_in_a_loop(page: int) -> None:
    """Token by token by lax.scan, the caches carried along and written in place; eagerly, too."""
    q, k, v = (normal(seed, 2, 40, heads, 128) for seed, heads in enumerate((8, 2, 2)))
    shape = (2, 64, 2, 128) if not page else (9, page, 2, 128)
    empty = jnp.full(shape, jnp.nan, jnp.bfloat16)
    table = {} if not page else {"block_table": jnp.array([[8, 1, 3, 2], [0, 7, 4, 5]], jnp.int32)}

    def step(state: Any, new: Any) -> Any:
        keys, values, length = state
        q, k, v = (x[:, None] for x in new)
        out, keys, values = fa2cupy.attention_with_kvcache(
            q, keys, values, k, v, cache_seqlens=jnp.full((2,), length, jnp.int32), causal=True, **table
        )
        return (keys, values, length + 1), out[:, 0]

    tokens = tuple(x.swapaxes(0, 1) for x in (q, k, v))
    (keys, values, _), outs = jax.jit(lambda tokens: jax.lax.scan(step, (empty, empty + 0, 0), tokens))(tokens)
    assert error(outs.swapaxes(0, 1), plain(q, k, v, True)[0]) < 0.01
    for stored, new in ((keys, k), (values, v)):
        whole = stored[table["block_table"]].reshape(2, -1, 2, 128) if page else stored
        assert (whole[:, :40] == new).all() and jnp.isnan(whole[:, 40:]).all()
    cache, written = fa2cupy.KVCache(keys, values, **table), keys
    lengths = jnp.full((2,), 40, jnp.int32)
    seen = cache.attend(q[:, :1], cache_seqlens=lengths)
    assert error(seen, plain(q[:, :1], k, v, False)[0]) < 0.01 and not written.is_deleted()
    again, keys, _ = cache.attend(q[:, :1], k=k[:, :1], v=v[:, :1], cache_seqlens=lengths - 1)
    assert written.is_deleted() and not jnp.isnan(again).any()
