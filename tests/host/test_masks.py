"""Masks by lists of blocks in every main kernel that has them, run on the CPU under three schedules."""

from __future__ import annotations

import dataclasses

import pytest

from tests.gpu.cases import DTYPES, Case
from tests.host.kernel_run import HostCase, check
from tests.host.masks import NAMES

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


@pytest.mark.parametrize(("arch", "head_dim"), [("sm_80", 64), ("sm_86", 128), ("sm_90", 64), ("sm_90", 128)])
def test_forward(arch: str, head_dim: int) -> None:
    for host_case in mask_cases(head_dim, arch):
        check(host_case, False)


@pytest.mark.parametrize(
    ("arch", "head_dim", "deterministic"),
    [
        ("sm_80", 64, True),
        ("sm_86", 128, False),
        ("sm_90", 64, False),
        ("sm_90", 128, True),
        ("sm_90", 128, False),
    ],
)
def test_backward(arch: str, head_dim: int, deterministic: bool) -> None:
    for host_case in mask_cases(head_dim, arch, deterministic):
        check(host_case, True)


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
