"""float32, tf32 and float64 on torch tensors: run, and judged by NumPy or beside torch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import fa2cupy
from tests.gpu import oracle
from tests.gpu.cases import Case
from tests.gpu.runner import inputs_of
from tests.lengths import Case as LengthsCase
from tests.lengths import expect_sequences
from tests.reference import Expected, Inputs, expect, make_inputs
from tests.scores import draw_features, features_of

__all__ = ["ARITHMETICS", "check", "check_lengths", "dtype_of", "errors", "peers"]

Tensor = torch.Tensor

# name -> (dtype, precision) of a call
ARITHMETICS: dict[str, tuple[str, str | None]] = {
    "float32": ("float32", None),
    "tf32": ("float32", "tf32"),
    "float64": ("float64", None),
}
_NAMES = ("dq", "dk", "dv", "dsinks")


def dtype_of(arithmetic: str) -> str:
    return ARITHMETICS[arithmetic][0]


def both(
    tensors: dict[str, Tensor], arithmetic: str, deterministic: bool = False, dlse: Tensor | None = None,
    **options: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """out, lse and all gradients of q, k, v, dout by the public functions."""
    q, k, v, dout = (tensors[name] for name in ("q", "k", "v", "dout"))
    options["precision"] = ARITHMETICS[arithmetic][1]
    out, lse = fa2cupy.attention(q, k, v, return_lse=True, **options)
    more = {"grad_of": ("sinks",)} if "sinks" in options else {}
    found = fa2cupy.attention_backward(
        dout, q, k, v, out, lse, dlse=dlse, deterministic=deterministic, **options, **more
    )  # fmt: skip
    results = {"out": out, "lse": lse, **dict(zip(_NAMES, found, strict=False))}
    for name, x in results.items():
        wanted = torch.float64 if name == "lse" and q.dtype == torch.float64 else q.dtype
        assert name == "dsinks" or x.dtype == wanted, f"{name} has dtype {x.dtype}"
    return results


def judge(expected: Expected, results: dict[str, Tensor]) -> None:
    """AssertionError unless they are as they should be; lse of float64 to its own accuracy."""
    found = {name: x.cpu().numpy() for name, x in results.items()}
    expected.check(**found)
    if found["lse"].dtype == np.float64:
        finite = np.isfinite(expected.lse)
        error = abs(found["lse"][finite] - expected.lse[finite])
        assert (error <= 1e-12 * (1 + abs(expected.lse[finite]))).all(), f"lse: error {error.max():.1e}"


def check(
    arithmetic: str, seqlen_q: int, seqlen_k: int, device: torch.device, *, seed: int = 0, scores: tuple[str, ...] = (),
    causal: bool = False, window: tuple[int, int] | None = None, scale: float | None = None, layout: str = "bshd",
    deterministic: bool = False, dlse: bool = False, batch: int = 2, heads: tuple[int, int] = (4, 2),
    head_dim: int = 64, head_dim_v: int | None = None,
) -> None:  # fmt: skip
    """A case against the formula, of float64 in long doubles. scores: some of tests/scores.py's NAMES."""
    dtype = dtype_of(arithmetic)
    inputs = make_inputs(
        seed, seqlen_q, seqlen_k, dtype=dtype, batch=batch, heads=heads, head_dim=head_dim, head_dim_v=head_dim_v
    )
    keywords = draw_features(scores, seed, batch, heads[0], dtype)
    features = features_of(keywords, batch, heads[0], seqlen_q, seqlen_k)

    def turned(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous() if layout == "bhsd" and x.dim() == 4 else x

    tensors = {name: turned(torch.from_numpy(x).to(device)) for name, x in inputs._asdict().items()}
    options: dict[str, Any] = {
        name: torch.from_numpy(x).to(device) if isinstance(x, np.ndarray) else x for name, x in keywords.items()
    }
    options |= {"causal": causal, "softmax_scale": scale, "layout": layout}
    options |= {} if window is None else {"window_size": window}
    of_lse = None
    if dlse:
        kind = np.float64 if dtype == "float64" else np.float32
        of_lse = np.random.default_rng(seed).standard_normal((batch, heads[0], seqlen_q)).astype(kind)
    given = None if of_lse is None else torch.from_numpy(of_lse).to(device)
    results = both(tensors, arithmetic, deterministic, given, **options)
    if layout == "bhsd":
        results = {name: x.transpose(1, 2) if x.dim() == 4 else x for name, x in results.items()}
    expected = expect(
        *inputs, causal=causal, scale=scale, window=window, dlse=of_lse, features=features,
        out=results["out"].cpu().numpy(), dtype="tf32" if arithmetic == "tf32" else dtype, own_accuracy=True,
    )  # fmt: skip
    judge(expected, results)


def check_lengths(arithmetic: str, case: LengthsCase, device: torch.device, **options: Any) -> None:
    """Each sequence by itself; of tf32 nothing."""
    inputs: Inputs = case.inputs
    tensors = {name: torch.from_numpy(x).to(device) for name, x in inputs._asdict().items()}

    def on_device(x: Any) -> Any:
        return tuple(map(on_device, x)) if isinstance(x, tuple) else torch.from_numpy(x).to(device)

    lengths = {name: on_device(x) for name, x in case.lengths.items()}
    renamed = {"window": "window_size"}
    results = both(
        tensors, arithmetic, **lengths, **{renamed.get(name, name): value for name, value in options.items()}
    )
    out = results["out"].cpu().numpy()
    judge(expect_sequences(inputs, case.lengths, out=out, **options), results)


# ----------------------------------------------------------------------------------------------------------------------
# Beside torch


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _unfused(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(
            torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -torch.inf
        )
    return scores.softmax(-1) @ v


def _efficient(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=causal)


def _gradients(forward: Callable[..., Tensor], tensors: dict[str, Tensor], causal: bool) -> dict[str, Tensor]:
    leaves = [tensors[name].transpose(1, 2).detach().requires_grad_() for name in ("q", "k", "v")]
    out = forward(*leaves, causal)
    found = torch.autograd.grad(out, leaves, tensors["dout"].transpose(1, 2))
    results = dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *found), strict=True))
    return {name: x.transpose(1, 2) for name, x in results.items()}


def peers(arithmetic: str, tensors: dict[str, Tensor], causal: bool) -> dict[str, dict[str, Tensor]]:
    """Results of who has this accuracy; of float64 of nobody, who would be the reference."""
    if arithmetic == "float64":
        return {}
    with matmul_precision("high" if arithmetic == "tf32" else "highest"):
        found = {"unfused": _gradients(_unfused, tensors, causal)}
        if arithmetic == "float32" and tensors["q"].is_cuda:
            found["eff"] = _gradients(_efficient, tensors, causal)
    return found


def errors(
    arithmetic: str, case: Case, device: torch.device
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:  # fmt: skip
    """rms errors of ours, and of each peer, relative to the reference's rms."""
    tensors = inputs_of(case, device)
    _, bounds = oracle.attention(
        *(tensors[name] for name in ("q", "k", "v", "dout")), causal=case.causal, scale=case.softmax_scale,
        want_model=False,
    )  # fmt: skip
    ours = both(tensors, arithmetic, causal=case.causal)
    del ours["lse"]
    theirs = peers(arithmetic, tensors, case.causal)
    return oracle.rms_errors(ours, bounds), {name: oracle.rms_errors(x, bounds) for name, x in theirs.items()}
