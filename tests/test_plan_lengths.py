"""Plans of sequences whose lengths only the device knows."""

from __future__ import annotations

import ctypes
import dataclasses

import pytest

from fa2cupy.errors import InvalidArgument
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.kernels import KernelLaunch, plan_forward
from fa2cupy.kernels.listed import Lists, Segments
from fa2cupy.kernels.params import ListedPlace, ListedPosition
from fa2cupy.kernels.tiles import SHARED_MEMORY
from fa2cupy.problem import AttentionProblem
from fa2cupy.spec import LengthsSpec, WindowSpec

H200 = DeviceInfo(0, "", (9, 0), 132, SHARED_MEMORY["sm_90"], 50 << 20)
A100 = DeviceInfo(0, "", (8, 0), 108, SHARED_MEMORY["sm_80"], 40 << 20)
HEADS, WIDTH = 4, 64


def problem_of(total: int, sequences: int, *, packed_k: bool = True, seqlen_k: int = 0) -> AttentionProblem:
    """Packed queries, and keys of as many rows, or of rows for each sequence."""
    rows = {"q": total, "out": total, "k": seqlen_k or total, "v": seqlen_k or total}
    strides = {
        name: (0 if packed_k or name in ("q", "out") else length * HEADS * WIDTH, HEADS * WIDTH, WIDTH)
        for name, length in rows.items()
    }
    strides["lse"] = (0, total, 1)
    lengths = LengthsSpec(sequences, cu_seqlens_q=True, cu_seqlens_k=packed_k, seqused_k=not packed_k)
    return AttentionProblem(
        sequences, total, rows["k"], HEADS, HEADS, WIDTH, WIDTH, "bfloat16", True, 0.125,
        tuple(strides.items()), True, lengths=lengths,
    )  # fmt: skip


def names(launches: tuple[KernelLaunch, ...]) -> list[str]:
    return [launch.name for launch in launches]


def test_a_list_is_made_and_taken() -> None:
    problem = problem_of(5000, 7)
    for device, overlaps in ((H200, True), (A100, False)):
        plan = plan_forward(problem, device)
        assert names(plan.launches) == ["list_tiles", "flash_fwd"]
        listing, main = plan.launches
        assert not listing.config.overlaps_previous and main.config.overlaps_previous == overlaps
        most = sum(-(-n // plan.tile.block_m) for n in (5000 - 6, 1, 1, 1, 1, 1, 1))
        lists = Lists.of(problem, plan.tile.block_m, plan.tile.block_n, has_keys=False)
        assert lists.tiles_of_head_q >= most and plan.workspace_bytes == lists.end
        assert main.defines["FA2_LISTED"] == main.defines["FA2_UNSEEN_ROWS"] == 1
        blocks = min(132, lists.tiles_of_head_q * HEADS) if overlaps else lists.tiles_of_head_q * HEADS
        assert main.config.grid == (blocks, 1, 1)
        workspace = 5 + len(problem.extra_arrays)
        assert {each.position for each in main.pointers} >= {4, workspace} and len(main.pointers) == (
            3 if overlaps else 7
        )


def test_maps_begin_in_front_of_their_arrays() -> None:
    plan = plan_forward(problem_of(5000, 7, packed_k=False, seqlen_k=300), H200)
    maps = {"qkvo"[each.position]: each for each in plan.launches[1].tensor_maps}
    row = 2 * HEADS * WIDTH
    assert maps["q"].spec.dims == (WIDTH, 5000, HEADS, 5001, 7) and maps["k"].spec.dims == (WIDTH, 300, HEADS, 301, 7)
    assert maps["q"].spec.strides_bytes == (row, 2 * WIDTH, row, 0)
    assert maps["k"].spec.strides_bytes == (row, 2 * WIDTH, row, 300 * row)
    assert (maps["q"].add_bytes, maps["k"].add_bytes) == (-5000 * row, -300 * row)


@pytest.mark.parametrize(
    ("total", "sequences", "most"), [(10, 3, 3), (5, 9, 5), (130, 2, 4), (128, 1, 2), (129, 2, 3), (0, 4, 0)]
)
def test_no_list_is_longer(total: int, sequences: int, most: int) -> None:
    """What sequences of a total can make at most, in tiles of 64."""
    lists = Lists.of(problem_of(total, sequences), 64, 64, has_keys=True)
    assert lists.tiles_of_head_q == lists.tiles_of_head_k == most
    assert lists.offsets["tiles_k"] - lists.offsets["tiles_q"] >= 32 * most <= lists.end - lists.offsets["tiles_k"]


def test_rows_nobody_owns_are_filled() -> None:
    """Of no sequence at all, or of no key; nothing is launched for arrays without rows."""
    none = problem_of(10, 0)
    keyless = dataclasses.replace(problem_of(10, 2), seqlen_k=0)
    for problem in (none, keyless):
        plan = plan_forward(problem, H200)
        assert names(plan.launches) == ["list_tiles"] and plan.workspace_bytes > 0
    assert plan_forward(problem_of(0, 3), H200).launches == ()


def test_rows_of_the_table_go_by_the_mean_length() -> None:
    assert plan_forward(problem_of(8192, 16), H200).tile.block_m == 128
    assert plan_forward(problem_of(8192, 2), H200).tile.block_m == 192


def test_arrays_too_long_for_a_shift() -> None:
    """A map may not begin below the lowest address that there is."""
    rows = 2**33 // (2 * HEADS * WIDTH)
    problem = problem_of(rows, 4)
    assert plan_forward(problem, H200).objection == f"q's rows take {2**33} bytes, not below 2**33"
    assert plan_forward(problem_of(rows - 1, 4), H200).objection == ""


def segments_of(batch: int, seqlen: int, seqlen_k: int = 0) -> AttentionProblem:
    """Dense rows with ids."""
    keys = seqlen_k or seqlen
    rows = {"q": seqlen, "out": seqlen, "k": keys, "v": keys}
    strides = {name: (length * HEADS * WIDTH, HEADS * WIDTH, WIDTH) for name, length in rows.items()}
    problem = dataclasses.replace(
        problem_of(seqlen, batch), strides=(*strides.items(), ("lse", (HEADS * seqlen, seqlen, 1))), seqlen_k=keys
    )
    return dataclasses.replace(problem, lengths=LengthsSpec(batch * min(seqlen, keys), segments=True))


def test_segments_are_found_first() -> None:
    """By a thread block for each row of the batch, or for some, whose tokens it takes as one line."""
    for batch, groups in ((3, 3), (1024, 1024), (1025, 513)):
        plan = plan_forward(segments_of(batch, 300), H200)
        assert names(plan.launches) == ["find_segments", "list_tiles", "flash_fwd"]
        finding, listing, main = plan.launches
        assert finding.config.grid == (groups, 1, 1) and not finding.config.overlaps_previous
        assert listing.config.overlaps_previous and main.config.overlaps_previous
        assert finding.defines["FA2_SEGMENTS"] == listing.defines["FA2_SEGMENTS"] == 1
        assert "FA2_SEGMENTS" not in main.defines and main.defines["FA2_LISTED"] == 1
    assert not any(launch.config.overlaps_previous for launch in plan_forward(segments_of(3, 300), A100).launches)


def test_who_finds_segments_is_one_binary() -> None:
    """Whatever else is asked for."""
    window = dataclasses.replace(segments_of(2, 300), causal=False, window=WindowSpec(20, 3))
    half = dataclasses.replace(segments_of(2, 300), dtype="float16", head_dim=32, head_dim_v=32)
    finding = [plan_forward(each, H200).launches[0] for each in (segments_of(2, 300), window, half)]
    assert len({tuple(launch.defines.items()) for launch in finding}) == 1 and finding[0].name == "find_segments"


def test_a_list_has_room_for_a_segment_of_each_token() -> None:
    problem = segments_of(2, 1000, 700)
    plan = plan_forward(problem, H200)
    lists = Lists.of(problem, plan.tile.block_m, plan.tile.block_n, has_keys=False)
    segments = Segments(2, lists)
    assert lists.tiles_of_head_q >= 2 * 700 and plan.workspace_bytes == segments.end < 64 * 2 * 1700
    offsets = sorted(segments.offsets.values())
    assert lists.end <= offsets[0] and set(segments.offsets) == {"found", "runs_q", "runs_k", "segments"}


def test_thread_blocks_take_several_tiles_where_there_may_be_many() -> None:
    """sm_80: of short segments there are more than usual; the usual ones have a thread block each."""
    plan = plan_forward(segments_of(2, 8192), A100)
    main = plan.launches[-1]
    assert main.defines["FA2_REPEAT"] == 1
    usual = 2 * 8192 // plan.tile.block_m * HEADS
    assert usual <= main.config.grid[0] <= 2.5 * usual
    assert "FA2_REPEAT" not in plan_forward(segments_of(2, 1), A100).launches[-1].defines


def test_tokens_are_counted_in_32_bits() -> None:
    assert plan_forward(segments_of(1 << 19, 1 << 11), A100).launches
    message = r"segment_ids of 2147483648 tokens \(batch 1048576\) are not supported on a GPU: at most 1073741824"
    with pytest.raises(InvalidArgument, match=message):
        plan_forward(segments_of(1 << 20, 1 << 11), H200)


@pytest.mark.parametrize("positioned", [False, True])
def test_lists_have_room_for_whole_runs(positioned: bool) -> None:
    """The kernels read a run of eight neighbours as if all were there."""
    entry = ctypes.sizeof(ListedPosition if positioned else ListedPlace)
    for tiles in (1, 5, 8, 9, 17):
        lists = Lists(64, 64, 100, 100, tiles, tiles, True, positioned)
        run = -(-tiles // 8) * 8 * entry
        first, second = lists.offsets["tiles_q"], lists.offsets["tiles_k"]
        assert first % 256 == second % 256 == 0 and second - first >= run and lists.end - second >= run
