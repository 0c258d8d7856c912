"""fa2cupy.cpu against the float64 reference: shapes, strides, formats, and everything that is easy to get wrong."""

from __future__ import annotations

import itertools
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from fa2cupy import cpu
from tests.reference import (
    HEAD_DIMS,
    HEADS,
    SEQLENS_BOTH_WAYS,
    Inputs,
    as_float64,
    as_ml_dtypes,
    attention_reference,
    expect,
    make_inputs,
    store,
)

pytestmark = pytest.mark.filterwarnings("error")

DTYPES = ("float16", "bfloat16", "float32", "float64")
NAMES = ("out", "lse", "dq", "dk", "dv")


def run(inputs, causal, scale=None, window=None):
    """out, lse, dq, dk, dv by name; NumPy errors raise, and the inputs cannot be written."""
    q, k, v, dout = inputs
    scale = q.shape[3] ** -0.5 if scale is None else scale
    for x in inputs:
        x.flags.writeable = False
    with np.errstate(all="raise"):
        out, lse = cpu.forward(q, k, v, causal=causal, softmax_scale=scale, window_size=window)
        gradients = cpu.backward(dout, q, k, v, out, lse, causal=causal, softmax_scale=scale, window_size=window)
    for x, like in zip((out, *gradients), (dout, q, k, v), strict=True):
        assert x.shape == like.shape
        assert x.dtype == like.dtype
    assert lse.dtype == (np.float64 if q.dtype == np.float64 else np.float32)
    return dict(zip(NAMES, (out, lse, *gradients), strict=True))


def check(inputs, causal, scale=None, window=None):
    results = run(inputs, causal, scale, window)
    expect(*inputs, causal=causal, scale=scale, window=window, out=results["out"]).check(**results)
    return results


def assert_same(results, expected):
    for name in NAMES:
        np.testing.assert_array_equal(results[name], expected[name], err_msg=name)


# ----------------------------------------------------------------------------------------------------------------------
# Shapes


# All scores of the longest are 140 MB each time that the reference holds them: causal alone in `make test`.
LENGTHS = [
    pytest.param(*pair, causal, marks=pytest.mark.slow if pair == (4224, 4224) and not causal else [])
    for pair, causal in itertools.product(SEQLENS_BOTH_WAYS, (False, True))
]


@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "causal"), LENGTHS)
def test_sequence_lengths(seqlen_q, seqlen_k, causal):
    big = seqlen_q * seqlen_k > 1 << 18
    for n, dtype in enumerate(DTYPES):
        if big and n != (seqlen_q + causal) % 4:
            continue
        size = {"batch": 1, "heads": (1, 1)} if big else {"batch": 2, "heads": (2, 1)}
        check(make_inputs(n, seqlen_q, seqlen_k, dtype=dtype, head_dim=16, **size), causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_edges(dtype, causal, monkeypatch):
    """Blocks of 8 x 4 and slabs of two heads at most, so that every kind of tile is met at small sizes."""
    monkeypatch.setattr(cpu, "BLOCK_M", 8)
    monkeypatch.setattr(cpu, "BLOCK_N", 4)
    monkeypatch.setattr(cpu, "_TILE_SCORES", 64)
    for seqlen_q, seqlen_k in itertools.product((1, 7, 8, 9, 25), (1, 3, 4, 5, 23)):
        check(make_inputs(0, seqlen_q, seqlen_k, dtype=dtype, heads=(4, 2), head_dim=8), causal)


@pytest.mark.parametrize("head_dim", [1, 2, *HEAD_DIMS])
def test_head_dims(head_dim):
    for n, (seqlen_q, seqlen_k) in enumerate(((113, 203), (203, 113))):
        for m, dtype in enumerate(DTYPES):
            causal = (n + m) % 2 == 0
            check(make_inputs(n, seqlen_q, seqlen_k, dtype=dtype, heads=(2, 1), batch=1, head_dim=head_dim), causal)


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(16, 40), (64, 8), (192, 128), (1, 3), (59, 112)])
@pytest.mark.parametrize("causal", [False, True])
def test_head_dim_of_v_differs(head_dim, head_dim_v, causal):
    for dtype in DTYPES:
        check(make_inputs(1, 57, 83, dtype=dtype, heads=(4, 2), head_dim=head_dim, head_dim_v=head_dim_v), causal)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads(heads, causal):
    for dtype in DTYPES:
        check(make_inputs(0, 70, 90, dtype=dtype, heads=heads, head_dim=24), causal)


def test_grouped_heads_are_repeated_heads():
    q, k, v, dout = make_inputs(0, 40, 60, dtype="float64", heads=(6, 2), head_dim=8)
    grouped = run((q, k, v, dout), True)
    repeated = run((q, np.repeat(k, 3, 2), np.repeat(v, 3, 2), dout), True)
    for name in ("out", "lse", "dq"):
        np.testing.assert_allclose(grouped[name], repeated[name], rtol=1e-12, atol=1e-13)
    for name in ("dk", "dv"):
        summed = repeated[name].reshape(2, 60, 2, 3, 8).sum(3)
        np.testing.assert_allclose(grouped[name], summed, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("seed", range(40))
def test_random_cases(seed):
    rng = np.random.default_rng(seed)
    scale = float(rng.choice([np.nan, 0.0, 0.3, -0.2, 1.7]))
    inputs = make_inputs(
        seed,
        *(int(n) for n in rng.integers(0, rng.choice([6, 60, 400]), 2)),
        dtype=str(rng.choice(DTYPES)),
        batch=int(rng.integers(1, 4)),
        heads=HEADS[rng.integers(len(HEADS))],
        head_dim=int(rng.integers(1, 100)),
        head_dim_v=int(rng.integers(1, 100)),
        outliers=bool(rng.integers(2)),
    )
    check(inputs, bool(rng.integers(2)), None if np.isnan(scale) else scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("batch", "seqlen_q", "seqlen_k", "heads"),
    [(0, 3, 4, (4, 2)), (2, 0, 4, (4, 2)), (2, 3, 0, (4, 2)), (2, 0, 0, (4, 2)), (2, 3, 4, (0, 2)), (2, 3, 4, (0, 0))],
)
def test_nothing_to_do(batch, seqlen_q, seqlen_k, heads, causal, dtype):
    inputs = make_inputs(0, seqlen_q, seqlen_k, dtype=dtype, batch=batch, heads=heads, head_dim=8, head_dim_v=6)
    results = run(inputs, causal)
    assert results["lse"].shape == (batch, heads[0], seqlen_q)
    assert np.isneginf(results["lse"]).all()
    for name in ("out", "dq", "dk", "dv"):
        assert not as_float64(results[name]).any()


def test_more_heads_than_a_grid_dimension():
    check(make_inputs(0, 1, 1, dtype="float16", batch=8300, heads=(16, 16), head_dim=8), False)
    check(make_inputs(0, 2, 3, dtype="float32", batch=66_000, heads=(1, 1), head_dim=2), True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [16, 32, 64])
def test_large_queries(dtype, head_dim):
    for seqlen in (1, 2, 5, 17, 128):
        q, k, v, dout = make_inputs(seqlen, seqlen, seqlen, dtype=dtype, head_dim=head_dim)
        check((store(5 * as_float64(q), dtype), k, v, dout), False)


# ----------------------------------------------------------------------------------------------------------------------
# Rows that see no key


@pytest.mark.parametrize("dtype", DTYPES)
def test_leading_rows_without_keys(dtype):
    results = check(make_inputs(0, 300, 20, dtype=dtype, heads=(4, 2), head_dim=16), True)
    assert not as_float64(results["out"])[:, :280].any()
    assert not as_float64(results["dq"])[:, :280].any()
    assert np.isneginf(results["lse"][:, :, :280]).all()
    assert np.isfinite(results["lse"][:, :, 280:]).all()


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_keys_leak_nothing(dtype, garbage):
    q, k, v, dout = make_inputs(0, 50, 20, dtype=dtype, heads=(4, 2), head_dim=16)
    clean = run((q, k, v, dout), True)
    q, dout, out, lse = q.copy(), dout.copy(), clean["out"].copy(), clean["lse"].copy()
    for x in (q, dout, out):
        x[:, :30] = store(np.array(garbage), dtype)
    assert_same(run((q, k, v, dout), True), clean)
    lse[:, :, :30] = garbage
    gradients = cpu.backward(dout, q, k, v, out, lse, causal=True, softmax_scale=0.25)
    assert_same({**clean, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}, clean)


# ----------------------------------------------------------------------------------------------------------------------
# Windows


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("left", [-1, 0, 1, 6, 13, 60])
def test_windows(left, causal, monkeypatch):
    """Blocks of 8 x 4: every kind of tile, and tiles that nobody sees, at lengths both ways round."""
    monkeypatch.setattr(cpu, "BLOCK_M", 8)
    monkeypatch.setattr(cpu, "BLOCK_N", 4)
    for right in (-1, 0) if causal else (-1, 0, 3, 14, 60):
        for n, (seqlen_q, seqlen_k) in enumerate(itertools.product((0, 1, 9, 25, 41), (0, 1, 4, 23, 40))):
            inputs = make_inputs(n, seqlen_q, seqlen_k, dtype=DTYPES[n % 4], heads=(4, 2), head_dim=8)
            check(inputs, causal, window=(left, right))


def test_blocks_that_nobody_sees_are_skipped(monkeypatch):
    seen = []
    monkeypatch.setattr(cpu, "_mask", lambda S, *rest: seen.append(S.shape))
    run(make_inputs(0, 2560, 2560, dtype="float32", batch=1, heads=(1, 1), head_dim=8), False, window=(255, 0))
    assert len(seen) == 2 * (10 + 9)  # of 100 tiles, forward and backward


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_keys_that_nobody_sees_leak_nothing(garbage):
    q, k, v, dout = make_inputs(0, 20, 50, dtype="float32", heads=(4, 2), head_dim=16)
    clean = run((q, k, v, dout), True, window=(10, 0))
    k, v = k.copy(), v.copy()
    k[:, :20], v[:, :20] = garbage, garbage
    assert_same(run((q, k, v, dout), True, window=(10, 0)), clean)
    assert not clean["dk"][:, :20].any() and not clean["dv"][:, :20].any()
    assert clean["dk"][:, 20].all()


# ----------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("scale", [0.0, -0.125, -3.0, 1e-30, 1.2e-38, 5.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_scale(dtype, scale):
    check(make_inputs(0, 60, 80, dtype=dtype, heads=(4, 2), head_dim=16), True, scale)
    check(make_inputs(0, 60, 80, dtype=dtype, heads=(4, 2), head_dim=16), False, scale)


def test_a_scale_that_is_nothing_in_float32():
    results = run(make_inputs(0, 6, 8, dtype="float32"), True, 1e-60)
    np.testing.assert_allclose(results["lse"][0, 0], np.log(np.arange(3, 9)), rtol=1e-6)
    assert not results["dq"].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sign", [-1, 1])
def test_logits_beyond_50000(dtype, causal, sign):
    """Whole numbers, so that float32 has the scores exactly and what is seen is the softmax."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (np.array(as_float64(x)) for x in make_inputs(0, 150, 600, dtype=dtype, heads=(4, 2)))
    q[...] = 32
    q[..., 1:3] = rng.integers(-1, 2, q[..., 1:3].shape)
    k[...] = sign * 256
    k[..., 1:3] = rng.integers(-3, 4, k[..., 1:3].shape)
    k[:, ::7, :, 0] += 2.0 * sign
    inputs = tuple(store(x, dtype) for x in (q, k, v, dout))
    if dtype in ("float16", "bfloat16"):
        results = check(inputs, causal, 0.11)
    else:  # the backward is limited by the rounding of the lse that it is given; and 0.125 keeps the reference exact
        results = run(inputs, causal, 0.125)
        expect(*inputs[:3], causal=causal, scale=0.125).check(out=results["out"], lse=results["lse"])
    assert np.all(sign * results["lse"] > 50_000)


@pytest.mark.parametrize("seqlen_k", [1, 128, 256, 257, 768])
def test_one_query_with_a_very_negative_lse(seqlen_k):
    q, k, v, dout = make_inputs(0, 1, seqlen_k, dtype="bfloat16", batch=1, heads=(1, 1), head_dim=128)
    k = store(-8 * abs(as_float64(k)), "bfloat16")
    check((store(abs(as_float64(q)), "bfloat16"), k, v, dout), False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_passes_through_one_key(dtype):
    """With one key out = v: rounding and the special values survive, and nothing warns."""
    v = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1 / 3, 1e-8, 6e-8, -65504.0, 3.3e38, 1e-39])
    one, v = store(np.ones((1, 1, 1, 1)), dtype), store(v[None, None, None], dtype)
    out = run(Inputs(one, one, v, np.zeros_like(v)), False)["out"]
    np.testing.assert_array_equal(as_float64(out), as_float64(v))


@pytest.mark.parametrize(("dtype", "ulp"), [("float16", 2.0**-10), ("bfloat16", 2.0**-7)])
def test_ties_are_rounded_to_even(dtype, ulp):
    """Two keys of equal weight, so that out is halfway between two numbers."""
    v = store(np.array([[1, 1 + ulp], [1 + ulp, 1 + 2 * ulp], [-1, -1 - ulp]]).T[None, :, None], dtype)
    zeros = store(np.zeros((1, 2, 1, 1)), dtype)
    out = run(Inputs(zeros, zeros, v, v), False)["out"]
    np.testing.assert_array_equal(as_float64(out)[0, 0, 0], [1, 1 + 2 * ulp, -1])


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_nan_of_any_bits_stays_nan(bits):
    """Adding a half to the bits of a NaN and cutting them off could leave a zero."""
    out = np.zeros((1, 1, 1, 1), np.uint16)
    cpu.store(np.full(out.shape, bits, np.uint32).view(np.float32), out)
    assert np.isnan(as_float64(out)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_results_that_overflow_are_infinite(dtype):
    q, k, v, dout = make_inputs(0, 64, 1, dtype=dtype, batch=1, heads=(1, 1), head_dim=8)
    dout = store(np.full(dout.shape, 60_000.0 if dtype == "float16" else 3e38), dtype)
    results = run(Inputs(q, k, store(np.zeros(v.shape), dtype), dout), False)
    assert np.isposinf(as_float64(results["dv"])).all()


@pytest.mark.parametrize("causal", [False, True])
def test_nan_stays_in_its_row(causal):
    q, k, v, dout = make_inputs(0, 30, 40, dtype="float32", heads=(4, 2), head_dim=8)
    clean = run((q, k, v, dout), causal)
    q = q.copy()
    q[1, 7, 2] = np.nan
    results = run((q, k, v, dout), causal)
    for name, place in (("out", (1, 7, 2)), ("dq", (1, 7, 2)), ("lse", (1, 2, 7))):
        assert np.isnan(results[name][place]).all()
        results[name][place] = clean[name][place]
        np.testing.assert_array_equal(results[name], clean[name])


def test_bfloat16_comes_in_two_kinds():
    inputs = make_inputs(0, 70, 90, dtype="bfloat16", heads=(6, 3), head_dim=40)
    bits = check(inputs, True)
    values = check(tuple(as_ml_dtypes(x) for x in inputs), True)
    assert values["out"].dtype == ml_dtypes.bfloat16
    assert_same({**values, **{n: values[n].view(np.uint16) for n in NAMES if n != "lse"}}, bits)


# ----------------------------------------------------------------------------------------------------------------------
# Memory layouts


def _bhsd(x):
    return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)


def _in_nan(x, start=3):
    """A view of x's values inside a buffer whose other elements are NaN, off by `start` elements and strided."""
    padded = store(np.full((x.shape[0], 2 * x.shape[1] + 2, x.shape[2] + 1, x.shape[3] + 5), np.nan), _name(x))
    view = padded[:, 1:-1:2, 1:, start : start + x.shape[3]]
    view[...] = x
    return view


def _name(x):
    return "bfloat16" if x.dtype == np.uint16 else x.dtype.name


def _backwards(x):
    return np.ascontiguousarray(x[:, ::-1, ::-1])[:, ::-1, ::-1]


def _seqlen_last(x):
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


LAYOUTS = {"bhsd": _bhsd, "in NaN": _in_nan, "negative": _backwards, "head_dim not contiguous": _seqlen_last}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layouts", [*((name,) * 4 for name in LAYOUTS), tuple(LAYOUTS), tuple(LAYOUTS)[::-1]])
def test_strides(dtype, layouts):
    inputs = make_inputs(0, 33, 47, dtype=dtype, heads=(4, 2), head_dim=12)
    expected = run(inputs, True)
    strided = [LAYOUTS[layout](x) for layout, x in zip(layouts, inputs, strict=True)]
    for x, y in zip(strided, inputs, strict=True):
        assert x.strides != y.strides
    assert_same(run(strided, True), expected)


def test_every_second_row_of_dout():
    q, k, v, dout = make_inputs(0, 64, 32, dtype="float16", heads=(4, 4))
    q, k, v, dout = q[:, ::2], k, v, dout[:, ::2]
    check((q, k, v, dout), True)


def test_expanded_keys_and_values():
    q, k, v, dout = make_inputs(0, 20, 30, dtype="float32", batch=3, heads=(4, 4), head_dim=8)
    k, v = k[:1, :, :1], v[:1, :, :1]
    expanded = [np.broadcast_to(x, (3, 30, 4, 8)) for x in (k, v)]
    assert expanded[0].strides[0] == 0
    assert_same(run((q, *expanded, dout), True), run((q, *(x.copy() for x in expanded), dout), True))


def test_junk_strides_of_size_one_dimensions():
    inputs = make_inputs(0, 1, 1, dtype="float16", batch=1, heads=(1, 1), head_dim=1)
    junk = [np.lib.stride_tricks.as_strided(x, x.shape, (2 * 7, 2**40, -2, 6)) for x in inputs]
    assert_same(run(junk, True), run(inputs, True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [np.copy, *LAYOUTS.values()])
def test_results_go_where_they_are_wanted(dtype, layout):
    q, k, v, dout = inputs = make_inputs(0, 50, 37, dtype=dtype, heads=(4, 2), head_dim=12)
    expected = run(inputs, True)
    nan = {name: layout(store(np.full(x.shape, np.nan), _name(x))) for name, x in expected.items() if name != "lse"}
    buffer = np.full((4, 2, 100), np.nan, expected["lse"].dtype)
    nan["lse"] = buffer.transpose(1, 0, 2)[:, :, ::2]
    scale = q.shape[3] ** -0.5
    results = cpu.forward(q, k, v, causal=True, softmax_scale=scale, out=nan["out"], lse=nan["lse"])
    results += cpu.backward(
        dout, q, k, v, *results, causal=True, softmax_scale=scale, **{n: nan[n] for n in ("dq", "dk", "dv")}
    )
    for name, result in zip(NAMES, results, strict=True):
        assert result is nan[name]
    assert_same(nan, expected)
    assert np.isnan(buffer[:, :, 1::2]).all()
    if layout is _in_nan:
        for name in ("out", "dq", "dk", "dv"):
            buffer = as_float64(nan[name].base)
            assert np.count_nonzero(~np.isnan(buffer)) == nan[name].size


# ----------------------------------------------------------------------------------------------------------------------
# Properties


@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "causal"), [(6, 9, False), (6, 9, True), (9, 6, True)])
def test_gradients_are_finite_differences(seqlen_q, seqlen_k, causal, with_dlse):
    q, k, v, dout = make_inputs(2, seqlen_q, seqlen_k, dtype="float64", heads=(4, 2), head_dim=5, head_dim_v=4)
    options = {"causal": causal, "softmax_scale": 0.8}
    out, lse = cpu.forward(q, k, v, **options)
    seen = np.isfinite(lse)  # the other rows have no key: whatever dlse is there, it is not read
    dlse = np.where(seen, np.random.default_rng(3).standard_normal(lse.shape), np.nan) if with_dlse else None
    gradients = cpu.backward(dout, q, k, v, out, lse, dlse=dlse, **options)
    results = dict(zip(("dq", "dk", "dv"), gradients, strict=True))

    def loss(q, k, v):
        out, lse = cpu.forward(q, k, v, **options)
        return np.sum(dout * out) + (np.sum((dlse * lse)[seen]) if with_dlse else 0)

    for n, name in enumerate(("dq", "dk", "dv")):
        for place in np.random.default_rng(n).permutation(results[name].size)[:25]:
            losses = []
            for step in (1e-5, -1e-5):
                moved = [x.copy() for x in (q, k, v)]
                moved[n].flat[place] += step
                losses.append(loss(*moved))
            assert results[name].flat[place] == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-6, abs=1e-8)


def test_partial_results_merge_by_their_lse():
    q, k, v, _ = make_inputs(0, 100, 300, dtype="float64", heads=(4, 2), head_dim=16)
    whole, whole_lse = cpu.forward(q, k, v, causal=True, softmax_scale=0.25)
    parts = [
        cpu.forward(q, k[:, :200], v[:, :200], causal=False, softmax_scale=0.25),
        cpu.forward(q, k[:, 200:], v[:, 200:], causal=True, softmax_scale=0.25),
    ]
    merged_lse = np.logaddexp(parts[0][1], parts[1][1])
    merged = sum(np.exp(lse - merged_lse).swapaxes(1, 2)[..., None] * out for out, lse in parts)
    np.testing.assert_allclose(merged, whole, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(merged_lse, whole_lse, rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_query_is_a_row_of_the_prefill(dtype):
    q, k, v, _ = make_inputs(0, 300, 300, dtype=dtype, heads=(4, 2))
    for i in (0, 1, 150, 299):
        out, lse = cpu.forward(q[:, i : i + 1], k[:, : i + 1], v[:, : i + 1], causal=True, softmax_scale=0.125)
        ref, ref_lse = attention_reference(q, k, v, True, 0.125)
        unit = {"bfloat16": 8e-3, "float16": 1e-3, "float32": 1e-6, "float64": 1e-14}[dtype]
        np.testing.assert_allclose(as_float64(out), ref[:, i : i + 1], rtol=unit, atol=unit)
        np.testing.assert_allclose(lse, ref_lse[:, :, i : i + 1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_inputs_same_bits(dtype):
    inputs = make_inputs(0, 300, 500, dtype=dtype, heads=(6, 3), head_dim=32)
    first = run(inputs, True)
    for _ in range(10):
        again = run(inputs, True)
        for name in NAMES:
            assert again[name].tobytes() == first[name].tobytes()


def test_memory_is_linear_in_the_sequence_length():
    peaks = []
    for seqlen in (2048, 8192):
        inputs = make_inputs(0, seqlen, seqlen, dtype="float32", batch=1, heads=(1, 1), head_dim=16)
        tracemalloc.start()
        run(inputs, True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 4 * peaks[0]
    assert peaks[1] < 8192 * 8192 * 4 / 16


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_real_size_takes_seconds(dtype):
    inputs = make_inputs(0, 2048, 2048, dtype=dtype, batch=2, heads=(8, 8), head_dim=64)
    start = time.process_time()  # of all threads, and none of the waiting for a busy machine
    results = run(inputs, True)
    assert time.process_time() - start < 20  # about one second
    one = Inputs(*(x[1:, :, 5:6] for x in inputs))
    picked = {name: x[1:, 5:6] if name == "lse" else x[1:, :, 5:6] for name, x in results.items()}
    expect(*one, causal=True, out=picked["out"]).check(**picked)
