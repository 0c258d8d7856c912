"""Lengths through JAX: grad, jit, vmap, shardings, export. Each sequence by itself is the judge."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fa2cupy
from fa2cupy.errors import InvalidArgument
from tests.frameworks.jax_problems import assert_close, normal
from tests.frameworks.jax_versions import x64
from tests.lengths import FORMS, Case, draw, expect_sequences

PAIRS = ((3, 5), (0, 4), (1, 1), (7, 0), (6, 6))
USED = ("seqused_q", "seqused_k", "leftpad_k")


class Jax(NamedTuple):
    case: Case
    qkv: tuple[Any, Any, Any]
    dout: Any
    lengths: dict[str, Any]

    def check(self, results: tuple[Any, ...]) -> None:
        """Of `derived`."""
        named = {name: np.asarray(x) for name, x in zip(("out", "lse", "dq", "dk", "dv"), results, strict=True)}
        expect_sequences(self.case.inputs, self.case.lengths, causal=True).check(**named)


def make(form: str, used: tuple[str, ...] = USED, dtype: str = "float32") -> Jax:
    case = draw(3, form, pairs=PAIRS, used=used, head_dim=8, head_dim_v=16, dtype=dtype)
    q, k, v, dout = map(jnp.asarray, case.inputs)
    return Jax(case, (q, k, v), dout, jax.tree.map(jnp.asarray, case.lengths))


def derived(qkv: Any, dout: Any, lengths: Any) -> Any:
    """out, lse and the gradients."""

    def run(q: Any, k: Any, v: Any) -> Any:
        return fa2cupy.attention(q, k, v, causal=True, return_lse=True, max_seqlen_q=7, **lengths)

    (out, lse), pullback = jax.vjp(run, *qkv)
    return out, lse, *pullback((dout, jnp.zeros_like(lse)))


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form: str) -> None:
    x = make(form)
    x.check(derived(x.qkv, x.dout, x.lengths))
    compiled = jax.jit(derived)
    x.check(compiled(x.qkv, x.dout, x.lengths))
    out, lse = fa2cupy.attention(*x.qkv, causal=True, return_lse=True, **x.lengths)
    again = fa2cupy.attention_backward(x.dout, *x.qkv, out, lse, causal=True, dlse=jnp.zeros_like(lse), **x.lengths)
    x.check((out, lse, *again))


def test_other_lengths_do_not_recompile() -> None:
    x = make("packed", ())
    qkv = tuple(map(jnp.nan_to_num, x.qkv))
    compiled = jax.jit(lambda starts: fa2cupy.attention(*qkv, cu_seqlens_q=starts, cu_seqlens_k=starts))
    for shift in (0, 1, 2):
        starts = jnp.maximum(x.lengths["cu_seqlens_k"] - shift, 0)
        assert_close(compiled(starts), fa2cupy.attention(*qkv, cu_seqlens_q=starts, cu_seqlens_k=starts), 0)
    assert compiled._cache_size() == 1


def test_int64_and_float64() -> None:
    with x64():
        x = make("packed", dtype="float64")
        wide = {name: array.astype("int64") for name, array in x.lengths.items()}
        results = derived(x.qkv, x.dout, wide)
        assert results[1].dtype == jnp.float64
        x.check(results)


@pytest.mark.parametrize("form", ["packed", "dense", "segments"])
def test_vmap(form: str) -> None:
    x = make(form)
    qkv, dout = tuple(map(jnp.nan_to_num, x.qkv)), jnp.nan_to_num(x.dout)
    stacked = [jnp.stack([y, 2 * y]) for y in (*qkv, dout)]
    both = jax.tree.map(lambda y: jnp.stack([y, jnp.maximum(y - 1, 0)]), x.lengths)
    for axis, lengths in ((None, x.lengths), (0, both)):
        got = jax.jit(jax.vmap(lambda q, k, v, do, of: derived((q, k, v), do, of), (0, 0, 0, 0, axis)))(
            *stacked, lengths
        )
        for n in range(2):
            one = lengths if axis is None else jax.tree.map(lambda y, n=n: y[n], lengths)
            assert_close([y[n] for y in got], derived([y[n] for y in stacked[:3]], stacked[3][n], one), 1e-5)


def test_vmap_of_a_batch_of_one() -> None:
    """What is shared by all problems is each one's, also where the batch is one."""
    q, k, v = normal(0, 3, 1, 6, 4, 8), normal(1, 1, 9, 2, 8), normal(2, 1, 9, 2, 8)
    used = jnp.asarray([5])
    run = jax.vmap(lambda q: fa2cupy.attention(q, k, v, causal=True, seqused_k=used))
    assert_close(run(q), jnp.stack([fa2cupy.attention(x, k[:, :5], v[:, :5], causal=True) for x in q]))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("form", FORMS)
def test_shardings(form: str, kind: str) -> None:
    """Used lengths and segments go with the batch, of packed arrays heads alone are split."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(getattr(jax.sharding.AxisType, kind),) * 2)

    def put(array: Any, *spec: Any) -> Any:
        return jax.device_put(np.asarray(array), NamedSharding(mesh, P(*spec)))

    case = draw(5, form, pairs=PAIRS[:4], used=USED, heads=(4, 2), head_dim=8, dtype="float32")
    if form.startswith("segment"):  # of three rows four
        case = Case(
            type(case.inputs)(*(np.concatenate([y, y[:1]]) for y in case.inputs)),
            jax.tree.map(lambda y: np.concatenate([y, y[:1]]), case.lengths),
        )
    has_batch = form == "dense" or form.startswith("segment")
    batch = "data" if has_batch or kind == "Auto" else None  # of q, where it is not split out's is not, nor dout's
    specs = [(batch, None, "model") if y.ndim == 4 else (None, "model") for y in case.inputs]
    q, k, v, dout = (put(y, *spec) for y, spec in zip(case.inputs, specs, strict=True))
    lengths = jax.tree.map(lambda y: put(y, "data") if has_batch else put(y), case.lengths)
    results = jax.jit(derived)((q, k, v), dout, lengths)
    Jax(case, (q, k, v), dout, lengths).check(results)


def test_export_and_remat() -> None:
    export = pytest.importorskip("jax.export")
    x = make("packed")
    run = jax.jit(jax.checkpoint(lambda q, k, v, of: fa2cupy.attention(q, k, v, causal=True, **of)))
    exported = export.export(run, disabled_checks=[export.DisabledSafetyCheck.custom_call("fa2cupy")])
    assert_close(exported(*x.qkv, x.lengths).call(*x.qkv, x.lengths), run(*x.qkv, x.lengths), 0)


def test_wrong_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make("packed", ())
    wrong = x.lengths | {"cu_seqlens_q": x.lengths["cu_seqlens_q"] + 1000}
    fa2cupy.attention(*x.qkv, **wrong)
    monkeypatch.setenv("FA2CUPY_CHECK", "1")
    with pytest.raises(InvalidArgument, match="cu_seqlens_q ends sequence 0 at 100"):
        fa2cupy.attention(*x.qkv, **wrong)
    with pytest.raises(jax.errors.JaxRuntimeError, match="cu_seqlens_q ends sequence 0 at 100"):
        jax.block_until_ready(jax.jit(lambda of: fa2cupy.attention(*x.qkv, **of))(wrong))
    with pytest.raises(InvalidArgument, match=r"q has 3 dimensions.* say where they start with cu_seqlens_q"):
        jax.jit(fa2cupy.attention)(*x.qkv)
