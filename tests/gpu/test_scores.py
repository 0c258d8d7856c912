"""softcap, ALiBi, sinks and dropout against float64, alone and together: every head_dim, both families, masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import fa2cupy
from fa2cupy.frameworks.base import Device, TensorRef, contiguous_strides
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.kernels import plan_backward, plan_forward
from fa2cupy.kernels.plan import Plan
from fa2cupy.problem import SPECS, AttentionProblem
from tests import reference
from tests.gpu import oracle
from tests.gpu.cases import SM80_WIDTHS, WIDTHS, Case, problem_of
from tests.gpu.ledger import LEDGER
from tests.gpu.runner import inputs_of
from tests.scores import draw_features, features_of

Tensor = torch.Tensor

SETS = (
    ("softcap",), ("alibi_slopes",), ("sinks",), ("dropout_p",), ("softcap", "dropout_p"),
    ("alibi of batch", "sinks"), ("softcap", "sinks", "dropout_p"), ("softcap", "alibi of batch", "sinks", "dropout_p"),
)  # fmt: skip
# Lengths and masks: tiles that end within, more queries than keys, keys on both sides, long rows of many key blocks.
SHAPES = (
    ((300, 300), True, None), ((113, 203), False, None), ((203, 113), True, None), ((256, 700), False, (100, 40)),
    ((515, 515), False, (200, 0)), ((64, 1030), False, None),
)  # fmt: skip
BY_NUMPY = 113  # queries of the cases that NumPy judges too
ORDER = ("softcap", "alibi_slopes", "sinks", "dropout_p", "dropout_seed")  # that of the keywords


def cases_of(head_dim: int, head_dim_v: int | None, dtype: str) -> Iterator[tuple[Case, tuple[str, ...]]]:
    """Each set once; with which shape, differs from width to width."""
    turn = head_dim // 8 + (dtype == "float16")
    for place, names in enumerate(SETS):
        (seqlen_q, seqlen_k), causal, window = SHAPES[(place + turn) % len(SHAPES)]
        case = Case(
            seqlen_q, seqlen_k, head_dim, dtype, causal, 2, ((4, 4), (6, 3), (4, 1))[(place + turn // 2) % 3],
            deterministic=(place // 2 + turn) % 2 == 0, seed=place + turn, head_dim_v=head_dim_v, window=window,
            given=False,
        )  # fmt: skip
        yield case, names


def problem(case: Case, names: tuple[str, ...], backward: bool) -> AttentionProblem:
    """As a call makes it."""
    keywords = draw_features(names, case.seed, case.batch, case.heads[0], case.dtype)
    found = problem_of(case, backward)
    for name in ORDER:
        value = keywords.get(name)
        if name == "dropout_seed" and value is not None:
            value = np.zeros(2, np.int64)
        if isinstance(value, np.ndarray):
            dtype = "float32" if value.dtype == np.float32 else "int64" if value.dtype == np.int64 else case.dtype
            strides = contiguous_strides(value.shape)
            value = TensorRef(256, value.shape, strides, dtype, Device("cuda", 0), None)
        if value is not None:
            found = SPECS[name](found, value)
        if name == "sinks" and value is not None and backward:
            found = SPECS["dsinks"](found, value)
    return found


def needed_plans(info: DeviceInfo) -> Iterator[Plan]:
    """What is to be compiled beforehand."""
    families: list[tuple[Any, str | None]] = [(width, None) for width in WIDTHS]
    families += [((head_dim, None, dtype), "sm80") for head_dim, dtype in SM80_WIDTHS]
    for width, family in families:
        for case, names in cases_of(*width):
            yield plan_forward(problem(case, names, False), info, family=family)
            yield plan_backward(problem(case, names, True), info, case.deterministic, family=family)


def to_numpy(x: Tensor) -> np.ndarray:
    x = x.detach().cpu()
    return np.asarray(x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy())


def problems_of(case: Case, names: tuple[str, ...], device: torch.device) -> list[str]:
    """What is wrong with a case, one sentence each."""
    keywords = draw_features(names, case.seed, case.batch, case.heads[0], case.dtype)
    features = features_of(keywords, case.batch, case.heads[0], case.seqlen_q, case.seqlen_k)
    on_gpu = oracle.features_on(features, device)
    tensors = inputs_of(case, device)
    q, k, v, dout = (tensors[name] for name in ("q", "k", "v", "dout"))
    options: dict[str, Any] = {"causal": case.causal, "window_size": case.window, **keywords}
    options |= {
        long: on_gpu[name] for long, name in (("alibi_slopes", "slopes"), ("sinks", "sinks")) if long in keywords
    }
    grad_of = ("sinks",) if "sinks" in keywords else ()
    out, lse = fa2cupy.attention(q, k, v, return_lse=True, **options)
    options |= {"deterministic": case.deterministic, "grad_of": grad_of}
    gradients = fa2cupy.attention_backward(dout, q, k, v, out, lse, **options)
    again = fa2cupy.attention_backward(dout, q, k, v, out, lse, **options)
    results = {"out": out, **dict(zip(("dq", "dk", "dv", "dsinks"), gradients, strict=False))}
    flags = {
        f"{name} does not repeat": (results[name] == x).all()
        for name, x in zip(("dq", "dk", "dv", "dsinks"), again, strict=False)
        if name != "dq" or case.deterministic
    }
    seen = {"causal": case.causal, "window": case.window, "out": out}
    lse_ref, bounds = oracle.attention(q, k, v, dout, scale=case.softmax_scale, **seen, **on_gpu)
    judgements = oracle.judge(results, lse, lse_ref, bounds, flags)
    LEDGER.add(case.dtype, judgements)
    problems = [problem for judgement in judgements.values() for problem in judgement.problems]
    if case.seqlen_q == BY_NUMPY:
        seen["out"] = to_numpy(out)
        expected = reference.expect(*map(to_numpy, (q, k, v, dout)), **seen, features=features, dtype=case.dtype)
        try:
            expected.check(lse=to_numpy(lse), **{name: to_numpy(x) for name, x in results.items()})
        except AssertionError as error:
            problems.append(f"by NumPy, {error}")
    return [f"{case} {' '.join(names)}: {problem}" for problem in problems]


def check_all(cases: Iterator[tuple[Case, tuple[str, ...]]], device: torch.device) -> None:
    """All of them, and every failure in words."""
    problems = [problem for case, names in cases for problem in problems_of(case, names, device)]
    assert not problems, f"{len(problems)} problems:\n" + "\n".join(problems[:40])


@pytest.mark.parametrize(("head_dim", "head_dim_v", "dtype"), WIDTHS)
def test_scores(head_dim: int, head_dim_v: int | None, dtype: str, device: torch.device) -> None:
    check_all(cases_of(head_dim, head_dim_v, dtype), device)


@pytest.mark.parametrize(("head_dim", "dtype"), SM80_WIDTHS)
@pytest.mark.usefixtures("sm80_kernels")
def test_scores_of_sm80(head_dim: int, dtype: str, device: torch.device) -> None:
    check_all(cases_of(head_dim, None, dtype), device)


def test_the_mask_is_numpys_on_every_kernel(device: torch.device) -> None:
    """q = 0 and v = 1 in one place: out says which P were kept."""
    q = torch.zeros(2, 200, 3, 64, device=device, dtype=torch.float16)
    k, v = (
        torch.zeros_like(q),
        torch.eye(200, 64, device=device, dtype=torch.float16)[None, :, None].expand(2, -1, 3, -1),
    )
    out = fa2cupy.attention(q, k, v.contiguous(), dropout_p=0.5, dropout_seed=(12345, 6))
    kept = fa2cupy.dropout_mask(2, 3, 200, 200, 0.5, (12345, 6))
    assert ((out.permute(0, 2, 1, 3) > 0).cpu().numpy() == kept[..., :64]).all()


def test_a_graph_draws_anew_when_its_seed_is_rewritten(device: torch.device) -> None:
    q, k, v = (torch.randn(1, 256, 4, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    seed = torch.tensor([1, 2], device=device)
    fa2cupy.attention(q, k, v, dropout_p=0.3, dropout_seed=seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fa2cupy.attention(q, k, v, dropout_p=0.3, dropout_seed=seed)
    for numbers in ((1, 2), (1, 3), (7, 2)):
        seed.copy_(torch.tensor(numbers))
        graph.replay()
        assert torch.equal(out, fa2cupy.attention(q, k, v, dropout_p=0.3, dropout_seed=numbers)), numbers
