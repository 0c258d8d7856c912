"""Masks by lists of blocks in every main kernel that has them, run on the CPU under three schedules."""

from __future__ import annotations

import dataclasses

import pytest

from tests.gpu.cases import DTYPES, Case
from tests.host.kernel_run import HostCase, check
from tests.host.masks import NAMES
from tests.host.run import Schedule

LENGTHS = ((300, 390), (113, 203), (384, 256), (129, 515), (64, 130), (260, 70), (200, 200), (140, 300), (256, 256))
_HEADS = ((2, 1), (4, 2), (3, 3))


def mask_cases(head_dim: int, arch: str, deterministic: bool = False, names: tuple[str, ...] = NAMES) -> list[HostCase]:
    cases = []
    for number, name in enumerate(names):
        seqlen_q, seqlen_k = LENGTHS[number % len(LENGTHS)]
        case = Case(
            seqlen_q,
            seqlen_k,
            head_dim,
            DTYPES[(number + head_dim // 64) % 2],
            False,
            1 + (name in ("batches", "both")),
            _HEADS[number % 3],
            layout=("bshd", "bhsd")[number % 2],
            pad=8 * (number % 2),
            deterministic=deterministic,
            seed=number,
        )
        cases.append(HostCase(case, arch, mask=name))
    return cases


SOME = ("blocks", "rows", "heads", "both", "none")


@pytest.mark.parametrize(("arch", "head_dim"), [("sm_86", 128), ("sm_90", 128)])
def test_forward(arch: str, head_dim: int) -> None:
    for host_case in mask_cases(head_dim, arch, names=SOME):
        check(host_case, False)


@pytest.mark.parametrize(
    ("arch", "head_dim", "deterministic"), [("sm_86", 128, True), ("sm_90", 128, True), ("sm_90", 64, False)]
)
def test_backward(arch: str, head_dim: int, deterministic: bool) -> None:
    """On sm_86 a block of the mask is four tiles of queries and two of keys."""
    for host_case in mask_cases(head_dim, arch, deterministic, SOME):
        check(host_case, True, schedules=(Schedule.LOWEST_FIRST, Schedule.RANDOM))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100"])
@pytest.mark.parametrize("head_dim", [40, 64, 96, 128, 192, 256])
def test_all(arch: str, head_dim: int) -> None:
    for host_case in mask_cases(head_dim, arch):
        check(host_case, False)
    for deterministic in (False, True):
        for host_case in mask_cases(head_dim, arch, deterministic):
            check(host_case, True)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "head_dim"), [("sm_80", 64), ("sm_90", 128)])
def test_of_arrays(arch: str, head_dim: int) -> None:
    """Lists that the call makes in its workspace, of what causal and windows leave."""
    cases = mask_cases(head_dim, arch, names=("dots", "both", "heads", "full", "none"))
    for number, host_case in enumerate(cases):
        seqlen_q, seqlen_k = (140, 260) if number % 2 else (130, 130)
        window = (100, 20) if number == 2 else None
        causal = number in (1, 3)
        case = dataclasses.replace(
            host_case.case, seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal=causal, window=window, batch=1 + number % 2
        )
        for backward in (False, True):
            check(dataclasses.replace(host_case, case=case, mask_array=True), backward)


def test_beside_other_features() -> None:
    """Positions are those of the blocks, not of their places in lists: dropout and distances go by them; and a sink of
    rows that see nothing."""
    case = Case(200, 300, 64, "float16", False, 1, (2, 1), seed=3)
    with_all = HostCase(case, scores=("alibi_slopes",), dropout=(0.3, 4), sinks="float32", mask="heads")
    for arch in ("sm_90", "sm_86"):
        for backward in (False, True):
            check(dataclasses.replace(with_all, arch=arch), backward, schedules=(Schedule.LOWEST_FIRST,))
