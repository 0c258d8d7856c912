"""Shapes and memory that broke attention kernels elsewhere."""

from __future__ import annotations

import math

import pytest
import torch

import fa2cupy
from tests.gpu import oracle
from tests.gpu.cases import DTYPES, Case
from tests.gpu.runner import check_all, inputs_of

Tensor = torch.Tensor


def _judged(
    results: dict[str, Tensor], lse: Tensor | None, inputs: dict[str, Tensor], causal: bool, scale: float
) -> None:
    """Fail unless (batch, seqlen, heads, d) results are as close to float64 as they can be."""
    dout = inputs["dout"] if "dq" in results else None
    lse_ref, bounds = oracle.attention(inputs["q"], inputs["k"], inputs["v"], dout, causal=causal, scale=scale)
    problems = [p for j in oracle.judge(results, lse, lse_ref, bounds, {}).values() for p in j.problems]
    assert not problems, "\n".join(problems)


def _both(inputs: dict[str, Tensor], causal: bool, scale: float | None = None) -> tuple[dict[str, Tensor], Tensor]:
    q, k, v, dout = (inputs[name] for name in ("q", "k", "v", "dout"))
    out, lse = fa2cupy.attention(q, k, v, causal=causal, softmax_scale=scale, return_lse=True)
    gradients = fa2cupy.attention_backward(dout, q, k, v, out, lse, causal=causal, softmax_scale=scale)
    return dict(zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True)), lse


# q x 5: large scores, so that what is masked or missing shows. flash-attention #334.
SHORT = [
    Case(s, s, d, dtype, causal, scale=5 * d**-0.5, seed=s)
    for s in (1, 2, 5, 17, 128)
    for d in (16, 32, 64)
    for dtype in DTYPES
    for causal in (False, True)
]
MANY_ROWS = [
    Case(sq, sk, d, dtype, True, batch=2, heads=heads, seed=sq)
    for sq, sk in ((1000, 3), (2048, 1), (1537, 128), (700, 65), (129, 128))
    for d in (64, 128)
    for dtype in DTYPES
    for heads in ((4, 4), (6, 2))
]
EMPTY = [
    Case(sq, sk, d, dtype, causal, batch=batch, heads=heads, given=given, layout=layout)
    for sq, sk, batch, heads in (
        (5, 0, 2, (4, 4)), (0, 5, 2, (4, 2)), (0, 0, 2, (1, 1)), (130, 0, 1, (6, 3)), (7, 9, 0, (2, 2)),
        (7, 9, 2, (0, 0)),
    )
    for d in (40, 128)
    for dtype in DTYPES
    for causal in (False, True)
    for given, layout in ((True, "bshd"), (False, "bhsd"))
]  # fmt: skip
SCALES = [
    Case(200, 333, d, dtype, causal, scale=scale, seed=5)
    for scale in (0.0, -0.125, -3.0, 1e-6, 2.5)
    for d in (64, 128)
    for dtype in DTYPES
    for causal in (False, True)
]
PLACES = [
    Case(130, 130, 64, dtype, True, order=order, pad=pad, shift=shift, layout=layout, expanded=expanded, heads=(4, 2))
    for dtype in DTYPES
    for order in range(4)
    for pad, shift in ((0, 0), (0, 1), (1, 0), (8, 8), (3, 5))
    for layout in ("bshd", "bhsd")
    for expanded in (False, True)
]
ODD_WIDTHS = [
    Case(65, 130, d, "bfloat16", True, heads=(2, 1), pad=pad, seed=d)
    for d in (1, 2, 3, 7, 9, 15, 17, 31, 33, 63, 65, 100, 127, 129, 200, 255)
    for pad in (0, 1)
]
NEEDS = [Case(64, 64, d, dtype, causal, given=False) for d in (64, 128) for dtype in DTYPES for causal in (False, True)]


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(SHORT, id="short"),
        pytest.param(MANY_ROWS, id="more_rows_than_keys"),
        pytest.param(EMPTY, id="empty"),
        pytest.param(SCALES, id="scales"),
        pytest.param(PLACES, id="strides_and_pointers"),
        pytest.param(ODD_WIDTHS, id="odd_head_dims"),
    ],
)
def test_backward_of(cases: list[Case], device: torch.device) -> None:
    check_all(cases, True, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dout_with_gaps_and_inputs_of_different_order(dtype: str, device: torch.device) -> None:
    """dout as every second row, or transposed; q and k with different contiguity."""
    case = Case(200, 200, 64, dtype, True)
    inputs = inputs_of(case, device)
    twice = torch.full((2, 400, 4, 64), math.nan, dtype=inputs["q"].dtype, device=device)
    twice[:, ::2] = inputs["dout"]
    by_head = inputs["dout"].transpose(1, 2).contiguous().transpose(1, 2)
    by_width = inputs["dout"].transpose(2, 3).contiguous().transpose(2, 3)  # copied inside: the last dim has a stride
    k = inputs["k"].transpose(1, 2).contiguous().transpose(1, 2)
    packed = torch.stack([inputs["q"], inputs["k"], inputs["v"]], dim=2)
    variants = [
        inputs | {"dout": twice[:, ::2]},
        inputs | {"dout": by_head, "k": k},
        inputs | {"dout": by_width, "v": k.clone().copy_(inputs["v"])},
        inputs | {"q": packed[:, :, 0], "k": packed[:, :, 1], "v": packed[:, :, 2]},
    ]
    for variant in variants:
        results, lse = _both(variant, True)
        _judged(results, lse, variant, True, 64**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_interleaved_in_one_buffer(dtype: str, device: torch.device) -> None:
    """dq, dk, dv into slices of one packed tensor: their ranges meet, their elements do not."""
    inputs = inputs_of(Case(150, 150, 64, dtype, True), device)
    packed = torch.full((2, 150, 3, 4, 64), math.nan, dtype=inputs["q"].dtype, device=device)
    q, k, v, dout = (inputs[name] for name in ("q", "k", "v", "dout"))
    out, lse = fa2cupy.attention(q, k, v, causal=True, return_lse=True)
    fa2cupy.attention_backward(
        dout, q, k, v, out, lse, causal=True, dq=packed[:, :, 0], dk=packed[:, :, 1], dv=packed[:, :, 2]
    )
    results = {"out": out, "dq": packed[:, :, 0], "dk": packed[:, :, 1], "dv": packed[:, :, 2]}
    _judged(results, lse, inputs, True, 64**-0.5)


def test_junk_strides_of_dimensions_of_size_one(device: torch.device) -> None:
    for d in (1, 64):
        inputs = inputs_of(Case(1, 33, d, "bfloat16", False, batch=1, heads=(1, 1)), device)
        junk = {
            name: x.as_strided(x.shape, (7, x.stride(1) if x.shape[1] > 1 else 13, 3, 1 if d > 1 else 11))
            for name, x in inputs.items()
        }
        results, lse = _both(junk, False)
        _judged(results, lse, inputs, False, d**-0.5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_k", [128, 256, 1024])
def test_one_query_with_very_negative_scores(seqlen_k: int, causal: bool, device: torch.device) -> None:
    """sq = 1, lse near -50,000 and below, sk a multiple of 128; also batch = heads = sq = 1."""
    for batch, heads in ((1, (1, 1)), (2, (4, 2))):
        inputs = inputs_of(Case(1, seqlen_k, 64, "bfloat16", causal, batch=batch, heads=heads, seed=3), device)
        # 256 x -196 = -50,176 in every score.
        inputs["q"][..., 0], inputs["k"][..., 0] = 256.0, -196.0
        q, k, v, dout = (inputs[name] for name in ("q", "k", "v", "dout"))
        out, lse = fa2cupy.attention(q, k, v, causal=causal, softmax_scale=1.0, return_lse=True)
        gradients = fa2cupy.attention_backward(dout, q, k, v, out, lse, causal=causal, softmax_scale=1.0)
        assert float(lse.max()) < -50_000
        lse_ref, bounds = oracle.attention(q, k, v, dout, causal=causal, scale=1.0)
        assert torch.allclose(lse.double(), lse_ref, rtol=1e-6, atol=1e-4)
        for name, got in zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True):
            assert bool(torch.isfinite(got).all()), name
            # float32 holds such scores to 0.004 at best, and P with them; the sum behind dq's first column cancels.
            got, ref = (x[..., 1:] for x in (got.double(), bounds[name].ref))
            error = (got - ref).abs().amax() / ref.abs().amax()
            assert bool(error <= 0.1), f"{name}: {float(error):.3e}"


@pytest.mark.parametrize("head_dim", [64, 96, 128, 160, 192, 256])
def test_equal_scores_far_from_zero(head_dim: int, device: torch.device) -> None:
    """Scores of 50,176 everywhere: a rescaling by anything but exactly 1 would weigh early keys against late ones."""
    inputs = inputs_of(Case(128, 4096, head_dim, "bfloat16", False), device)
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    q[...], k[...] = 0.0, 0.0
    q[..., 0], k[..., 0] = 256.0, 196.0
    v[:, :2048], v[:, 2048:] = 1.0, -1.0
    out, lse = fa2cupy.attention(q, k, v, softmax_scale=1.0, return_lse=True)
    assert bool((out == 0).all()), float(out.abs().amax())
    assert torch.allclose(lse.double(), torch.full_like(lse, 50176 + math.log(4096)).double(), rtol=1e-6)


def test_nan_in_rows_that_nobody_uses(device: torch.device) -> None:
    """Leading query rows without keys may hold anything, and so may dout there."""
    for dtype in DTYPES:
        inputs = inputs_of(Case(300, 170, 128, dtype, True, heads=(4, 2)), device)
        inputs["q"][:, :130] = math.nan
        inputs["dout"][:, :130] = math.inf
        results, lse = _both(inputs, True)
        assert bool((results["out"][:, :130] == 0).all()) and bool((results["dq"][:, :130] == 0).all())
        assert bool((lse[:, :, :130] == -math.inf).all())
        _judged(results, lse, inputs, True, 128**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row_alone_and_in_a_full_prefill(dtype: str, device: torch.device) -> None:
    inputs = inputs_of(Case(777, 777, 128, dtype, True, heads=(8, 2)), device)
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    full, full_lse = fa2cupy.attention(q, k, v, causal=True, return_lse=True)
    for row in (0, 63, 64, 300, 776):
        alone, lse = fa2cupy.attention(q[:, row : row + 1], k[:, : row + 1], v[:, : row + 1], return_lse=True)
        step = 2.0 ** (-8 if dtype == "bfloat16" else -11)
        error = (alone[:, 0].float() - full[:, row].float()).abs()
        assert bool((error <= 2 * step * full[:, row].float().abs() + step).all())
        assert torch.allclose(lse[..., 0], full_lse[..., row], rtol=1e-6, atol=1e-4)


def test_temporaries_freed_before_the_kernel_ran(device: torch.device) -> None:
    """Inputs, out and lse dropped at once and their memory written over, with work still queued."""
    inputs = inputs_of(Case(512, 512, 128, "bfloat16", True), device)
    expected, _ = _both(inputs, True)
    torch.cuda._sleep(100_000_000)
    results = []
    for _ in range(20):
        copies = {name: x.clone() for name, x in inputs.items()}
        made, _ = _both(copies, True)
        results.append(made)
        del copies
        for x in inputs.values():
            torch.full_like(x, math.nan)
    for made in results:
        for name in ("out", "dk", "dv"):
            assert torch.equal(made[name], expected[name]), name
        assert torch.allclose(made["dq"].float(), expected["dq"].float(), rtol=2**-6, atol=1e-3)


def test_masked_batches_and_outliers(device: torch.device) -> None:
    """One batch entry whose queries are all zero (uniform weights), one with huge values, beside usual ones."""
    inputs = inputs_of(Case(256, 300, 64, "bfloat16", True, batch=4), device)
    inputs["q"][1] = 0
    inputs["q"][2] *= 40
    inputs["v"][3] *= 100
    results, lse = _both(inputs, True)
    for b in range(4):
        one = {name: x[b : b + 1] for name, x in inputs.items()}
        _judged({name: x[b : b + 1] for name, x in results.items()}, lse[b : b + 1], one, True, 0.125)
