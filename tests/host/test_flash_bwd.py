"""cuda_src/{sm80,sm90}/flash_bwd.cu with the kernels of smxx beside them, run on the CPU under three schedules."""

from __future__ import annotations

import dataclasses

import pytest

from fa2cupy.kernels import BackwardPlan
from tests.gpu.cases import DTYPES, Case
from tests.host import cases
from tests.host.build import Mutation
from tests.host.kernel_run import HostCase, check, prepare
from tests.host.run import Schedule
from tests.reference import HEAD_DIM_PAIRS

BACKWARD = True
LSE_GRADIENTS = (
    (Case(150, 70, 64, "bfloat16", True, heads=(4, 2)), "sm_90"),
    (Case(70, 70, 192, "bfloat16", False), "sm_90"),
    (Case(70, 33, 40, "float16", True), "sm_80"),
)
USUAL_SPECIALS = list(cases.special_cases(BACKWARD))
COVERING = cases.covering_groups(BACKWARD)


def run_all(host_cases: list[HostCase]) -> None:
    """On the case's GPU; and what Hopper's own kernel serves on a B200 as well, so that both see the same shapes."""
    for host_case in host_cases:
        check(host_case, BACKWARD)
        case = host_case.case
        if host_case.arch == "sm_90" and case.head_dim % 8 == 0:
            check(dataclasses.replace(host_case, arch="sm_100"), BACKWARD)


@pytest.mark.parametrize("host_cases", [pytest.param(group, id=name) for name, group in COVERING.items()])
def test_covering_array(host_cases: list[HostCase]) -> None:
    for host_case in host_cases:
        check(host_case, BACKWARD)


@pytest.mark.parametrize("host_cases", [pytest.param(group, id=name) for name, group in USUAL_SPECIALS])
def test_special_cases(host_cases: list[HostCase]) -> None:
    run_all(host_cases)


@pytest.mark.parametrize("host_case, splits", [pytest.param(*pair, id=str(pair[0])) for pair in cases.split_cases()])
def test_splits(host_case: HostCase, splits: int) -> None:
    plan = prepare(host_case, BACKWARD).plan
    assert isinstance(plan, BackwardPlan) and plan.splits == splits
    check(host_case, BACKWARD)


def test_lengths() -> None:
    """Causal and not, on Hopper and on another GPU, each of both once; `test_long_lengths` has all four."""
    for number, host_case in enumerate(cases.length_cases(64, DTYPES, 1 << 16)):
        arch = ("sm_90", "sm_100")[(number // 2 + number) % 2]
        check(dataclasses.replace(host_case, arch=arch), BACKWARD)


@pytest.mark.parametrize("host_case, cleared", [pytest.param(*pair, id=str(pair[0])) for pair in cases.adder_cases()])
def test_who_adds_to_dq(host_case: HostCase, cleared: bool) -> None:
    (defines,) = (each.defines for each in prepare(host_case, BACKWARD).plan.launches if each.name == "flash_bwd")
    assert defines["FA2_CLEAR_DQ"] == cleared and not defines["FA2_PARTIAL_DKV"]
    check(host_case, BACKWARD)


@pytest.mark.parametrize("host_case", cases.wide_cases(), ids=str)
def test_wide_heads_of_sm90(host_case: HostCase) -> None:
    """The Hopper kernel for head dims above 128."""
    (source,) = (each.source for each in prepare(host_case, BACKWARD).plan.launches if each.name == "flash_bwd")
    assert source == "sm90/flash_bwd_wide.cu"
    check(host_case, BACKWARD)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", cases.HEAD_DIMS)
def test_head_dims(head_dim: int, dtype: str) -> None:
    run_all(cases.head_dim_cases(head_dim, dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "head_dim_v"), HEAD_DIM_PAIRS)
def test_head_dims_of_v(head_dim: int, head_dim_v: int) -> None:
    run_all(cases.head_dim_v_cases(head_dim, head_dim_v))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90"])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
def test_all_tiles(head_dim: int, arch: str, dtype: str) -> None:
    run_all(cases.arch_cases(head_dim, arch, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_long_lengths(head_dim: int, dtype: str) -> None:
    run_all(cases.length_cases(head_dim, (dtype,), 1 << 20))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_random_cases(dtype: str) -> None:
    run_all(cases.some_random_cases(250, (32, 40, 59, 64, 111, 128, 192, 256), dtype))


@pytest.mark.parametrize("case, arch", LSE_GRADIENTS)
def test_gradient_of_lse(case: Case, arch: str) -> None:
    """Queries that see no key, whose dlse is NaN, among them."""
    host_case = HostCase(case, arch, dlse=True)
    check(host_case, BACKWARD, schedules=(Schedule.LOWEST_FIRST,))
    wrong = Mutation("smxx/flash_bwd_preprocess.cu", "d -= dlse_of", "d += dlse_of")
    with pytest.raises(AssertionError):
        check(host_case, BACKWARD, schedules=(Schedule.LOWEST_FIRST,), mutation=wrong)
