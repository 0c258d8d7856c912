"""Masks against float64: BlockMasks and bool arrays, every head_dim, both families, lists of heads and batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import fa2cupy
from fa2cupy import BlockMask
from fa2cupy.frameworks.base import Device, TensorRef, contiguous_strides
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.kernels import plan_backward, plan_forward
from fa2cupy.kernels.plan import Plan
from fa2cupy.problem import SPECS, AttentionProblem
from tests import reference
from tests.gpu.cases import SM80_WIDTHS, WIDTHS, Case, problem_of
from tests.gpu.runner import inputs_of
from tests.gpu.test_scores import to_numpy
from tests.host.masks import NAMES, drawn

LENGTHS = ((300, 390), (113, 203), (384, 256), (129, 515), (1000, 1030))


def cases_of(head_dim: int, head_dim_v: int | None, dtype: str) -> Iterator[tuple[Case, str, bool]]:
    """Case, mask, and whether it is an array, with causal then."""
    for number, (name, (seqlen_q, seqlen_k)) in enumerate(itertools.product(NAMES, LENGTHS)):
        if number % 3 != head_dim // 32 % 3:
            continue
        is_array = number % 2 == 0
        heads = ((4, 4), (6, 3), (4, 1))[number % 3]
        case = Case(
            seqlen_q, seqlen_k, head_dim, dtype, is_array and seqlen_q < seqlen_k, 2, heads,
            deterministic=number % 4 < 2, seed=number, head_dim_v=head_dim_v, given=False,
        )  # fmt: skip
        yield case, name, is_array


def mask_of(case: Case, name: str) -> np.ndarray:
    return drawn(name, case.seed, case.batch, case.heads[0], case.seqlen_q, case.seqlen_k)


def problem(case: Case, name: str, is_array: bool, backward: bool) -> AttentionProblem:
    """As a call makes it."""
    shape = mask_of(case, name).shape
    ref = TensorRef(256, shape, contiguous_strides(shape), "bool", Device("cuda", 0), None)
    return SPECS["mask"](problem_of(case, backward), ref if is_array else shape)


def needed_plans(info: DeviceInfo) -> Iterator[Plan]:
    """What is to be compiled beforehand."""
    families: list[tuple[Any, str | None]] = [(width, None) for width in WIDTHS]
    families += [((head_dim, None, dtype), "sm80") for head_dim, dtype in SM80_WIDTHS]
    for width, family in families:
        for case, name, is_array in cases_of(*width):
            yield plan_forward(problem(case, name, is_array, False), info, family=family)
            yield plan_backward(problem(case, name, is_array, True), info, case.deterministic, family=family)


def check(case: Case, name: str, is_array: bool, device: torch.device) -> None:
    dense = mask_of(case, name)
    tensors = inputs_of(case, device)
    q, k, v, dout = (tensors[each] for each in ("q", "k", "v", "dout"))
    array = torch.from_numpy(np.ascontiguousarray(dense)).to(device)
    mask = array if is_array else BlockMask.from_dense(array)
    options: dict[str, Any] = {"causal": case.causal, "mask": mask}
    out, lse = fa2cupy.attention(q, k, v, return_lse=True, **options)
    options["deterministic"] = case.deterministic
    gradients = fa2cupy.attention_backward(dout, q, k, v, out, lse, **options)
    again = fa2cupy.attention_backward(dout, q, k, v, out, lse, **options)
    expected = reference.expect(
        *(to_numpy(x) for x in (q, k, v, dout)), causal=case.causal, out=to_numpy(out),
        features=reference.Features(mask=dense), dtype=case.dtype,
    )  # fmt: skip
    results = dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    expected.check(lse=to_numpy(lse), out=to_numpy(out), **{each: to_numpy(x) for each, x in results.items()})
    for (each, first), second in zip(results.items(), again, strict=True):
        assert torch.equal(first, second) or (each == "dq" and not case.deterministic), f"{each} does not repeat"


def check_all(cases: Iterator[tuple[Case, str, bool]], device: torch.device) -> None:
    """All of them, and every failure in words."""
    failures = []
    for case, name, is_array in cases:
        try:
            check(case, name, is_array, device)
        except AssertionError as error:
            failures.append(f"{case} mask {name} {'array' if is_array else 'lists'}: {error}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(("head_dim", "head_dim_v", "dtype"), WIDTHS)
def test_every_head_dim(head_dim: int, head_dim_v: int | None, dtype: str, device: torch.device) -> None:
    check_all(cases_of(head_dim, head_dim_v, dtype), device)


@pytest.mark.parametrize(("head_dim", "dtype"), SM80_WIDTHS)
@pytest.mark.usefixtures("sm80_kernels")
def test_sm80(head_dim: int, dtype: str, device: torch.device) -> None:
    check_all(cases_of(head_dim, None, dtype), device)


def test_a_gradient_through_autograd(device: torch.device) -> None:
    q, k, v = (torch.randn(2, 300, 4, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    mask = BlockMask.from_mask_mod(lambda b, h, i, j: j <= i, 1, 1, 300, 300, like=q)
    dout = torch.randn_like(q)
    causal = torch.autograd.grad(fa2cupy.attention(q, k, v, causal=True), (q, k, v), dout)
    masked = torch.autograd.grad(fa2cupy.attention(q, k, v, mask=mask), (q, k, v), dout)
    for mine, theirs in zip(masked, causal, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-2, rtol=2e-2)


def test_a_captured_graph_serves_other_masks(device: torch.device) -> None:
    """The array is read anew: lists are made on the device."""
    q, k, v = (torch.randn(1, 260, 2, 64, device=device, dtype=torch.float16) for _ in range(3))
    mask = torch.ones(260, 260, dtype=torch.bool, device=device)
    fa2cupy.attention(q, k, v, mask=mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fa2cupy.attention(q, k, v, mask=mask)
    mask.copy_(torch.rand(260, 260, device=device) < 0.3)
    graph.replay()
    assert torch.equal(out, fa2cupy.attention(q, k, v, mask=mask))
