"""Packed sequences, used lengths and left padding in the main kernels, run on the CPU under three schedules."""

from __future__ import annotations

import dataclasses

import pytest

from tests.host.lengths import Lengths, LengthsCase, check, starts

# Zero lengths on either side, one row, blocks' edges and beside them; more queries than keys.
_PACKED = Lengths(520, 700, 8, starts(1, 0, 130, 64, 65, 129, 0, 100), starts(5, 7, 203, 0, 33, 128, 0, 261))
LENGTHS = {
    "full": _PACKED,
    "causal": dataclasses.replace(_PACKED, causal=True),
    "window": dataclasses.replace(_PACKED, window=(40, 3)),
    "left": dataclasses.replace(_PACKED, window=(70, 0)),
    "gaps": dataclasses.replace(
        _PACKED,
        seqused_q=(1, 0, 117, 64, 64, 1, 0, 99),
        seqused_k=(0, 7, 190, 0, 33, 100, 0, 256),
        leftpad_k=(0, 3, 64, 0, 31, 0, 0, 7),
        causal=True,
    ),
    "late": Lengths(300, 400, 2, (40, 140, 250), (200, 310, 390), causal=True),
    "dense": Lengths(150, 170, 3, seqused_q=(150, 0, 70), seqused_k=(170, 20, 0), leftpad_k=(100, 5, 0), causal=True),
    "keypad": Lengths(130, 260, 3, seqused_k=(260, 129, 1)),
    "queries": Lengths(200, 140, 3, starts(100, 0, 64), leftpad_k=(0, 3, 100), window=(20, 20)),
    "keys": Lengths(90, 330, 3, None, starts(150, 50, 128), seqused_q=(13, 90, 64), causal=True),
    "more-than-tokens": Lengths(5, 9, 12, starts(0, 1, 0, 0, 2, 0, 1, 0, 0, 0, 0, 1), starts(*[0, 3] * 3, *[0] * 6)),
    "no-keys": Lengths(100, 50, 2, starts(60, 40), starts(0, 0)),
}


def cases(arch: str, head_dim: int, head_dim_v: int | None = None, **changes: object) -> list[LengthsCase]:
    """All lengths for one kernel; dtypes, heads and places in memory take turns."""
    found = []
    for number, lengths in enumerate(LENGTHS.values()):
        case = LengthsCase(
            lengths,
            head_dim,
            ("bfloat16", "float16")[(number + head_dim // 64) % 2],
            ((2, 1), (3, 3), (4, 2))[number % 3],
            arch,
            head_dim_v,
            pad=8 * (number % 4 == 1),
            heads_first=number % 3 == 2,
            seed=number,
        )
        found.append(dataclasses.replace(case, **changes))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(("arch", "head_dim"), [("sm_80", 64), ("sm_86", 128), ("sm_90", 64), ("sm_90", 128)])
def test_forward(arch: str, head_dim: int) -> None:
    for case in cases(arch, head_dim):
        check(case, False)


def test_unaligned() -> None:
    for case in cases("sm_80", 59, pad=1)[::3]:
        check(case, False)
