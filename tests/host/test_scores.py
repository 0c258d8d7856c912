"""Scores that become others, in every main kernel, run on the CPU under three schedules."""

from __future__ import annotations

import pytest

from tests.gpu.cases import DTYPES, Case
from tests.host import lengths
from tests.host.kernel_run import HostCase, check
from tests.host.lengths import LengthsCase, lengths_of

# Lengths with and without a mask, more queries than keys, windows of which keys are in front, behind and on both sides.
CASES = (
    ((113, 203), True, None, ("softcap",)),
    ((203, 113), False, None, ("alibi_slopes",)),
    ((300, 260), False, (70, 40), ("softcap", "alibi of batch")),
    ((150, 300), True, None, ("alibi of batch",)),
    ((257, 385), False, (-1, 0), ("softcap", "alibi_slopes")),
    ((200, 100), True, None, ("softcap", "alibi_slopes")),
    ((300, 300), False, (20, -1), ("alibi_slopes",)),
    ((65, 520), False, None, ("softcap", "alibi of batch")),
)


def score_cases(head_dim: int, arch: str, deterministic: bool, head_dim_v: int | None = None) -> list[HostCase]:
    cases = []
    for number, ((seqlen_q, seqlen_k), causal, window, scores) in enumerate(CASES):
        case = Case(
            seqlen_q,
            seqlen_k,
            head_dim,
            DTYPES[(number + head_dim // 64) % 2],
            causal,
            2 if "alibi of batch" in scores else 1,
            ((2, 1), (4, 4), (3, 3))[number % 3],
            layout=("bshd", "bhsd")[number % 2],
            deterministic=deterministic,
            seed=number,
            head_dim_v=head_dim_v,
            window=window,
        )
        sinks = "float32" if number == 3 else ""
        cases.append(HostCase(case, arch, scores=scores, sinks=sinks, dlse=number in (3, 4)))
    return cases


EACH = pytest.mark.parametrize(
    ("arch", "head_dim", "head_dim_v"),
    [("sm_80", 64, None), ("sm_86", 128, None), ("sm_90", 64, None), ("sm_90", 128, None), ("sm_90", 256, None)],
)


@EACH
def test_forward(arch: str, head_dim: int, head_dim_v: int | None) -> None:
    for host_case in score_cases(head_dim, arch, False, head_dim_v)[head_dim // 64 % 2 :: 2]:
        check(host_case, False)


@EACH
def test_backward(arch: str, head_dim: int, head_dim_v: int | None) -> None:
    for host_case in score_cases(head_dim, arch, head_dim == 64, head_dim_v)[1 - head_dim // 64 % 2 :: 2]:
        check(host_case, True)


# Sequences without keys, with rows out of use in front and behind; a window whose keys are on both sides.
LISTS = (
    lengths_of((70, 130), (0, 5), (33, 9), (140, 64), causal=True),
    lengths_of((65, 200, 3, 17, 4), (100, 1), (4, 0), (129, 129), window=(50, 30)),
)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("arch", "head_dim"), [("sm_80", 64), ("sm_90", 128), ("sm_90", 256)])
def test_lists(arch: str, head_dim: int, backward: bool) -> None:
    number = head_dim // 64 % 2
    case = LengthsCase(
        LISTS[number],
        head_dim,
        DTYPES[number],
        (4, 2),
        arch,
        scores=("softcap", "alibi of batch"),
        deterministic=backward,
    )
    lengths.check(case, backward)
