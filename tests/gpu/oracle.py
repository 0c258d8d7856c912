"""Reference and model of tests/reference.py, computed on the tensors' own device with torch, and the same comparison.

On a GPU thousands of cases take seconds this way. tests/frameworks/test_gpu_instruments.py checks that both agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from tests.reference import Features

__all__ = ["Bound", "Judgement", "attention", "features_on", "judge", "rms_errors"]

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Bound:
    """What a result should be: reference and model in float64, and the floor of the errors (a scalar tensor)."""

    ref: Tensor
    model: Tensor
    floor: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor | None,
    *,
    causal: bool,
    scale: float,
    window: tuple[int, int] | None = None,
    out: Tensor | None = None,
    sinks: Tensor | None = None,
    dlse: Tensor | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
    want_model: bool = True,
) -> tuple[Tensor, dict[str, Bound]]:
    """lse (batch, heads, seqlen_q) and the bounds of out, and with `dout` of dq, dk, dv, and with `sinks` (heads,) of
    dsinks. All (batch, seqlen, heads, d), dlse as lse. slopes: (heads,) or (batch, heads). keep: which P dropout keeps,
    bool (batch, heads, seqlen_q, seqlen_k).

    Rows of q and dout that see no key may hold anything, and so may keys that no query sees. `out`: what the backward
    was given, which the model takes D from; the errors of another out would be another draw.
    """
    dtype = q.dtype
    batch, seqlen_q, heads, _ = q.shape
    seqlen_k, heads_k = k.shape[1], k.shape[2]
    group = heads // max(1, heads_k)

    def split(x: Tensor, together: int) -> Tensor:
        """(batch, seqlen, heads, d) -> (batch, heads_k, heads in the group x seqlen, d), float64"""
        x = x.permute(0, 2, 1, 3).double()
        return x.reshape(batch, heads_k, together * x.shape[2], x.shape[3])

    def merge(x: Tensor, together: int, seqlen: int) -> Tensor:
        return x.reshape(batch, heads_k * together, seqlen, x.shape[3]).permute(0, 2, 1, 3)

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).double()

    def kept(x: Tensor) -> Tensor:
        return x if keep is None else torch.where(keep.reshape(x.shape), x, 0.0)

    def of_rows(x: Tensor) -> Tensor:
        """(batch, heads, seqlen_q) -> (batch, heads_k, heads in the group x seqlen_q, 1)"""
        return x.double().reshape(batch, heads_k, group * seqlen_q, 1)

    # Row i stands beside key i + seqlen_k - seqlen_q.
    beside = torch.arange(seqlen_k - seqlen_q, seqlen_k, device=q.device).repeat(group)[:, None]
    left, right = window or (-1, -1)
    right = 0 if causal else right
    distance = torch.arange(seqlen_k, device=q.device)[None, :] - beside
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if right >= 0:
        hidden |= distance > right
    if left >= 0:
        hidden |= distance < -left
    sees, seen = (~hidden).any(1)[:, None], (~hidden).any(0)[:, None]

    Q = torch.where(sees, split(q, group), 0.0)
    K, V = torch.where(seen, split(k, 1), 0.0), torch.where(seen, split(v, 1), 0.0)
    S, derivative, r = (Q @ K.mT).mul_(scale), None, 1 / (1 - dropout_p)
    if softcap is not None:
        t = torch.tanh(S / softcap)
        S, derivative = softcap * t, 1 - t * t
    if slopes is not None:
        S = S - of_rows(slopes.expand(batch, heads)[..., None].expand(batch, heads, seqlen_q)) * distance.abs()
    S = S.masked_fill_(hidden, -math.inf)
    m = S.amax(-1, keepdim=True) if seqlen_k else torch.zeros_like(Q[..., :1])
    m = torch.where(sees, m, 0.0)
    P = torch.exp(S - m)
    l = torch.where(sees, P.sum(-1, keepdim=True), 1.0)
    lse = torch.where(sees, m + torch.log(l), -math.inf)
    if sinks is not None:
        sink = of_rows(sinks[None, :, None].expand(batch, heads, seqlen_q))
        lse = torch.logaddexp(lse, sink)
        l = torch.where(sees, torch.exp(lse - m), 1.0)
    O = (kept(P) @ V) * r / l
    out_model = rounded((rounded(kept(P)) @ V) * r / l) if want_model else O
    bounds = {"out": Bound(merge(O, group, seqlen_q), merge(out_model, group, seqlen_q), _largest(V, r * 1e-5))}
    lse_out = lse.reshape(batch, heads, seqlen_q)
    if dout is None:
        return lse_out, bounds

    dO = torch.where(sees, split(dout, group), 0.0)
    dP = kept(dO @ V.mT) * r
    P = P.div_(l)
    of_lse = 0.0 if dlse is None else of_rows(dlse)
    D = (dO * O).sum(-1, keepdim=True) - of_lse
    model_D = D

    def of_scores(D: Tensor) -> Tensor:
        dS = (dP - torch.where(sees, D, 0.0)).mul_(P)
        return dS if derivative is None else dS.mul_(derivative)

    dS = of_scores(D)
    refs = scale * (dS @ K), scale * (dS.mT @ Q), r * (kept(P).mT @ dO)
    models = refs
    if want_model:
        P = torch.exp(S - torch.where(sees, lse.float().double(), 0.0))
        if out is not None:
            out_model = torch.where(sees, split(out, group), 0.0)
        model_D = (dO * out_model).sum(-1, keepdim=True) - of_lse
        dS = rounded(of_scores(model_D).div_(r)).mul_(r)
        models = rounded(scale * (dS @ K)), rounded(scale * (dS.mT @ Q)), rounded(r * (rounded(kept(P)).mT @ dO))
    if dlse is not None:
        dP = dP + torch.where(sees, of_lse, 0.0)
    largest_dP = _largest(dP.masked_fill_(hidden, 0.0), abs(scale) * 1e-5)
    floors = largest_dP * _largest(K), largest_dP * _largest(Q), _largest(dO, r * 1e-5)
    shapes = ((group, seqlen_q), (1, seqlen_k), (1, seqlen_k))
    for name, ref, model, floor, shape in zip(("dq", "dk", "dv"), refs, models, floors, shapes, strict=True):
        bounds[name] = Bound(merge(ref, *shape), merge(model, *shape), floor)
    if sinks is not None:
        share = torch.where(torch.isinf(sink), 0.0, torch.exp(sink - lse))
        terms, of_model = (torch.where(share == 0, 0.0, -share * each) for each in (D, model_D))
        ref, model = (x.reshape(batch, heads, seqlen_q).sum((0, 2)) for x in (terms, of_model))
        floor = _largest(terms.abs().reshape(batch, heads, seqlen_q).sum((0, 2)), 1e-5)
        bounds["dsinks"] = Bound(ref, model.to(sinks.dtype).double(), floor)
    return lse_out, bounds


def features_on(features: Features, device: torch.device) -> dict[str, Any]:
    """Those of tests/reference.py as keywords of `attention`."""
    found = {}
    for name, value in features._asdict().items():
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value).to(device)
            value = value.view(torch.bfloat16) if value.dtype == torch.uint16 else value
        found[name] = value
    assert found.pop("mask") is None
    return found


def _largest(x: Tensor, unit: float = 1.0) -> Tensor:
    return x.abs().amax() * unit if x.numel() else x.new_zeros(())


class Judgement(NamedTuple):
    """Errors of one output. `problems` is empty if it is as close to the reference as its format allows."""

    max_ratio: float  # max error over its limit, 2 x the model's + floor
    rms: float  # relative to the reference
    rms_ratio: float  # to the model's
    problems: list[str]


def _measures(got: Tensor, bound: Bound) -> Tensor:
    """The numbers that `judge` needs, on the device."""
    got, ref = got.double(), bound.ref
    wrong_places = (~torch.isfinite(got)).sum()
    error, model_error = got - ref, bound.model - ref
    rows = model_error.square().sum(-1)
    total = rows.sum()
    # The model's mean square is one random draw: its relative standard deviation, estimated over its rows.
    spread = torch.where(total > 0, (rows.square().sum() / 2).sqrt() / total, 0.0)
    if got.numel() == 0:
        zero = ref.new_zeros(())
        return torch.stack([zero] * 8)
    return torch.stack(
        [
            error.abs().amax(),
            model_error.abs().amax(),
            error.square().mean().sqrt(),
            (total / got.numel()).sqrt(),
            spread,
            bound.floor,
            ref.square().mean().sqrt(),
            wrong_places.double(),
        ]
    )


def _lse_measures(got: Tensor, ref: Tensor) -> Tensor:
    got = got.double()
    finite = torch.isfinite(ref)
    wrong = torch.where(finite, ~torch.isfinite(got), got != ref).sum()  # the reference has -inf or finite numbers
    excess = torch.where(finite, (got - ref).abs() / (1e-4 + 1e-6 * ref.abs()), 0.0)
    return torch.stack([excess.amax() if excess.numel() else ref.new_zeros(()), wrong.double()])


def judge(
    results: dict[str, Tensor], lse: Tensor | None, lse_ref: Tensor, bounds: dict[str, Bound], flags: dict[str, Tensor]
) -> dict[str, Judgement]:
    """Judge all results of a case with one transfer from the device, by the rules of tests/reference.py's `compare`.

    `flags`: description -> bool tensor that must be true (guard bands and the like); they are judged under "memory".
    """
    parts = [_measures(got, bounds[name]) for name, got in results.items()]
    if lse is not None:
        parts.append(_lse_measures(lse, lse_ref))
    parts += [flag.reshape(1).double() for flag in flags.values()]
    numbers = torch.cat(parts).tolist()
    judgements = {}
    for name in results:
        worst, model_worst, rms, model_rms, spread, floor, ref_rms, wrong = numbers[:8]
        del numbers[:8]
        limit = 2 * model_worst + floor
        rms_limit = math.hypot(1.05 * model_rms * (1 + 3 * spread), 0.1 * floor)
        problems = []
        if wrong:
            problems.append(f"{name}: {wrong:.0f} elements are NaN or infinite")
        if not worst <= limit:
            problems.append(f"{name}: error {worst:.3e} above {limit:.3e} (model {model_worst:.3e}, floor {floor:.3e})")
        if not rms <= rms_limit:
            problems.append(f"{name}: rms error {rms:.4e} above {rms_limit:.4e} (model {model_rms:.4e})")
        unit = max(ref_rms, floor) or 1.0
        judgements[name] = Judgement(
            worst / limit if limit else 0.0, rms / unit, rms / rms_limit if rms_limit else 0.0, problems
        )
    if lse is not None:
        excess, wrong = numbers[:2]
        del numbers[:2]
        problems = [f"lse: {wrong:.0f} elements are not finite, or -inf, where they must be"] if wrong else []
        if not excess <= 1:
            problems.append(f"lse: error {excess:.2f} times what is allowed")
        judgements["lse"] = Judgement(excess, 0.0, 0.0, problems)
    broken = [text for text, held in zip(flags, numbers, strict=True) if not held]
    judgements["memory"] = Judgement(0.0, 0.0, 0.0, broken)
    return judgements


def rms_errors(results: dict[str, Tensor], bounds: dict[str, Bound]) -> dict[str, float]:
    """Root-mean-square error of each result relative to the reference's rms."""
    return {
        name: float((got.double() - bounds[name].ref).square().mean().sqrt() / bounds[name].ref.square().mean().sqrt())
        for name, got in results.items()
    }
