"""Plans of windows: what the kernels are told of one, what is dropped and filled, who shares and orders the work."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from fa2cupy.kernels import KernelLaunch, plan_backward, plan_forward
from fa2cupy.kernels.backward import Work
from fa2cupy.kernels.params import BwdParams, BwdTmaParams, FillParams, FwdParams, FwdTmaParams
from fa2cupy.problem import AttentionProblem
from fa2cupy.spec import WindowParams
from tests.plan_cases import A100, B200, H200, backward_problem, main_launch, named, problem

DEVICES = pytest.mark.parametrize("device", [H200, A100, B200], ids=lambda device: device.name or "H200")


def block_of(launch: KernelLaunch, struct: Any) -> WindowParams:
    """What lies behind the kernel's struct."""
    return WindowParams.from_buffer_copy(launch.params[ctypes.sizeof(struct) :][: ctypes.sizeof(WindowParams)])


@DEVICES
def test_one_binary_for_all_windows(device: Any) -> None:
    """Both ends are parameters, and neither mask is compiled in."""
    launches = []
    for window, causal, ends in (((127, 0), False, (127, 0)), ((127, -1), True, (127, 0)), ((5, 300), False, (5, 300))):
        wanted = problem(1000, 1000, 128, causal=causal, window=window)
        launch = main_launch(plan_forward(wanted, device))
        assert launch.defines["FA2_BAND"] == 1 and launch.defines["FA2_CAUSAL"] == 0
        block = block_of(launch, FwdTmaParams if device is H200 else FwdParams)
        assert (block.left, block.right) == ends
        launches.append(launch)
    assert len({tuple(launch.defines.items()) for launch in launches}) == 1
    assert launches[0] == launches[1]


@DEVICES
def test_windows_that_are_none(device: Any) -> None:
    for causal, windows in ((False, [(-1, -1), (999, 299), (2000, -1)]), (True, [(-1, 0), (999, 0), (5000, -1)])):
        for window in windows:
            wanted, dense = (problem(300, 1000, causal=causal, window=each) for each in (window, None))
            assert plan_forward(wanted, device).launches == plan_forward(dense, device).launches


@DEVICES
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_leading_keys_are_dropped(device: Any, layout: str) -> None:
    """Of 1,000 keys a window of 100 leaves 300 queries the last 400, which is where the kernels' arrays begin."""
    wanted = backward_problem(300, 1000, 128, "bfloat16", True, window=(100, 0), layout=layout)
    assert (wanted.empty_rows, wanted.empty_keys) == (0, 600)
    row = dict(wanted.strides)["k"][1]
    forward = main_launch(plan_forward(problem(300, 1000, 128, causal=True, window=(100, 0), layout=layout), device))
    plan = plan_backward(wanted, device, False)
    main = named(plan, "flash_bwd")
    structs = (FwdTmaParams, BwdTmaParams) if device is H200 else (FwdParams, BwdParams)
    for launch, struct in ((forward, structs[0]), (main, structs[1])):
        shape = struct.from_buffer_copy(launch.params).shape
        assert (shape.seqlen_q, shape.seqlen_k) == (300, 400)
    if device is H200:
        maps = {each.position: each for each in forward.tensor_maps}
        assert [maps[place].add_bytes for place in (0, 1, 2)] == [0, 1200 * row, 1200 * row]
        assert [maps[place].spec.dims[1] for place in (0, 1, 2)] == [300, 400, 400]
    skipped = {pointer.position: pointer.add_bytes for pointer in main.pointers}
    assert skipped[7] == skipped[8] == 1200 * row  # dk, dv
    fills = [FillParams.from_buffer_copy(each.params) for each in plan.launches if each.name == "fill_unseen"]
    assert [fill.num_rows for fill in fills] == [600, 600]


def test_rows_without_keys_and_keys_without_queries() -> None:
    for window, causal, unseen in (((3, 2), False, (58, 0)), ((3, -1), True, (60, 0)), ((-1, 5), False, (55, 0))):
        wanted = problem(100, 40, causal=causal, window=window)
        assert (wanted.empty_rows, wanted.empty_keys) == unseen
    assert (problem(10, 90, window=(7, 2)).empty_rows, problem(10, 90, window=(7, 2)).empty_keys) == (0, 73)
    none = plan_backward(backward_problem(0, 90, 64, "bfloat16", False, window=(7, 2)), H200, False)
    assert [FillParams.from_buffer_copy(each.params).num_rows for each in none.launches] == [90, 90]


@DEVICES
def test_a_query_alone_needs_no_band(device: Any) -> None:
    """It sees all keys that are left, with the kernel that knows no window."""
    launch = main_launch(plan_forward(problem(1, 1000, window=(99, 0)), device))
    alone = main_launch(plan_forward(problem(1, 100), device))
    assert launch.defines == alone.defines and launch.config == alone.config


def test_rows_of_sm90_are_those_with_a_mask() -> None:
    for head_dim in (64, 96, 128, 192, 256):
        windowed, causal = (problem(4096, 4096, head_dim, causal=True, window=each) for each in ((512, 0), None))
        assert plan_forward(windowed, H200).tile == plan_forward(causal, H200).tile


@pytest.mark.parametrize("window", [(0, 0), (63, 0), (64, 64), (200, 10), (1000, 0), (-1, 70), (90, -1), (700, 700)])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1000, 1000), (77, 1500), (1500, 77), (129, 128), (1, 300)])
def test_steps_are_counted_right(seqlen_q: int, seqlen_k: int, window: tuple[int, int]) -> None:
    """No key block meets fewer tiles of queries than `steps` says, and none more."""
    wanted: AttentionProblem = backward_problem(seqlen_q, seqlen_k, 128, "bfloat16", False, window=window)
    tile = plan_backward(wanted, H200, False).tile
    work = Work(wanted, H200, False, tile, wanted.empty_rows)
    if work.band is None:
        return
    fewest, most = work.steps
    beside, wide = work.keys - work.rows, tile.block_n * tile.cluster
    counts, adders = [], {}
    for first in range(0, work.keys, wide):
        last = min(first + wide, work.keys) - 1
        begin = max(0, first - beside - work.band.right) // tile.block_m
        end = -(-min(work.rows, last - beside + work.band.left + 1) // tile.block_m)
        counts.append(end - begin)
        for block in range(begin, end):
            adders[block] = adders.get(block, 0) + 1
    assert 1 <= fewest <= min(counts) and max(counts) <= most
    assert set(adders) == set(range(work.m_blocks)) and max(adders.values()) <= work.adding_blocks
