"""The yardstick itself: formulas, rounding; `compare` passes honest kernels and fails every planted mistake."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest

from tests import reference
from tests.reference import Inputs, as_float64, compare, compare_lse, expect, make_inputs, round_to, store, visible_keys

pytestmark = pytest.mark.filterwarnings("error")


# ----------------------------------------------------------------------------------------------------------------------
# Formats


@pytest.mark.parametrize(("dtype", "numpy_dtype"), [("float16", np.float16), ("float32", np.float32)])
def test_round_to_agrees_with_numpy(dtype, numpy_dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(100_000) * np.exp(rng.uniform(-120, 120, 100_000))
    x[:8] = np.nan, np.inf, -np.inf, 0.0, -0.0, 65519.99, 65520.0, 2.0**-25
    with np.errstate(over="ignore", under="ignore"):
        expected = x.astype(numpy_dtype).astype(np.float64)
    np.testing.assert_array_equal(round_to(x, dtype), expected)


def test_round_to_bfloat16_agrees_with_ml_dtypes():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(100_000) * np.exp(rng.uniform(-100, 100, 100_000))
    x[:6] = np.nan, np.inf, -np.inf, 3.4e38, 2.0**-133, 1.5 * 2.0**-133
    with np.errstate(over="ignore", under="ignore"):
        x = x.astype(np.float32).astype(np.float64)  # ml_dtypes rounds by way of float32
        expected = x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
    np.testing.assert_array_equal(round_to(x, "bfloat16"), expected)
    np.testing.assert_array_equal(as_float64(store(x, "bfloat16")), expected)


@pytest.mark.parametrize(
    ("x", "expected"),
    [(1 + 2**-8, 1.0), (1 + 3 * 2**-8, 1 + 2**-6), (1 + 2**-8 + 2**-40, 1 + 2**-7), (-(1 + 2**-8), -1.0)],
)
def test_ties_go_to_even(x, expected):
    assert round_to(np.array([x]), "bfloat16")[0] == expected


def test_all_kinds_of_bfloat16_are_read_alike():
    bits = store(np.random.default_rng(0).standard_normal((3, 5)), "bfloat16")
    assert bits.dtype == np.uint16
    np.testing.assert_array_equal(as_float64(bits), as_float64(reference.as_ml_dtypes(bits)))
    np.testing.assert_array_equal(as_float64(bits[:, ::-2]), as_float64(bits)[:, ::-2])
    assert reference.dtype_name(bits) == reference.dtype_name(reference.as_ml_dtypes(bits)) == "bfloat16"


def test_inputs_are_seeded_and_outliers_are_where_they_should_be():
    one, same, other = (make_inputs(seed, 100, 200, dtype="float64") for seed in (1, 1, 2))
    for a, b, c in zip(one, same, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != c).all()
    spiked = make_inputs(1, 1000, 1000, dtype="float64", outliers=True)
    for x, share in zip(spiked, (1e-3, 1e-3, 1e-3, 0), strict=True):
        assert np.mean(abs(x) > 7) == pytest.approx(0.48 * share, abs=2e-4)  # 10 N(0,1) is beyond 7 in 48%


# ----------------------------------------------------------------------------------------------------------------------
# Formulas


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(3, 5), (5, 3), (4, 0), (0, 4)])
def test_forward_is_the_sum_over_visible_keys(seqlen_q, seqlen_k, causal):
    q, k, v, _ = make_inputs(0, seqlen_q, seqlen_k, dtype="float64", heads=(4, 2), head_dim=3, head_dim_v=2)
    out, lse = reference.attention_reference(q, k, v, causal, 0.7)
    for b, h, i in itertools.product(range(2), range(4), range(seqlen_q)):
        keys = [j for j in range(seqlen_k) if not causal or j - seqlen_k <= i - seqlen_q]
        weights = [math.exp(0.7 * sum(q[b, i, h] * k[b, j, h // 2])) for j in keys]
        total = sum(weights)
        expected = sum((w / total * v[b, j, h // 2] for w, j in zip(weights, keys, strict=True)), np.zeros(2))
        np.testing.assert_allclose(out[b, i, h], expected, rtol=1e-12, atol=1e-14)
        assert lse[b, h, i] == pytest.approx(math.log(total) if keys else -math.inf, rel=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.0, -0.7, 60.0, 1e-30])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (1, 239), (113, 203), (203, 113), (70, 3)])
def test_scipy_agrees(seqlen_q, seqlen_k, scale, causal):
    """With the forward of the formulas, GQA, rows that see no key and steep scores included."""
    inputs = make_inputs(seqlen_q, seqlen_q, seqlen_k, dtype="bfloat16", heads=(4, 2), head_dim=24, head_dim_v=16)
    out, lse = reference.attention_reference(*inputs[:3], causal, scale)
    judged_out, judged_lse = reference.attention_by_scipy(*inputs[:3], causal, scale)
    np.testing.assert_allclose(lse, judged_lse, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(out, judged_out, rtol=1e-12, atol=1e-12)
    assert np.isneginf(judged_lse).any() == (causal and seqlen_q > seqlen_k)


def test_causal_is_bottom_right():
    assert visible_keys(2, 4, True).tolist() == [[True, True, True, False], [True] * 4]
    assert visible_keys(3, 2, True).tolist() == [[False, False], [True, False], [True, True]]
    assert visible_keys(3, 2, False).all()


def test_windows_are_counted_from_the_last_key():
    assert visible_keys(2, 4, False, (1, 0)).tolist() == [[False, True, True, False], [False, False, True, True]]
    assert visible_keys(3, 2, False, (0, 1)).tolist() == [[True, False], [True, True], [False, True]]
    assert visible_keys(4, 1, False, (5, 1)).tolist() == [[False], [False], [True], [True]]
    assert (visible_keys(3, 5, True, (-1, -1)) == visible_keys(3, 5, True)).all()


@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "causal"), [(5, 7, False), (5, 7, True), (7, 5, True)])
def test_backward_is_the_derivative_of_the_forward(seqlen_q, seqlen_k, causal):
    q, k, v, dout = make_inputs(3, seqlen_q, seqlen_k, dtype="float64", heads=(4, 2), head_dim=4, head_dim_v=3)
    gradients = reference.attention_backward_reference(dout, q, k, v, causal, -0.6)
    rng = np.random.default_rng(0)
    for n, gradient in enumerate(gradients):
        step = 1e-5 * rng.standard_normal(gradient.shape)

        def loss(sign, n=n, step=step):
            moved = [x + sign * step if m == n else x for m, x in enumerate((q, k, v))]
            return np.sum(dout * reference.attention_reference(*moved, causal, -0.6)[0])

        assert np.sum(gradient * step) == pytest.approx((loss(1) - loss(-1)) / 2, rel=1e-7, abs=1e-13)


def test_slabs_do_not_matter(monkeypatch):
    inputs = make_inputs(0, 20, 30, dtype="bfloat16", heads=(6, 3), head_dim=16)
    at_once = expect(*inputs, causal=True)
    monkeypatch.setattr(reference, "_MAX_SCORES", 1)
    for name, bound in expect(*inputs, causal=True).bounds.items():
        np.testing.assert_array_equal(bound.ref, at_once.bounds[name].ref)
        np.testing.assert_array_equal(bound.model, at_once.bounds[name].model)
        assert bound.floor == at_once.bounds[name].floor


@pytest.mark.parametrize(
    ("dtype", "measured"),
    [
        ("bfloat16", {"out": 2.22e-3, "dq": 2.39e-3, "dk": 2.36e-3, "dv": 2.35e-3}),
        ("float16", {"out": 2.78e-4, "dq": 2.99e-4, "dk": 2.94e-4, "dv": 2.94e-4}),
    ],
)
def test_the_model_is_as_wrong_as_good_kernels(dtype, measured):
    """Relative rms errors of FlashAttention-2, FlashAttention-3 and cuDNN 9.19 on an H200: B 2, H 4, D 64, full."""
    expected = expect(*make_inputs(0, 1024, 1024, dtype=dtype))
    for name, error in measured.items():
        model = compare(name, expected.bounds[name].model, *expected.bounds[name]).model_rms_error
        assert model == pytest.approx(error, rel=0.02)


# ----------------------------------------------------------------------------------------------------------------------
# compare


def flash_kernel(inputs, causal, dtype, *, columns_too_many=0, cut_p=False, skip_rescale=False, round_ds=True):
    """out, lse, dq, dk, dv as a kernel computes them: float32, P rounded relative to the running maximum. Mistakes on
    request: a causal mask that is off by some columns, P cut off instead of rounded, ..."""
    q, k, v, dout = (as_float64(x).astype(np.float32).swapaxes(1, 2) for x in inputs)
    group, block_n = q.shape[1] // k.shape[1], 32
    k_all, v_all = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scale = np.float32(q.shape[3] ** -0.5)
    last_seen = k.shape[2] - q.shape[2] + columns_too_many if causal else k.shape[2]
    visible = np.tri(q.shape[2], k.shape[2], last_seen, dtype=bool)

    def rounded(x):
        return round_to(x.astype(np.float64), dtype).astype(np.float32)

    def rounded_p(p):
        return (rounded(p * (1 - 2**-9)) if dtype == "bfloat16" else rounded(p * (1 - 2**-12))) if cut_p else rounded(p)

    with np.errstate(all="ignore"):
        s = np.where(visible, q @ k_all.swapaxes(2, 3), np.float32(-np.inf))
        m = np.full((*q.shape[:3], 1), -np.inf, np.float32)
        total, acc = np.zeros_like(m), np.zeros((*q.shape[:3], v.shape[3]), np.float32)
        for n in reversed(range(0, k.shape[2], block_n)):
            block = s[..., n : n + block_n]
            m_new = np.maximum(m, block.max(-1, keepdims=True))
            m_finite = np.where(np.isneginf(m_new), 0, m_new)
            alpha = np.float32(1) if skip_rescale and n == 0 else np.exp((m - m_finite) * scale)
            p = np.exp((block - m_finite) * scale)
            total = alpha * total + p.sum(-1, keepdims=True)
            acc = alpha * acc + rounded_p(p) @ v_all[:, :, n : n + block_n]
            m = m_new
        sees = total > 0
        out = rounded(np.where(sees, acc / total, 0))
        lse = np.where(sees, m * scale + np.log(total), -np.inf)
        p = np.exp(s * scale - np.where(sees, lse, 0))
        ds = p * (dout @ v_all.swapaxes(2, 3) - np.sum(dout * out, axis=-1, keepdims=True))
        ds = rounded(ds) if round_ds else rounded(ds * np.float32(1.002))

    def grouped(x):
        return x.reshape(x.shape[0], -1, group, *x.shape[2:]).sum(2)

    dq = rounded(scale * (ds @ k_all))
    dk = rounded(scale * grouped(ds.swapaxes(2, 3) @ q))
    dv = rounded(grouped(rounded_p(p).swapaxes(2, 3) @ dout))
    return {
        "out": store(out.swapaxes(1, 2), dtype),
        "lse": lse[..., 0].astype(np.float32),
        **{name: store(x.swapaxes(1, 2), dtype) for name, x in (("dq", dq), ("dk", dk), ("dv", dv))},
    }


def check(inputs, causal, results):
    expect(*inputs, causal=causal, out=results["out"]).check(**results)


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_honest_kernels_pass(dtype, outliers):
    rng = np.random.default_rng(11)
    for seed in range(60):
        seqlen_q, seqlen_k = (int(n) for n in rng.integers(1, [8, 200][seed % 2], 2))
        heads, causal = reference.HEADS[seed % len(reference.HEADS)], bool(rng.integers(2))
        inputs = make_inputs(seed, seqlen_q, seqlen_k, dtype=dtype, heads=heads, head_dim=40, outliers=outliers)
        check(inputs, causal, flash_kernel(inputs, causal, dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("mistake", "caught_in"),
    [
        ({"columns_too_many": 1}, {"out", "lse", "dq", "dk", "dv"}),
        ({"columns_too_many": -1}, {"out", "lse", "dq", "dk", "dv"}),
        ({"skip_rescale": True}, {"out", "lse"}),
        ({"cut_p": True}, {"out", "dv"}),
        ({"round_ds": False}, {"dq", "dk"}),
    ],
)
def test_planted_mistakes_fail(dtype, mistake, caught_in):
    inputs = make_inputs(5, 250, 300, dtype=dtype)
    expected = expect(*inputs, causal=True)
    failed = set()
    for name, x in flash_kernel(inputs, True, dtype, **mistake).items():
        try:
            expected.check(**{name: x})
        except AssertionError:
            failed.add(name)
    assert failed >= caught_in


@pytest.fixture(scope="module")
def case():
    inputs = make_inputs(5, 40, 70, dtype="float16", heads=(4, 2))
    return inputs, flash_kernel(inputs, True, "float16"), expect(*inputs, causal=True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv"])
def test_one_bad_element_fails(case, name, value):
    _, results, expected = case
    expected.check(**results)
    bad = results[name].copy()
    bad.flat[-1] = value
    with pytest.raises(AssertionError, match=f"{name}: 1 (NaN|.inf), expected 0; first at"):
        expected.check(**{name: bad})


@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv"])
def test_wrong_values_fail(case, name):
    _, results, expected = case
    good = results[name]
    others = {
        "zeros": np.zeros_like(good),
        "one element": np.concatenate([good.ravel()[:-1], good.ravel()[-1:] + 1]).reshape(good.shape),
        "other heads": good[:, ::-1] if name == "lse" else good[:, :, ::-1],
        "other rows": np.roll(good, 1, axis=2 if name == "lse" else 1),
    }
    for bad in others.values():
        with pytest.raises(AssertionError, match=f"{name}: (rms )?error"):
            expected.check(**{name: bad})
    with pytest.raises(AssertionError, match=f"{name}: shape"):
        expected.check(**{name: good[:, :-1]})


def test_inf_must_be_where_the_reference_has_it():
    ref = np.array([[1.0, np.inf, -np.inf, np.nan]])
    compare("x", ref, ref, ref, 0.0)
    for places in ([0, 2, 1, 3], [0, 3, 2, 1], [1, 0, 2, 3]):
        with pytest.raises(AssertionError, match="x: "):
            compare("x", ref[:, places], ref, ref, 1e9)


def test_a_model_that_overflows_is_no_yardstick():
    with pytest.raises(AssertionError, match="of the model"):
        compare("x", np.ones((1, 2)), np.ones((1, 2)), np.array([[1.0, np.inf]]), 1.0)


def test_rules_have_their_edges():
    ref, model = np.zeros((1000, 10)), np.full((1000, 10), 1e-3)
    compare("x", np.full_like(ref, 1.05e-3), ref, model, 1e-6)
    with pytest.raises(AssertionError, match="x: rms error"):
        compare("x", np.full_like(ref, 1.15e-3), ref, model, 1e-6)
    spike = np.zeros_like(ref)
    spike[0, 0] = 2e-3 + 0.9e-6
    compare("x", spike, ref, model, 1e-6)
    spike[0, 0] = 2e-3 + 1.1e-6
    with pytest.raises(AssertionError, match="x: error"):
        compare("x", spike, ref, model, 1e-6)
    compare("x", ref + 1e-6, ref, None, 1.1e-6)
    with pytest.raises(AssertionError, match="x: error"):
        compare("x", ref + 1e-6, ref, None, 0.9e-6)


def test_lse_rule():
    ref = np.array([[[1.0, -60_000.0, -np.inf]]])
    compare_lse((ref + 0.9e-4).astype(np.float32), ref.astype(np.float32))
    compare_lse((ref - [0, 0.06, 0]).astype(np.float32), ref.astype(np.float32))
    for shift in ([2e-4, 0, 0], [0, 0.1, 0], [np.nan, 0, 0], [0, -np.inf, 0]):
        with pytest.raises(AssertionError, match="lse: "):
            compare_lse((ref + shift).astype(np.float32), ref.astype(np.float32))
    with pytest.raises(AssertionError, match=r"lse: 1 \+inf, expected 0"):
        compare_lse(-ref, ref)
    with pytest.raises(AssertionError, match="lse: error"):
        compare_lse(ref + 1e-9, ref)  # a float64 result is held to more


def test_empty_results_compare():
    for seqlen_q, seqlen_k in ((0, 5), (5, 0), (0, 0)):
        inputs = make_inputs(0, seqlen_q, seqlen_k, dtype="float16")
        expected = expect(*inputs, causal=True)
        assert expected.lse.shape == (2, 4, seqlen_q)
        assert np.isneginf(expected.lse).all()
        zeros = {"out": inputs.dout, "dq": inputs.q, "dk": inputs.k, "dv": inputs.v}
        expected.check(lse=expected.lse, **{name: np.zeros_like(x) for name, x in zeros.items()})


def test_rows_without_keys_leak_nothing():
    inputs = make_inputs(0, 9, 5, dtype="float32", heads=(4, 2))
    clean = expect(*inputs, causal=True)
    dirty = Inputs(*(x.copy() for x in inputs))
    dirty.q[:, :4], dirty.dout[:, :4] = np.nan, np.inf
    for name, bound in expect(*dirty, causal=True).bounds.items():
        np.testing.assert_array_equal(bound.ref, clean.bounds[name].ref)
        assert bound.floor <= clean.bounds[name].floor
