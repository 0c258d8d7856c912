"""softcap, ALiBi, sinks and dropout in JAX: keys, gradients, every transformation, shards."""

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
import fa2cupy.jax
from fa2cupy.errors import InvalidArgument, InvalidType
from tests.frameworks.jax_problems import assert_close
from tests.frameworks.jax_versions import x64
from tests.lengths import draw, expect_sequences
from tests.reference import Inputs, as_ml_dtypes, expect, make_inputs
from tests.scores import draw_features, features_of

B, SQ, SK, H, HK = 4, 11, 17, 4, 2
KEY = jax.random.key(7)
ALL = ("softcap", "alibi_slopes", "sinks", "dropout_p")
NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")


def numbers(key: Any) -> tuple[int, int]:
    """The dropout_seed of a key of two words, as other frameworks take it."""
    low, high = np.asarray(jax.random.key_data(key)).tolist()
    return low | high << 32, 0


def problem(names: Any = ALL, dtype: str = "float32", seed: int = 0, batch: int = B) -> tuple[Inputs, dict[str, Any]]:
    """Arrays of NumPy, and keywords; the seed is `KEY`, which every framework's mask can be had from."""
    inputs = make_inputs(seed, SQ, SK, dtype=dtype, batch=batch, heads=(H, HK), head_dim=8)
    keywords = draw_features(names, seed, batch, H, dtype)
    return inputs, keywords | ({"dropout_seed": KEY} if "dropout_p" in names else {})


def to_jax(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(as_ml_dtypes(x)) if isinstance(x, np.ndarray) else x, tree)


def split(keywords: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays, options)"""
    arrays = {name: x for name, x in keywords.items() if hasattr(x, "shape")}
    return arrays, {name: x for name, x in keywords.items() if name not in arrays}


def derived(options: dict[str, Any], q: Any, k: Any, v: Any, dout: Any, dlse: Any, arrays: dict[str, Any]) -> Any:
    """out, lse, dq, dk, dv and, with sinks, dsinks."""
    others = {name: x for name, x in arrays.items() if name != "sinks"}

    def run(q: Any, k: Any, v: Any, of_sinks: Any) -> Any:
        return fa2cupy.attention(q, k, v, return_lse=True, **others, **of_sinks, **options)

    of_sinks = {name: x for name, x in arrays.items() if name == "sinks"}
    (out, lse), pullback = jax.vjp(run, q, k, v, of_sinks)
    *gradients, dsinks = pullback((dout, dlse))
    return out, lse, *gradients, *dsinks.values()


def dlse_like(inputs: Inputs, seed: int = 9) -> Any:
    dtype = "float64" if inputs.q.dtype == np.float64 else "float32"
    return np.random.default_rng(seed).standard_normal((len(inputs.q), H, SQ)).astype(dtype)


@functools.lru_cache(maxsize=1)
def whole() -> tuple[Inputs, Any, dict[str, Any], dict[str, Any], Any]:
    """The problem with everything, and its results on one device."""
    inputs, keywords = problem()
    arrays, options = split(keywords | {"causal": True})
    dlse = dlse_like(inputs)
    return inputs, dlse, arrays, options, jax.jit(functools.partial(derived, options))(*inputs, dlse, to_jax(arrays))


def assert_same(got: Any, wanted: Any, summed: tuple[int, ...] = ()) -> None:
    """Bit for bit; at the places `summed` in another order."""
    for place, (x, y) in enumerate(zip(got, wanted, strict=True)):
        if place in summed:
            assert_close(x, y, 1e-5)
        else:
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(place))


# ----------------------------------------------------------------------------------------------------------------------
# What is computed


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (ALL, "float32"),
        (("softcap", "alibi of batch", "sinks", "dropout_p"), "bfloat16"),
        (("alibi_slopes", "sinks"), "float16"),
        (("sinks", "dropout_p"), "float64"),
    ],
)
def test_results_and_gradients(names: Any, dtype: str) -> None:
    inputs, keywords = problem(names, dtype, seed=1)
    dlse = dlse_like(inputs)
    with x64(dtype == "float64"):
        arrays, options = split(keywords | {"causal": True})
        tensors = to_jax((*inputs, dlse, arrays))
        run = jax.jit(functools.partial(derived, options))
        results = run(*tensors)
        assert_same(derived(options, *tensors), results)
        assert run.lower(*tensors).as_text().count("custom_call @fa2cupy") == 2
    assert results[5].dtype == tensors[5]["sinks"].dtype
    out = inputs.q.dtype.type(0) if dtype == "float64" else results[0]
    expected = expect(
        *inputs, causal=True, dlse=dlse, dtype=dtype, features=features_of(keywords, B, H, SQ, SK),
        out=None if dtype == "float64" else np.asarray(out).view(inputs.q.dtype),
    )  # fmt: skip
    stored = (np.asarray(x) for x in results)
    expected.check(**{
        name: x.view(np.uint16) if x.dtype.name == "bfloat16" else x for name, x in zip(NAMES, stored, strict=True)
    })  # fmt: skip


def test_as_numpy_bit_for_bit() -> None:
    inputs, dlse, arrays, options, results = whole()
    keywords = {**arrays, **options, "dropout_seed": numbers(KEY)}
    out, lse = fa2cupy.attention(*inputs[:3], return_lse=True, **keywords)
    of = (inputs.dout, *inputs[:3], out, lse)
    gradients = fa2cupy.attention_backward(*of, dlse=dlse, grad_of=("sinks",), **keywords)
    assert_same(results, (out, lse, *gradients))
    # and by hand in JAX
    tensors, extra = to_jax(of), to_jax(arrays)
    again = fa2cupy.attention_backward(*tensors, dlse=jnp.asarray(dlse), grad_of=("sinks",), **extra, **options)
    assert_same(again, gradients)
    assert len(fa2cupy.attention_backward(*tensors, dlse=jnp.asarray(dlse), **extra, **options)) == 3
    _, pullback = fa2cupy.attention_vjp(*tensors[1:4], **extra, **options)
    assert_same(pullback(tensors[0], dlse=jnp.asarray(dlse), grad_of=("sinks",)), gradients)
    with pytest.raises(InvalidArgument, match="dsinks cannot be given for JAX arrays, which are immutable"):
        fa2cupy.attention_backward(*tensors, grad_of=("sinks",), dsinks=extra["sinks"], **extra, **options)


def test_gradients_are_those_of_finite_differences() -> None:
    inputs, keywords = problem(("softcap", "alibi of batch", "sinks", "dropout_p"), "float64", seed=3, batch=2)
    weights = np.random.default_rng(0).standard_normal(inputs.dout.shape)
    with x64():
        sinks = jnp.asarray(keywords.pop("sinks"))
        rest = to_jax(keywords)

        @jax.jit
        def loss(q: Any, k: Any, v: Any, sinks: Any) -> Any:
            out, lse = fa2cupy.attention(q, k, v, causal=True, sinks=sinks, return_lse=True, **rest)
            return (out * weights).sum() + (lse**2).sum()

        points = *map(jnp.asarray, inputs[:3]), sinks
        gradients = jax.grad(loss, (0, 1, 2, 3))(*points)
        rng = np.random.default_rng(1)
        for place, gradient in enumerate(gradients):
            step = 1e-5 * rng.standard_normal(gradient.shape)
            ahead, behind = (loss(*(x + s * step if i == place else x for i, x in enumerate(points))) for s in (1, -1))
            assert_close(ahead - behind, 2 * (gradient * step).sum(), 1e-7)


@pytest.mark.parametrize("form", ["packed", "segments"])
def test_with_lengths(form: str) -> None:
    case = draw(2, form, pairs=((3, 5), (1, 1), (7, 4)), heads=(H, HK), head_dim=8, dtype="float32")
    keywords = draw_features(ALL, 2, 3, H, "float32") | {"dropout_seed": KEY}
    arrays, options = split(keywords)
    lengths = jax.tree.map(jnp.asarray, case.lengths)

    def run(q: Any, k: Any, v: Any, sinks: Any, key: Any) -> Any:
        of = {"alibi_slopes": jnp.asarray(arrays["alibi_slopes"]), "sinks": sinks, "dropout_seed": key}
        return fa2cupy.attention(q, k, v, causal=True, **of, **options, **lengths)

    *tensors, dout = map(jnp.asarray, case.inputs)
    out, pullback = jax.vjp(jax.jit(run), *tensors, jnp.asarray(arrays["sinks"]), KEY)
    *gradients, dkey = pullback(dout)
    assert dkey.dtype == jax.dtypes.float0
    expected = expect_sequences(case.inputs, case.lengths, causal=True, features=keywords)
    names = ("out", *NAMES[2:])
    expected.check(**{name: np.asarray(x) for name, x in zip(names, (out, *gradients), strict=True)})


# ----------------------------------------------------------------------------------------------------------------------
# Keys


def test_keys_of_every_kind() -> None:
    """A key is the seed of its words, low one first; what dropout_mask makes of it is what is dropped."""
    inputs, _ = problem(())
    q, k, v = map(jnp.asarray, inputs[:3])
    attend = functools.partial(fa2cupy.attention, dropout_p=0.3)
    expected = fa2cupy.attention(*inputs[:3], dropout_p=0.3, dropout_seed=numbers(KEY))
    run = jax.jit(lambda q, key: attend(q, k, v, dropout_seed=key))
    for key in (KEY, jax.random.key_data(KEY), jax.random.PRNGKey(7)):
        for out in (attend(q, k, v, dropout_seed=key), run(q, key)):
            np.testing.assert_array_equal(out, expected)
    assert run._cache_size() == 2  # a typed key, and two words
    np.testing.assert_array_equal(
        fa2cupy.dropout_mask(2, 3, 20, 40, 0.3, KEY), fa2cupy.dropout_mask(2, 3, 20, 40, 0.3, numbers(KEY))
    )
    with pytest.raises(InvalidType, match=r"^dropout_seed is traced: dropout_mask is computed on the CPU, outside"):
        jax.jit(lambda key: fa2cupy.dropout_mask(1, 1, 2, 2, 0.3, key))(KEY)
    four = jax.random.key(7, impl="rbg")  # of four words: seed and offset
    words = np.asarray(jax.random.key_data(four))
    np.testing.assert_array_equal(run(q, four), fa2cupy.attention(*inputs[:3], dropout_p=0.3, dropout_seed=words))


def test_other_keys_do_not_recompile() -> None:
    inputs, dlse, arrays, options, results = whole()
    run = jax.jit(functools.partial(derived, options))
    others = [run(*inputs, dlse, to_jax(arrays) | {"dropout_seed": jax.random.key(n)}) for n in (7, 8)]
    assert run._cache_size() == 1
    assert_same(others[0], results)
    assert all(bool((x != y).any()) for place, (x, y) in enumerate(zip(others[1], results, strict=True)) if place != 1)
    np.testing.assert_array_equal(others[1][1], results[1])  # lse knows nothing of it


def test_seeds_of_64_bits() -> None:
    """Also where they have left the scope that made them: nothing is cut off."""
    inputs, _ = problem(())
    q, k, v = map(jnp.asarray, inputs[:3])
    seed = (-3, 2**62 + 5)
    expected = fa2cupy.attention(*inputs[:3], dropout_p=0.3, dropout_seed=seed)
    attend = functools.partial(fa2cupy.attention, q, k, v, dropout_p=0.3)
    np.testing.assert_array_equal(attend(dropout_seed=seed), expected)
    with x64():
        array = jnp.asarray(np.array(seed, np.int64))
        of_shard = jnp.asarray(np.array([*seed, 0, 0], np.int64))
        for each in (array, array.astype("uint64"), of_shard):
            np.testing.assert_array_equal(attend(dropout_seed=each), expected)
            np.testing.assert_array_equal(jax.jit(lambda s: attend(dropout_seed=s))(each), expected)
    assert array.dtype == np.int64
    np.testing.assert_array_equal(attend(dropout_seed=array), expected)
    np.testing.assert_array_equal(
        jax.jit(lambda q: fa2cupy.attention(q, k, v, dropout_p=0.3, dropout_seed=array))(q), expected
    )


def test_the_seed_of_a_part() -> None:
    whole_mask = fa2cupy.dropout_mask(3, 5, 20, 18, 0.3, KEY)
    part = fa2cupy.jax.dropout_seed(KEY, first_sequence=1, first_head=jnp.asarray(2))
    assert part.shape == (8,) and part.dtype == "uint32"
    np.testing.assert_array_equal(fa2cupy.dropout_mask(2, 3, 20, 18, 0.3, part), whole_mask[1:, 2:])
    again = fa2cupy.jax.dropout_seed(part, first_sequence=1)
    np.testing.assert_array_equal(fa2cupy.dropout_mask(1, 3, 20, 18, 0.3, again), whole_mask[2:, 2:])
    np.testing.assert_array_equal(fa2cupy.jax.dropout_seed((2**40 + 3, -1)), [3, 256, 2**32 - 1, 2**32 - 1, 0, 0, 0, 0])
    for wrong in (1.5, jnp.ones(2, "int32"), "1"):
        with pytest.raises(InvalidType, match=r"first_head.* is a .*: an integer is needed"):
            fa2cupy.jax.dropout_seed(KEY, first_head=wrong)


def test_what_is_no_seed() -> None:
    inputs, _ = problem(())
    tensors = tuple(map(jnp.asarray, inputs[:3]))
    for seed, kind, message in (
        (jax.random.split(KEY, 3), InvalidArgument, r"an array of JAX keys, of shape \(3,\): one key is needed"),
        (jax.random.split(jax.random.PRNGKey(0), 3), InvalidArgument, r"has shape \(3, 2\) and dtype uint32: \(seed, "),
        (jnp.zeros(8, "int32"), InvalidType, r"has shape \(8,\) and dtype int32"),
    ):
        with pytest.raises(kind, match=f"^dropout_seed.* {message}"):
            fa2cupy.attention(*tensors, dropout_p=0.1, dropout_seed=seed)
    with pytest.raises(InvalidArgument, match=r"dropout_seed has shape \(8,\) and dtype int64"):
        fa2cupy.attention(*inputs[:3], dropout_p=0.1, dropout_seed=np.zeros(8, np.int64))
    with pytest.raises(InvalidArgument, match=r"dropout_p=0.1 is given without dropout_seed"):
        fa2cupy.attention(*tensors, dropout_p=0.1)
    plain = fa2cupy.attention(*tensors)
    np.testing.assert_array_equal(fa2cupy.attention(*tensors, dropout_p=0.0, dropout_seed=KEY), plain)


# ----------------------------------------------------------------------------------------------------------------------
# Gradients of arrays in keywords


def test_sinks_alone(host_calls: Any) -> None:
    inputs, dlse, arrays, options, results = whole()
    others = to_jax({name: x for name, x in arrays.items() if name != "sinks"})
    q, k, v, dout = map(jnp.asarray, inputs)

    def loss(sinks: Any) -> Any:
        out, lse = fa2cupy.attention(q, k, v, sinks=sinks, return_lse=True, deterministic=True, **others, **options)
        return (out * dout).sum() + (lse * dlse).sum()

    np.testing.assert_array_equal(jax.grad(loss)(jnp.asarray(arrays["sinks"])), results[5])
    assert [name for name, _ in host_calls] == ["forward", "backward"]


def test_slopes_have_no_gradient() -> None:
    inputs, _ = problem(())
    q, k, v, _ = map(jnp.asarray, inputs)
    slopes = jnp.ones(H)
    with pytest.raises(
        InvalidType, match=r"alibi_slopes has no gradient: pass jax\.lax\.stop_gradient\(alibi_slopes\)"
    ):
        jax.grad(lambda slopes: fa2cupy.attention(q, k, v, alibi_slopes=slopes).sum())(slopes)
    stopped = jax.grad(lambda x: fa2cupy.attention(q, k, v, alibi_slopes=jax.lax.stop_gradient(x)).sum())(slopes)
    assert not stopped.any()


# ----------------------------------------------------------------------------------------------------------------------
# Transformations


def test_layers_by_scan_remat_and_donation() -> None:
    """A key for each layer; what is computed again in the backward drops the same."""
    inputs, _ = problem((), batch=2)
    q, k, v = map(jnp.asarray, inputs[:3])
    sinks, keys = jnp.linspace(-1, 1, H), jax.random.split(KEY, 3)
    names = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")

    def layer(q: Any, sinks: Any, key: Any) -> Any:
        return q + fa2cupy.attention(q, k, v, sinks=sinks, dropout_p=0.25, dropout_seed=key)

    def by_hand(q: Any, sinks: Any) -> Any:
        for key in keys:
            q = layer(q, sinks, key)
        return (q**2).sum()

    expected = jax.grad(by_hand, (0, 1))(q, sinks)
    for one in (layer, jax.checkpoint(layer), jax.checkpoint(layer, policy=names)):

        def loss(q: Any, sinks: Any, one: Any = one) -> Any:
            return (jax.lax.scan(lambda q, key: (one(q, sinks, key), None), q, keys)[0] ** 2).sum()

        run = jax.jit(jax.grad(loss, (0, 1)), donate_argnums=0)
        assert_close(run(q + 0, sinks), expected, 1e-5)


def test_export_and_ahead_of_time() -> None:
    export = pytest.importorskip("jax.export")
    inputs, dlse, arrays, options, results = whole()
    words = to_jax(arrays) | {"dropout_seed": jax.random.key_data(KEY)}
    run = jax.jit(functools.partial(derived, options))
    allowed = [export.DisabledSafetyCheck.custom_call(fa2cupy.jax.TARGET)]
    program = export.deserialize(export.export(run, disabled_checks=allowed)(*inputs, dlse, words).serialize())
    assert_same(program.call(*inputs, dlse, words), results)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (*inputs, dlse, words))
    assert_same(run.lower(*shapes).compile()(*inputs, dlse, words), results)


@pytest.mark.parametrize(
    ("names", "mapped", "calls"),
    [
        (("softcap", "alibi_slopes"), ("alibi_slopes",), (1, 1)),
        (("alibi_slopes",), (), (1, 1)),
        (("alibi of batch",), ("alibi_slopes",), (1, 1)),
        (("sinks",), (), (1, 3)),  # of each problem a gradient of the sinks
        (("sinks", "alibi_slopes"), ("sinks", "alibi_slopes"), (3, 3)),
    ],
)
def test_vmap(names: Any, mapped: Any, calls: tuple[int, int], host_calls: Any) -> None:
    inputs, keywords = problem(names, batch=2)
    arrays, options = split(keywords)
    tensors = [jnp.stack([x, 2 * x, -x]) for x in map(jnp.asarray, inputs)]
    stacked = {n: jnp.stack([x, 2 * x, x / 2]) if n in mapped else x for n, x in to_jax(arrays).items()}
    run = functools.partial(derived, {**options, "causal": True})
    axes = {name: 0 if name in mapped else None for name in stacked}
    dlse = jnp.asarray(dlse_like(inputs))
    got = jax.jit(jax.vmap(run, (0, 0, 0, 0, None, axes)))(*tensors, dlse, stacked)
    jax.block_until_ready(got)
    assert [sum(name == way for name, _ in host_calls) for way in ("forward", "backward")] == list(calls)
    for n in range(3):
        each = {name: x[n] if name in mapped else x for name, x in stacked.items()}
        assert_close([x[n] for x in got], run(*(x[n] for x in tensors), dlse, each), 1e-5)


@pytest.mark.parametrize("what", ["q", "key"])
def test_dropout_under_vmap_is_refused(what: str) -> None:
    inputs, _ = problem(())
    q, k, v = map(jnp.asarray, inputs[:3])

    def attend(q: Any, key: Any) -> Any:
        return fa2cupy.attention(q, k, v, dropout_p=0.5, dropout_seed=key)

    qs, keys = jnp.stack([q, -q]), jax.random.split(KEY, 2)
    run = jax.vmap(attend, (0, None) if what == "q" else (None, 0))
    arguments = (qs, KEY) if what == "q" else (q, keys)
    for function in (run, jax.jit(run)):
        with pytest.raises(InvalidArgument, match=r"^dropout_seed is not supported under vmap: .* use jax\.lax\.map"):
            function(*arguments)
    each = jax.lax.map(lambda x: attend(*x), (qs, keys))
    np.testing.assert_array_equal(each, [attend(x, key) for x, key in zip(qs, keys, strict=True)])


# ----------------------------------------------------------------------------------------------------------------------
# Shards

COLLECTIVES = ("all-gather(", "all-reduce(", "all-to-all(", "collective-permute(")
DSINKS = (5,)  # is a sum over the batch


def mesh_of(kind: str, shape: tuple[int, int] = (2, 2)) -> Any:
    return jax.make_mesh(shape, ("data", "model"), axis_types=(getattr(jax.sharding.AxisType, kind),) * 2)


def placed(mesh: Any, batch: Any, heads: Any, of_key_heads: Any, arrays: Any, inputs: Any, dlse: Any) -> Any:
    def put(x: Any, *spec: Any) -> Any:
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    tensors = [put(x, batch, None, of) for x, of in zip(inputs, (heads, *(of_key_heads,) * 2, heads), strict=True)]
    specs = {"alibi_slopes": (heads,), "sinks": (heads,), "dropout_seed": ()}
    extra = {name: put(x, *specs[name]) for name, x in arrays.items()}
    return *tensors, put(dlse, batch, heads), extra


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize(
    ("shape", "batch", "heads", "key_heads", "collectives"),
    [
        ((2, 2), "data", "model", "model", 1),
        ((1, 2), None, "model", "model", 0),  # of heads nothing is summed
        ((4, 1), "data", None, None, 1),
        ((2, 2), None, ("data", "model"), "data", 0),  # a key head has a device, and two have its queries: dk and dv
    ],
)
def test_shards_are_the_whole(
    kind: str, shape: Any, batch: Any, heads: Any, key_heads: Any, collectives: int, host_calls: Any
) -> None:
    inputs, dlse, arrays, options, results = whole()
    devices = shape[0] * shape[1]
    mesh = jax.make_mesh(
        shape, ("data", "model"), devices=jax.devices()[:devices],
        axis_types=(getattr(jax.sharding.AxisType, kind),) * 2,
    )  # fmt: skip
    arguments = placed(mesh, batch, heads, key_heads, arrays, inputs, dlse)
    host_calls.clear()
    shared = heads != key_heads
    run = jax.jit(functools.partial(derived, options))
    assert_same(run(*arguments), results, (3, 4) if shared else DSINKS)
    assert len({shape for _, shape in host_calls}) == 1 and host_calls[0][1] != inputs.q.shape

    def count(run: Any, *arguments: Any) -> int:
        lines = jax.jit(run).lower(*arguments).compile().as_text().splitlines()
        return sum(word in line for line in lines for word in COLLECTIVES)

    q, k, v, _, _, extra = arguments
    assert count(lambda q, k, v, extra: fa2cupy.attention(q, k, v, **extra, **options), q, k, v, extra) == 0
    if not shared:
        assert count(functools.partial(derived, options), *arguments) == collectives


def test_shards_of_16_bit_sinks_and_slopes_of_sequences() -> None:
    inputs, keywords = problem(("alibi of batch", "sinks", "dropout_p"), "bfloat16", seed=1)
    arrays, options = split(keywords)
    dlse = dlse_like(inputs)
    expected = derived(options, *to_jax((*inputs, dlse, arrays)))
    mesh = mesh_of("Auto")

    def put(x: Any, *spec: Any) -> Any:
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    tensors, extra = [put(x, "data", None, "model") for x in to_jax(tuple(inputs))], to_jax(arrays)
    extra["alibi_slopes"], extra["sinks"] = put(extra["alibi_slopes"], "data", "model"), put(extra["sinks"], "model")
    got = jax.jit(functools.partial(derived, options))(*tensors, put(dlse, "data", "model"), extra)
    assert got[5].dtype == "bfloat16"
    assert_same(got[:5], expected[:5])
    assert_close(got[5].astype("float32"), expected[5].astype("float32"), 2e-2)


def test_heads_of_packed_sequences() -> None:
    inputs, dlse, arrays, options, _ = whole()
    packed = [x.reshape(-1, *x.shape[2:]) for x in inputs]
    starts = {f"cu_seqlens_{x}": np.arange(0, B + 1, dtype=np.int32) * n for x, n in (("q", SQ), ("k", SK))}
    run = jax.jit(functools.partial(derived, options))
    dlse = np.moveaxis(dlse, 1, 0).reshape(H, -1)
    expected = run(*packed, dlse, to_jax({**arrays, **starts}))
    mesh = mesh_of("Auto", (1, 2))

    def put(x: Any, *spec: Any) -> Any:
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    extra = {name: put(x, *(("model",) if x.shape == (H,) else ())) for name, x in to_jax({**arrays, **starts}).items()}
    assert_same(run(*(put(x, None, "model") for x in packed), put(dlse, "model"), extra), expected)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma: bool) -> None:
    """Each device computes its block, whose seed says where it is; the gradient of the sinks is the sum of all."""
    inputs, dlse, arrays, options, results = whole()

    def block(q: Any, k: Any, v: Any, sinks: Any, slopes: Any, key: Any) -> Any:
        first = jax.lax.axis_index("data") * q.shape[0], jax.lax.axis_index("model") * q.shape[2]
        seed = fa2cupy.jax.dropout_seed(key, first_sequence=first[0], first_head=first[1])
        of = {"alibi_slopes": slopes, "sinks": sinks, "dropout_seed": seed}
        return fa2cupy.attention(q, k, v, return_lse=True, **of, **options)

    tensor, lse = P("data", None, "model"), P("data", "model")
    mapped = jax.shard_map(
        block, mesh=mesh_of("Auto"), in_specs=(tensor,) * 3 + (P("model"), P("model"), P()), out_specs=(tensor, lse),
        check_vma=check_vma,
    )  # fmt: skip

    @jax.jit
    def run(q: Any, k: Any, v: Any, dout: Any, sinks: Any, slopes: Any, words: Any) -> Any:
        outs, pullback = jax.vjp(lambda *x: mapped(*x, slopes, words), q, k, v, sinks)
        return *outs, *pullback((dout, jnp.asarray(dlse)))

    sinks, slopes, words = arrays["sinks"], arrays["alibi_slopes"], jax.random.key_data(KEY)
    assert_same(run(*inputs, sinks, slopes, words), results, DSINKS)
