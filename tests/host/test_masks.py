"""Masks by lists of blocks in every main kernel that has them, run on the CPU under three schedules."""

from __future__ import annotations

import dataclasses

import pytest

from tests.covering import chosen
from tests.gpu.cases import DTYPES, Case
from tests.host.build import Mutation
from tests.host.kernel_run import HostCase, check
from tests.host.masks import NAMES
from tests.host.run import Schedule
from tests.host.test_plants import is_caught

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


def _case(
    arch: str, head_dim: int, mask: str, deterministic: bool = False, lengths: tuple[int, int] = (300, 390)
) -> HostCase:
    heads = (4, 2) if mask in ("heads", "both") else (2, 1)
    batch = 2 if mask == "both" else 1
    case = Case(*lengths, head_dim, "bfloat16", False, batch, heads, seed=1, deterministic=deterministic)
    return HostCase(case, arch, mask=mask)


MUTATED = {
    "fwd": _case("sm_86", 128, "both"),  # of a block two tiles of queries and four of keys
    "fwd-none": _case("sm_80", 64, "none"),
    "fwd-hopper": _case("sm_90", 64, "heads"),
    "bwd": _case("sm_86", 128, "both", True),
    "bwd-hopper": _case("sm_90", 128, "heads"),
    "bwd-hopper-turns": _case("sm_90", 128, "full", True, (150, 700)),
    "bwd-hopper-none": _case("sm_90", 64, "none"),
}
PICKED, VISIT, MASK = "common/picked.cuh", "common/visit.cuh", "common/mask.cuh"
STEPS, BOTH90 = "common/bwd_steps.cuh", "sm90/backward.cuh"
FWD, FWD90, BWD, BWD90 = "sm80/flash_fwd.cu", "sm90/flash_fwd.cu", "sm80/flash_bwd.cu", "sm90/flash_bwd.cu"

# Case, file, what stands there, what is put there instead.
MUTANTS = [
    ("fwd", PICKED, "static_cast<int64_t>(batch) * params.batch_masks", "static_cast<int64_t>(0)"),
    ("fwd-hopper", PICKED, "static_cast<int64_t>(head) * params.head_masks", "static_cast<int64_t>(0)"),
    ("fwd", VISIT, "row.z * kKeyParts, params", "row.z, params"),
    ("fwd", VISIT, "kKeyParts - 1 - place % kKeyParts", "0"),
    ("fwd", VISIT, ".w * kQueryParts + place % kQueryParts", ".w * kQueryParts"),
    ("fwd", FWD, "m_block % kQueryParts * kBlockM + warp_row", "warp_row"),
    ("fwd", FWD, "n % kKeyParts * kBlockN)", "0)"),
    ("fwd", FWD, "for (; n >= visit.mask_from; --n) step_at", "for (; n > visit.mask_from; --n) step_at"),
    (
        "fwd",
        FWD,
        "step(met.block, masked, False{}, met.bits, next.block)",
        "step(met.block, masked, False{}, met.bits, -1)",
    ),
    ("fwd", MASK, "+ kTransposed) * kPickedBlock * 4", "+ !kTransposed) * kPickedBlock * 4"),
    ("fwd", MASK, "words[i][e / 2] >> (2 * j + e % 2)", "words[i][e / 2] >> (2 * j)"),
    ("fwd-none", PICKED, "return entries.y + entries.z > 0;", "return true;"),
    ("fwd-hopper", FWD90, "look(work, work.visit.end - 1);", ";"),
    ("fwd-hopper", FWD90, "if constexpr (decltype(masked)::value) look(work, n);", ""),
    ("fwd-hopper", FWD90, "int n = met_keys(work.visit, place).block", "int n = place"),
    ("bwd", STEPS, "mask_ranks[entry] * kKeyParts + n_block % kKeyParts", "mask_ranks[entry] * kKeyParts"),
    ("bwd", STEPS, "met.x * kQueryParts + step.place % kQueryParts", "met.x * kQueryParts"),
    ("bwd", STEPS, "step.bits >= 0 ? 0x7fffffff : 0", "0"),
    ("bwd", BWD, "n_block % kKeyParts * kBlockN + warp_row", "warp_row"),
    ("bwd", BWD, "m_block % kQueryParts * kBlockM + s_col", "s_col"),
    ("bwd", BWD, "if (kPicked && !any) cp_async_commit_group();", ""),
    ("bwd-hopper", BOTH90, "steps += (row.y + row.z) * kQueryParts;", "steps = (row.y + row.z) * kQueryParts;"),
    ("bwd-hopper", BWD90, "step.m_block % kQueryParts * kBlockM)", "0)"),
    ("bwd-hopper", BWD90, "(kPicked ? seen.hides(0, j, e) : hidden)", "hidden"),
    ("bwd-hopper-turns", BOTH90, "return turn_at(step);", "return 0;"),
    ("bwd-hopper-none", PICKED, "if (entries.y + entries.z > 0) return true;", "return true;"),
    ("bwd-hopper-none", BOTH90, "if constexpr (kPicked) skip_unmet(params);", ""),
]
FEW = chosen([{"case": mutant[0], "file": mutant[1]} for mutant in MUTANTS])


@pytest.mark.parametrize(
    ("name", "path", "old", "new"),
    [
        pytest.param(*mutant, id=f"{mutant[0]}-{number}", marks=[] if number in FEW else pytest.mark.slow)
        for number, mutant in enumerate(MUTANTS)
    ],
)
def test_mutants(name: str, path: str, old: str, new: str) -> None:
    assert is_caught(MUTATED[name], name.startswith("bwd"), mutation=Mutation(path, old, new))
