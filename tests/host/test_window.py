"""Windows in every main kernel, run on the CPU under three schedules; bounds of the band, each changed and caught."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from tests.covering import chosen
from tests.gpu.cases import DTYPES, Case
from tests.host.build import Mutation
from tests.host.kernel_run import HostCase, check
from tests.host.test_plants import is_caught

# Lengths and windows: both ends, one, an end at a block's edge, rows without keys and keys without queries in front, a
# window of the query's own key, a single query.
CASES = (
    ((113, 203), (30, 0)),
    ((203, 113), (17, 9)),
    ((300, 300), (64, -1)),
    ((200, 330), (-1, 5)),
    ((300, 40), (3, 2)),
    ((260, 260), (0, 0)),
    ((130, 515), (129, 130)),
    ((384, 384), (127, 0)),
    ((5, 400), (100, 0)),
    ((1, 300), (77, 0)),
)


def window_cases(head_dim: int, arch: str, deterministic: bool, head_dim_v: int | None = None) -> list[HostCase]:
    cases = []
    for number, ((seqlen_q, seqlen_k), window) in enumerate(CASES):
        case = Case(
            seqlen_q,
            seqlen_k,
            head_dim,
            DTYPES[(number + head_dim // 64) % 2],
            number % 3 == 0 and window[1] <= 0,
            1,
            ((2, 1), (4, 4), (3, 3))[number % 3],
            layout=("bshd", "bhsd")[number % 2],
            pad=8 * (number % 2),
            deterministic=deterministic,
            seed=number,
            head_dim_v=head_dim_v,
            window=window,
        )
        cases.append(HostCase(case, arch, flip=number == 3))
    return cases


@pytest.mark.parametrize(
    ("arch", "head_dim", "head_dim_v"),
    [("sm_80", 64, None), ("sm_86", 128, None), ("sm_90", 64, None), ("sm_90", 128, None), ("sm_90", 256, None)],
)
def test_forward(arch: str, head_dim: int, head_dim_v: int | None) -> None:
    for host_case in window_cases(head_dim, arch, False, head_dim_v)[head_dim // 64 % 2 :: 2]:
        check(host_case, False)


@pytest.mark.parametrize(
    ("arch", "head_dim", "deterministic"),
    [
        ("sm_80", 64, True),
        ("sm_100", 128, False),
        ("sm_90", 64, False),
        ("sm_90", 128, True),
        ("sm_90", 192, True),
        ("sm_90", 256, False),
    ],
)
def test_backward(arch: str, head_dim: int, deterministic: bool) -> None:
    for host_case in window_cases(head_dim, arch, deterministic)[head_dim // 64 % 2 :: 2]:
        check(host_case, True)


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim, head_dim_v", [(40, None), (59, None), (96, None), (192, 128), (256, None)])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100"])
def test_every_kernel(arch: str, head_dim: int, head_dim_v: int | None, deterministic: bool) -> None:
    for host_case, backward in itertools.product(
        window_cases(head_dim, arch, deterministic, head_dim_v), (False, True)
    ):
        check(host_case, backward)


@pytest.mark.parametrize(
    "arch, head_dim, deterministic", [("sm_90", 64, False), ("sm_90", 192, False), ("sm_100", 128, True)]
)
def test_shared_key_blocks(arch: str, head_dim: int, deterministic: bool) -> None:
    """Many query heads on few keys: key blocks are shared, of which no part may be empty."""
    for seqlen_q, seqlen_k, window in ((300, 300, (20, 10)), (40, 260, (100, -1)), (500, 130, (-1, 64))):
        case = Case(seqlen_q, seqlen_k, head_dim, "bfloat16", False, 1, (8, 1), seed=seqlen_q, window=window)
        check(HostCase(dataclasses.replace(case, deterministic=deterministic), arch), True)


RANGE, MASK = "common/visit.cuh", "common/mask.cuh"
FWD, FWD90 = "sm80/flash_fwd.cu", "sm90/flash_fwd.cu"
BWD, BWD90, BOTH90 = "sm80/flash_bwd.cu", "sm90/flash_bwd.cu", "sm90/backward.cuh"


def _case(
    arch: str,
    window: tuple[int, int],
    head_dim: int = 64,
    deterministic: bool = False,
    lengths: tuple[int, int] = (300, 460),
) -> HostCase:
    case = Case(*lengths, head_dim, "bfloat16", False, 1, (2, 1), seed=1, deterministic=deterministic, window=window)
    return HostCase(case, arch)


BAND = {
    "fwd": _case("sm_80", (400, 20), lengths=(500, 800)),  # wide enough for blocks without a mask
    "fwd-hopper": _case("sm_90", (470, 20), lengths=(300, 900)),
    "fwd-hopper-even": _case("sm_90", (5, -1), lengths=(384, 384)),  # masks on the left alone, in the last block too
    "bwd": _case("sm_100", (300, 20), lengths=(500, 600)),
    "bwd-turns": _case("sm_86", (70, 20), deterministic=True),
    "bwd-hopper": _case("sm_90", (70, 20), 128),
    "bwd-hopper-turns": _case("sm_90", (170, 20), 128, True),
    "bwd-hopper-wide": _case("sm_90", (70, 20), 192),
}

# Case, file, what stands there, what is put there instead.
MUTANTS = [
    ("fwd", RANGE, "query + offset_of(sequence) - sequence.left)", "query + offset_of(sequence) - sequence.left + 1)"),
    ("fwd", RANGE, "query + offset_of(sequence) - sequence.left)", "query + offset_of(sequence) - sequence.left - 1)"),
    ("fwd", RANGE, "sequence.right + 1)", "sequence.right)"),
    ("fwd", RANGE, "sequence.right + 1)", "sequence.right + 2)"),
    ("fwd", MASK, "(kBand && col_of(j, e) < begin)) acc_s", "false) acc_s"),
    ("fwd", RANGE, "ceil_div(key_begin(sequence, last_query), kBlockN)", "key_begin(sequence, last_query) / kBlockN"),
    ("fwd", RANGE, "key_begin(sequence, first_query) / kBlockN, end", "key_begin(sequence, last_query) / kBlockN, end"),
    ("fwd-hopper-even", RANGE, "left_to < end ? mask_from : min(mask_from, end - 1)", "mask_from"),
    ("fwd", FWD, "n >= visit.unmasked_from()", "n >= visit.begin"),
    ("fwd", FWD, "n >= visit.begin; --n) step(n, True{}, True{})", "n > visit.begin; --n) step(n, True{}, True{})"),
    ("fwd-hopper", FWD90, "(kBand ? work.visit.unmasked_from() : 0)", "work.visit.begin"),
    ("fwd-hopper", FWD90, "n >= work.visit.begin; --n) step(n, True{})", "n > work.visit.begin; --n) step(n, True{})"),
    ("bwd", RANGE, "offset_of(sequence) - sequence.right;", "offset_of(sequence) - sequence.right - 1;"),
    ("bwd", RANGE, "offset_of(sequence) - sequence.right;", "offset_of(sequence) - sequence.right + 1;"),
    ("bwd", RANGE, "offset_of(sequence) + sequence.left + 1;", "offset_of(sequence) + sequence.left;"),
    ("bwd", RANGE, "offset_of(sequence) + sequence.left + 1;", "offset_of(sequence) + sequence.left + 2;"),
    ("bwd", BWD, ">= query_end(sequence, key)) p = 0.f", "> query_end(sequence, key)) p = 0.f"),
    ("bwd", RANGE, "m < visit.mask_again ? visit.mask_to", "m <= visit.mask_again ? visit.mask_to"),
    ("bwd-hopper", BWD90, "col_of(j, e) >= end[e / 2]", "col_of(j, e) > end[e / 2]"),
    ("bwd-hopper", BWD90, "query_end(sequence, keys[1])", "query_end(sequence, keys[0])"),
    ("bwd-hopper", BOTH90, "return work.head_blocks;", "return work.end;"),
    ("bwd-hopper-turns", BOTH90, "/ (kCluster * kBlockN) - block;", "/ (kCluster * kBlockN) - block + 1;"),
    ("bwd-turns", BWD, "if (!kCausal && !kBand) return n_block;", "if (!kCausal) return n_block;"),
    ("bwd-hopper-wide", BOTH90, "query_blocks<kBand ? kCluster : 1>", "query_blocks<1>"),
    ("bwd-hopper-wide", MASK, "(kBand && col_of(j, e) < begin)) acc_p", "false) acc_p"),
]


@pytest.mark.parametrize("name", BAND)
def test_the_cases_of_the_mutants_are_right(name: str) -> None:
    check(BAND[name], name.startswith("bwd"))


# Of which `make test` has as many as test_plants.py has of its own.
FEW = chosen([{"case": mutant[0], "file": mutant[1]} for mutant in MUTANTS])


@pytest.mark.parametrize(
    ("name", "path", "old", "new"),
    [
        pytest.param(*mutant, id=f"{mutant[0]}-{number}", marks=[] if number in FEW else pytest.mark.slow)
        for number, mutant in enumerate(MUTANTS)
    ],
)
def test_mutants(name: str, path: str, old: str, new: str) -> None:
    assert is_caught(BAND[name], name.startswith("bwd"), mutation=Mutation(path, old, new))
