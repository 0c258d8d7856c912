"""The backward of sequences whose lengths only the device knows, in every main kernel, run on the CPU."""

from __future__ import annotations

import numpy as np
import pytest

from fa2cupy.kernels import order
from fa2cupy.kernels.params import BwdTmaParams
from tests.host.build import Mutation
from tests.host.lengths import LengthsCase, check, execute, judge_memory, lengths_of, prepare
from tests.host.run import HostRunError, Schedule

# As lengths_of has them.
MIXED = ((70, 70), (0, 0), (130, 40), (3, 200, 0, 5, 7), (0, 33), (65, 0, 4), (1, 1), (200, 260, 9, 0, 1))
PLAIN = ((64, 64), (129, 129), (0, 0), (257, 257))
SHORT = tuple((n % 3, n % 4) for n in range(40))
NOTHING = ((0, 5), (7, 0), (0, 0))
LONG = ((20, 2300), (3, 2100))  # more key blocks than the first of which is to write dQ

Sequences = tuple[tuple[int, ...], ...]


def case(
    sequences: Sequences,
    head_dim: int,
    arch: str,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    packed_q: bool = True,
    packed_k: bool = True,
    **more: object,
) -> LengthsCase:
    """With other inputs, and some rows behind."""
    lengths = lengths_of(
        *sequences, causal=causal, window=window, packed_q=packed_q, packed_k=packed_k, behind=len(sequences) % 7
    )
    return LengthsCase(lengths, head_dim, arch=arch, seed=head_dim, **more)  # type: ignore[arg-type]


CASES = (
    case(MIXED, 64, "sm_80"),
    case(MIXED, 64, "sm_80", causal=True, dtype="float16", heads=(4, 2), heads_first=True, pad=8),
    case(MIXED, 59, "sm_86", causal=True, deterministic=True),
    case(MIXED, 128, "sm_86", window=(70, 3), deterministic=True, packed_q=False),
    case(PLAIN, 128, "sm_100", head_dim_v=64, deterministic=True, dlse=True),
    case(MIXED, 64, "sm_90"),
    case(MIXED, 64, "sm_90", causal=True, dtype="float16", packed_q=False, packed_k=False),
    case(MIXED, 96, "sm_90", window=(40, 20), heads=(4, 2), heads_first=True, pad=8),
    case(MIXED, 128, "sm_90", causal=True, packed_k=False),
    case(MIXED, 128, "sm_90", deterministic=True, dlse=True),
    case(PLAIN, 128, "sm_90", causal=True, deterministic=True, heads=(3, 3)),
    case(MIXED, 64, "sm_90", window=(30, 0), deterministic=True),
    case(LONG, 64, "sm_90"),
    case(MIXED, 192, "sm_90", head_dim_v=128, packed_q=False),
    case(MIXED, 192, "sm_90", causal=True, deterministic=True),
    case(MIXED, 256, "sm_90", window=(20, 70), packed_k=False, dlse=True),
    case(MIXED, 256, "sm_90", causal=True, dtype="float16", heads=(4, 2)),
    case(PLAIN, 256, "sm_90", window=(100, -1), deterministic=True),
)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_backward(number: int) -> None:
    """Each fourth under all schedules."""
    check(CASES[number], True, schedules=tuple(Schedule) if number % 4 == 0 else (Schedule(number % 3),))


@pytest.mark.parametrize(
    ("head_dim", "causal", "heads"), [(64, True, (4, 4)), (128, False, (6, 3)), (192, True, (3, 3))]
)
def test_sections_of_heads(
    head_dim: int, causal: bool, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one key head each, for sequences of any length."""
    monkeypatch.setattr(order, "_LONG_SEQUENCE", 0)
    monkeypatch.setattr(order, "_LISTED_TILES", 1e-9)
    one = case(MIXED, head_dim, "sm_90", causal=causal, heads=heads)
    (launch,) = (each for each in prepare(one, True).plan.launches if each.name == "flash_bwd")
    assert BwdTmaParams.from_buffer_copy(launch.params).shape.heads_per_section == 1
    check(one, True)


@pytest.mark.parametrize("arch, head_dim", [("sm_80", 64), ("sm_90", 128), ("sm_90", 192)])
@pytest.mark.parametrize("sequences", [SHORT, NOTHING], ids=["short", "nothing"])
def test_few_rows(sequences: Sequences, arch: str, head_dim: int) -> None:
    """More sequences than rows; and no tile at all, where every thread block ends at once."""
    check(case(sequences, head_dim, arch, causal=head_dim == 64), True)


def test_who_adds_to_dq() -> None:
    """As the mean length says: the first key block writes, or sums begin with zeros."""
    for sequences, cleared in ((MIXED, False), (LONG, True)):
        plan = prepare(case(sequences, 64, "sm_90"), True).plan
        (defines,) = (launch.defines for launch in plan.launches if launch.name == "flash_bwd")
        assert defines["FA2_CLEAR_DQ"] == cleared


# Starts that overlap and go back, so that there are more tiles than there is room for.
WRONG = ((0, 530, 0, 530, 0, 530), (-5, 1 << 30, -9, 3, -(1 << 31), 99), (530,) * 6)


@pytest.mark.parametrize("arch, causal", [("sm_80", True), ("sm_90", False)])
def test_wrong_lengths_end_and_stay_inside(arch: str, causal: bool) -> None:
    """In turn: a sequence has all of its tiles or none, so nobody waits for one that is not there."""
    window, sequences = None if causal else (100, 50), ((64, 64), (0, 0), (129, 129), (0, 0), (337, 337))
    prepared = prepare(case(sequences, 64, arch, causal=causal, window=window, deterministic=True), True)
    for wrong in WRONG:
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            execute(prepared, arrays=prepared.arrays | {name: np.array(wrong, np.int32)})
            judge_memory(prepared)


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("causal, window", [(False, None), (True, None), (False, (50, 10)), (True, (64, -1))])
@pytest.mark.parametrize(
    "head_dim, head_dim_v", [(40, None), (64, None), (96, None), (128, None), (192, 128), (256, None)]
)
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100"])
def test_every_kernel(
    arch: str, head_dim: int, head_dim_v: int | None, causal: bool, window: tuple[int, int] | None, deterministic: bool
) -> None:
    for packed_q, packed_k in ((True, True), (False, True), (True, False), (False, False)):
        options = {"deterministic": deterministic, "head_dim_v": head_dim_v}
        packed = {"packed_q": packed_q, "packed_k": packed_k}
        check(case(MIXED, head_dim, arch, causal=causal, window=window, **packed, **options), True)


TILES, STEPS, BOTH90 = "common/bwd_tiles.cuh", "common/bwd_steps.cuh", "sm90/backward.cuh"
BWD, BWD90, WIDE90 = "sm80/flash_bwd.cu", "sm90/flash_bwd.cu", "sm90/flash_bwd_wide.cu"
BEFORE, AFTER = "smxx/flash_bwd_preprocess.cu", "smxx/flash_bwd_postprocess.cu"

MUTATED = {
    "sm80": case(MIXED, 64, "sm_80", causal=True),
    "sm90": case(PLAIN, 64, "sm_90", causal=True),
    "sm90-wide": case(PLAIN, 192, "sm_90", causal=True),
    "nothing": case(NOTHING, 64, "sm_90"),
    "nothing-wide": case(NOTHING, 192, "sm_90"),
}

# Case, file, what stands there, what is put there instead.
MUTANTS = [
    ("sm80", TILES, "return place < params.counts[0];", "return place < params.counts[0] - 1;"),
    ("sm80", BEFORE, "(kListed ? entry.block : place) * kBlockM", "place * kBlockM"),
    ("sm80", BEFORE, "static_cast<int64_t>(head) * m_blocks + entry.tile", "linear"),
    ("sm80", AFTER, "query_row(entry, first_query) * dqs.row", "first_query * dqs.row"),
    ("sm80", BWD, "* m_blocks + entry.tile + step.m_block", "* m_blocks + step.m_block"),
    ("sm80", STEPS, "return entry.block;", "return place;"),
    ("sm80", BWD, "rows + query_row(entry, first_query) * dos.row", "rows + first_query * dos.row"),
    ("sm90", BOTH90, "return work.tiles_of_head;", "return work.end;"),
    ("sm90", BOTH90, "* work.tiles_of_head + work.first_tile", "* work.tiles_of_head"),
    ("sm90", BOTH90, "kCluster * (kListed ? entry.block : place)", "kCluster * place"),
    ("sm90", BWD90, "row = key_row(work, row);", "row += 0;"),
    ("sm90-wide", BOTH90, "kCluster * (kListed ? entry.block : place)", "(kListed ? entry.block : place)"),
    ("sm90-wide", WIDE90, "target += key_row(work, 0) * strides.row;", "target += 0;"),
    ("nothing", BWD90, "if constexpr (kMayBeIdle) griddepcontrol_wait();", ""),
    ("nothing", BWD90, "if (kMayBeIdle && !any) return;", ""),
    ("nothing-wide", WIDE90, "if constexpr (kListed) griddepcontrol_wait();", ""),
]


@pytest.mark.parametrize("name", MUTATED)
def test_the_cases_of_the_mutants_are_right(name: str) -> None:
    check(MUTATED[name], True)


@pytest.mark.parametrize(("name", "path", "old", "new"), MUTANTS, ids=[f"{m[0]}-{n}" for n, m in enumerate(MUTANTS)])
def test_mutants(name: str, path: str, old: str, new: str) -> None:
    with pytest.raises((AssertionError, HostRunError)):
        check(MUTATED[name], True, mutation=Mutation(path, old, new))
