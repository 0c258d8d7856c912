"""Packed sequences, used lengths and left padding in the main kernels, run on the CPU under three schedules."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fa2cupy.kernels import order, plan_forward
from fa2cupy.kernels.params import FwdTmaParams
from tests.host.build import Mutation
from tests.host.kernel_run import Tensor, device, run_plan
from tests.host.lengths import (
    Lengths,
    LengthsCase,
    check,
    execute,
    judge,
    judge_memory,
    prepare,
    prepared_of,
    problem_of,
    starts,
)
from tests.host.run import HostRunError, Schedule

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


# Of each family a third of the lengths at a time.
@pytest.mark.parametrize(
    ("arch", "family", "head_dim", "head_dim_v"),
    [
        ("sm_80", None, 64, None),
        ("sm_86", None, 128, None),
        ("sm_100", None, 40, 72),
        ("sm_90", "sm90", 64, None),
        ("sm_90", "sm90", 128, None),
        ("sm_90", "sm90", 192, 128),
        ("sm_90", "sm90", 256, None),
        ("sm_90", "sm80", 96, None),
    ],
)
def test_forward(arch: str, family: str | None, head_dim: int, head_dim_v: int | None) -> None:
    for case in cases(arch, head_dim, head_dim_v, family=family)[head_dim // 64 % 3 :: 3]:
        assert family in (None, prepared_of(case, False).plan.family)
        check(case, False)


def test_unaligned() -> None:
    for case in cases("sm_80", 59, pad=1)[1::5]:
        check(case, False)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim, head_dim_v", [(40, None), (59, None), (96, None), (192, 128), (256, None)])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100"])
def test_every_kernel(arch: str, head_dim: int, head_dim_v: int | None) -> None:
    for case in cases(arch, head_dim, head_dim_v):
        check(case, False)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("arch", "head_dim"), [("sm_80", 64), ("sm_90", 64), ("sm_90", 128)])
def test_equal_lengths_have_the_bits_of_dense_ones(arch: str, head_dim: int, causal: bool) -> None:
    batch, seqlen = 3, 150
    packed = starts(*[seqlen] * batch)
    case = LengthsCase(Lengths(450, 450, batch, packed, packed, causal=causal), head_dim, heads=(2, 1), arch=arch)
    prepared = prepare(case, False)
    execute(prepared)
    tensors = prepared.tensors
    sparse = problem_of(case, tensors)
    strides = {name: (seqlen * row, row, head) for name, (_, row, head) in sparse.strides if name != "lse"}
    strides["lse"] = (2 * seqlen, seqlen, 1)
    dense = dataclasses.replace(
        sparse, seqlen_q=seqlen, seqlen_k=seqlen, strides=tuple(strides.items()), lengths=None
    )  # fmt: skip
    out = Tensor(tensors["out"].shape, tensors["out"].strides, case.dtype)
    lse = Tensor((batch, 2, seqlen), strides["lse"], "float32")
    pointers = (*(tensors[name].pointer for name in "qkv"), out.pointer, lse.pointer)
    plan = plan_forward(dense, device(arch))
    assert plan.tile == prepared.plan.tile
    run_plan(plan, pointers, Tensor((0,), (1,), "float32"), Schedule.RANDOM)
    assert np.array_equal(out.values, tensors["out"].values)
    assert np.array_equal(lse.values, tensors["lse"].values.reshape(2, batch, seqlen).swapaxes(0, 1))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_one_plan_serves_all_lengths_and_wrong_ones_stay_inside(arch: str) -> None:
    one = LengthsCase(LENGTHS["causal"], arch=arch)
    lengths = dataclasses.replace(one.lengths, cu_seqlens_q=starts(*[65] * 8), cu_seqlens_k=starts(*[1, 174] * 4))
    prepared, other = prepare(one, False), prepare(dataclasses.replace(one, lengths=lengths), False)
    assert prepared.plan == other.plan
    for each in (prepared, other):
        execute(each)
        judge(each)
    for wrong in ((0, 700, 0, 700, 3, 700, 1, 1, 700), (-5, 1 << 30, -9, 3, 2, 1, -1, -(1 << 31), 99), (700,) * 9):
        array = np.array(wrong, np.int32)
        for arrays in ({"cu_seqlens_q": array}, {"cu_seqlens_k": array}, {"cu_seqlens_q": array[::-1].copy()}):
            execute(prepared, arrays=prepared.arrays | arrays)
            judge_memory(prepared)


VISIT, ORDER, TILE90, FWD90 = "common/visit.cuh", "common/schedule.cuh", "sm90/tile.cuh", "sm90/flash_fwd.cu"
OF_MUTANTS = {
    "sm80": LengthsCase(LENGTHS["gaps"], heads=(3, 3), arch="sm_80"),
    "sm90": LengthsCase(LENGTHS["gaps"], heads=(4, 2)),
    "sm80-dense": LengthsCase(LENGTHS["keypad"], arch="sm_80"),
    "sm90-dense": LengthsCase(LENGTHS["keypad"]),
    "sm90-band": LengthsCase(LENGTHS["window"], 128),
}
# Case, file, what stands there, what is put there instead.
MUTANTS = [
    ("sm80", VISIT, "return tile.first_q + query;", "return query;"),
    ("sm80", VISIT, "return tile.first_k + key;", "return key;"),
    ("sm80-dense", VISIT, "return tile.batch_q;", "return 0;"),
    ("sm80-dense", VISIT, "return tile.batch_k;", "return 0;"),
    ("sm80", ORDER, "count - first), index", "kListedRun), index"),
    ("sm90", ORDER, "first + kListedRun > count", "first >= count"),
    ("sm90", ORDER, "if (linear >= count * heads) return {0, -1};", "if (linear >= count) return {0, -1};"),
    ("sm90", TILE90, "min(query, tile.seqlen_q - 1)", "min(query + 1, tile.seqlen_q - 1)"),
    ("sm90", TILE90, "min(key, tile.seqlen_k - 1)", "key - 1"),
    ("sm90", TILE90, "min(query, tile.seqlen_q - 1)", "query"),
    ("sm90-band", FWD90, "if (is_there(work, work.m_block * kBlockM + group_row))", ""),
    ("sm90", TILE90, "tile.first_k + tile.seqlen_k, tile.batch_k", "tile.first_k + tile.seqlen_k + 1, tile.batch_k"),
    ("sm90-dense", TILE90, "tile.first_q + tile.seqlen_q, tile.batch_q", "tile.first_q + tile.seqlen_q, 0"),
    ("sm90-dense", TILE90, "tile.first_k + tile.seqlen_k, tile.batch_k", "tile.first_k + tile.seqlen_k, 0"),
    ("sm90", FWD90, "if (kListed) lse += query_row(work, 0) * params.lse_strides.row;", ""),
    (
        "sm90-band",
        VISIT,
        "params.left, params.right};\n  } else {\n    return {tile.first_q",
        "0, 0};\n  } else {\n    return {tile.first_q",
    ),
]


@pytest.fixture
def sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one key head each, for sequences of any length."""
    monkeypatch.setattr(order, "_LONG_SEQUENCE", 0)
    monkeypatch.setattr(order, "_LISTED_TILES", 1e-9)


RUNS = Lengths(780, 390, 6, starts(*[130] * 6), starts(*[65] * 6))  # more than eight tiles
SECTIONED = [("causal", 64, (4, 4)), ("gaps", 128, (6, 2)), ("window", 64, (3, 1)), ("more-than-tokens", 64, (3, 3))]


@pytest.mark.parametrize(("name", "head_dim", "heads"), SECTIONED)
@pytest.mark.usefixtures("sections")
def test_sections_of_heads(name: str, head_dim: int, heads: tuple[int, int]) -> None:
    case = LengthsCase(LENGTHS[name], head_dim, heads=heads)
    prepared = prepare(case, False)
    (launch,) = (each for each in prepared.plan.launches if each.name == "flash_fwd")
    assert FwdTmaParams.from_buffer_copy(launch.params).shape.heads_per_section == max(1, heads[0] // heads[1])
    check(case, False, schedules=tuple(Schedule))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("count - 1 - entry : entry", "count - entry : entry"),
        ("first_head + index / neighbours", "index / neighbours"),
        ("place = linear - first_head * count;", "place = linear;"),
        ("first + kListedRun > count || params.shape.heads_per_section < heads", "first + kListedRun > count"),
    ],
)
@pytest.mark.usefixtures("sections")
def test_mutants_of_sections(old: str, new: str) -> None:
    with pytest.raises((AssertionError, HostRunError)):
        check(LengthsCase(RUNS, 64, heads=(4, 4)), False, mutation=Mutation(ORDER, old, new))


@pytest.mark.usefixtures("sections")
def test_runs_within_sections() -> None:
    check(LengthsCase(RUNS, 64, heads=(4, 4)), False)


@pytest.mark.parametrize("name", OF_MUTANTS)
def test_the_cases_of_the_mutants_are_right(name: str) -> None:
    check(OF_MUTANTS[name], False)


@pytest.mark.parametrize(("name", "path", "old", "new"), MUTANTS, ids=[f"{m[0]}-{n}" for n, m in enumerate(MUTANTS)])
def test_mutants(name: str, path: str, old: str, new: str) -> None:
    with pytest.raises((AssertionError, HostRunError)):
        check(OF_MUTANTS[name], False, mutation=Mutation(path, old, new))
