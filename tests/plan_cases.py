"""Devices and problems that the tests of plans have in common."""

from __future__ import annotations

import dataclasses
from typing import Any

from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.kernels import BackwardPlan, ForwardPlan, KernelLaunch, plan_backward
from fa2cupy.kernels.params import BwdParams
from fa2cupy.kernels.tiles import SHARED_MEMORY
from fa2cupy.problem import AttentionProblem
from tests.gpu.cases import Case, problem_of

H200 = DeviceInfo(0, "", (9, 0), 132, SHARED_MEMORY["sm_90"], 50 << 20)
A100 = DeviceInfo(0, "A100", (8, 0), 108, SHARED_MEMORY["sm_80"], 40 << 20)
B200 = DeviceInfo(1, "B200", (10, 0), 148, SHARED_MEMORY["sm_100"], 126 << 20)


def problem(
    seqlen_q: int = 300,
    seqlen_k: int = 300,
    head_dim: int = 64,
    dtype: str = "bfloat16",
    causal: bool = False,
    **options: Any,
) -> AttentionProblem:
    """Of a forward."""
    return problem_of(Case(seqlen_q, seqlen_k, head_dim, dtype, causal, **options), False)


def backward_problem(*args: Any, **options: Any) -> AttentionProblem:
    return problem_of(Case(*args, **options), True)


def with_strides(base: AttentionProblem, **strides: tuple[int, int, int]) -> AttentionProblem:
    return dataclasses.replace(base, strides=tuple((dict(base.strides) | strides).items()))


def backward(
    seqlen_q: int, seqlen_k: int, head_dim: int, heads: tuple[int, int], batch: int = 1, device: DeviceInfo = H200
) -> BackwardPlan:
    """The plan of a causal backward with the sm_80 kernels."""
    case = Case(seqlen_q, seqlen_k, head_dim, "bfloat16", True, batch, heads)
    return plan_backward(problem_of(case, True), device, False, family="sm80")


def params_of(plan: BackwardPlan) -> BwdParams:
    """What the launches of a backward are given; the sm_90 kernel gets a struct of its own."""
    return BwdParams.from_buffer_copy(plan.launches[0].params)


def main_launch(plan: ForwardPlan) -> KernelLaunch:
    """That of `flash_fwd`."""
    (launch,) = (each for each in plan.launches if each.name != "fill_unseen")
    return launch


def named(plan: BackwardPlan, name: str) -> KernelLaunch:
    (launch,) = (each for each in plan.launches if each.name == name)
    return launch
