"""In which order thread blocks take tiles: how many heads are a section, in either direction."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fa2cupy.kernels import BackwardPlan, order, plan_backward, plan_forward
from fa2cupy.kernels.params import BwdTmaParams, FwdParams, FwdTmaParams
from tests.gpu.cases import Case, problem_of
from tests.plan_cases import H200, backward, backward_problem, main_launch, named, params_of, problem


def section_of(plan: BackwardPlan) -> int:
    return params_of(plan).shape.heads_per_section


@pytest.mark.parametrize(
    ("heads", "blocks_per_head", "heads_in_l2", "section"),
    [
        (64, 64, 12, 13),  # five sections: 13, 13, 13, 13, 12
        (64, 64, 100, 64),
        (16, 64, 1, 16),  # one head has not even a block for each multiprocessor
        (16, 256, 1, 4),  # four blocks for each
        (8, 10000, 0, 1),
    ],
)
def test_sections(heads: int, blocks_per_head: int, heads_in_l2: int, section: int) -> None:
    bytes_per_head = H200.l2_bytes // heads_in_l2 if heads_in_l2 else 2 * H200.l2_bytes
    assert order.heads_per_section(H200, True, heads, blocks_per_head, bytes_per_head) == section
    assert order.heads_per_section(H200, False, heads, blocks_per_head, bytes_per_head) == 1


def test_sections_count_the_heads_of_a_block() -> None:
    """With fewer query heads for each block, more of them fit L2."""
    l2 = dataclasses.replace(H200, l2_bytes=4 * 2048 * 128 * 8, sm_count=4)  # the queries of 4 heads
    plan = backward(2048, 2048, 128, (64, 16), device=l2)
    assert plan.splits == 1 and section_of(plan) == 1
    plan = backward(2048, 2048, 128, (16, 16), device=l2)
    assert plan.splits == 1 and section_of(plan) == 4


def test_turns_are_a_section_apart() -> None:
    """Deterministic: neighbouring key blocks are launched so far apart that the turn has come when it is awaited."""
    for seqlen, causal, section in ((4096, False, 9), (512, False, 64), (4096, True, 9), (16384, True, 3)):
        case = Case(seqlen, seqlen, 128, "bfloat16", causal, 4, (16, 16))
        plan = plan_backward(problem_of(case, True), H200, True, family="sm80")
        # 2 turns of 2 steps, 132 blocks at once, seqlen / 64 steps each; at most what L2 holds, or all heads
        assert section_of(plan) == section, (seqlen, causal)


@pytest.mark.parametrize(
    ("heads", "tiles_per_head", "section"),
    [
        (64, 32, 8),  # 7 heads have a tile and a half for each of 132 multiprocessors, 8 divide 64
        (16, 128, 2),
        (13, 32, 13),  # one section: no number from 7 to 13 divides 13 but 13
        (26, 64, 5),  # 4 to 8 heads would not be even: six sections, as even as can be
        (64, 17, 16),
        # up to 16 tiles per head: sections of 16 tiles, if they are shared out as evenly
        (64, 16, 1),
        (128, 8, 2),
        (256, 8, 2),
        (256, 4, 4),
        (512, 4, 4),
        (1024, 4, 4),
        (4, 16, 1),  # one tile for each thread block, whatever the order
        (256, 11, 32),  # 2 to 16 heads share worse
        (64, 4, 64),
        (16, 16, 16),
        (17, 4, 17),  # no number from 4 to 16 divides 17
    ],
)
def test_even_sections(heads: int, tiles_per_head: int, section: int) -> None:
    assert order.heads_per_even_section(H200.sm_count, True, heads, tiles_per_head) == section
    assert order.heads_per_even_section(H200.sm_count, False, heads, tiles_per_head) == 1


def largest_share(blocks: int, heads: int, tiles_per_head: int, section: int) -> float:
    """Tile by tile as `Schedule` of sm90/flash_fwd.cu and `tile_of` of common/schedule.cuh have them."""
    tiles, work = heads * tiles_per_head, [0] * blocks
    for block in range(blocks):
        for rounds in range(64):  # enough to tell
            place = block if rounds % 2 == 0 else blocks - 1 - block
            linear = rounds * blocks + place
            if linear >= tiles:
                break
            number = linear // (section * tiles_per_head)
            first = number * section
            index = (linear - first * tiles_per_head) // min(section, heads - first)
            sections_left = (heads - 1) // section - number
            m_block = tiles_per_head - 1 - index if sections_left % 2 == 0 else index
            work[block] += m_block + 1
    return max(work) / (sum(work) / blocks)


@pytest.mark.parametrize(
    ("heads", "tiles_per_head", "section"),
    [
        (256, 4, 4),
        (256, 11, 2),
        (256, 11, 32),
        (64, 16, 1),
        (26, 7, 5),
        (13, 16, 13),
        (4, 16, 1),
        (3, 1, 2),
        (140, 1, 7),
        (2500, 4, 4),
    ],
)
def test_largest_share(heads: int, tiles_per_head: int, section: int) -> None:
    blocks = min(H200.sm_count, heads * tiles_per_head)
    expected = largest_share(blocks, heads, tiles_per_head, section)
    growing = np.arange(tiles_per_head, 0, -1)
    found = order._largest_share(H200.sm_count, heads, section, growing, both_ways=True)
    assert found == pytest.approx(expected, rel=1e-12)


def test_sections_of_either_kernel() -> None:
    wanted = problem(4096, 4096, 128, causal=True, heads=(64, 64), batch=1)
    for family, sms, heads in (("sm80", 8, 13), ("sm90", 132, 8)):  # 12 heads fit the cache; 7 fill the GPU
        small = dataclasses.replace(H200, l2_bytes=12 * 4 * 4096 * 128, sm_count=sms)
        launch = main_launch(plan_forward(wanted, small, family=family))
        params = (FwdTmaParams if family == "sm90" else FwdParams).from_buffer_copy(launch.params)
        assert params.shape.heads_per_section == heads
    assert main_launch(plan_forward(dataclasses.replace(wanted, causal=False), H200)).params != launch.params


def test_sections_of_the_backward_of_sm90() -> None:
    """As even as the forward's; deterministic causal ones are longer, so that neighbours do not start together."""
    for seqlen, section, turns in ((512, 64, 64), (4096, 8, 32), (16384, 2, 16)):
        wanted = backward_problem(seqlen, seqlen, 128, "bfloat16", True, 4, (16, 16))
        sections = [
            BwdTmaParams.from_buffer_copy(named(plan_backward(wanted, H200, deterministic), "flash_bwd").params)
            for deterministic in (False, True)
        ]
        assert [params.shape.heads_per_section for params in sections] == [section, turns], seqlen


@pytest.mark.parametrize(
    ("workers", "heads", "tiles_of_head", "tiles_of_sequence", "section"),
    [
        (132, 16, 150, 50, 4),  # 4.2 tiles for each multiprocessor
        (132, 16, 150, 31, 16),  # short sequences
        (132, 16, 10_000, 50, 1),
        (132, 16, 20, 50, 16),
        (132, 7, 150, 50, 7),  # 4, 5 and 6 do not divide 7
        (132, 13, 300, 50, 2),  # nor anything from 2 to 4 13
    ],
)
def test_sections_of_lists(workers: int, heads: int, tiles_of_head: int, tiles_of_sequence: int, section: int) -> None:
    assert order.heads_per_listed_section(workers, heads, tiles_of_head, tiles_of_sequence) == section


def test_what_a_band_meets() -> None:
    """Beside a loop over all pairs."""
    band = order.Banded(5, 3, 23, 31, 4, 2, 10)
    for number, met in enumerate(band.met()):
        rows = range(5 * number, min(5 * number + 5, 23))
        assert met == len({j // 3 for i in rows for j in range(31) if i - 4 <= j <= i + 2})
    assert band.bytes_at_once(2) == (10 + 6) * 10 and band.bytes_at_once(100) == 310


@pytest.mark.parametrize(
    ("seqlen", "batch", "left", "forward", "backward"),
    [
        (32768, 1, 4096, 16, 8),  # 256 tiles a head: by one head the short ones of all are the same multiprocessors'
        (8192, 2, 4096, 1, 1),  # by 2 to 8 heads
        (8192, 2, 1024, 1, 1),
    ],
)
def test_the_ends_of_a_band_are_shared_out(seqlen: int, batch: int, left: int, forward: int, backward: int) -> None:
    case = Case(seqlen, seqlen, 128, "bfloat16", True, batch, (16, 16), window=(left, 0))
    launch = main_launch(plan_forward(problem_of(case, False), H200))
    assert FwdTmaParams.from_buffer_copy(launch.params).shape.heads_per_section == forward
    launch = named(plan_backward(problem_of(case, True), H200, False), "flash_bwd")
    assert BwdTmaParams.from_buffer_copy(launch.params).shape.heads_per_section == backward


def test_few_heads_of_a_band_where_more_do_not_fit() -> None:
    band = order.Banded(128, 128, 32768, 32768, 4096, 0, 512)
    assert order.heads_per_banded_section(H200, 132, 16, band) == 16
    assert order.heads_per_banded_section(dataclasses.replace(H200, l2_bytes=16 << 20), 132, 16, band) == 1
