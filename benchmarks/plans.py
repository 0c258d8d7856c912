"""The plan of a case, without arrays: what would run, and what there is to compile."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import Case
from fa2cupy import kernels
from fa2cupy.frameworks.base import Device, TensorRef, contiguous_strides
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.options import Options
from fa2cupy.problem import AttentionProblem, Sizes

__all__ = ["plan_of", "problem_of"]

FORWARD_TENSORS = ("q", "k", "v", "out", "lse")
BACKWARD_TENSORS = ("dout", "q", "k", "v", "out", "lse", "dq", "dk", "dv")


def problem_of(case: Case, scale: float | None = None) -> AttentionProblem:
    """The problem of contiguous (batch, seqlen, heads, head_dim) arrays."""
    sizes = Sizes(
        case.batch, case.seqlen, case.seqlen, case.num_heads, case.num_heads_k, case.head_dim, case.head_dim_v
    )
    options = Options.checked(case.causal, scale, "bshd", None)
    refs = {}
    for name in FORWARD_TENSORS if case.mode == "fwd" else BACKWARD_TENSORS:
        shape = sizes.shape(name, "bshd")
        dtype = case.dtype if name != "lse" else "float64" if case.dtype == "float64" else "float32"
        refs[name] = TensorRef(0, shape, contiguous_strides(shape), dtype, Device("cuda", 0), None)
    return AttentionProblem.from_refs(refs, sizes, case.dtype, options)


def plan_of(case: Case, device: DeviceInfo, *, deterministic: bool = False, tile: Any = None) -> Any:
    """The ForwardPlan or BackwardPlan of a case on a GPU; `tile` replaces the row of the tile table."""
    override = {} if tile is None else {"tile": tile}
    problem = problem_of(case)
    if case.mode == "fwd":
        return kernels.plan_forward(problem, device, **override)
    return kernels.plan_backward(problem, device, deterministic, **override)
