"""mask= on the CPU against the float64 reference: bool arrays and BlockMasks, with everything else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fa2cupy
from fa2cupy import BlockMask, cpu
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.spec import MASK_ARRAYS
from tests.fake_gpu import FakeGpu, cupy_array, host_view, to_cupy
from tests.reference import expect, make_inputs
from tests.scores import draw_features, features_of
from tests.test_block_mask import random_dense

pytestmark = pytest.mark.filterwarnings("error")

Arrays = dict[str, np.ndarray]


def run(inputs: Any, dlse: Any = None, **keywords: Any) -> Arrays:
    q, k, v, dout = inputs
    out, lse = fa2cupy.attention(q, k, v, return_lse=True, dtype=_dtype(q), **keywords)
    grad_of = ("sinks",) if keywords.get("sinks") is not None else ()
    names = ("dq", "dk", "dv", *(f"d{name}" for name in grad_of))
    gradients = fa2cupy.attention_backward(
        dout, q, k, v, out, lse, dlse=dlse, grad_of=grad_of, dtype=_dtype(q), **keywords
    )  # fmt: skip
    return {"out": out, "lse": lse, **dict(zip(names, gradients, strict=True))}


def _dtype(q: np.ndarray) -> str | None:
    return "bfloat16" if q.dtype == np.uint16 else None


def check(inputs: Any, dense: np.ndarray, mask: Any = None, dlse: Any = None, **keywords: Any) -> Arrays:
    """AssertionError unless attention with the mask is what the reference makes of `dense`."""
    q, k = inputs[:2]
    batch, seqlen_q, heads = q.shape[:3]
    results = run(inputs, dlse, mask=dense if mask is None else mask, **keywords)
    features = features_of(keywords, batch, heads, seqlen_q, k.shape[1])._replace(mask=dense)
    expect(
        *inputs, causal=keywords.get("causal", False), scale=keywords.get("softmax_scale"), out=results["out"],
        window=keywords.get("window_size"), dlse=dlse, features=features,
    ).check(**results)  # fmt: skip
    return results


def same(a: Arrays, b: Arrays) -> None:
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


DTYPES = ("float16", "bfloat16", "float32", "float64")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(300, 400), (400, 300), (129, 640)])
def test_masks_of_both_kinds(dtype: str, lengths: tuple[int, int]) -> None:
    """With rows that see no key, keys that nobody sees, blocks of every kind; the same bits either way."""
    inputs = make_inputs(1, *lengths, dtype=dtype, heads=(4, 2), head_dim=16)
    first = DTYPES.index(dtype) + lengths[0]
    for seed in (first, first + 1):
        masks = ((1, 1), (2, 1), (1, 4), (2, 4))[seed % 4]
        dense = random_dense(seed, (*masks, *lengths))
        same(check(inputs, dense), run(inputs, mask=BlockMask.from_dense(dense)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, (30, 0), (60, -1), (-1, -1)])
def test_an_array_with_causal_and_windows(causal: bool, window: tuple[int, int] | None) -> None:
    """Both ways round, so that leading queries see no key, or nobody leading keys; the same as a BlockMask of both."""
    for n, lengths in enumerate(((300, 270), (140, 300), (70, 500))):
        inputs = make_inputs(n, *lengths, dtype=DTYPES[n], heads=(4, 2), head_dim=8)
        dense = random_dense(n, (2, 4, *lengths))
        results = check(inputs, dense, causal=causal, window_size=window)
        band = BlockMask.from_blocks(np.ones((1, 1), bool), lengths, causal=causal, window_size=window)
        both = BlockMask.from_dense(dense) & band
        for name, value in check(inputs, both.to_dense(), both).items():
            np.testing.assert_allclose(results[name].astype(float), value.astype(float), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "shape", [(50, 70), (1, 70), (50, 1), (4, 1, 70), (2, 1, 1, 70), (2, 1, 50, 1), (1, 1, 1, 1), (70,)]
)
def test_arrays_that_broadcast(shape: tuple[int, ...]) -> None:
    inputs = make_inputs(0, 50, 70, dtype="float32", heads=(4, 2), head_dim=8)
    dense = np.random.default_rng(1).random(shape) < 0.7
    check(inputs, dense)
    check(inputs, np.asfortranarray(dense)[..., ::-1])
    swapped = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in inputs]
    for name, value in run(swapped, mask=dense, layout="bhsd").items():
        expected = run(inputs, mask=dense)[name]
        np.testing.assert_array_equal(value, expected if name == "lse" else expected.swapaxes(1, 2))


@pytest.mark.parametrize(
    "names",
    [("softcap",), ("alibi_slopes",), ("sinks",), ("dropout_p",), ("softcap", "alibi of batch", "sinks", "dropout_p")],
)
def test_with_what_becomes_of_scores(names: tuple[str, ...]) -> None:
    for n, dtype in enumerate(("float32", "bfloat16", "float64")):
        inputs = make_inputs(n, 200, 270, dtype=dtype, heads=(4, 2), head_dim=16)
        dense = random_dense(n, (2, 4, 200, 270))
        features = draw_features(names, n, 2, 4, dtype)
        dlse = (
            np.random.default_rng(n).standard_normal((2, 4, 200)).astype("float64" if dtype == "float64" else "float32")
        )
        results = check(inputs, dense, BlockMask.from_dense(dense), dlse, causal=False, **features)
        if "sinks" in names:  # of a row without any key the sink is all
            assert np.isfinite(results["lse"]).all() and not results["out"][:, 3].any()
        check(inputs, dense, None, dlse, causal=True, **features)


def test_a_sink_of_minus_infinity_and_a_row_without_keys() -> None:
    inputs = make_inputs(0, 40, 40, dtype="float32", heads=(2, 2), head_dim=8)
    dense = random_dense(1, (1, 1, 40, 40))
    check(inputs, dense, sinks=np.array([-np.inf, 0.5], np.float32))


def test_gradient_of_lse_and_finite_differences() -> None:
    inputs = make_inputs(0, 9, 11, dtype="float64", heads=(4, 2), head_dim=4)
    dense = random_dense(1, (2, 4, 9, 11))
    rng = np.random.default_rng(1)
    dlse = np.where(dense.any(-1), rng.standard_normal((2, 4, 9)), 0)
    results = check(inputs, dense, dlse=dlse)

    def loss(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> float:
        out, lse = fa2cupy.attention(q, k, v, mask=dense, return_lse=True)
        return float((out * inputs[3]).sum() + (np.where(np.isneginf(lse), 0, lse) * dlse).sum())

    for n, name in enumerate(("dq", "dk", "dv")):
        for _ in range(10):
            place = int(rng.integers(inputs[n].size))
            losses = []
            for step in (1e-5, -1e-5):
                moved = [x.copy() for x in inputs[:3]]
                moved[n].flat[place] += step
                losses.append(loss(*moved))
            assert results[name].flat[place] == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("kind", ["array", "BlockMask"])
def test_blocks_that_nobody_sees_are_skipped(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(cpu, "_mask", lambda S, *rest: seen.append(S.shape))
    blocks = np.zeros((20, 20), bool)
    blocks[::4, 3] = blocks[7, :5] = True
    mask = BlockMask.from_blocks(blocks, 128)
    inputs = make_inputs(0, 2560, 2560, dtype="float32", batch=1, heads=(1, 1), head_dim=8)
    run(inputs, mask=mask if kind == "BlockMask" else mask.to_dense())
    assert len(seen) == 2 * 8  # tiles of 256 x 256, forward and backward


def test_small_tiles_and_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that begin anywhere in a block of the mask, and slabs of several heads."""
    for rows, columns, scores in ((8, 4, 64), (96, 200, 1 << 20), (130, 64, 1)):
        monkeypatch.setattr(cpu, "BLOCK_M", rows)
        monkeypatch.setattr(cpu, "BLOCK_N", columns)
        monkeypatch.setattr(cpu, "_TILE_SCORES", scores)
        inputs = make_inputs(0, 140, 150, dtype="float32", heads=(4, 2), head_dim=8)
        for masks in ((1, 1), (2, 4)):
            dense = random_dense(3, (*masks, 140, 150))
            check(inputs, dense, BlockMask.from_dense(dense))
            check(inputs, dense, causal=True)


@pytest.mark.parametrize(
    ("batch", "seqlen_q", "seqlen_k", "heads"),
    [(0, 3, 4, (4, 2)), (2, 0, 4, (4, 2)), (2, 3, 0, (4, 2)), (2, 3, 4, (0, 2)), (2, 3, 4, (0, 0))],
)
def test_nothing_to_do(batch: int, seqlen_q: int, seqlen_k: int, heads: tuple[int, int]) -> None:
    inputs = make_inputs(0, seqlen_q, seqlen_k, dtype="float32", batch=batch, heads=heads, head_dim=8)
    for mask in (np.ones((1, 1, seqlen_q, seqlen_k), bool), BlockMask.from_dense(np.ones((seqlen_q, seqlen_k), bool))):
        results = run(inputs, mask=mask)
        assert results["lse"].shape == (batch, heads[0], seqlen_q)
        if not seqlen_k:
            assert np.isneginf(results["lse"]).all() and not results["out"].any()


def test_everything_hidden() -> None:
    inputs = make_inputs(0, 130, 140, dtype="float16", heads=(4, 2), head_dim=8)
    for mask in (np.zeros((1, 1), bool), BlockMask.from_dense(np.zeros((130, 140), bool))):
        results = run(inputs, np.ones((2, 4, 130), np.float32), mask=mask)
        assert np.isneginf(results["lse"]).all()
        assert not any(results[name].any() for name in ("out", "dq", "dk", "dv"))


# ----------------------------------------------------------------------------------------------------------------------
# Sequences


def packed(inputs: Any) -> Any:
    return [x.reshape(-1, *x.shape[2:]) for x in inputs]


@pytest.mark.parametrize("kind", ["array", "BlockMask"])
def test_packed_rows(kind: str) -> None:
    """One mask over all rows, batch 1: each sequence sees its part of it."""
    inputs = make_inputs(1, 90, 90, dtype="float32", batch=3, heads=(4, 2), head_dim=8)
    dense = random_dense(2, (1, 4, 270, 270))
    starts = np.array([0, 90, 180, 270], np.int32)
    mask = BlockMask.from_dense(dense) if kind == "BlockMask" else dense
    how = {} if kind == "BlockMask" else {"causal": True}
    results = run(packed(inputs), mask=mask, cu_seqlens_q=starts, cu_seqlens_k=starts, **how)
    own = np.concatenate([dense[:, :, n : n + 90, n : n + 90] for n in (0, 90, 180)])
    expected = run(inputs, mask=own, **how)
    for name in ("out", "dq", "dk", "dv"):
        np.testing.assert_array_equal(results[name].reshape(expected[name].shape), expected[name])
    np.testing.assert_array_equal(results["lse"].reshape(4, 3, 90).swapaxes(0, 1), expected["lse"])
    wrong = mask if kind == "BlockMask" else dense[..., :90]
    with pytest.raises(InvalidArgument, match=r"\(1, 4, 270, 90\)"):
        run([inputs[0].reshape(-1, 4, 8), *inputs[1:3], inputs[3].reshape(-1, 4, 8)], mask=wrong if kind == "BlockMask"
            else dense, cu_seqlens_q=starts)  # fmt: skip


def test_used_rows_padding_and_segments() -> None:
    inputs = make_inputs(1, 60, 60, dtype="float32", batch=3, heads=(4, 2), head_dim=8)
    dense = random_dense(2, (3, 1, 60, 60)) | (np.random.default_rng(1).random((3, 1, 60, 60)) < 0.3)
    used_q, used_k, pad = (np.array(x, np.int32) for x in ((60, 20, 0), (50, 60, 7), (3, 0, 2)))
    results = run(inputs, mask=dense, seqused_q=used_q, seqused_k=used_k, leftpad_k=pad)
    query, key = np.arange(60)[:, None], np.arange(60)
    seen = (query < used_q[:, None, None]) & (key < used_k[:, None, None]) & (key >= pad[:, None, None])
    expected = run(inputs, mask=dense & seen[:, None])
    for name in expected:
        np.testing.assert_allclose(results[name], expected[name], rtol=1e-5, atol=1e-5)
    ids = np.repeat([[0, 0, 1, 2, 2, -1]], 3, 0).repeat(10, 1).astype(np.int32)
    for mask in (dense, BlockMask.from_dense(dense)):
        results = run(inputs, mask=mask, segment_ids=ids)
        same_id = (ids[:, :, None] == ids[:, None]) & (ids >= 0)[:, None]
        for name, value in run(inputs, mask=dense & same_id[:, None]).items():
            np.testing.assert_allclose(results[name], value, rtol=1e-5, atol=1e-5)


def test_one_side_packed() -> None:
    inputs = make_inputs(1, 40, 50, dtype="float32", batch=2, heads=(4, 2), head_dim=8)
    q, k, v, dout = inputs
    starts_q, starts_k = np.array([0, 40, 80], np.int32), np.array([0, 50, 100], np.int32)
    dense = random_dense(1, (1, 4, 80, 50))
    results = run([*packed([q]), k, v, *packed([dout])], mask=dense, cu_seqlens_q=starts_q)
    expected = run(inputs, mask=np.concatenate([dense[:, :, :40], dense[:, :, 40:]]))
    np.testing.assert_array_equal(results["dk"], expected["dk"])
    dense = random_dense(1, (2, 1, 40, 100))
    results = run([q, *packed([k, v]), dout], mask=dense, cu_seqlens_k=starts_k)
    expected = run(inputs, mask=np.concatenate([dense[:1, :, :, :50], dense[1:, :, :, 50:]]))
    np.testing.assert_array_equal(results["out"], expected["out"])
    np.testing.assert_array_equal(results["dk"].reshape(k.shape), expected["dk"])


# ----------------------------------------------------------------------------------------------------------------------
# As a keyword


def test_a_pullback_takes_it_along() -> None:
    q, k, v, dout = make_inputs(0, 130, 140, dtype="float32", heads=(4, 2), head_dim=8)
    dense = random_dense(0, (1, 1, 130, 140))
    for mask in (dense, BlockMask.from_dense(dense)):
        out, pullback = fa2cupy.attention_vjp(q, k, v, mask=mask)
        expected = run((q, k, v, dout), mask=dense)
        np.testing.assert_array_equal(out, expected["out"])
        for name, value in zip(("dq", "dk", "dv"), pullback(dout), strict=True):
            np.testing.assert_array_equal(value, expected[name])
        assert fa2cupy.backward_workspace_bytes(q, k, v, mask=mask) == 0


def test_none_is_no_mask() -> None:
    inputs = make_inputs(0, 30, 40, dtype="float32", heads=(4, 2), head_dim=8)
    same(run(inputs, mask=None), run(inputs))


def test_the_arrays_of_a_block_mask_are_known() -> None:
    from fa2cupy.block_mask.lists import NAMES

    assert [*MASK_ARRAYS] == [f"mask_{name}" for name in NAMES]


SMALL = make_inputs(0, 5, 7, dtype="float32", batch=2, heads=(4, 2), head_dim=8)
ONES = np.ones((5, 7), bool)


@pytest.mark.parametrize(
    ("keywords", "kind", "message"),
    [
        ({"mask": ONES.astype(np.float32)}, InvalidType, "mask has dtype float32: bool is needed"),
        (
            {"mask": ONES[:, :6]},
            InvalidArgument,
            r"mask has shape \(5, 6\): a shape that broadcasts to \(batch, .*\) is needed, here \(2, 4, 5, 7\)",
        ),
        ({"mask": np.ones((1, 1, 1, 5, 7), bool)}, InvalidArgument, "that broadcasts to"),
        ({"mask": np.ones((2, 2, 5, 7), bool)}, InvalidArgument, "that broadcasts to"),
        ({"mask": True}, InvalidType, "mask is a bool: an array of CuPy"),
        ({"mask": "causal"}, InvalidType, "mask is a str: an array of CuPy"),
        (
            {"mask": BlockMask.from_dense(np.ones((5, 8), bool))},
            InvalidArgument,
            r"mask is a BlockMask of shape \(1, 1, 5, 8\): \(2, 4, 5, 7\) is needed, of which batch",
        ),
        ({"mask": BlockMask.from_dense(np.ones((1, 2, 5, 7), bool))}, InvalidArgument, "is a BlockMask of shape"),
        (
            {"mask": BlockMask.from_dense(ONES), "causal": True},
            InvalidArgument,
            "causal=True is given beside a BlockMask, which has its own: give it to the BlockMask",
        ),
        (
            {"mask": BlockMask.from_dense(ONES), "window_size": (3, 0)},
            InvalidArgument,
            r"window_size=\(3, 0\) is given",
        ),
        ({"alibi_slopes": BlockMask.from_dense(ONES)}, InvalidType, "alibi_slopes is a BlockMask: mask= takes one"),
        ({"attn_mask": ONES}, TypeError, r"did you mean 'mask' or 'bias'\? \(mask is for booleans"),
        ({"block_mask": BlockMask.from_dense(ONES)}, TypeError, r"did you mean 'mask'\?"),
    ],
)
def test_errors(keywords: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        fa2cupy.attention(*SMALL[:3], **keywords)


def test_neutral_windows_beside_a_block_mask() -> None:
    fa2cupy.attention(*SMALL[:3], mask=BlockMask.from_dense(ONES), causal=False, window_size=(-1, -1))


def test_of_another_home(gpu: FakeGpu) -> None:
    q, k, v = (cupy_array(x.shape, np.float16) for x in SMALL[:3])
    for function in (fa2cupy.attention, fa2cupy.attention_vjp, fa2cupy.backward_workspace_bytes):
        with pytest.raises(InvalidArgument, match=r"mask is on the CPU \(NumPy\) but q is on cuda:0 \(CuPy\): make"):
            function(q, k, v, mask=BlockMask.from_dense(ONES))
    assert not gpu.launches and not gpu.allocations


def test_nan_where_nobody_looks() -> None:
    """Of keys in tiles that no list has nothing is read."""
    q, k, v, dout = make_inputs(0, 300, 640, dtype="float32", heads=(4, 2), head_dim=8)
    mask = BlockMask.from_blocks(np.array([[1, 1, 0, 0, 1]] * 2) > 0, (150, 128))
    clean = run((q, k, v, dout), mask=mask)
    k, v = k.copy(), v.copy()
    k[:, 256:512], v[:, 256:512] = np.nan, np.inf
    got = run((q, k, v, dout), mask=mask)
    same(got, clean)
    assert not got["dk"][:, 256:512].any()


def test_on_a_gpu(gpu: FakeGpu, copies: None) -> None:
    """The arrays of a BlockMask go to the kernels, forward and backward, beside those of other keywords."""
    q, k, v, dout = make_inputs(0, 150, 200, dtype="float16", heads=(4, 2), head_dim=8)
    dense = np.random.default_rng(0).random((2, 1, 150, 200)) < 0.4
    sinks = np.linspace(-1, 1, 4, dtype=np.float32)
    mask = BlockMask.from_dense(dense)
    expected = fa2cupy.attention(q, k, v, mask=mask, sinks=sinks, return_lse=True)
    gradients = fa2cupy.attention_backward(dout, q, k, v, *expected, mask=mask, sinks=sinks)
    there = [to_cupy(x) for x in (dout, q, k, v, *expected)]
    own, held = mask.to("cuda"), to_cupy(sinks)
    for _ in range(2):  # planned, and repeated
        out, lse = fa2cupy.attention(*there[1:4], mask=own, sinks=held, return_lse=True)
        assert (host_view(out) == expected[0]).all() and (host_view(lse) == expected[1]).all()
        found = fa2cupy.attention_backward(*there, mask=own, sinks=held)
        for mine, theirs in zip(found, gradients, strict=True):
            assert (host_view(mine) == theirs).all()
    assert len(gpu.plans) == 2 and len(gpu.launches) == 4
    lengths = to_cupy(np.array([150, 100], np.int32))
    with pytest.raises(InvalidArgument, match="mask= with lengths is not supported on a GPU yet"):
        fa2cupy.attention(*there[1:4], mask=own, seqused_k=lengths)


@pytest.mark.parametrize(
    ("shape", "keywords"),
    [
        ((150, 200), {}),
        ((1, 4, 150, 1), {"causal": True}),
        ((2, 1, 1, 200), {"window_size": (30, 9)}),
        ((2, 4, 150, 200), {"causal": True, "window_size": (40, -1)}),
    ],
    ids=str,
)
def test_arrays_on_a_gpu(shape: tuple[int, ...], keywords: dict[str, Any], gpu: FakeGpu) -> None:
    """A bool array of any strides goes to the kernels, with what causal and windows hide."""
    q, k, v, dout = make_inputs(0, 150, 200, dtype="float16", heads=(4, 2), head_dim=8)
    mask = np.random.default_rng(0).random(shape) < 0.6
    expected = fa2cupy.attention(q, k, v, mask=mask, return_lse=True, **keywords)
    gradients = fa2cupy.attention_backward(dout, q, k, v, *expected, mask=mask, **keywords)
    there = [to_cupy(x) for x in (dout, q, k, v, *expected)]
    own = to_cupy(mask, order=tuple(reversed(range(mask.ndim))))
    out, lse = fa2cupy.attention(*there[1:4], mask=own, return_lse=True, **keywords)
    np.testing.assert_allclose(host_view(out).astype(float), expected[0].astype(float), atol=2e-3)
    np.testing.assert_allclose(host_view(lse), expected[1], rtol=1e-5)
    found = fa2cupy.attention_backward(*there, mask=own, **keywords)
    for mine, theirs in zip(found, gradients, strict=True):
        np.testing.assert_allclose(host_view(mine).astype(float), theirs.astype(float), atol=2e-3)
    problem = gpu.plans[0].problem
    assert problem.mask is not None and not problem.causal and problem.window is None
    assert fa2cupy.forward_workspace_bytes(*there[1:4], mask=own, **keywords) == 0  # the fake plan's
