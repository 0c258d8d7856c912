"""What plans are made of: launches, workspaces, and among how many thread blocks query heads are shared out."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.kernels import BackwardPlan, plan_backward, plan_forward
from fa2cupy.kernels import plan as plans
from fa2cupy.kernels.params import BwdParams
from fa2cupy.kernels.tiles import SHARED_MEMORY
from tests.gpu.cases import Case, problem_of

H200 = DeviceInfo(0, "", (9, 0), 132, SHARED_MEMORY["sm_90"], 50 << 20)


def backward(
    seqlen_q: int, seqlen_k: int, head_dim: int, heads: tuple[int, int], batch: int = 1, device: DeviceInfo = H200
) -> BackwardPlan:
    return plan_backward(
        problem_of(Case(seqlen_q, seqlen_k, head_dim, "bfloat16", True, batch, heads), True), device, False
    )


def params_of(plan: BackwardPlan) -> BwdParams:
    return BwdParams.from_buffer_copy(plan.launches[0].params)


@pytest.mark.parametrize(
    ("seqlen_k", "head_dim", "heads", "batch", "head_splits"),
    [
        (4096, 128, (32, 1), 1, 8),  # 32 key blocks: 8 times as many are the first to be a wave and a half
        (4096, 128, (32, 1), 4, 2),
        (4096, 128, (32, 1), 8, 1),
        (4096, 128, (32, 8), 1, 1),  # 256 key blocks
        (4096, 128, (16, 4), 1, 2),
        (128, 128, (32, 1), 1, 32),  # all of them are not enough
        (128 * 198, 128, (4, 1), 1, 1),  # exactly a wave and a half
        (128 * 197, 128, (4, 1), 1, 2),
        (4096, 128, (6, 2), 1, 3),  # 64 key blocks, and 3 has no divisor between
        (4096, 128, (7, 1), 1, 7),
        (64, 128, (32, 32), 1, 1),  # nothing to share out
        (4096, 128, (16, 16), 4, 1),
    ],
)
def test_query_heads_are_shared_out_where_key_blocks_are_few(
    seqlen_k: int, head_dim: int, heads: tuple[int, int], batch: int, head_splits: int
) -> None:
    plan = backward(512, seqlen_k, head_dim, heads, batch)
    assert plan.head_splits == params_of(plan).head_splits == head_splits
    launches = {launch.name: launch for launch in plan.launches}
    main = launches["flash_bwd"]
    key_blocks = -(-seqlen_k // plan.tile.block_n) * heads[1] * batch
    assert main.config.grid == (key_blocks * head_splits, 1, 1)
    assert main.defines["FA2_PARTIAL_DKV"] == int(head_splits > 1)
    assert ("flash_bwd_combine" in launches) == (head_splits > 1)
    names = [launch.name for launch in plan.launches if launch.name != "fill_empty"]
    assert names[:3] == ["flash_bwd_preprocess", "flash_bwd", "flash_bwd_postprocess"]


def test_smaller_gpus_need_fewer_blocks() -> None:
    small = dataclasses.replace(H200, sm_count=20)
    assert backward(512, 4096, 128, (32, 1), device=small).head_splits == 1
    assert backward(512, 512, 128, (32, 1), device=small).head_splits == 8


def test_workspace_of_partial_gradients() -> None:
    """Beside the rest, (2, head_splits, batch, num_heads_k, n_blocks * block_n, padded head_dim) floats."""
    for seqlen_k, head_dim, padded, splits in ((4096, 128, 128, 8), (4001, 128, 128, 8), (4001, 90, 96, 4)):
        plan = backward(4096, seqlen_k, head_dim, (32, 1))
        enough = dataclasses.replace(H200, sm_count=1)
        one_block = backward(4096, seqlen_k, head_dim, (32, 1), device=enough)
        assert (plan.head_splits, one_block.head_splits) == (splits, 1)
        rows = -(-seqlen_k // plan.tile.block_n) * plan.tile.block_n
        assert plan.workspace_bytes - one_block.workspace_bytes == 2 * splits * rows * padded * 4
    # The same with one head or many: nothing is kept for parts where there are none.
    assert backward(512, 4096, 128, (32, 32)).workspace_bytes == backward(512, 8192, 128, (32, 32)).workspace_bytes


def test_workspace_grows_no_faster_than_the_sequence() -> None:
    sizes = [backward(n, n, 128, (32, 1)).workspace_bytes for n in (1024, 2048, 4096, 8192, 16384, 32768)]
    assert all(longer <= 2.01 * shorter for shorter, longer in itertools.pairwise(sizes))


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
    assert plans.heads_per_section(H200, True, heads, blocks_per_head, bytes_per_head) == section
    assert plans.heads_per_section(H200, False, heads, blocks_per_head, bytes_per_head) == 1


def section_of(plan: BackwardPlan) -> int:
    return params_of(plan).shape.heads_per_section


def test_sections_count_the_heads_of_a_block() -> None:
    """With fewer query heads for each block, more of them fit L2."""
    l2 = dataclasses.replace(H200, l2_bytes=4 * 2048 * 128 * 8, sm_count=4)  # the queries of 4 heads
    plan = backward(2048, 2048, 128, (64, 16), device=l2)
    assert plan.head_splits == 1 and section_of(plan) == 1
    plan = backward(2048, 2048, 128, (16, 16), device=l2)
    assert plan.head_splits == 1 and section_of(plan) == 4


def test_turns_are_a_section_apart() -> None:
    """Deterministic: neighbouring key blocks are launched so far apart that the turn has come when it is awaited."""
    for seqlen, causal, section in ((4096, False, 9), (512, False, 64), (4096, True, 9), (16384, True, 3)):
        case = Case(seqlen, seqlen, 128, "bfloat16", causal, 4, (16, 16))
        plan = plan_backward(problem_of(case, True), H200, True)
        # 2 turns of 2 steps, 132 blocks at once, seqlen / 64 steps each; at most what L2 holds, or all heads
        assert section_of(plan) == section, (seqlen, causal)


def test_thin_grids_take_smaller_tiles() -> None:
    """A forward tile of 128 rows, unless its grid leaves multiprocessors without a block."""
    for heads, seqlen, block_m in ((16, 2048, 128), (8, 2048, 64), (132, 1, 64), (133, 1, 128)):
        problem = problem_of(Case(seqlen, seqlen, 128, "bfloat16", False, 1, (heads, heads)), False)
        assert plan_forward(problem, H200).tile.block_m == block_m, (heads, seqlen)


def test_no_keys_or_no_queries_need_no_parts() -> None:
    for seqlen_q, seqlen_k in ((0, 100), (100, 0)):
        plan = backward(seqlen_q, seqlen_k, 64, (8, 1))
        assert plan.head_splits == 1 and plan.workspace_bytes == 0
        assert {launch.name for launch in plan.launches} == {"fill_empty"}
