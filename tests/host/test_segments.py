"""Segments: found and listed on the device (smxx/find_segments.cu), and computed by every family, run on the CPU.

Where they are shorter than a tile they can be so many that a backward has no room for a tile of each: then those of few
keys are computed by thread blocks of their own, whole (kShort); and a forward's take several tiles each (kRepeat).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np
import pytest

from fa2cupy import sequences
from fa2cupy.kernels import Plan, listed
from tests.host import build
from tests.host.build import Mutation
from tests.host.lengths import Lengths, LengthsCase, check, execute, judge_memory, prepare, prepared_of, segments_of
from tests.host.run import HostRunError, Schedule
from tests.host.test_list_tiles import OF_SEGMENTS, Listing, Made, barriers_of, expected, filled, is_caught, make

SOURCE, LISTING, SEQUENCES = "smxx/find_segments.cu", "smxx/list_tiles.cu", "common/sequences.cuh"

# Rows of the batch; of each segment (queries, keys, padding behind both).
PLAIN = (((70, 70), (1, 1), (130, 130, 3), (40, 40)), ((5, 5, 60), (129, 129)), ())
MIXED = (((70, 90), (0, 33), (130, 40, 2), (65, 0)), ((1, 1),), ((200, 260, 5), (3, 200)))
MANY = (tuple((n % 3, n % 4, n % 7 == 0) for n in range(1600)), tuple((1, 1) for _ in range(300)))
TINY = (tuple((1 + n % 5, 1 + n % 5, n % 11 == 0) for n in range(60)), ((30, 30), (150, 6), *((2, 3),) * 20, (20, 20)))
USED = {"seqused_q": (100, 0, 150), "seqused_k": (260, 5, 200), "leftpad_k": (20, 0, 0)}

LENGTHS = {
    "plain": segments_of(*PLAIN),
    "causal": segments_of(*PLAIN, causal=True),
    "mixed": segments_of(*MIXED, causal=True),
    "other-order": segments_of(*MIXED, reverse_keys=True, window=(70, 3)),
    "window": segments_of(*PLAIN, window=(40, 20)),
    "used": segments_of(*MIXED, used=USED, causal=True),
    "nothing": segments_of(((5, 0), (0, 7)), ((0, 0, 9),)),
    # One id in each row of the batch, the same in all.
    "one": Lengths(600, 300, 3, segment_ids=(((7,) * 600,) * 3, ((7,) * 300,) * 3)),
    "many": segments_of(*MANY),
    "tiny": segments_of(*TINY, causal=True),
}


def check_lists(
    listing: Listing, schedule: Schedule, mutation: Mutation | None = None, plant: str | None = None
) -> None:
    """AssertionError unless exactly the tiles of all segments are listed, each once, and rows of none are filled; with
    `short_keys` none of those that are put apart, and these by themselves, if there is no room for all.
    """
    made = make(listing, schedule, mutation, plant)
    wanted = expected(listing)
    lists, width = made.lists, listing.short_keys
    if width and (len(wanted[0]) > lists.tiles_of_head_q or len(wanted[1]) > lists.tiles_of_head_k):
        apart = sorted({tile[:6] for tile in wanted[1] if tile[3] <= width})
        first = [(*each, 0, each[4] * lists.rows_q + each[0]) for each in apart]
        assert made.shorts is not None and sorted(made.shorts) == sorted(first)
        got = (made.queries, made.keys)
        for tiles, all_tiles in zip(got, wanted, strict=True):
            assert sorted(each[:7] for each in tiles) == sorted(each[:7] for each in all_tiles if each[3] > width)
        numbers = sorted(tile for *_, tile in made.queries)
        assert numbers == list(range(len(numbers))) and len(numbers) <= lists.tiles_of_head_q
        first_tiles = {tile[:6]: tile[7] for tile in made.queries if tile[6] == 0}
        assert all(first_tiles[tile[:6]] == tile[7] for tile in made.keys) and len(made.keys) <= lists.tiles_of_head_k
    else:
        assert not made.shorts
        for got_tiles, tiles in list(zip((made.queries, made.keys), wanted, strict=True))[: 1 + listing.backward]:
            assert len(got_tiles) == len(tiles) and set(got_tiles) == set(tiles)
            if listing.in_order:
                assert got_tiles == list(tiles)
    for name, values in made.results.items():
        assert np.array_equal(values, filled(listing.lengths, name, values.shape), equal_nan=True), name


LISTINGS = {name: Listing(lengths, n % 2 == 1, n % 4 == 3) for n, (name, lengths) in enumerate(LENGTHS.items())}
LISTINGS |= {
    "long": Listing(segments_of(((900, 900),) * 10)),  # tokens that are looked at in two rounds
    "no-room-for-keys": Listing(segments_of(((64, 1),) * 20), True, short_keys=64),
    "tiny-apart": Listing(LENGTHS["tiny"], True, True, short_keys=30),
    "many-apart": Listing(LENGTHS["many"], True, short_keys=64),
    "mixed-apart": Listing(segments_of(*MIXED, *TINY, causal=True), True, short_keys=64),
    "used-positioned": Listing(LENGTHS["used"], True, positioned=True),
    "tiny-apart-positioned": Listing(LENGTHS["tiny"], True, short_keys=30, positioned=True),
    "plain-has-room": Listing(LENGTHS["plain"], True, short_keys=64),
}


@pytest.mark.parametrize("name", LISTINGS)
def test_lists(name: str) -> None:
    for schedule in Schedule:
        check_lists(LISTINGS[name], schedule)


@pytest.mark.parametrize("groups", [1, 2])
def test_several_rows_are_a_group(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more rows than `listed._MOST_GROUPS`; equal ids of neighbouring rows are not one segment."""
    monkeypatch.setattr(listed, "_MOST_GROUPS", groups)
    for name in ("mixed", "used", "one", "tiny-apart"):
        check_lists(LISTINGS[name], Schedule.RANDOM)


def found_of(made: Made) -> set[tuple[int, ...]]:
    """The sequences that tiles are of."""
    return {tile[:6] for tile in made.queries}


@pytest.mark.parametrize("seed", range(3))
def test_ids_that_come_again(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are wrong; the first run of an id counts, as on the CPU, and no row is anybody's twice."""
    monkeypatch.setattr(listed, "_MOST_GROUPS", 2)
    rng = np.random.default_rng(seed)
    ids = [np.repeat(rng.integers(-1, 6, (3, 100)), rng.integers(1, 6, 100), 1) for _ in "qk"]
    lengths = dataclasses.replace(LENGTHS["one"], rows_q=ids[0].shape[1], rows_k=ids[1].shape[1], segment_ids=tuple(
        tuple(map(tuple, side.tolist())) for side in ids
    ))  # fmt: skip
    for schedule in Schedule:
        found = found_of(make(Listing(lengths), schedule))
        table = sequences.sequences(lengths.arrays, 3, lengths.rows_q, lengths.rows_k)
        assert found == {(s.first_q, s.length_q, s.first_k, s.length_k, s.batch_q, s.batch_k) for s in table}


def test_any_ids_stay_inside() -> None:
    """More runs than are looked up together, of ids that come again and are any number: nobody's row is taken twice."""
    rng = np.random.default_rng(5)
    ids = [rng.choice([-(1 << 31), -1, 0, 1, 5, (1 << 31) - 1, *range(2000, 3000)], (2, 1500)) for _ in "qk"]
    empty = Lengths(1500, 1500, 0, segment_ids=(((-1,) * 1500,) * 2,) * 2)
    arrays = dict(zip(("segment_ids_q", "segment_ids_k"), (np.array(x, np.int32) for x in ids), strict=True))
    made = make(Listing(empty, True, blocks=(16, 16)), Schedule.RANDOM, arrays=arrays)
    assert made.queries and len(made.queries) <= made.lists.tiles_of_head_q
    for first in (0, 2):
        taken = np.zeros((2, 1500), int)
        for sequence in found_of(made):
            start, length, batch = sequence[first], sequence[first + 1], sequence[4]
            taken[batch, start : start + length] += 1
            kind = ids[first // 2][batch, start : start + length]
            assert length > 0 and start + length <= 1500 and (kind == kind[0]).all() and kind[0] >= 0
        assert taken.max() == 1


def names(plan: Plan) -> list[str]:
    return [launch.name for launch in plan.launches]


def case(name: str, head_dim: int, arch: str, **more: object) -> LengthsCase:
    return LengthsCase(LENGTHS[name], head_dim, arch=arch, seed=head_dim, **more)  # type: ignore[arg-type]


FORWARD = (
    case("plain", 64, "sm_80"),
    case("mixed", 128, "sm_86", dtype="float16", heads=(4, 2)),
    case("used", 40, "sm_100", head_dim_v=72),
    case("tiny", 64, "sm_80", heads=(4, 2)),
    case("window", 64, "sm_90", heads=(3, 3), heads_first=True, pad=8),
    case("other-order", 128, "sm_90", dtype="float16"),
    case("used", 192, "sm_90", head_dim_v=128),
    case("tiny", 96, "sm_90"),
    case("causal", 256, "sm_90"),
    case("nothing", 64, "sm_90"),
    case("mixed", 64, "sm_90", sinks="float32"),
    case("window", 64, "sm_86", scores=("alibi of batch", "softcap")),
    case("used", 64, "sm_90", dropout=(0.3, 4)),
)
BACKWARD = (
    case("causal", 64, "sm_80"),
    case("mixed", 59, "sm_86", deterministic=True),
    case("window", 128, "sm_100", heads=(4, 2), dlse=True),
    case("tiny", 64, "sm_80", heads=(4, 2), dtype="float16", dlse=True),
    case("tiny", 128, "sm_86", deterministic=True, heads_first=True, pad=8),
    case("tiny", 59, "sm_80"),
    case("other-order", 64, "sm_90", heads=(4, 2)),
    case("used", 128, "sm_90", deterministic=True, dlse=True),
    case("plain", 192, "sm_90", head_dim_v=128),
    case("mixed", 256, "sm_90", heads=(2, 2)),
    case("tiny", 64, "sm_90", deterministic=True, dlse=True),
    case("tiny", 256, "sm_90", heads=(4, 2)),
    case("nothing", 64, "sm_90"),
    case("tiny", 64, "sm_90", sinks="bfloat16", dlse=True, scores=("alibi of batch",)),
    case("mixed", 128, "sm_80", sinks="float32", dlse=True, scores=("softcap",)),
    case("tiny", 64, "sm_80", dropout=(0.3, 4), dlse=True),
    case("used", 128, "sm_90", dropout=(0.3, 4)),
)


def some(count: int, quick: Collection[int]) -> list[Any]:
    """Numbers below count; all but the quick ones are for `make test-all`."""
    return [pytest.param(n, marks=[] if n in quick else pytest.mark.slow) for n in range(count)]


@pytest.mark.parametrize("number", some(len(FORWARD), (1, 2, 3, 4, 6, 9, 10)))
def test_forward(number: int) -> None:
    one = FORWARD[number]
    plan = prepared_of(one, False).plan
    assert names(plan) == ["find_segments", "list_tiles", "flash_fwd"]
    several = plan.family == "sm80" and one.lengths is LENGTHS["tiny"]
    main = plan.launches[-1]
    if several:
        assert main.defines["FA2_REPEAT"] and main.config.grid[0] < one.heads[0] * one.lengths.sequences
    check(one, False, schedules=tuple(Schedule) if number % 3 == 0 else (Schedule(number % 3),))


@pytest.mark.parametrize("number", some(len(BACKWARD), (1, 2, 3, 6, 7, 9, 10, 12, 13)))
def test_backward(number: int) -> None:
    """Where tiles have no room, their thread blocks take several segments each."""
    one = BACKWARD[number]
    plan = prepared_of(one, True).plan
    assert names(plan)[:5] == [
        "find_segments",
        "list_tiles",
        "flash_bwd_preprocess",
        "flash_bwd",
        "flash_bwd_postprocess",
    ]
    if one.lengths is LENGTHS["tiny"]:
        assert names(plan)[5:7] == ["flash_bwd_preprocess", "flash_bwd"] and plan.launches[6].defines["FA2_SHORT"]
        assert plan.launches[6].config.grid[0] < one.heads[1] * one.lengths.sequences
    check(one, True, schedules=tuple(Schedule) if number % 3 == 0 else (Schedule(number % 3),))


@pytest.mark.parametrize("arch, backward", [("sm_80", False), ("sm_90", False), ("sm_80", True), ("sm_90", True)])
def test_one_plan_serves_all_ids_and_any_stay_inside(arch: str, backward: bool) -> None:
    """Whatever the ids are; and a plan with room for few tiles has thread blocks for the others."""
    one = LengthsCase(LENGTHS["tiny"], 64, arch=arch, deterministic=True)
    prepared = prepare(one, backward)
    shape = prepared.arrays["segment_ids_q"].shape, prepared.arrays["segment_ids_k"].shape
    long = tuple(tuple(map(tuple, (np.arange(b * n).reshape(b, n) // 60).tolist())) for b, n in shape)
    other = LengthsCase(dataclasses.replace(one.lengths, segment_ids=long), 64, arch=arch, deterministic=True)
    count = len(other.lengths._segments)
    other = dataclasses.replace(other, lengths=dataclasses.replace(other.lengths, sequences=count))
    assert prepare(other, backward).plan == prepared.plan
    check(other, backward, schedules=(Schedule.RANDOM,))
    rng = np.random.default_rng(1)
    for highest in (0, 3, 1 << 30):
        wrong = {name: rng.integers(-1, highest + 1, x.shape).astype(np.int32) for name, x in prepared.arrays.items()}
        execute(prepared, arrays=wrong)
        judge_memory(prepared)


# Listing, what stands there, what is put there instead; in who finds them, who lists them, or the header.
MUTANTS = [
    ("used", "run.first <= place && place", "place"),
    ("used", "place < run.first + run.seqlen ?", "true ?"),
    ("one", "token % line.side.rows == 0 || ", ""),
    ("one", "line.begin < first && first < line.end ? line.id_of(first - 1) : -1", "-1"),
    ("plain", "last = __shfl_sync(0xffffffffu, ids[i], 31);", ""),
    ("one", "run + 1 < count ? runs[run + 1].start : end", "run + 1 < count ? runs[run + 1].start : end - 1"),
    ("long", "queries.count += smem.sum_q", "queries.count = smem.sum_q"),
    ("many", "place += __popc(starts[i]);", ""),
    ("many", "(smem.id[run] == id && smem.row[run] == row)", "true"),
    ("many", "found += smem.sum_q;", "found = smem.sum_q;"),
    ("mixed", "keys.runs[met].start - row * keys.side.rows", "keys.runs[met].start"),
    ("other-order", "keys.runs[met].met = seqlen_q;", "keys.runs[met].met = seqlen_k;"),
    ("mixed", "params.found + 3 * blockIdx.x", "params.found"),
    ("tiny-apart", "tiles_q <= params.tiles_of_head_q && tiles_k", "true || tiles_k"),
    ("no-room-for-keys", "tiles_k <= params.tiles_of_head_k;", "true;"),
    ("plain-has-room", "smem.apart = !has_room;", "smem.apart = 1;"),
    ("tiny-apart", "sequence.keys.seqlen <= params.short_keys", "sequence.keys.seqlen < params.short_keys"),
    ("many-apart", "listed += smem.sum;", ""),
    ("tiny-apart", "sequence.batch * params.rows_q + queries.first", "queries.first"),
    ("mixed", "group * params.rows_of_group * min(", "group * max("),
    ("mixed", "own[before + half].start <= at", "own[before + half].start < at"),
    ("causal", "start + unseen_rows({0, until", "start; unseen_rows({0, until"),
    ("mixed", "{0, max(met, 0)}, reach)", "{0, until - start}, reach)"),
    ("used", "params.found[3 * group + side]", "params.found[3 * group + 1]"),
]


@pytest.mark.parametrize("number", some(len(MUTANTS), range(0, len(MUTANTS), 2)))
def test_mutants(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name, old, new = MUTANTS[number]
    monkeypatch.setattr(listed, "_MOST_GROUPS", 2)
    (path,) = (each for each in (SOURCE, LISTING) if old in (build.source_module.root() / each).read_text())
    with pytest.raises((AssertionError, HostRunError)):
        check_lists(LISTINGS[name], Schedule.LOWEST_FIRST, Mutation(path, old, new))


SINKS = "smxx/flash_bwd_sinks.cu"
SINKS_FORWARD = case("mixed", 64, "sm_80", sinks="float32")
SINKS_BACKWARD = LengthsCase(
    segments_of(*MIXED, *TINY, causal=True), 64, arch="sm_100", sinks="float32", dlse=True, seed=3
)  # fmt: skip
# Case, whether backward, file, what stands there, what is put there instead.
SINKS_MUTANTS = [
    (SINKS_FORWARD, False, SOURCE, "line.id_of(token) < 0 ? kNobodys : 0", "0"),
    (SINKS_FORWARD, False, LISTING, "met < 0 ? until : start", "until"),
    (SINKS_BACKWARD, True, SINKS, "if (kSegments) sum += sum_of_shorts(params, head);", ""),
    (SINKS_BACKWARD, True, SINKS, "start % params.rows_q, unseen", "start, unseen"),
    (SINKS_BACKWARD, True, SINKS, "{0, runs[own].met}, reach)", "{0, 0}, reach)"),
    (
        SINKS_BACKWARD,
        True,
        "smxx/flash_bwd_preprocess.cu",
        "logit_sum_before += logit_sum;",
        "logit_sum_before = logit_sum;",
    ),
    (SINKS_BACKWARD, True, "common/bwd_tiles.cuh", "* params.tiles_of_head_k + place;", "+ place;"),
]


def test_the_cases_of_the_mutants_of_sinks_are_right() -> None:
    check(SINKS_FORWARD, False)
    check(SINKS_BACKWARD, True)


@pytest.mark.parametrize("number", some(len(SINKS_MUTANTS), (0, 2, 5)))
def test_mutants_of_sinks(number: int) -> None:
    one, backward, path, old, new = SINKS_MUTANTS[number]
    with pytest.raises((AssertionError, HostRunError)):
        check(one, backward, schedules=(Schedule.LOWEST_FIRST,), mutation=Mutation(path, old, new))


def test_every_barrier_is_needed() -> None:
    """Left out, each is caught."""
    names = ("mixed-apart", "tiny-apart", "many-apart", "many")
    checks = [lambda schedule, plant, name=name: check_lists(LISTINGS[name], schedule, plant=plant) for name in names]
    barriers = {plant: line for plant, line in barriers_of(LISTING).items() if line in OF_SEGMENTS}
    assert len(barriers) == len(OF_SEGMENTS)
    unseen = {
        plant: line for plant, line in {**barriers_of(SOURCE), **barriers}.items() if not is_caught(plant, checks)
    }
    assert not unseen, f"left out, and nothing showed: {unseen}"
