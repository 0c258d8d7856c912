"""Plans of sequences whose lengths only the device knows."""

from __future__ import annotations

import dataclasses

import pytest

from fa2cupy.errors import InvalidArgument
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.kernels import KernelLaunch, plan_forward
from fa2cupy.kernels.listed import Lists
from fa2cupy.kernels.tiles import SHARED_MEMORY
from fa2cupy.problem import AttentionProblem
from fa2cupy.spec import LengthsSpec

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


def test_segments_are_to_come() -> None:
    problem = dataclasses.replace(problem_of(10, 2), lengths=LengthsSpec(10, segments=True))
    with pytest.raises(InvalidArgument, match="segment_ids is not supported on a GPU yet"):
        plan_forward(problem, H200)
