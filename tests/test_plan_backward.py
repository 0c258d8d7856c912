"""Plans of the backward: which kernel and tile, its launches and workspace, and how query heads are shared out."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import re
from typing import Any

import pytest

from fa2cupy.errors import InvalidArgument
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.kernels import BackwardPlan, plan_backward
from fa2cupy.kernels.params import BwdParams, BwdTmaParams, FillParams
from fa2cupy.kernels.sm90.flash_bwd import BWD_TILES_SM90, BwdTileNarrow
from fa2cupy.kernels.sm90.flash_bwd_wide import BWD_TILES_SM90_WIDE, BwdTileWide
from fa2cupy.kernels.tiles import SHARED_MEMORY
from tests.gpu.cases import Case, problem_of
from tests.plan_cases import A100, H200, backward, backward_problem, named, params_of


@pytest.mark.parametrize(
    ("seqlen_k", "head_dim", "heads", "batch", "splits"),
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
    seqlen_k: int, head_dim: int, heads: tuple[int, int], batch: int, splits: int
) -> None:
    """Of the sm_80 kernel, and of deterministic ones."""
    plan = backward(512, seqlen_k, head_dim, heads, batch)
    assert plan.splits == params_of(plan).splits == splits
    key_blocks = -(-seqlen_k // plan.tile.block_n) * heads[1] * batch
    assert named(plan, "flash_bwd").config.grid == (key_blocks * splits, 1, 1)
    turns = plan_backward(backward_problem(512, seqlen_k, head_dim, "bfloat16", False, batch, heads), H200, True)
    assert turns.family == "sm90" and turns.splits == splits
    assert named(turns, "flash_bwd").config.grid == (key_blocks * splits, 1, 1)


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "head_dim", "heads", "causal", "splits"),
    [
        (2048, 2048, 128, (8, 8), True, 2),  # 128 key blocks, of which the longest has twice the mean
        (2048, 2048, 128, (8, 8), False, 1),  # all of them at once
        (2048, 2048, 128, (4, 4), False, 2),
        (2048, 2048, 128, (2, 2), False, 4),
        (2048, 2048, 128, (16, 16), True, 1),  # 256 key blocks: long and short ones come to the mean
        (512, 512, 128, (8, 8), True, 1),  # parts would cost more than they save
        (2048, 2048, 64, (8, 8), True, 1),  # the last key block has one step
        (2048, 2048, 64, (4, 4), False, 2),
        (2048, 2048, 256, (4, 4), True, 2),  # 64 clusters
        (2048, 2048, 256, (4, 4), False, 1),  # two parts of each would take two waves
        (4096, 4096, 128, (32, 1), False, 4),  # 32 key blocks: 128 parts are a wave
        (4096, 4096, 128, (32, 1), True, 8),
        (512, 128, 128, (7, 1), False, 56),  # of one step each
        (1, 4096, 128, (8, 8), False, 1),  # nothing to share out
        (100, 30, 128, (1, 1), True, 1),
    ],
)
def test_steps_are_shared_out_where_key_blocks_are_few(
    seqlen_q: int, seqlen_k: int, head_dim: int, heads: tuple[int, int], causal: bool, splits: int
) -> None:
    plan = plan_backward(backward_problem(seqlen_q, seqlen_k, head_dim, "bfloat16", causal, 1, heads), H200, False)
    assert plan.family == "sm90" and plan.splits == params_of(plan).splits == splits


@pytest.mark.parametrize("family", ["sm80", "sm90"])
@pytest.mark.parametrize("shared", [False, True])
def test_who_sums_parts(family: str, shared: bool) -> None:
    """Blocks of the postprocess beyond those of dQ: of dK, and then of dV."""
    wanted = backward_problem(2048, 2048, 192, "bfloat16", True, 1, (8, 1) if shared else (32, 32), head_dim_v=120)
    plan = plan_backward(wanted, H200, False, family=family)
    assert (plan.splits > 1) == shared
    main, post = named(plan, "flash_bwd"), named(plan, "flash_bwd_postprocess")
    assert main.defines["FA2_PARTIAL_DKV"] == post.defines["FA2_PARTIAL_DKV"] == int(shared)
    threads = 32 * plan.tile.dq_warps
    sums = [-(-2048 * width // 8 // threads) for width in (192, 120)] if shared else []
    assert post.config.grid == (2048 // plan.tile.block_m * (8 if shared else 32) + sum(sums), 1, 1)


@pytest.mark.parametrize(
    ("seqlen", "heads", "causal", "deterministic", "overlap"),
    [
        (2048, 8, False, False, True),
        (2048, 8, False, True, False),  # turns are announced without waiting
        (2048, 16, False, False, True),
        (2048, 17, False, False, False),  # more than two waves
        (2048, 64, True, False, True),
        (2048, 67, True, False, False),  # more than eight
    ],
)
def test_kernels_start_beside_each_other(
    seqlen: int, heads: int, causal: bool, deterministic: bool, overlap: bool
) -> None:
    wanted = backward_problem(seqlen, seqlen, 128, "bfloat16", causal, 1, (heads, heads))
    launches = plan_backward(wanted, H200, deterministic).launches
    assert [launch.config.overlaps_previous for launch in launches] == [False, overlap, overlap]
    sm80 = plan_backward(wanted, H200, deterministic, family="sm80").launches
    assert not any(launch.config.overlaps_previous for launch in sm80)


def test_smaller_gpus_need_fewer_blocks() -> None:
    small = dataclasses.replace(H200, sm_count=20)
    assert backward(512, 4096, 128, (32, 1), device=small).splits == 1
    assert backward(512, 512, 128, (32, 1), device=small).splits == 8


def test_workspace_of_partial_gradients() -> None:
    """Beside the rest, (2, splits, batch, num_heads_k, n_blocks * block_n, padded head_dim) floats."""
    for seqlen_k, head_dim, padded, splits in ((4096, 128, 128, 8), (4001, 128, 128, 8), (4001, 90, 96, 4)):
        plan = backward(4096, seqlen_k, head_dim, (32, 1))
        enough = dataclasses.replace(H200, sm_count=1)
        one_block = backward(4096, seqlen_k, head_dim, (32, 1), device=enough)
        assert (plan.splits, one_block.splits) == (splits, 1)
        rows = -(-seqlen_k // plan.tile.block_n) * plan.tile.block_n
        assert plan.workspace_bytes - one_block.workspace_bytes == 2 * splits * rows * padded * 4
    # The same with one head or many: nothing is kept for parts where there are none.
    assert backward(512, 4096, 128, (32, 32)).workspace_bytes == backward(512, 8192, 128, (32, 32)).workspace_bytes


def test_workspace_of_a_head_dim_of_v_of_its_own() -> None:
    """Parts of dK are as wide as k, those of dV as v; dQ and the statistics do not know v."""
    for head_dim, head_dim_v, padded in ((192, 128, (192, 128)), (192, 72, (192, 128)), (40, 72, (48, 80))):
        case = Case(4096, 4001, head_dim, "bfloat16", True, 1, (32, 1), head_dim_v=head_dim_v)
        one_block = plan_backward(problem_of(case, True), dataclasses.replace(H200, sm_count=1), False, family="sm80")
        plan = plan_backward(problem_of(case, True), H200, False, family="sm80")
        rows = -(-4001 // plan.tile.block_n) * plan.tile.block_n * plan.splits
        assert plan.tile is one_block.tile and plan.splits > one_block.splits == 1
        assert plan.workspace_bytes - one_block.workspace_bytes == rows * sum(padded) * 4
        same = dataclasses.replace(case, head_dim_v=None)
        tile = plan.tile  # the row of the wider of both
        usual = plan_backward(problem_of(same, True), dataclasses.replace(H200, sm_count=1), False, tile)
        assert usual.workspace_bytes == one_block.workspace_bytes


def test_workspace_grows_no_faster_than_the_sequence() -> None:
    sizes = [backward(n, n, 128, (32, 1)).workspace_bytes for n in (1024, 2048, 4096, 8192, 16384, 32768)]
    assert all(longer <= 2.01 * shorter for shorter, longer in itertools.pairwise(sizes))


def test_head_dim_of_v_in_the_backward() -> None:
    wanted = problem_of(Case(300, 200, 192, "float16", True, 1, (8, 1), head_dim_v=120), True)
    plan = plan_backward(wanted, H200, deterministic=False, family="sm80")
    tile, launches = plan.tile, {launch.name: launch for launch in plan.launches}
    assert plan.splits > 1 and tile.head_dim == 192
    for name in ("flash_bwd_preprocess", "flash_bwd", "flash_bwd_postprocess"):
        defines = launches[name].defines
        assert (defines["FA2_HEAD_DIM"], defines["FA2_HEAD_DIM_V"]) == (192, 128)
        params = BwdParams.from_buffer_copy(launches[name].params)
        assert (params.shape.head_dim, params.head_dim_v) == (192, 120)
    tiles = (tile.block_n + tile.num_stages * tile.block_m) * (200 + 136) * 2
    scores = 2 * tile.block_n * (tile.block_m + 8) * 2 + 2 * tile.num_stages * tile.block_m * 4
    assert launches["flash_bwd"].config.shared_mem_bytes == tiles + scores
    assert FillParams.from_buffer_copy(launches["fill_unseen"].params).head_dim == 192  # dq
    wider = plan_backward(problem_of(Case(300, 0, 64, "float16", False, head_dim_v=80), True), H200, False)
    assert [FillParams.from_buffer_copy(each.params).head_dim for each in wider.launches] == [64]
    wider = plan_backward(problem_of(Case(0, 300, 64, "float16", False, head_dim_v=80), True), H200, False)
    assert [FillParams.from_buffer_copy(each.params).head_dim for each in wider.launches] == [64, 80]


def test_no_keys_or_no_queries_need_no_parts() -> None:
    for seqlen_q, seqlen_k in ((0, 100), (100, 0)):
        plan = backward(seqlen_q, seqlen_k, 64, (8, 1))
        assert plan.splits == 1 and plan.workspace_bytes == 0
        assert {launch.name for launch in plan.launches} == {"fill_unseen"}


@pytest.mark.parametrize("causal", [False, True])
def test_who_waits_for_turns_has_a_thread_block_for_every_tile(causal: bool) -> None:
    wanted = backward_problem(4096, 4096, 64, "bfloat16", causal, 1, (16, 16))
    for deterministic, blocks in ((False, 132), (True, 32 * 16)):
        plan = plan_backward(wanted, H200, deterministic)
        assert plan.family == "sm90" and named(plan, "flash_bwd").config.grid == (blocks, 1, 1)


@pytest.mark.parametrize(
    ("head_dims", "options", "objection"),
    [
        ((64, 64), {}, ""),
        ((8, 8), {}, ""),
        ((72, 40), {}, ""),
        ((40, 128), {}, ""),
        ((128, 128), {}, ""),
        ((59, 59), {}, "head_dim 59 is not a multiple of 8"),
        ((64, 59), {}, "head_dim_v 59 is not a multiple of 8"),
        ((64, 64), {"shift": 3}, "an array starts at an address that is not a multiple of 16 bytes"),
        ((64, 64), {"pad": 4}, "dout's head stride is 136 bytes, not a multiple of 16 bytes"),
    ],
)
def test_which_backward(head_dims: tuple[int, int], options: dict[str, Any], objection: str) -> None:
    head_dim, head_dim_v = head_dims
    wanted = backward_problem(300, 200, head_dim, "bfloat16", False, head_dim_v=head_dim_v, **options)
    plan = plan_backward(wanted, H200, False)
    main = named(plan, "flash_bwd")
    assert plan.objection == objection and plan.family == ("sm80" if objection else "sm90")
    assert main.source == f"{plan.family}/flash_bwd.cu" and main.arch == ("sm_90" if objection else "sm_90a")
    assert f"  sm_{plan.family[2:]} kernel" + (f": {objection}" if objection else "") in str(plan).splitlines()
    if objection:
        with pytest.raises(InvalidArgument, match=re.escape(objection)):
            plan_backward(wanted, H200, False, family="sm90")
    else:
        assert plan_backward(wanted, H200, False, compiler=lambda arch, row: "no" * (arch == "sm_90a")).family == "sm80"
    assert plan_backward(wanted, A100, False).family == "sm80"


@pytest.mark.parametrize(
    "head_dims, row", [((256, 256), (256, 0)), ((136, 136), (192, 0)), ((192, 128), (192, 128)), ((40, 160), (192, 0))]
)
def test_wide_heads_of_sm90(head_dims: tuple[int, int], row: tuple[int, int]) -> None:
    head_dim, head_dim_v = head_dims
    wanted = backward_problem(300, 200, head_dim, "bfloat16", False, head_dim_v=head_dim_v)
    plan = plan_backward(wanted, H200, False)
    tile, main = plan.tile, named(plan, "flash_bwd")
    assert isinstance(tile, BwdTileWide) and (tile.head_dim, tile.head_dim_v) == row
    assert main.source == "sm90/flash_bwd_wide.cu" and main.config.block == (512, 1, 1)
    params = BwdTmaParams.from_buffer_copy(main.params)
    assert (params.shape.head_dim, params.head_dim_v) == head_dims
    assert named(plan, "flash_bwd_preprocess").config.block == (256, 1, 1)
    assert named(plan, "flash_bwd_postprocess").config.block == (128, 1, 1)
    assert plan_backward(wanted, H200, False, family="sm80").family == "sm80"


@pytest.mark.parametrize(
    "tile", BWD_TILES_SM90 + BWD_TILES_SM90_WIDE, ids=lambda tile: f"{tile.head_dim}/{tile.head_dim_v}"
)
def test_rows_of_the_backward_of_sm90(tile: BwdTileNarrow | BwdTileWide) -> None:
    assert tile.shared_mem_bytes() <= SHARED_MEMORY["sm_90"] and tile.shared_mem_bytes() % 1024 == 0
    assert tile.block_m % 64 == 0 and tile.dq_tile_floats(tile.head_dim) == tile.block_m * -(-tile.head_dim // 64) * 64
    assert tile.note.startswith(f"{tile.shared_mem_bytes() // 1024} KB")
    if isinstance(tile, BwdTileWide):
        assert tile.head_dim > 128
        assert tile.block_m == tile.block_n == 64 and tile.num_warps == 16
        assert tile.dq_warps == tile.dq_warps_m == 4 and tile.cluster == 2
        assert tile.dq_parts == (2 if tile.head_dim == 256 else 4)  # turns of each block, or of each of its pieces
    else:
        assert tile.head_dim <= 128
        assert tile.block_n == 128 and tile.num_warps == 12 and tile.cluster == 1
        assert tile.dq_warps == 8 and tile.dq_parts == 2


def clearing(plan: BackwardPlan) -> int:
    """FA2_CLEAR_DQ, on which who prepares the sums of dQ and who adds to them agree."""
    main, before = named(plan, "flash_bwd").defines, named(plan, "flash_bwd_preprocess").defines
    assert all(main[name] == before[name] for name in ("FA2_CLEAR_DQ", "FA2_DQ_PARTS"))
    return int(main["FA2_CLEAR_DQ"])


@pytest.mark.parametrize(
    ("seqlen_k", "causal", "deterministic", "cleared"),
    [
        (16 * 128, False, False, 0),
        (16 * 128 + 1, False, False, 1),
        (31 * 128, True, False, 0),  # 16 key blocks on average
        (31 * 128 + 1, True, False, 1),
        (99 * 128, False, True, 0),
        (99 * 128, True, True, 0),
    ],
)
def test_who_begins_a_sum_of_dq(seqlen_k: int, causal: bool, deterministic: bool, cleared: int) -> None:
    """The first of a few key blocks, or of many that add in turn; else zeros."""
    for head_dim in (64, 96, 128):
        wanted = backward_problem(seqlen_k, seqlen_k, head_dim, "bfloat16", causal)
        assert clearing(plan_backward(wanted, H200, deterministic)) == cleared


def test_who_begins_a_sum_of_shared_key_blocks() -> None:
    """Parts of full ones begin with the same queries, and would wait for each other."""
    for causal in (False, True):
        plan = plan_backward(backward_problem(2048, 2048, 128, "bfloat16", causal, 1, (4, 4)), H200, False)
        assert plan.splits == 2 and clearing(plan) == int(not causal)


@pytest.mark.parametrize(
    ("head_dim", "device", "deterministic", "cleared"),
    [
        (192, H200, False, 1),
        (192, H200, True, 0),
        (256, H200, False, 1),
        (256, H200, True, 0),
        (64, A100, False, 1),
        (64, A100, True, 1),
        (59, H200, True, 1),
    ],
)
def test_who_begins_a_sum(head_dim: int, device: DeviceInfo, deterministic: bool, cleared: int) -> None:
    """Wide heads, and the sm_80 kernel."""
    plan = plan_backward(backward_problem(300, 300, head_dim, "bfloat16", False), device, deterministic)
    assert clearing(plan) == cleared
    assert named(plan, "flash_bwd").defines["FA2_DQ_PARTS"] == plan.tile.dq_parts


@pytest.mark.parametrize(("head_dim", "block_n", "cluster"), [(128, 128, 1), (192, 64, 2), (256, 64, 2)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_clusters(head_dim: int, block_n: int, cluster: int, deterministic: bool) -> None:
    """Whole clusters, one for each two multiprocessors; deterministic: for each two key blocks."""
    long, short = (
        plan_backward(backward_problem(4096, keys, head_dim, "bfloat16", False, 1, (16, 16)), H200, deterministic)
        for keys in (4000, 70)
    )
    main = named(long, "flash_bwd")
    assert (main.defines["FA2_CLUSTER"], main.defines["FA2_BLOCK_N"]) == (cluster, block_n)
    assert main.config.grid == (32 * 16 * cluster if deterministic else 132, 1, 1)
    assert named(short, "flash_bwd").config.grid == (16 * cluster * short.splits, 1, 1)
    assert named(short, "flash_bwd_preprocess").defines["FA2_BLOCK_N"] == 128


def test_sections_of_turns() -> None:
    """Of one size if the heads can be shared out so, else a few more than are needed; never more than there are."""

    def sections(head_dim: int, heads: int, steps: int) -> list[int]:
        found = []
        for causal in (False, True):
            wanted = backward_problem(steps * 64, steps * 64, head_dim, "bfloat16", causal, 1, (heads, heads))
            params = BwdTmaParams.from_buffer_copy(named(plan_backward(wanted, H200, True), "flash_bwd").params)
            found.append(params.shape.heads_per_section)
        return found

    assert sections(128, 512, 8) == [16, 64] and sections(128, 16, 256) == [2, 16]
    assert sections(256, 256, 8) == [8, 32] and sections(256, 32, 64) == [2, 8]
    assert sections(256, 509, 8) == [6, 26]
    assert sections(128, 3, 1) == [3, 3]


def test_workspace_of_turns() -> None:
    """A counter for each part of a block of dQ, after the sums."""
    plan = plan_backward(backward_problem(4096, 4096, 128, "bfloat16", False, 2, (8, 8)), H200, False)
    blocks = 2 * 8 * 4096 // 64
    statistics, dq = blocks * 64 * 4, blocks * 64 * 128 * 4
    assert plan.workspace_bytes == 2 * statistics + dq + blocks * 2 * 4
    workspaces = [each for each in named(plan, "flash_bwd_preprocess").pointers if each.position == 9][:4]
    assert [each.add_bytes for each in workspaces] == [0, statistics, 2 * statistics, 2 * statistics + dq]
    names = ("lse_log2", "softmax_d", "dq_accum", "dq_turn")
    assert [each.offset for each in workspaces] == [getattr(BwdParams, name).offset for name in names]


def test_launches_of_the_backward_of_sm90() -> None:
    wanted = backward_problem(350, 300, 96, "float16", True, 2, (8, 2), head_dim_v=72)
    plan = plan_backward(wanted, H200, False)
    tile, main = plan.tile, named(plan, "flash_bwd")
    assert isinstance(tile, BwdTileNarrow) and tile.head_dim == 96 and plan.splits == 4
    assert main.config.grid == (3 * 2 * 2 * 4, 1, 1) and main.config.block == (384, 1, 1)
    assert main.defines["FA2_HEAD_DIM"] == main.defines["FA2_HEAD_DIM_V"] == 96
    assert [(each.position, each.add_bytes) for each in main.tensor_maps] == [
        (0, 50 * 8 * 72 * 2),
        (1, 50 * 8 * 96 * 2),
        (2, 0),
        (3, 0),
        (9, 0),
        (9, 2 * 8 * 5 * 64 * 4),
    ]
    dims = [(72, 300), (96, 300), (96, 300), (72, 300)] + [(64, 2 * 8 * 5)] * 2
    assert [each.spec.dims[:2] for each in main.tensor_maps] == dims
    boxes = [(64, tile.block_m)] * 2 + [(64, tile.block_n)] * 2 + [(tile.block_m, 1)] * 2
    assert [each.spec.box for each in main.tensor_maps] == boxes
    assert [each.spec.dtype for each in main.tensor_maps] == ["float16"] * 4 + ["float32"] * 2
    assert [each.offset for each in main.tensor_maps] == [128 * number for number in range(6)]
    beside = named(plan, "flash_bwd_preprocess")
    where = {field: beside.pointers[place][1:] for place, (field, *_) in enumerate(BwdParams._fields_[:15])}
    assert [where["lse_log2"], where["softmax_d"]] == [each[1:3] for each in main.tensor_maps[4:]]
    own = ("dk", "dv", "dq_accum", "dq_turn", "dk_partial", "dv_partial")
    assert main.pointers == tuple((getattr(BwdTmaParams, name).offset, *where[name]) for name in own)
    assert [each.offset for each in beside.pointers] == list(range(0, 15 * 8, 8)) and beside.arch == "sm_90"
    params, same = BwdTmaParams.from_buffer_copy(main.params), BwdParams.from_buffer_copy(beside.params)
    assert ctypes.sizeof(BwdTmaParams) % 64 == 0 and BwdTmaParams.dk.offset == 768
    for name in ("shape", "dk_strides", "dv_strides"):
        assert bytes(getattr(params, name)) == bytes(getattr(same, name))
    assert (params.splits, params.head_dim_v, params.softmax_scale) == (4, 72, same.softmax_scale)
    assert [each.name for each in plan.launches] == [
        "flash_bwd_preprocess",
        "flash_bwd",
        "flash_bwd_postprocess",
        "fill_unseen",
    ]
    many = plan_backward(backward_problem(4096, 4096, 64, "float16", True, 2, (8, 8)), H200, False)
    assert named(many, "flash_bwd").config.grid == (132, 1, 1)
