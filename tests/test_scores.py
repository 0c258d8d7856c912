"""softcap, ALiBi, sinks and dropout on the CPU: against the formula, by derivatives, by what they must leave alone."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from scipy import special

import fa2cupy
from fa2cupy import cpu
from tests.covering import covering
from tests.fake_gpu import FakeGpu, host_view, to_cupy
from tests.lengths import FORMS, SMALL, dead_rows, draw, expect_sequences
from tests.reference import Inputs, as_float64, expect, make_inputs, store
from tests.scores import NAMES, draw_features, features_of

pytestmark = pytest.mark.filterwarnings("error")

GRADIENTS = ("dq", "dk", "dv")


def run(inputs: Inputs, keywords: dict[str, Any], *, dlse: Any = None, given: bool = False) -> dict[str, Any]:
    """Everything that comes out. given: outputs are, filled with NaN."""
    q, k, v, dout = inputs
    if q.dtype == np.uint16:
        keywords = keywords | {"dtype": "bfloat16"}
    swapped = keywords.get("layout") == "bhsd"
    q, k, v, dout = (x.swapaxes(1, 2) if swapped else x for x in (q, k, v, dout))
    out, lse = fa2cupy.attention(q, k, v, return_lse=True, **keywords)
    wanted = ("sinks",) if "sinks" in keywords else ()
    outputs = {}
    if given:
        arrays = {"dq": q, "dk": k, "dv": v, **({"dsinks": keywords["sinks"]} if wanted else {})}
        outputs = {name: np.full_like(x, 0xFFFF if x.dtype == np.uint16 else np.nan) for name, x in arrays.items()}
    gradients = fa2cupy.attention_backward(
        dout, q, k, v, out, lse, dlse=dlse, grad_of=wanted, **keywords, **outputs
    )  # fmt: skip
    results = dict(zip((*GRADIENTS, "dsinks"), gradients, strict=False))
    if given:
        assert all(results[name] is x for name, x in outputs.items())
    results["out"] = out
    turned = {name: x.swapaxes(1, 2) if swapped and x.ndim == 4 else x for name, x in results.items()}
    return {"lse": lse, **turned}


def draw_dlse(inputs: Inputs, lse_shape: tuple[int, ...], seed: int) -> np.ndarray:
    dlse = np.random.default_rng(seed).standard_normal(lse_shape)
    return dlse.astype(np.float64 if inputs.q.dtype == np.float64 else np.float32)


def check(
    inputs: Inputs,
    keywords: dict[str, Any],
    *,
    causal: bool = False,
    window: Any = None,
    scale: float | None = None,
    dlse: Any = None,
    **more: Any,
) -> dict[str, Any]:
    """Dense attention with these features, against the reference."""
    batch, seqlen_q, heads, _ = inputs.q.shape
    seqlen_k = inputs.k.shape[1]
    results = run(inputs, keywords | {"causal": causal, "window_size": window, "softmax_scale": scale}, dlse=dlse)
    expected = expect(
        *inputs, causal=causal, window=window, scale=scale, out=results["out"], dlse=dlse,
        features=features_of(keywords, batch, heads, seqlen_q, seqlen_k), **more,
    )  # fmt: skip
    expected.check(**results)
    return results


# ----------------------------------------------------------------------------------------------------------------------
# Every combination


_MASKS: dict[str, tuple[bool, Any]] = {
    "full": (False, None), "causal": (True, None), "(7, 3)": (False, (7, 3)), "(5, -1)": (False, (5, -1)),
    "causal (9, 0)": (True, (9, 0)),
}  # fmt: skip
# All subsets of what there is.
_FEATURES = tuple(
    tuple(name for name in names if name)
    for names in itertools.product(
        ("", "softcap"), ("", "alibi_slopes", "alibi of batch"), ("", "sinks"), ("", "dropout_p")
    )
)
_FACTORS = {
    "features": _FEATURES,
    "mask": tuple(_MASKS),
    "lengths": ((20, 33), (50, 37), (45, 45), (1, 70), (33, 270)),
    "heads": ((4, 4), (6, 3), (4, 1)),
    "dtype": ("float16", "bfloat16", "float32", "float64"),
    "layout": ("bshd", "bhsd"),
    "scale": (None, -0.3),
    "dlse": (False, True),
    "given": (False, True),
}


def _id(choice: dict[str, Any]) -> str:
    return "-".join((*choice["features"], choice["dtype"]))


@pytest.mark.parametrize("choice", covering(_FACTORS), ids=_id)
def test_every_combination(choice: dict[str, Any]) -> None:
    """All features with each other, and each combination with every choice of everything else."""
    number = _FEATURES.index(choice["features"])
    (seqlen_q, seqlen_k), heads, dtype = choice["lengths"], choice["heads"], choice["dtype"]
    inputs = make_inputs(number, seqlen_q, seqlen_k, dtype=dtype, heads=heads, head_dim=16, head_dim_v=24)
    keywords = draw_features(choice["features"], number, 2, heads[0], dtype)
    causal, window = _MASKS[choice["mask"]]
    options = {"causal": causal, "window_size": window, "softmax_scale": choice["scale"], "layout": choice["layout"]}
    dlse = draw_dlse(inputs, (2, heads[0], seqlen_q), number) if choice["dlse"] else None
    results = run(inputs, keywords | options, dlse=dlse, given=choice["given"])
    features = features_of(keywords, 2, heads[0], seqlen_q, seqlen_k)
    expect(
        *inputs, causal=causal, window=window, scale=choice["scale"], out=results["out"], dlse=dlse, features=features
    ).check(**results)


_MIXED = ((3, 5), (0, 4), (20, 37), (1, 1), (17, 0), (0, 0), (19, 3))
_SEQUENCES = {
    "form": FORMS,
    "pairs": (_MIXED, SMALL),
    "used": ((), ("seqused_q", "seqused_k"), ("leftpad_k",), ("seqused_q", "seqused_k", "leftpad_k")),
    "features": _FEATURES,
    "mask": ("full", "causal", "(7, 3)"),
    "dtype": ("float16", "bfloat16", "float32", "float64"),
    "dlse": (False, True),
}


@pytest.mark.parametrize("choice", covering(_SEQUENCES), ids=lambda choice: f"{choice['form']}-{_id(choice)}")
def test_sequences_of_their_own(choice: dict[str, Any]) -> None:
    """Packed, padded and segments: each sequence has its slopes, its part of a mask, and all rows their sinks."""
    dtype = choice["dtype"]
    case = draw(7, choice["form"], pairs=choice["pairs"], used=choice["used"], dtype=dtype)
    lengths = case.lengths
    starts = next((lengths[name] for name in ("cu_seqlens_q", "cu_seqlens_k") if name in lengths), None)
    batch = len(case.inputs.q) if starts is None else len(starts) - 1
    keywords = draw_features(choice["features"], 3, batch, 4, dtype)
    causal, window = _MASKS[choice["mask"]]
    dlse = None
    if choice["dlse"]:
        dlse = draw_dlse(case.inputs, np.moveaxis(case.inputs.q[..., 0], -1, -2).shape, 1)
        np.moveaxis(dlse, -1, -2)[dead_rows(case.inputs, lengths)[0]] = np.nan
    results = run(case.inputs, {**keywords, **lengths, "causal": causal, "window_size": window}, dlse=dlse)
    expect_sequences(
        case.inputs, lengths, causal=causal, window=window, out=results["out"], dlse=dlse, features=keywords
    ).check(**results)


@pytest.mark.parametrize("name", NAMES)
def test_features_that_are_off_are_off(name: str) -> None:
    """Nothing is nothing, to the bit; and what is on is noticed."""
    inputs = make_inputs(3, 30, 40, dtype="float32", heads=(4, 2), head_dim=8)
    plain = run(inputs, {"causal": True})
    off = {
        "softcap": {"softcap": 0.0}, "alibi_slopes": {"alibi_slopes": None}, "alibi of batch": {}, "sinks": {},
        "dropout_p": {"dropout_p": 1e-6, "dropout_seed": (1, 2)},
    }[name]  # fmt: skip
    for result, other in zip(plain.values(), run(inputs, {"causal": True, **off}).values(), strict=True):
        assert result.tobytes() == other.tobytes()
    on = run(inputs, {"causal": True, **draw_features([name], 1, 2, 4, "float32")})
    assert not np.allclose(plain["out"], on["out"], atol=1e-2)


def test_values_that_change_nothing() -> None:
    inputs = make_inputs(3, 30, 40, dtype="float64", heads=(4, 2), head_dim=8)
    plain = run(inputs, {"causal": True})
    nothing: dict[str, dict[str, Any]] = {
        "slopes of 0": {"alibi_slopes": np.zeros(4)},
        "no sink at all": {"sinks": np.full(4, -np.inf)},
        "a far cap": {"softcap": 1e9},
    }
    for name, keywords in nothing.items():
        results = run(inputs, {"causal": True, **keywords})
        for key, expected in plain.items():
            np.testing.assert_allclose(results[key], expected, rtol=1e-12, atol=1e-13, err_msg=name)
        assert not results.get("dsinks", np.zeros(1)).any()


# ----------------------------------------------------------------------------------------------------------------------
# Derivatives


@pytest.mark.parametrize("seqlens", [(6, 9), (9, 6)], ids=str)
@pytest.mark.parametrize(
    "names",
    [("softcap",), ("alibi_slopes",), ("sinks",), ("dropout_p",), ("softcap", "alibi of batch", "sinks", "dropout_p")],
    ids="+".join,
)
def test_gradients_are_finite_differences(names: tuple[str, ...], seqlens: tuple[int, int]) -> None:
    """Of out and lse, rows without a key among them: with a sink those have an lse to differentiate."""
    q, k, v, dout = make_inputs(2, *seqlens, dtype="float64", heads=(4, 2), head_dim=5, head_dim_v=4)
    keywords = draw_features(names, 2, 2, 4, "float64") | {"causal": True, "softmax_scale": 0.8}
    out, lse = fa2cupy.attention(q, k, v, return_lse=True, **keywords)
    finite = np.isfinite(lse)
    assert finite.all() == ("sinks" in names or seqlens[0] <= seqlens[1])
    dlse = np.where(finite, np.random.default_rng(3).standard_normal(lse.shape), np.nan)
    arrays = {"q": q, "k": k, "v": v, **({"sinks": keywords.pop("sinks")} if "sinks" in names else {})}
    grad_of = ("sinks",) if "sinks" in names else ()
    sinks = {"sinks": arrays["sinks"]} if grad_of else {}
    gradients = fa2cupy.attention_backward(
        dout, q, k, v, out, lse, dlse=dlse, grad_of=grad_of, **keywords, **sinks
    )  # fmt: skip

    def loss(q: np.ndarray, k: np.ndarray, v: np.ndarray, **sinks: np.ndarray) -> float:
        out, lse = fa2cupy.attention(q, k, v, return_lse=True, **keywords, **sinks)
        return float(np.sum(dout * out) + np.sum((dlse * lse)[finite]))

    for n, (name, gradient) in enumerate(zip(arrays, gradients, strict=True)):
        for place in np.random.default_rng(n).permutation(gradient.size)[:20]:
            losses = []
            for step in (1e-5, -1e-5):
                moved = {key: x.copy() for key, x in arrays.items()}
                moved[name].flat[place] += step
                losses.append(loss(**moved))
            difference = (losses[0] - losses[1]) / 2e-5
            assert gradient.flat[place] == pytest.approx(difference, rel=1e-6, abs=1e-8), (name, place)


def test_the_pullback_has_all_of_it() -> None:
    q, k, v, dout = make_inputs(5, 12, 12, dtype="float64", heads=(4, 2), head_dim=8)
    keywords = draw_features(NAMES[:1] + NAMES[2:], 5, 2, 4, "float64") | {"causal": True}
    (out, lse), pullback = fa2cupy.attention_vjp(q, k, v, return_lse=True, **keywords)
    dlse = np.ones_like(lse)
    expected = fa2cupy.attention_backward(dout, q, k, v, out, lse, dlse=dlse, grad_of=("sinks",), **keywords)
    for found, wanted in zip(pullback(dout, dlse, grad_of=("sinks",)), expected, strict=True):
        assert (found == wanted).all()
    assert len(pullback(dout)) == 3


# ----------------------------------------------------------------------------------------------------------------------
# Sinks


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_rows_without_keys_have_the_sink(dtype: str) -> None:
    """out 0 and lse the sink; dlse of these rows goes to the sink, and nothing of them is read."""
    q, k, v, dout = make_inputs(1, 50, 20, dtype=dtype, heads=(4, 2), head_dim=16)
    sinks = np.array([0.5, -np.inf, -3.0, 30.0], np.float64 if dtype == "float64" else np.float32)
    dlse = np.random.default_rng(0).standard_normal((2, 4, 50)).astype(sinks.dtype)
    results = check(Inputs(q, k, v, dout), {"sinks": sinks}, causal=True, dlse=dlse)
    assert not as_float64(results["out"])[:, :30].any() and not as_float64(results["dq"])[:, :30].any()
    assert (results["lse"][:, :, :30] == sinks[:, None]).all()
    none = np.where(np.arange(50) < 30, dlse, 0)
    q, dout = q.copy(), dout.copy()
    q[:, :30], dout[:, :30] = (store(np.array(np.nan), dtype),) * 2
    dout[:, 30:] = 0
    dsinks = run(Inputs(q, k, v, dout), {"sinks": sinks, "causal": True}, dlse=none)["dsinks"]
    expected = np.where(np.isinf(sinks), 0, none.sum((0, 2), dtype=np.float64))
    np.testing.assert_allclose(dsinks, expected, rtol=1e-6, atol=1e-7)


def test_no_keys_at_all() -> None:
    sinks = np.array([1.0, 2.0])
    for lengths in ({}, {"seqused_k": np.zeros(3, np.int32)}):
        q, k = np.ones((3, 5, 2, 4)), np.ones((3, 0 if not lengths else 4, 1, 4))
        out, lse = fa2cupy.attention(q, k, k, sinks=sinks, return_lse=True, **lengths)
        assert not out.any() and (lse == sinks[:, None]).all()
        dlse = np.arange(lse.size, dtype=float).reshape(lse.shape)
        *gradients, dsinks = fa2cupy.attention_backward(
            q, q, k, k, out, lse, dlse=dlse, sinks=sinks, grad_of=("sinks",), **lengths
        )
        assert not any(x.any() for x in gradients) and (dsinks == dlse.sum((0, 2))).all()


@pytest.mark.parametrize("sink", [-200.0, 200.0, 50_000.0])
def test_sinks_far_above_and_below(sink: float) -> None:
    inputs = make_inputs(4, 20, 30, dtype="float32", heads=(2, 1), head_dim=8)
    results = check(inputs, {"sinks": np.array([sink, 0], np.float32)}, causal=True)
    if sink > 0:
        assert not results["out"][:, :, 0].any() and (results["lse"][:, 0] == sink).all()


def test_where_the_gradient_of_sinks_goes() -> None:
    inputs = make_inputs(4, 20, 30, dtype="float16", heads=(4, 2), head_dim=8)
    for dtype in (np.float16, np.float32):
        sinks = np.linspace(-1, 1, 4).astype(dtype)
        wider = np.full(12, np.nan, dtype)
        given = run(inputs, {"sinks": sinks})["dsinks"]
        assert given.dtype == dtype
        out, lse = fa2cupy.attention(*inputs[:3], sinks=sinks, return_lse=True)
        with pytest.raises(ValueError, match=r"dsinks has strides \(6,\) \(bytes\)|dsinks has strides \(12,\)"):
            fa2cupy.attention_backward(
                inputs.dout, *inputs[:3], out, lse, sinks=sinks, grad_of=("sinks",), dsinks=wider[::3]
            )
        fa2cupy.attention_backward(
            inputs.dout, *inputs[:3], out, lse, sinks=sinks, grad_of=("sinks",), dsinks=wider[4:8]
        )
        assert (wider[4:8] == given).all() and np.isnan(wider[:4]).all() and np.isnan(wider[8:]).all()


# ----------------------------------------------------------------------------------------------------------------------
# ALiBi


@pytest.mark.parametrize("slope", [0.7, 0.011, -0.7])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_alibi_far_from_the_diagonal(dtype: str, slope: float) -> None:
    """The first queries of 128k stand 128k before 40 keys: out is as exact as beside the diagonal, and lse is true."""
    far, seen = 2**17, 3
    rng = np.random.default_rng(1)
    q = np.zeros((1, far, 2, 8), dtype)
    q[:, :seen] = rng.standard_normal((1, seen, 2, 8))
    k, v = rng.standard_normal((2, 1, 40, 1, 8)).astype(dtype)
    slopes = np.array([slope, 0.3], np.float32)
    out, lse = fa2cupy.attention(q, k, v, alibi_slopes=slopes, return_lse=True)
    scores = np.einsum("bihd,bjgd->bhij", as_float64(q[:, :seen]), as_float64(k)) * 8**-0.5
    distance = abs(np.arange(seen)[:, None] + 40 - far - np.arange(40))
    scores -= as_float64(slopes)[:, None, None] * distance
    np.testing.assert_allclose(lse[..., :seen], special.logsumexp(scores, -1), rtol=6e-8)
    expected = np.einsum("bhij,bjgd->bihd", special.softmax(scores, -1), as_float64(v))
    np.testing.assert_allclose(out[:, :seen], expected, **TOLERANCE[dtype])


TOLERANCE: dict[str, Any] = {"float32": {"rtol": 3e-6, "atol": 3e-6}, "float16": {"rtol": 1e-3, "atol": 1e-4}}


def test_slopes_of_any_strides() -> None:
    inputs = make_inputs(4, 20, 30, dtype="float32", heads=(4, 2), head_dim=8)
    slopes = np.linspace(0.1, 1, 8).astype(np.float32).reshape(2, 4)
    expected = run(inputs, {"alibi_slopes": slopes})
    for strided in (np.asfortranarray(slopes), np.repeat(slopes, 2, axis=1)[:, ::2], slopes[::-1].copy()[::-1]):
        for result, wanted in zip(run(inputs, {"alibi_slopes": strided}).values(), expected.values(), strict=True):
            assert (result == wanted).all()
    shared = run(inputs, {"alibi_slopes": np.broadcast_to(slopes[0], (2, 4))})
    alone = run(inputs, {"alibi_slopes": slopes[0]})
    assert all((shared[name] == alone[name]).all() for name in alone)


# ----------------------------------------------------------------------------------------------------------------------
# Softcap


@pytest.mark.parametrize("softcap", [1e-40, 1e-30, 1e-3, 0.5, 50.0, 1e30, 1e300])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_any_softcap(dtype: str, softcap: float) -> None:
    inputs = make_inputs(6, 20, 30, dtype=dtype, heads=(2, 1), head_dim=8)
    results = check(inputs, {"softcap": softcap}, causal=True)
    assert all(np.isfinite(x).all() for x in results.values())


def test_scores_far_beyond_a_cap() -> None:
    """tanh is 1 there and its derivative 0: no NaN, and no gradient."""
    q, k, v, dout = make_inputs(6, 20, 30, dtype="float32", heads=(2, 1), head_dim=8)
    results = check(Inputs(1e4 * q, 1e4 * k, v, dout), {"softcap": 30.0}, causal=True)
    assert (abs(results["lse"]) <= 30 + np.log(30)).all()


# ----------------------------------------------------------------------------------------------------------------------
# Tiles, pieces


@pytest.mark.parametrize("names", [NAMES[:1], NAMES[1:2], NAMES[3:4], NAMES[4:], NAMES[:1] + NAMES[2:]], ids="+".join)
def test_tiles_change_nothing(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same within rounding, and what is dropped is the same exactly: blocks that cut Philox's units of 16."""
    inputs = make_inputs(9, 45, 51, dtype="float64", heads=(4, 2), head_dim=8)
    keywords = draw_features(names, 4, 2, 4, "float64") | {"window_size": (30, 9)}
    whole = run(inputs, keywords)
    for block_m, block_n in ((8, 4), (7, 13), (32, 5)):
        monkeypatch.setattr(cpu, "BLOCK_M", block_m)
        monkeypatch.setattr(cpu, "BLOCK_N", block_n)
        monkeypatch.setattr(cpu, "_TILE_SCORES", 64)
        for name, result in run(inputs, keywords).items():
            np.testing.assert_allclose(result, whole[name], rtol=1e-11, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("names", [("softcap",), ("alibi of batch",), ("softcap", "alibi_slopes")], ids="+".join)
def test_pieces_of_the_keys_are_merged(names: tuple[str, ...]) -> None:
    """Forward and backward, as ring attention and decoding in parts have it.

    ALiBi with one query: in a piece it stands beside the last key of the piece, c keys too early, so that the piece's
    lse is slope * c too large.
    """
    seqlen_q = 20 if names == ("softcap",) else 1
    q, k, v, dout = make_inputs(9, seqlen_q, 40, dtype="float64", heads=(4, 2), head_dim=8)
    keywords = draw_features(names, 4, 2, 4, "float64")
    slopes = np.broadcast_to(keywords.get("alibi_slopes", np.zeros(4)), (2, 4))[..., None]
    out, lse = fa2cupy.attention(q, k, v, return_lse=True, **keywords)
    dlse = np.random.default_rng(2).standard_normal(lse.shape)
    cuts = [(0, 13), (13, 13), (13, 29), (29, 40)]
    pieces, gradients = [], []
    for start, end in cuts:
        its = q, k[:, start:end], v[:, start:end]
        piece, piece_lse = fa2cupy.attention(*its, return_lse=True, **keywords)
        shift = slopes * (40 - end)
        pieces.append((piece, piece_lse - shift))
        gradients.append(fa2cupy.attention_backward(dout, *its, out, lse + shift, dlse=dlse, **keywords))
    merged, merged_lse = fa2cupy.merge_attention(*zip(*pieces, strict=True))
    np.testing.assert_allclose(merged, out, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(merged_lse, lse, rtol=1e-12)
    dq, dk, dv = fa2cupy.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **keywords)
    np.testing.assert_allclose(sum(each[0] for each in gradients), dq, rtol=1e-11, atol=1e-13)
    for n, whole in ((1, dk), (2, dv)):
        np.testing.assert_allclose(np.concatenate([each[n] for each in gradients], 1), whole, rtol=1e-11, atol=1e-13)


# ----------------------------------------------------------------------------------------------------------------------
# What reaches a GPU


@pytest.mark.parametrize("form", ["dense, bhsd", "packed", "q packed"])
@pytest.mark.parametrize("names", [("softcap", "sinks"), ("alibi_slopes",), ("softcap", "alibi of batch", "sinks")])
@pytest.mark.parametrize("seed", [2, 3])
def test_what_a_gpu_is_told(names: tuple[str, ...], form: str, seed: int, gpu: FakeGpu) -> None:
    """The front end's pointers, strides and shapes serve a computation with them alone: sinks of either dtype, slopes
    with gaps.
    """
    case = draw(11, form.split(",")[0], pairs=_MIXED, dtype="float16", head_dim=8, head_dim_v=16)
    q, k, v, dout = case.inputs
    swapped = "bhsd" in form
    if swapped:
        case = case._replace(inputs=make_inputs(1, 20, 13, dtype="float16", batch=7, heads=(4, 2), head_dim=8))
        q, k, v, dout = (x.swapaxes(1, 2) for x in case.inputs)
    keywords = draw_features(names, seed, 7, 4, "float16")
    theirs: dict[str, Any] = {name: to_cupy(x) if isinstance(x, np.ndarray) else x for name, x in keywords.items()}
    if "alibi_slopes" in theirs:
        slopes = keywords["alibi_slopes"]
        theirs["alibi_slopes"] = to_cupy(np.repeat(slopes, 2, axis=-1))[..., ::2]
    theirs |= {name: to_cupy(x) for name, x in case.lengths.items()}
    options: dict[str, Any] = {"causal": True, "layout": "bhsd" if swapped else "bshd"}
    arrays = [to_cupy(x) for x in (q, k, v)]
    out, lse = fa2cupy.attention(*arrays, return_lse=True, **options, **theirs)
    dlse = np.random.default_rng(0).standard_normal(lse.shape).astype(np.float32)
    wanted = ("sinks",) if "sinks" in names else ()
    gradients = fa2cupy.attention_backward(
        to_cupy(dout), *arrays, out, lse, dlse=to_cupy(dlse), grad_of=wanted, **options, **theirs
    )
    results = dict(zip(("out", "lse", *GRADIENTS, "dsinks"), map(host_view, (out, lse, *gradients)), strict=False))
    results = {name: x.swapaxes(1, 2) if swapped and x.ndim == 4 else x for name, x in results.items()}
    expect_sequences(case.inputs, case.lengths, causal=True, dlse=dlse, out=results["out"], features=keywords).check(
        **results
    )
    assert len(gpu.plans) == 2 and len(gradients) == 3 + len(wanted)
