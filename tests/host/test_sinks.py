"""Attention sinks and their gradient in the kernels, run on the CPU; each bound changed and caught."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fa2cupy.kernels import plan_backward
from tests.gpu.cases import Case
from tests.host import kernel_run, lengths
from tests.host.build import Mutation
from tests.host.kernel_run import HostCase, device, execute, prepare
from tests.host.lengths import LengthsCase, lengths_of
from tests.host.run import Schedule
from tests.host.test_plants import is_caught

# Of four heads one has no sink, and one has one much larger than its scores (kernel_run.sinks_of).
CAUSAL = HostCase(Case(150, 203, 64, "bfloat16", True, 1, (4, 2), seed=1), sinks="float32")
EMPTY = HostCase(Case(330, 200, 64, "bfloat16", True, 2, (4, 1), layout="bhsd", seed=2), sinks="bfloat16")
FORWARD = {
    "causal": CAUSAL,
    "empty": EMPTY,
    "sm80": HostCase(Case(203, 113, 64, "bfloat16", True, 1, (4, 4), seed=3), "sm_80", sinks="float32"),
    "window": HostCase(Case(150, 260, 128, "float16", False, 1, (3, 3), window=(60, 7), seed=4), sinks="float16"),
    "own-o": HostCase(Case(70, 90, 256, "bfloat16", False, 1, (2, 1), seed=5), sinks="bfloat16"),
    "scale": HostCase(Case(70, 90, 59, "float16", False, 1, (2, 1), scale=-0.5, seed=6), "sm_86", sinks="float32"),
    "no-keys": HostCase(Case(70, 0, 64, "bfloat16", False, 2, (3, 3), seed=7), sinks="float32"),
}
BACKWARD = {
    "causal": CAUSAL,
    "empty": dataclasses.replace(EMPTY, dlse=True),
    "sm80": HostCase(Case(203, 113, 64, "bfloat16", True, 1, (4, 4), seed=3), "sm_100", dlse=True, sinks="float32"),
    "splits": HostCase(Case(150, 203, 64, "bfloat16", True, 1, (8, 2), seed=13), "sm_100", sinks="bfloat16"),
    "wide": HostCase(Case(150, 203, 192, "bfloat16", True, 1, (2, 1), seed=28, head_dim_v=120), sinks="float32"),
    "no-keys": HostCase(Case(70, 0, 64, "bfloat16", False, 2, (3, 3), seed=7), dlse=True, sinks="float32"),
    "many": HostCase(Case(3, 17, 64, "bfloat16", False, 33, (1, 1), deterministic=True, seed=8), sinks="float32"),
}
# Zero lengths on either side, more queries than keys, rows of no sequence; and more sequences than threads.
MIXED = ((150, 200), (0, 0), (33, 0), (70, 40), (0, 20), (65, 130, 5, 3, 2), (1, 1), (90, 30))
MANY = ((40, 0), *((1, n % 50 == 0) for n in range(300)), (2, 0))
LISTED = {
    "packed": LengthsCase(
        lengths_of(*MIXED, behind=7, causal=True), heads=(4, 2), sinks="bfloat16", dlse=True, deterministic=True
    ),
    "padded": LengthsCase(
        lengths_of(*MIXED, packed_q=False, packed_k=False, window=(40, 3)), arch="sm_80", sinks="float32", dlse=True
    ),
    "no-keys": LengthsCase(lengths_of((30, 0), (5, 0)), sinks="float32", dlse=True),
    "many-short": LengthsCase(lengths_of(*MANY), heads=(1, 1), arch="sm_80", sinks="float32", dlse=True, seed=3),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward(name: str) -> None:
    kernel_run.check(FORWARD[name], False)


@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name: str) -> None:
    kernel_run.check(BACKWARD[name], True)


@pytest.mark.parametrize("name", LISTED)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_lists(backward: bool, name: str) -> None:
    """dsinks has the same bits under every schedule, as all that is no dq has."""
    lengths.check(LISTED[name], backward)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim, head_dim_v", [(40, None), (59, None), (96, None), (128, None), (192, 128)])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100"])
def test_every_kernel(arch: str, head_dim: int, head_dim_v: int | None) -> None:
    for number, (sizes, window) in enumerate((((203, 113), None), ((113, 203), (70, 3)), ((5, 300), None))):
        case = Case(*sizes, head_dim, "bfloat16", number == 0, 2, (4, 2), head_dim_v=head_dim_v, window=window)
        host_case = HostCase(case, arch, sinks=("float32", "bfloat16")[number % 2], dlse=number > 0)
        for backward in (False, True):
            kernel_run.check(host_case, backward)
    for name, listed in LISTED.items():
        if name != "many-short":
            listed = dataclasses.replace(listed, head_dim=head_dim, head_dim_v=head_dim_v, arch=arch)
            for backward in (False, True):
                lengths.check(listed, backward)


@pytest.mark.parametrize("name", ["causal", "sm80"])
def test_without_a_sink(name: str) -> None:
    """Of -inf in each head: the bits of out and lse are those of a call without sinks, and their gradient is 0."""
    host_case = dataclasses.replace(FORWARD[name], sinks="")
    bits = []
    for each in (host_case, FORWARD[name]):
        prepared = prepare(each, False)
        if each.sinks:
            prepared.tensors["sinks"].values[...] = -np.inf
        bits.append(execute(prepared, Schedule.LOWEST_FIRST)[0])
    assert bits[0] == bits[1]
    prepared = prepare(dataclasses.replace(BACKWARD[name], dlse=True), True)  # whose lse is finite, or the sink
    prepared.tensors["sinks"].values[...] = -np.inf
    execute(prepared, Schedule.LOWEST_FIRST)
    assert not prepared.tensors["dsinks"].values.any()


def test_a_backward_whose_lse_has_them_need_not_know_them() -> None:
    """The kernels are those of a backward without sinks, and their gradient is nobody's."""
    host_case = dataclasses.replace(CAUSAL, dsinks=False)
    kernel_run.check(host_case, True, schedules=(Schedule.LOWEST_FIRST,))
    problem = prepare(host_case, True).plan.problem
    without = plan_backward(dataclasses.replace(problem, sinks=None), device("sm_90"), False)
    with_sinks = plan_backward(problem, device("sm_90"), False)
    assert [each.defines for each in with_sinks.launches] == [each.defines for each in without.launches]


SOFTMAX, STATISTICS = "common/softmax.cuh", "common/statistics.cuh"
FILL, LIST = "smxx/fill_unseen.cu", "smxx/list_tiles.cu"
PRE, OWN = "smxx/flash_bwd_preprocess.cu", "smxx/flash_bwd_sinks.cu"

# Direction, case, file, what stands there, what is put there instead.
MUTANTS = [
    ("fwd", "causal", SOFTMAX, "sum[i][h] * alpha + ex2(", "sum[i][h] + ex2("),
    ("fwd", "causal", SOFTMAX, "Real inverse = alpha * (", "Real inverse = ("),
    (
        "fwd",
        "causal",
        SOFTMAX,
        "(kOwnLogit ? max[i][h] : scaled(max[i][h], scale_log2))",
        "scaled(max[i][h], scale_log2)",
    ),
    ("fwd", "causal", SOFTMAX, "mul_rn(sink, kLog2E)", "sink"),
    (
        "fwd",
        "causal",
        STATISTICS,
        "static_cast<const float*>(params.sinks)[head]",
        "*static_cast<const float*>(params.sinks)",
    ),
    (
        "fwd",
        "window",
        STATISTICS,
        "static_cast<const Element*>(params.sinks)[head]",
        "*static_cast<const Element*>(params.sinks)",
    ),
    ("fwd", "empty", FILL, "= own_logit(params, head);", "= -kInfinity;"),
    ("fwd", "packed", LIST, "is_of_run ? own_logit(params, head) : -kInfinity", "-kInfinity"),
    ("fwd", "padded", LIST, "run_from && at < stretch.seen_to);", "run_from);"),
    ("bwd", "causal", PRE, "ex2((logit - row_lse[pass]) * kLog2E)", "ex2(logit - row_lse[pass])"),
    ("bwd", "causal", PRE, "kOwnLogit && row < rows && col == 0", "kOwnLogit && row < rows"),
    ("bwd", "causal", STATISTICS, "tile * kWarps + threadIdx.x / 32]", "tile * kWarps]"),
    ("bwd", "many", OWN, "warp < kNumWarps", "warp < kNumWarps - 1"),
    ("bwd", "causal", OWN, "== -kInfinity) sum = 0.f;", "== -kInfinity) sum = 1.f;"),
    ("bwd", "causal", OWN, "(i / count * params.num_heads + head)", "(i / count * params.num_heads)"),
    ("bwd", "empty", OWN, "(i / count * params.num_heads + head)", "head"),
    ("bwd", "empty", OWN, "i % rows - rows", "i % rows"),
    ("bwd", "empty", OWN, "i < params.batch * rows", "i < rows"),
    ("bwd", "many", OWN, "i < params.batch * count; i += kNumThreads", "i < kNumThreads; i += kNumThreads"),
    ("bwd", "packed", OWN, "(params.counts[0]) *", "(params.tiles_of_head) *"),
    ("bwd", "packed", OWN, "row < rows; row += 32", "row < rows; row += 64"),
    ("bwd", "padded", OWN, "int reach = reach_of(params).behind, lane", "int reach = reach_of(params).before, lane"),
    (
        "bwd",
        "many-short",
        OWN,
        "first < params.sequences; first += kNumThreads",
        "first < params.sequences; first += 9999",
    ),
    ("bwd", "many-short", OWN, "other < 32", "other < 31"),
]


@pytest.mark.parametrize(
    ("way", "name", "path", "old", "new"), MUTANTS, ids=[f"{m[0]}-{m[1]}-{n}" for n, m in enumerate(MUTANTS)]
)
def test_mutants(way: str, name: str, path: str, old: str, new: str) -> None:
    case = LISTED.get(name) or (FORWARD if way == "fwd" else BACKWARD)[name]
    assert is_caught(case, way == "bwd", schedules=(Schedule.LOWEST_FIRST,), mutation=Mutation(path, old, new))
