"""JAX arrays as a KV cache, on the CPU: caches that are written come back; each sequence against float64."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fa2cupy
from fa2cupy.cached import prepared as cached_prepared
from fa2cupy.cached.problem import CacheProblem
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.jit import driver
from fa2cupy.kernels.decode import DecodePlan, plan_decode
from fa2cupy.xla import cached
from tests import caches
from tests.caches import FLOAT8, INT8, CacheCase, draw
from tests.frameworks.xla_frame import FakeApi, FakeFrame
from tests.host import build, run
from tests.reference import as_ml_dtypes

_H100 = driver.DeviceInfo(0, "H100", (9, 0), 4, 232448, 50 << 20)


class Held:
    """A case in JAX's arrays."""

    def __init__(self, case: CacheCase) -> None:
        self.drawn = drawn = draw(case)
        every = {{"k_new": "k", "v_new": "v"}.get(name, name): self._array(x) for name, x in drawn.arrays.items()}
        names = ("block_table", "indptr", "indices", "k_scale", "v_scale")
        self.of_cache = {name: every.pop(name) for name in names if name in every} | {"layout": case.layout}
        self.of_cache["kv_dtype"] = case.kv_dtype
        if case.rotary is not None:
            every["rotary"] = every.pop("rotary_cos"), every.pop("rotary_sin"), case.rotary[1]
        every |= {"causal": case.causal, "window_size": case.window, "softmax_scale": case.scale}
        self.of_call = every | {"softcap": case.softcap}
        self.q = self._array(drawn.q)
        kind = {None: None, FLOAT8: jnp.float8_e4m3fn, INT8: jnp.int8}[case.kv_dtype]
        self.k, self.v = (self._array(x if kind is None else x.view(kind)) for x in (drawn.k_cache, drawn.v_cache))

    def _array(self, x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return float(x)
        x = as_ml_dtypes(x)
        return jnp.asarray(x.swapaxes(1, 2) if self.drawn.case.layout == "bhsd" and x.ndim == 4 else x)

    def check(self, out: Any, lse: Any, *stored: Any) -> None:
        drawn = self.drawn
        swapped = drawn.case.layout == "bhsd"
        out, *stored = (np.asarray(x.swapaxes(1, 2) if swapped and x.ndim == 4 else x) for x in (out, *stored))
        if stored:
            assert len(stored) == 2
            drawn.k_cache, drawn.v_cache = (x.view(drawn.k_cache.dtype) for x in stored)
        caches.check(drawn, out.view(np.uint16) if drawn.case.dtype == "bfloat16" else out, np.asarray(lse))


_CASES = {
    "new keys": CacheCase((5, 0, 70), 2, 2, page=16, causal=True, rotary=(16, "neox", "float32"), dtype="bfloat16"),
    "pages, scores": CacheCase((5, 0, 70), 2, None, page=3, capacity=96, window=(20, 3), softcap=2.0, dtype="float32",
                               slopes="head", sinks="float32", scale=0.3),
    "packed": CacheCase((5, 0, 70), (2, 0, 3), 1, table="indptr", page=16, by="seqused_k", dtype="float16"),
    "8 bits": CacheCase((5, 0, 20), 1, 1, kv_dtype=FLOAT8, page=16, scales=("page", "none"), dtype="float32"),
    "int8": CacheCase((5, 0, 20), 1, None, kv_dtype=INT8, scales=("batch", "number"), dtype="bfloat16"),
    "rows": CacheCase((5, 9, 70), 3, 1, batch_idx=True, leftpad=(2, 0, 9), layout="bhsd", head_dim_v=16),
}  # fmt: skip


@pytest.mark.parametrize("way", ["cache", "function", "jit"])
@pytest.mark.parametrize("name", _CASES)
def test_results(name: str, way: str) -> None:
    held = Held(_CASES[name])
    if way == "cache":
        results = fa2cupy.KVCache(held.k, held.v, **held.of_cache).attend(held.q, **held.of_call, return_lse=True)
    else:
        plain = {name: x for name, x in {**held.of_cache, **held.of_call}.items() if not isinstance(x, jax.Array)}
        rotary = plain.pop("rotary", None)
        arrays = {name: x for name, x in {**held.of_cache, **held.of_call}.items() if isinstance(x, jax.Array)}
        if rotary is not None:
            plain["style"] = rotary[2]
            arrays |= {"cos": rotary[0], "sin": rotary[1]}

        def run(q: Any, k: Any, v: Any, given: dict[str, Any]) -> Any:
            given = {**given, **plain}
            if "cos" in given:
                given["rotary"] = given.pop("cos"), given.pop("sin"), given.pop("style")
            return fa2cupy.attention_with_kvcache(q, k, v, **given, return_lse=True)

        results = (jax.jit(run) if way == "jit" else run)(held.q, held.k, held.v, arrays)
    held.check(*results)
    assert held.k.is_deleted() == (way != "jit" and len(results) == 4), "donated if it was written, and was ours"


def test_decoding_in_one_loop() -> None:
    """Token by token by lax.scan, the caches carried along; beside all at once."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 20, heads, 16)), jnp.float32) for heads in (4, 2, 2))
    empty = jnp.full((2, 32, 2, 16), jnp.nan)

    def step(state: Any, new: Any) -> Any:
        keys, values, length = state
        q, k, v = (x[:, None] for x in new)
        out, keys, values = fa2cupy.attention_with_kvcache(
            q, keys, values, k, v, cache_seqlens=jnp.full((2,), length, jnp.int32), causal=True
        )
        return (keys, values, length + 1), out[:, 0]

    (keys, values, _), outs = jax.lax.scan(step, (empty, empty, 0), tuple(x.swapaxes(0, 1) for x in (q, k, v)))
    np.testing.assert_allclose(outs.swapaxes(0, 1), fa2cupy.attention(q, k, v, causal=True), rtol=1e-5, atol=1e-6)
    assert (keys[:, :20] == k).all() and (values[:, :20] == v).all() and jnp.isnan(keys[:, 20:]).all()


def test_another_number_of_keys_is_no_other_program() -> None:
    q, k = jnp.ones((2, 1, 2, 16)), jnp.ones((2, 64, 2, 16))
    cache = fa2cupy.KVCache(k, k + 1)
    traced = []
    for n in (3, 9, 30):
        np.testing.assert_allclose(cache.attend(q, cache_seqlens=n), 2, rtol=1e-6)
        traced.append(cached._parse.cache_info().currsize)
    assert traced[0] == traced[2]


def test_refused() -> None:
    q, k = jnp.ones((2, 1, 2, 16)), jnp.ones((2, 64, 2, 16))
    cache = fa2cupy.KVCache(k, k)
    for error, words, given in (
        (InvalidArgument, "out cannot be given for JAX arrays, which are immutable", {"out": q}),
        (InvalidArgument, "k is given without cache_seqlens or seqused_k", {"k": q, "v": q}),
        (InvalidType, "cache_seqlens has dtype float32", {"cache_seqlens": jnp.ones(2)}),
        (InvalidArgument, "the cache has 2 rows but q is a batch of 1", {"q": q[:1]}),
        (InvalidType, r"is a numpy.ndarray but .* is a ", {"q": np.ones((2, 1, 2, 16))}),
    ):
        with pytest.raises(error, match=words):
            cache.attend(**{"q": q, **given})
    with pytest.raises(InvalidType, match=r"v is a numpy.ndarray but k is a"):
        fa2cupy.KVCache(k, np.ones(k.shape))
    with pytest.raises(InvalidType, match="attention on a cache has no derivatives"):
        jax.grad(lambda q: cache.attend(q).sum())(q)


def test_wrong_lengths_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA2CUPY_CHECK", "1")
    q, k = jnp.ones((2, 1, 2, 16)), jnp.ones((2, 64, 2, 16))
    with pytest.raises(Exception, match="cache_seqlens of sequence 1 is 65: 0 to 64 is needed"):
        fa2cupy.attention_with_kvcache(q, k, k, cache_seqlens=jnp.array([3, 65])).block_until_ready()


# ----------------------------------------------------------------------------------------------------------------------
# What a GPU's handler launches: the kernels, run by g++


def test_launch_of_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pointers of operands and results, caches from the results, a workspace that is rounded up, counters of 0."""
    held = Held(dataclasses.replace(_CASES["new keys"], head_dim=64, rotary=(16, "neox", "bfloat16")))
    plans: list[DecodePlan] = []

    def bound(problem: CacheProblem, index: int) -> Any:
        plans.append(plan_decode(problem, _H100))

        def launch(pointers: tuple[int, ...], stream: int) -> None:
            assert stream == 0x77 and pointers[-2] % 256 == 0
            for each in plans[-1].launches:
                run.launch(build.library(each.source, each.name, each.defines), each.config, each.pack(pointers))

        return launch, plans[-1].workspace_bytes, plans[-1].counters

    monkeypatch.setattr(cached_prepared, "bound_plan", bound)
    monkeypatch.setattr(driver, "device_info", lambda index: _H100)
    monkeypatch.setattr(driver, "device_guard", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(cached.ffi, "_gpus", lambda: (0,))
    cached._prepared.clear()
    calls: list[tuple[Any, ...]] = []

    def ffi_call(target: str, results: Any, input_output_aliases: Any) -> Any:
        def record(*operands: Any, call: str) -> Any:
            calls.append((results, input_output_aliases, operands, call))
            return [jnp.zeros(each.shape, each.dtype) for each in results]

        return record

    monkeypatch.setattr(jax.ffi, "ffi_call", ffi_call)
    with jax.disable_jit():
        fa2cupy.KVCache(held.k, held.v, **held.of_cache).attend(held.q, **held.of_call)
    cached._function.cache_clear()
    results, aliases, operands, attribute = calls[0]
    inputs = [np.array(x) for x in operands]
    outputs = [np.full(each.shape, 0x7F, np.uint8) if each.dtype == np.uint8 else np.zeros(each.shape, each.dtype)
               for each in results]  # fmt: skip
    for operand, result in aliases.items():
        outputs[result] = inputs[operand]
    assert sorted(aliases.values()) == [2, 3, 4] and len(outputs) == 6

    def buffers(arrays: Any) -> list[tuple[str, tuple[int, ...], int]]:
        return [(str(x.dtype), x.shape, x.ctypes.data) for x in arrays]

    api = FakeApi()
    frame = FakeFrame(api, attribute, buffers(inputs), buffers(outputs))
    assert cached._callbacks["CUDA"](frame.address) is None, api.errors
    assert not outputs[4].any(), "counters are not 0 again"
    held.check(*outputs[:4])
    small = FakeFrame(api, attribute, buffers(inputs), [*buffers(outputs[:5]), ("uint8", (100,), 4096)])
    cached._callbacks["CUDA"](small.address)
    assert "was compiled with 4 counters and a workspace of 100 bytes but needs 4" in api.errors[-1][1]
    cached._prepared.clear()
