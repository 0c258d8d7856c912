"""Plans with sinks: which kernels are told of them, what they are given, and that no row has anything against them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fa2cupy.kernels import KernelLaunch, Plan, plan_backward, plan_forward
from fa2cupy.kernels.params import BwdParams, FillParams, FwdTmaParams, SinksBwdParams, composed
from fa2cupy.problem import AttentionProblem
from fa2cupy.spec import DlseParams, SinksGradientParams, SinksParams, SinksSpec, SoftmaxSpec
from tests.plan_cases import A100, H200, backward_problem, problem

FORWARD, LSE_ONLY, GRADIENT = SinksSpec(True), SinksSpec(True, True), SinksSpec(False, True, True)
PREPROCESS, OWN = "smxx/flash_bwd_preprocess.cu", "smxx/flash_bwd_sinks.cu"


def backward_of(*sizes: Any, sinks: SinksSpec, dlse: bool = False, **options: Any) -> AttentionProblem:
    base = backward_problem(*sizes, 64, "bfloat16", True, **options)
    softmax = SoftmaxSpec((1, 2, 3), base.empty_rows) if dlse else None
    return dataclasses.replace(base, sinks=sinks, softmax=softmax)


def told(plan: Plan) -> set[str]:
    return {each.source for each in plan.launches if "FA2_SINKS" in each.defines}


def pointer_at(launch: KernelLaunch, offset: int) -> tuple[int, int]:
    """Position among the call's pointers, bytes added."""
    ((position, added),) = {(each.position, each.add_bytes) for each in launch.pointers if each.offset == offset}
    return position, added


def test_forward() -> None:
    plan = plan_forward(dataclasses.replace(problem(300, 200, causal=True), sinks=FORWARD), H200)
    assert told(plan) == {"sm90/flash_fwd.cu", "smxx/fill_unseen.cu"}
    for launch, base in zip(plan.launches, (FwdTmaParams, FillParams), strict=True):
        struct = composed(base, (SinksParams,))
        assert pointer_at(launch, struct.sinks.offset) == (5, 0)  # behind q, k, v, out, lse
        assert struct.from_buffer_copy(launch.params).sinks_are_16_bit == 1


@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 192, 256])
def test_every_row_takes_them(head_dim: int) -> None:
    for device in (H200, A100):
        for sizes in ((100, 100), (4096, 4096)):
            plain = problem(*sizes, head_dim, causal=True)
            assert (
                plan_forward(dataclasses.replace(plain, sinks=FORWARD), device).tile is plan_forward(plain, device).tile
            )


def test_a_backward_whose_lse_has_them() -> None:
    plain = plan_backward(backward_of(300, 200, sinks=LSE_ONLY), H200, False)
    assert told(plain) == set()


@pytest.mark.parametrize("dlse", [False, True])
def test_gradient(dlse: bool) -> None:
    plan = plan_backward(backward_of(300, 200, sinks=GRADIENT, dlse=dlse), H200, False)
    without = plan_backward(backward_of(300, 200, sinks=LSE_ONLY, dlse=dlse), H200, False)
    assert told(plan) == {PREPROCESS, OWN}
    preprocess, *_, own = plan.launches
    assert own.source == OWN and own.config.grid == (4, 1, 1) and not own.config.overlaps_previous
    blocks = (SinksGradientParams, *((DlseParams,) if dlse else ()))
    structs = composed(BwdParams, blocks), composed(SinksBwdParams, blocks)
    names = ["dout", "q", "k", "v", "out", "lse", "dq", "dk", "dv", "dsinks", "sinks", *(["dlse"] if dlse else [])]
    sums = {pointer_at(each, struct.sink_sums.offset) for each, struct in zip((preprocess, own), structs, strict=True)}
    assert len(sums) == 1  # the one writes where the other reads
    ((position, start),) = sums
    assert position == len(names) and plan.workspace_bytes == without.workspace_bytes
    tiles = -(-200 // plan.tile.block_m) * 4 * 2  # of 4 heads and 2 rows of the batch
    assert plan.workspace_bytes >= start + tiles * 8 * 4
    for each, struct in zip((preprocess, own), structs, strict=True):
        assert pointer_at(each, struct.sinks.offset) == (names.index("sinks"), 0)
        assert pointer_at(each, struct.dsinks.offset) == (names.index("dsinks"), 0)
        if dlse:
            assert pointer_at(each, struct.dlse.offset) == (names.index("dlse"), 0)
    params = structs[1].from_buffer_copy(own.params)
    assert (params.batch, params.num_heads, params.sums_of_tile) == (2, 4, 8) and params.tiles_of_head == tiles // 8
    if dlse:
        assert params.dlse_first_row == 100


@pytest.mark.parametrize("sizes, batch", [((7, 0), 2), ((0, 9), 2), ((5, 5), 0)])
def test_gradient_where_there_is_nothing_else(sizes: tuple[int, int], batch: int) -> None:
    """It is written all the same; nobody reads sums that nobody has written."""
    plan = plan_backward(backward_of(*sizes, sinks=GRADIENT, batch=batch), H200, False)
    *_, own = plan.launches
    assert own.source == OWN and PREPROCESS not in {each.source for each in plan.launches}
    assert composed(SinksBwdParams, (SinksGradientParams,)).from_buffer_copy(own.params).tiles_of_head == 0
    assert plan.workspace_bytes == 0


def test_no_head_no_gradient() -> None:
    assert plan_backward(backward_of(5, 5, sinks=GRADIENT, heads=(0, 0)), H200, False).launches == ()
