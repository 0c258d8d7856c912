"""float32 (in its own accuracy, and by tf32) and float64: how right they are beside torch's, with every feature,
through every door; what becomes of numbers that are none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cupy
import numpy as np
import pytest
import torch

import fa2cupy
from fa2cupy.torch import efficient
from tests.gpu.cases import Case
from tests.gpu.ledger import LEDGER
from tests.gpu.runner import inputs_of
from tests.gpu.wide import ARITHMETICS, both, check, check_lengths, dtype_of, errors
from tests.lengths import draw
from tests.reference import expect, make_inputs

# (head_dim, seqlen, causal, what the inputs are): 16 of them.
SHAPES = (
    *((64, s, causal, "normal") for s in (1024, 2048) for causal in (False, True)),
    *((128, s, causal, "normal") for s in (1024, 2048) for causal in (False, True)),
    (64, 8192, False, "normal"),
    (128, 8192, True, "normal"),
    *((head_dim, 2048, causal, "mean 1") for head_dim in (64, 128) for causal in (False, True)),
    (64, 2048, False, "outliers"),
    (128, 2048, True, "outliers"),
)
WIDTHS = (40, 59, 96, 128, 192, 256)


def accuracy_case(shape: tuple[int, int, bool, str], dtype: str, precision: str | None) -> Case:
    head_dim, seqlen, causal, kind = shape
    return Case(
        seqlen, seqlen, head_dim, dtype, causal, 1 if seqlen > 4096 else 2, (2, 2), given=False, seed=9,
        mean=float(kind == "mean 1"), outliers=kind == "outliers", precision=precision,
    )  # fmt: skip


NEEDS = [
    *(accuracy_case(shape, *each) for shape in SHAPES for each in ARITHMETICS.values()),
    *(
        Case(113, 203, head_dim, dtype, True, 2, (4, 2), given=False, precision=precision)
        for head_dim in (64, *WIDTHS)
        for dtype, precision in ARITHMETICS.values()
    ),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_no_peer_is_closer(
    arithmetic: str, shape: tuple[int, int, bool, str], device: torch.device
) -> None:  # fmt: skip
    """float32 beside memory-efficient attention and the formula; tf32 beside the formula in tf32; float64 by itself:
    its reference, in float64 too, is a few 1e-16 off, and with inputs of mean 1 more than any bar."""
    ours, theirs = errors(arithmetic, accuracy_case(shape, *ARITHMETICS[arithmetic]), device)
    label = f"{arithmetic} d{shape[0]} s{shape[1]} {'causal' if shape[2] else 'full'} {shape[3]}"
    rounded = {who: {n: float(f"{e:.3e}") for n, e in found.items()} for who, found in {"ours": ours, **theirs}.items()}
    LEDGER.notes.setdefault("rms_errors", {})[label] = rounded
    for name, error in ours.items():
        if arithmetic == "float64":
            assert error <= (4e-15 if shape[3] != "mean 1" else 1e-13), f"{name}: {rounded}"
            continue
        best = min(found[name] for found in theirs.values())
        assert error <= (1.05 if arithmetic == "float32" else 1.0) * best, f"{name}: {error:.3e}: {rounded}"


@pytest.mark.parametrize("head_dim", [8, *WIDTHS])
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_head_dims(arithmetic: str, head_dim: int, device: torch.device) -> None:
    for number, (lengths, causal) in enumerate((((113, 203), True), ((203, 113), False), ((1, 513), False))):
        check(
            arithmetic,
            *lengths,
            device,
            causal=causal,
            head_dim=head_dim,
            seed=number,
            heads=((4, 2), (6, 1))[number % 2],
        )


FEATURES: dict[str, dict[str, Any]] = {
    "unequal widths": {"head_dim": 128, "head_dim_v": 64},
    "narrow v": {"head_dim": 40, "head_dim_v": 24, "layout": "bhsd"},
    "window": {"window": (60, 7)},
    "deterministic": {"causal": True, "deterministic": True, "heads": (8, 1)},
    "scale below 0": {"scale": -0.2},
    "softcap": {"scores": ("softcap",), "causal": True},
    "alibi": {"scores": ("alibi of batch",)},
    "sinks": {"scores": ("sinks",), "causal": True, "dlse": True},
    "dropout": {"scores": ("dropout_p",)},
    "all": {"scores": ("softcap", "alibi_slopes", "sinks", "dropout_p"), "window": (90, -1), "dlse": True},
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_features(arithmetic: str, feature: str, device: torch.device) -> None:
    for seed in (1, 2):
        check(arithmetic, 170, 260, device, seed=seed, **FEATURES[feature])
    check(arithmetic, 260, 170, device, seed=3, **FEATURES[feature])


@pytest.mark.parametrize("form", ["packed", "dense", "segments"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lengths(dtype: str, form: str, device: torch.device) -> None:
    used = ("seqused_k", "leftpad_k") if form == "dense" else ()
    for causal, window in ((True, None), (False, (50, 10))):
        case = draw(4, form, used=used, dtype=dtype, head_dim=64)
        check_lengths(dtype, case, device, causal=causal, window=window)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_the_same_bits_each_time(arithmetic: str, device: torch.device) -> None:
    case = Case(700, 900, 64, dtype_of(arithmetic), True, 3, (8, 2))
    tensors = inputs_of(case, device)
    for deterministic in (False, True):
        first = both(tensors, arithmetic, deterministic, causal=True)
        for _ in range(20):
            again = both(tensors, arithmetic, deterministic, causal=True)
            for name, x in first.items():
                assert torch.equal(x, again[name]) or (name == "dq" and not deterministic), name


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_numbers_that_are_none(arithmetic: str, device: torch.device) -> None:
    """docs/numerics.md: NaN spreads as far as the formula lets it, one of bits that GPUs make included; an infinite
    value makes its column infinite, of float32 NaN; what is too small for float32's normal numbers is 0."""
    dtype = getattr(torch, dtype_of(arithmetic))

    def out_of(name: str, value: float | torch.Tensor) -> torch.Tensor:
        tensors = inputs_of(Case(40, 70, 64, dtype_of(arithmetic), False, 1, (1, 1)), device)
        tensors[name][0, 5, 0, 3] = value
        return fa2cupy.attention(
            *(tensors[x] for x in "qkv"), precision=ARITHMETICS[arithmetic][1]
        )[0, :, 0]  # fmt: skip

    plain = out_of("q", 0.25)
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    ones = torch.full((1,), 2**31 - 1 if dtype == torch.float32 else 2**63 - 1, dtype=bits, device=device).view(dtype)
    for nan in (torch.nan, ones[0]):
        of_query = out_of("q", nan)
        assert of_query[5].isnan().all() and torch.equal(of_query[:5], plain[:5])
        of_value = out_of("v", nan)
        assert of_value[:, 3].isnan().all() and not of_value[:, :3].isnan().any() and not of_value[:, 4:].isnan().any()
        assert out_of("k", nan).isnan().all()
    of_infinity = out_of("v", torch.inf)[:, 3]
    assert (of_infinity.isnan() if arithmetic == "float32" else of_infinity == torch.inf).all()
    tiny = 1e-310 if dtype == torch.float64 else 1e-40
    assert float((out_of("v", tiny) - out_of("v", 0.0)).abs().max()) <= 1e-38


# ----------------------------------------------------------------------------------------------------------------------
# Doors


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cupy_arrays_as_they_come(dtype: str) -> None:
    """Of `cupy.random`, float64 by default; results are CuPy arrays of their dtype."""
    inputs = make_inputs(5, 100, 130, dtype=dtype, batch=1, heads=(4, 2), head_dim=64)
    q, k, v, dout = (cupy.asarray(x) for x in inputs)
    out, pullback = fa2cupy.attention_vjp(q, k, v, causal=True)
    gradients = pullback(dout)
    assert isinstance(out, cupy.ndarray) and {x.dtype for x in (out, *gradients)} == {np.dtype(dtype)}
    found = dict(zip(("out", "dq", "dk", "dv"), map(cupy.asnumpy, (out, *gradients)), strict=True))
    expect(*inputs, causal=True, own_accuracy=True, out=found["out"]).check(**found)
    drawn = cupy.random.standard_normal((1, 64, 2, 32))
    assert fa2cupy.attention(drawn, drawn, drawn).dtype == np.float64


def test_no_cast_behind_anybodys_back(device: torch.device) -> None:
    """What torch allows of tf32 changes nothing; autocast casts, as everywhere."""
    case = Case(200, 200, 64, "float32", True)
    q, k, v, _ = (x.requires_grad_() for x in inputs_of(case, device).values())
    before = torch.get_float32_matmul_precision()
    exact = fa2cupy.attention(q, k, v, causal=True)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(exact, fa2cupy.attention(q, k, v, causal=True))
    finally:
        torch.set_float32_matmul_precision(before)
    tf32 = fa2cupy.attention(q, k, v, causal=True, precision="tf32")
    assert 1e-5 < float((tf32 - exact).norm() / exact.norm()) < 2e-3
    with torch.autocast("cuda", torch.bfloat16):
        cast = fa2cupy.attention(q, k, v, causal=True)
    assert cast.dtype == torch.bfloat16
    (dq,) = torch.autograd.grad(cast.float().sum(), q)
    assert dq.dtype == torch.float32


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(300, 300), (170, 260), (260, 170)])
def test_sdpa_of_float32(
    causal: bool, lengths: tuple[int, int], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken over where it was measured, which is said here; torch's own otherwise."""
    case = Case(*lengths, 64, "float32", False, 2, (4, 4), layout="bhsd")
    leaves = [x.transpose(1, 2).contiguous().requires_grad_() for x in list(inputs_of(case, device).values())[:3]]

    def results() -> list[torch.Tensor]:
        out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    theirs = results()
    capability = torch.cuda.get_device_capability(device)
    for faster in (frozenset[tuple[int, int]](), frozenset({capability})):
        monkeypatch.setattr(efficient, "FASTER_ON", faster)
        fa2cupy.report(reset=True)
        with fa2cupy.torch.sdpa():
            ours = results()
        taken = sum(row.calls for row in fa2cupy.report() if row.kernel == "fa2cupy")
        assert taken == 2 * len(faster)
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_jax(dtype: str) -> None:
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    inputs = make_inputs(6, 90, 120, dtype=dtype, batch=1, heads=(4, 2), head_dim=64)
    scope = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with scope(dtype == "float64"):
        arrays = [jnp.asarray(x) for x in inputs]

        def loss(q: Any, k: Any, v: Any, dout: Any) -> Any:
            out = fa2cupy.attention(q, k, v, causal=True)
            return (out * dout).sum(), out

        gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays)
        found = dict(zip(("out", "dq", "dk", "dv"), map(np.asarray, (out, *gradients)), strict=True))
    assert {x.dtype for x in found.values()} == {np.dtype(dtype)}
    expect(*inputs, causal=True, own_accuracy=True, out=found["out"]).check(**found)


def test_merged_pieces_are_the_whole(device: torch.device) -> None:
    for dtype in ("float32", "float64"):
        case = Case(100, 300, 64, dtype, False)
        q, k, v, _ = inputs_of(case, device).values()
        whole = fa2cupy.attention(q, k, v, return_lse=True)
        parts = [fa2cupy.attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in ((0, 70), (70, 300))]
        merged = fa2cupy.merge_attention(*map(list, zip(*parts, strict=True)))
        for x, y in zip(merged, whole, strict=True):
            assert x.dtype == y.dtype
            torch.testing.assert_close(x, y, rtol=0, atol=2e-6 if dtype == "float32" else 1e-14)


def test_wide_heads_that_fit(device: torch.device) -> None:
    """Of what this GPU has no room for nothing is launched, and the error says so."""
    case = replace(Case(70, 90, 256, "float64", False), batch=1)
    tensors = inputs_of(case, device)
    try:
        both(tensors, "float64")
    except fa2cupy.errors.InvalidArgument as error:
        assert "needs more shared memory than the" in str(error) and torch.cuda.get_device_capability(device) != (9, 0)
