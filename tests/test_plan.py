"""What plans are made of: launches, workspaces, and among how many thread blocks query heads are shared out."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import re
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from fa2cupy import jit
from fa2cupy.errors import InvalidArgument, LaunchError
from fa2cupy.jit import driver, tensor_map
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.kernels import BackwardPlan, ForwardPlan, compile_jobs, plan_backward, plan_forward
from fa2cupy.kernels import plan as plans
from fa2cupy.kernels.params import BwdParams, BwdTmaParams, FillParams, FwdParams, FwdTmaParams
from fa2cupy.kernels.tiles import (
    BWD_TILES_SM90,
    BWD_TILES_SM90_WIDE,
    FWD_TILES_SM90,
    SHARED_MEMORY,
    BwdTile,
    BwdTileSm90,
    FwdTile,
    FwdTileSm90,
    forward_tile_sm90,
)
from fa2cupy.problem import AttentionProblem
from tests.fake_driver import FakeDriver, FakeMap, fake_driver
from tests.gpu.cases import Case, problem_of

H200 = DeviceInfo(0, "", (9, 0), 132, SHARED_MEMORY["sm_90"], 50 << 20)

A100 = DeviceInfo(0, "A100", (8, 0), 108, SHARED_MEMORY["sm_80"], 40 << 20)
B200 = DeviceInfo(1, "B200", (10, 0), 148, SHARED_MEMORY["sm_100"], 126 << 20)


def backward(
    seqlen_q: int, seqlen_k: int, head_dim: int, heads: tuple[int, int], batch: int = 1, device: DeviceInfo = H200
) -> BackwardPlan:
    case = Case(seqlen_q, seqlen_k, head_dim, "bfloat16", True, batch, heads)
    return plan_backward(problem_of(case, True), device, False, family="sm80")


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


def test_workspace_of_a_head_dim_of_v_of_its_own() -> None:
    """Parts of dK are as wide as k, those of dV as v; dQ and the statistics do not know v."""
    for head_dim, head_dim_v, padded in ((192, 128, (192, 128)), (192, 72, (192, 128)), (40, 72, (48, 80))):
        case = Case(4096, 4001, head_dim, "bfloat16", True, 1, (32, 1), head_dim_v=head_dim_v)
        one_block = plan_backward(problem_of(case, True), dataclasses.replace(H200, sm_count=1), False, family="sm80")
        plan = plan_backward(problem_of(case, True), H200, False, family="sm80")
        rows = -(-4001 // plan.tile.block_n) * plan.tile.block_n * plan.head_splits
        assert plan.tile is one_block.tile and plan.head_splits > one_block.head_splits == 1
        assert plan.workspace_bytes - one_block.workspace_bytes == rows * sum(padded) * 4
        same = dataclasses.replace(case, head_dim_v=None)
        tile = plan.tile  # the row of the wider of both
        usual = plan_backward(problem_of(same, True), dataclasses.replace(H200, sm_count=1), False, tile)
        assert usual.workspace_bytes == one_block.workspace_bytes


def test_head_dim_of_v_in_the_backward() -> None:
    plan = plan_backward(
        problem_of(Case(300, 200, 192, "float16", True, 1, (8, 1), head_dim_v=120), True), H200, deterministic=False
    )
    tile, launches = plan.tile, {launch.name: launch for launch in plan.launches}
    assert plan.head_splits > 1 and tile.head_dim == 192
    for name in ("flash_bwd_preprocess", "flash_bwd", "flash_bwd_postprocess", "flash_bwd_combine"):
        defines = launches[name].defines
        assert (defines["FA2_HEAD_DIM"], defines["FA2_HEAD_DIM_V"]) == (192, 128)
        params = BwdParams.from_buffer_copy(launches[name].params)
        assert (params.shape.head_dim, params.head_dim_v) == (192, 120)
    tiles = (tile.block_n + tile.num_stages * tile.block_m) * (200 + 136) * 2
    scores = 2 * tile.block_n * (tile.block_m + 8) * 2 + 2 * tile.num_stages * tile.block_m * 4
    assert launches["flash_bwd"].config.shared_mem_bytes == tiles + scores
    assert launches["flash_bwd_combine"].config.grid == (-(-200 * 192 // 8 // (32 * tile.num_warps)), 2, 1)
    assert FillParams.from_buffer_copy(launches["fill_empty"].params).head_dim == 192  # dq
    wider = plan_backward(problem_of(Case(300, 0, 64, "float16", False, head_dim_v=80), True), H200, False)
    assert [FillParams.from_buffer_copy(each.params).head_dim for each in wider.launches] == [64]
    wider = plan_backward(problem_of(Case(0, 300, 64, "float16", False, head_dim_v=80), True), H200, False)
    assert [FillParams.from_buffer_copy(each.params).head_dim for each in wider.launches] == [64, 80]


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90"])
def test_every_pair_of_head_dims_has_a_tile_that_fits(arch: str) -> None:
    device = DeviceInfo(0, "", (int(arch[3]), int(arch[4])), 100, SHARED_MEMORY[arch], 40 << 20)
    for head_dim, head_dim_v in itertools.product(range(8, 257, 8), repeat=2):
        case = Case(2048, 2048, head_dim, "bfloat16", True, 1, (16, 1), head_dim_v=head_dim_v)
        launches = plan_forward(problem_of(case, False), device).launches
        plan = plan_backward(problem_of(case, True), device, False)
        for launch in launches + plan.launches:
            assert launch.config.shared_mem_bytes <= SHARED_MEMORY[arch]
            if launch.arch != "sm_90a":  # where a row's head dims are those of its kernels
                assert ("FA2_HEAD_DIM_V" in launch.defines) == (head_dim != head_dim_v)
        if isinstance(plan.tile, BwdTile):
            for width in plans.padded_head_dims(plan.problem, plan.tile.split):
                assert width % (16 * plan.tile.split) == 0
        else:
            assert max(head_dim, head_dim_v) <= plan.tile.head_dim


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
        plan = plan_backward(problem_of(case, True), H200, True, family="sm80")
        # 2 turns of 2 steps, 132 blocks at once, seqlen / 64 steps each; at most what L2 holds, or all heads
        assert section_of(plan) == section, (seqlen, causal)


def test_thin_grids_take_smaller_tiles() -> None:
    """A forward tile of 128 rows, unless its grid leaves multiprocessors without a block."""
    for heads, seqlen, block_m in ((16, 2048, 128), (8, 2048, 64), (132, 1, 64), (133, 1, 128)):
        problem = problem_of(Case(seqlen, seqlen, 128, "bfloat16", False, 1, (heads, heads)), False)
        assert plan_forward(problem, H200, family="sm80").tile.block_m == block_m, (heads, seqlen)


def test_no_keys_or_no_queries_need_no_parts() -> None:
    for seqlen_q, seqlen_k in ((0, 100), (100, 0)):
        plan = backward(seqlen_q, seqlen_k, 64, (8, 1))
        assert plan.head_splits == 1 and plan.workspace_bytes == 0
        assert {launch.name for launch in plan.launches} == {"fill_empty"}


# ---- the forward of sm_90 --------------------------------------------------------------------------------------------


def problem(
    seqlen_q: int = 300,
    seqlen_k: int = 300,
    head_dim: int = 64,
    dtype: str = "bfloat16",
    causal: bool = False,
    **options: Any,
) -> AttentionProblem:
    return problem_of(Case(seqlen_q, seqlen_k, head_dim, dtype, causal, **options), False)


def with_strides(base: AttentionProblem, **strides: tuple[int, int, int]) -> AttentionProblem:
    return dataclasses.replace(base, strides=tuple((dict(base.strides) | strides).items()))


def main_launch(plan: ForwardPlan) -> plans.KernelLaunch:
    (launch,) = (each for each in plan.launches if each.name != "fill_empty")
    return launch


NEGATIVE = with_strides(problem(), k=(76800, -256, 64))

# problem, device, family, objection to sm_90 (or none)
CHOICES = [
    (problem(), H200, None, ""),
    (problem(), H200, "sm90", ""),
    (problem(), H200, "sm80", "FA2CUPY_KERNEL=sm80"),
    (problem(), A100, None, "device 0 (A100) has compute capability 8.0, not 9.0"),
    (problem(), A100, "sm90", "device 0 (A100) has compute capability 8.0, not 9.0"),
    (problem(), B200, None, "device 1 (B200) has compute capability 10.0, not 9.0"),
    (problem(), A100, "sm80", "FA2CUPY_KERNEL=sm80"),
    (problem(head_dim=59), H200, None, "head_dim 59 is not a multiple of 8"),
    (problem(head_dim=59), H200, "sm90", "head_dim 59 is not a multiple of 8"),
    (problem(head_dim=40), H200, None, ""),
    (problem(head_dim=8), H200, None, ""),
    (problem(head_dim=256), H200, None, ""),
    (problem(head_dim=192, head_dim_v=128), H200, None, ""),
    (problem(head_dim=64, head_dim_v=128), H200, None, ""),
    (problem(head_dim_v=59), H200, None, "head_dim_v 59 is not a multiple of 8"),
    (problem(head_dim_v=59), H200, "sm90", "head_dim_v 59 is not a multiple of 8"),
    (problem(shift=3), H200, None, "an array starts at an address that is not a multiple of 16 bytes"),
    (problem(shift=3), H200, "sm90", "an array starts at an address that is not a multiple of 16 bytes"),
    (problem(shift=8), H200, None, ""),
    (problem(pad=4), H200, None, "q's head stride is 136 bytes, not a multiple of 16 bytes"),
    (problem(pad=2, order=1), H200, None, "q's row stride is 132 bytes, not a multiple of 16 bytes"),
    (problem(pad=8), H200, None, ""),
    (problem(pad=4, given=False), H200, "sm90", "q's head stride is 136 bytes, not a multiple of 16 bytes"),
    (problem(layout="bhsd"), H200, None, ""),
    (problem(order=3), H200, None, ""),
    (problem(expanded=True, heads=(8, 4)), H200, None, ""),
    (problem(heads=(6, 1), dtype="float16", causal=True), H200, None, ""),
    (NEGATIVE, H200, None, "k's row stride is negative"),
    (NEGATIVE, H200, "sm90", "k's row stride is negative"),
    (
        with_strides(problem(), v=(2**39, 256, 64)),
        H200,
        None,
        "v's batch stride is 1099511627776 bytes, not below 2**40",
    ),
    (with_strides(problem(), out=(76800, -256, 64)), H200, None, "out's row stride is negative"),
]


@pytest.mark.parametrize(("wanted", "device", "family", "objection"), CHOICES)
def test_which_forward(wanted: AttentionProblem, device: DeviceInfo, family: str | None, objection: str) -> None:
    if objection and family == "sm90":
        message = f"FA2CUPY_KERNEL=sm90 is impossible here: {objection}; use sm80, or unset it"
        with pytest.raises(InvalidArgument, match=re.escape(message)):
            plan_forward(wanted, device, family=family)
        return
    plan = plan_forward(wanted, device, family=family)
    launch = main_launch(plan)
    assert plan.why_not_sm90 == objection
    if objection:
        assert plan.family == "sm80" and isinstance(plan.tile, FwdTile) and launch.tensor_maps == ()
        assert (launch.source, launch.arch) == ("sm80/flash_fwd.cu", plans.architecture(device))
        assert f"  sm_80 kernel: {objection}" in str(plan).splitlines()
    else:
        assert plan.family == "sm90" and isinstance(plan.tile, FwdTileSm90) and len(launch.tensor_maps) == 4
        assert (launch.source, launch.name, launch.arch) == ("sm90/flash_fwd.cu", "flash_fwd", "sm_90a")
        assert "  sm_90 kernel" in str(plan).splitlines()


def test_objections_from_outside() -> None:
    plan = plan_forward(problem(), H200, why_not_sm90="NVRTC is no good")
    assert plan.family == "sm80" and "sm_80 kernel: NVRTC is no good" in str(plan)
    assert "device 0 (A100)" in plan_forward(problem(), A100, why_not_sm90="NVRTC is no good").why_not_sm90


def test_a_given_tile_chooses_its_kernel() -> None:
    row = FwdTileSm90(64, 192, 64, 1, 3, False, "")
    plan = plan_forward(problem(), H200, row)
    assert plan.tile is row and plan.family == "sm90"
    assert main_launch(plan).config.block == (512, 1, 1)
    usual = plan_forward(problem(), H200, family="sm80")
    given = plan_forward(problem(), H200, usual.tile)
    assert given.launches == usual.launches and given.family == "sm80"
    assert "  sm_80 kernel" in str(given).splitlines()


@pytest.mark.parametrize("causal", [False, True])
def test_rows_of_sm90(causal: bool) -> None:
    for head_dim, served in (
        (8, 64),
        (64, 64),
        (72, 96),
        (96, 96),
        (128, 128),
        (136, 192),
        (192, 192),
        (200, 256),
        (256, 256),
    ):
        row = forward_tile_sm90(head_dim, head_dim, causal, 1000)
        assert (row.head_dim, row.head_dim_v) == (served, 0)
    for head_dim, head_dim_v, pair in (
        (192, 128, (192, 128)),
        (136, 8, (192, 128)),
        (128, 64, (128, 0)),
        (64, 128, (128, 0)),  # Q's buffer has to hold O
        (192, 136, (192, 0)),
        (128, 192, (192, 0)),
        (256, 128, (256, 0)),
        (8, 256, (256, 0)),
    ):
        row = forward_tile_sm90(head_dim, head_dim_v, causal, 1000)
        assert (row.head_dim, row.head_dim_v) == pair
    for row in FWD_TILES_SM90[causal]:
        assert (row.head_dim, row.head_dim_v) in ((64, 0), (96, 0), (128, 0), (192, 128), (192, 0), (256, 0))
        assert row.block_m % 64 == row.block_n % 16 == 0
        assert row.num_warps == 4 + row.block_m // 16
        panels, panels_v = -(-row.head_dim // 64), -(-(row.head_dim_v or row.head_dim) // 64)
        q_rows, k_rows = row.num_q_stages * row.block_m, row.num_kv_stages * row.block_n
        tiles = 64 * 2 * (panels * q_rows + (panels + panels_v) * k_rows)
        assert row.shared_mem_bytes() == tiles + 1024 <= SHARED_MEMORY["sm_90"]


def test_launch_of_sm90() -> None:
    wanted = problem(300, 700, 72, "float16", True, batch=3, heads=(8, 2), scale=-0.5)
    plan = plan_forward(wanted, H200)
    launch, tile = main_launch(plan), plan.tile
    assert isinstance(tile, FwdTileSm90)
    assert launch.defines == {
        "FA2_BF16": 0,
        "FA2_HEAD_DIM": 96,
        "FA2_ALIGNED": 1,
        "FA2_BLOCK_M": tile.block_m,
        "FA2_BLOCK_N": tile.block_n,
        "FA2_NUM_WARPS": tile.num_warps,
        "FA2_NUM_Q_STAGES": tile.num_q_stages,
        "FA2_NUM_KV_STAGES": tile.num_kv_stages,
        "FA2_TURNS": 1,
        "FA2_CAUSAL": 1,
        "FA2_SCALE_FIRST": 1,
        "FA2_PARAMS_BYTES": 576,
        "FA2_SHARED_BYTES": tile.shared_mem_bytes(),
    }
    assert launch.config.grid == (-(-300 // tile.block_m) * 8 * 3, 1, 1) < (132, 1, 1)
    assert launch.config.block == (32 * tile.num_warps, 1, 1)
    assert launch.config.shared_mem_bytes == tile.shared_mem_bytes()
    params = FwdTmaParams.from_buffer_copy(launch.params)
    shape = params.shape
    assert (shape.batch, shape.num_heads, shape.num_heads_k) == (3, 8, 2)
    assert (shape.seqlen_q, shape.seqlen_k, shape.head_dim) == (300, 700, 72)
    other = main_launch(plan_forward(wanted, H200, family="sm80"))
    same = FwdParams.from_buffer_copy(other.params)
    assert bytes(params.lse_strides) == bytes(same.lse_strides)
    assert params.scale_softmax_log2 == same.scale_softmax_log2 < 0


def test_one_block_of_sm90_for_each_multiprocessor() -> None:
    for seqlen, causal, block_m, blocks in (
        (1024, True, 128, 64),
        (4096, True, 192, 132),
        (2048, True, 128, 128),
        (1024, False, 192, 48),
    ):
        plan = plan_forward(problem(seqlen, seqlen, causal=causal), H200)
        assert plan.tile.block_m == block_m and main_launch(plan).config.grid == (blocks, 1, 1)


@pytest.mark.parametrize(
    ("heads", "tiles_per_head", "section"),
    [
        (64, 32, 8),  # 7 heads have a tile and a half for each of 132 multiprocessors, 8 divide 64
        (512, 4, 64),
        (16, 128, 2),
        (13, 32, 13),  # one section: no number from 7 to 13 divides 13 but 13
        (26, 64, 5),  # 4 to 8 heads would not be even: six sections, as even as can be
        (4, 16, 4),
    ],
)
def test_even_sections(heads: int, tiles_per_head: int, section: int) -> None:
    assert plans.heads_per_even_section(H200, True, heads, tiles_per_head) == section
    assert plans.heads_per_even_section(H200, False, heads, tiles_per_head) == 1


def test_sections_of_either_kernel() -> None:
    wanted = problem(4096, 4096, 128, causal=True, heads=(64, 64), batch=1)
    for family, sms, heads in (("sm80", 8, 13), ("sm90", 132, 8)):  # 12 heads fit the cache; 7 fill the GPU
        small = dataclasses.replace(H200, l2_bytes=12 * 4 * 4096 * 128, sm_count=sms)
        launch = main_launch(plan_forward(wanted, small, family=family))
        params = (FwdTmaParams if family == "sm90" else FwdParams).from_buffer_copy(launch.params)
        assert params.shape.heads_per_section == heads
    assert main_launch(plan_forward(dataclasses.replace(wanted, causal=False), H200)).params != launch.params


def test_params_are_as_in_cuda() -> None:
    assert ctypes.sizeof(FwdTmaParams) == 576  # a multiple of 64, as its alignment asks for
    assert [getattr(FwdTmaParams, name).offset for name in ("q", "k", "v", "out", "lse")] == [0, 128, 256, 384, 512]


@pytest.mark.parametrize("empty", [0, 50])
def test_maps_skip_the_queries_that_see_no_key(empty: int) -> None:
    for layout, q_row in (("bshd", 2 * 4 * 64), ("bhsd", 2 * 64)):
        plan = plan_forward(problem(200 + empty, 200, causal=True, layout=layout, order=int(layout == "bhsd")), H200)
        launch, tile = main_launch(plan), plan.tile
        maps = launch.tensor_maps
        assert [each.offset for each in maps] == [0, 128, 256, 384]
        assert [each.position for each in maps] == [0, 1, 2, 3]
        assert [each.add_bytes for each in maps] == [empty * q_row, 0, 0, empty * q_row]
        assert [each.spec.dims for each in maps] == [(64, 200, 4, 2)] * 4
        assert [each.spec.box for each in maps] == [(64, 64), (64, tile.block_n), (64, tile.block_n), (64, 64)]
        assert {each.spec.dtype for each in maps} == {"bfloat16"}
        assert {each.spec.strides_bytes[0] for each in maps} == {q_row}
        assert launch.pointers == ((4, empty * 4),)
        assert FwdTmaParams.from_buffer_copy(launch.params).shape.seqlen_q == 200
        assert [each.name for each in plan.launches] == ["flash_fwd"] + ["fill_empty"] * bool(empty)


def test_head_dim_of_v_in_launches() -> None:
    wanted = problem(250, 200, 192, causal=True, head_dim_v=120)
    launch = main_launch(plan_forward(wanted, H200))
    assert (launch.defines["FA2_HEAD_DIM"], launch.defines["FA2_HEAD_DIM_V"]) == (192, 128)
    assert [each.spec.dims[0] for each in launch.tensor_maps] == [192, 192, 120, 120]
    assert launch.defines["FA2_SHARED_BYTES"] == 1024 * (48 + 2 * (48 + 32) + 1)
    plan = plan_forward(wanted, H200, family="sm80")
    launch, tile = main_launch(plan), plan.tile
    assert tile.head_dim == 192 and plan_forward(problem(head_dim=40, head_dim_v=184), A100).tile.head_dim == 192
    assert (launch.defines["FA2_HEAD_DIM"], launch.defines["FA2_HEAD_DIM_V"]) == (192, 128)
    assert launch.config.shared_mem_bytes == 2 * 200 * (tile.block_m + tile.block_n) + 2 * 136 * tile.block_n
    params = FwdParams.from_buffer_copy(launch.params)
    assert (params.shape.head_dim, params.head_dim_v) == (192, 120)
    (fill,) = (each for each in plan.launches if each.name == "fill_empty")
    assert FillParams.from_buffer_copy(fill.params).head_dim == 120


def test_nothing_to_do_on_sm90() -> None:
    for seqlen_q, seqlen_k in ((0, 100), (100, 0), (0, 0)):
        for family in (None, "sm90"):
            plan = plan_forward(problem(seqlen_q, seqlen_k), H200, family=family)
            assert {launch.name for launch in plan.launches} <= {"fill_empty"}


def test_jobs_of_sm90a() -> None:
    jobs = compile_jobs("sm_90a", True)
    own = [job for job in jobs if job.arch == "sm_90a"]
    beside = [job for job in jobs if job.arch != "sm_90a"]  # with the kernels beside the backward
    assert all(job in beside for job in compile_jobs("sm_90", True))
    sources = [[job for job in own if job.source == f"sm90/flash_{name}.cu"] for name in ("fwd", "bwd", "bwd_wide")]
    forward, backward, wide = sources
    assert len({job.label for job in own}) == len(own) == sum(map(len, sources))
    assert len(forward) == 2 * sum(map(len, FWD_TILES_SM90.values()))
    assert len(backward) == 2 * 8 * len(BWD_TILES_SM90) and len(wide) == 2 * 8 * len(BWD_TILES_SM90_WIDE)
    assert {job.defines["FA2_HEAD_DIM"] for job in compile_jobs("sm_90a", False) if job.arch == "sm_90a"} == {64, 128}
    planned = main_launch(plan_forward(problem(head_dim=128, causal=True), H200)).defines
    assert dict(planned) in [dict(job.defines) for job in own]


@pytest.mark.parametrize("device", [A100, H200, B200], ids=lambda device: device.name)
def test_jobs_of_a_head_dim_of_v_of_its_own(device: DeviceInfo) -> None:
    arch = plans.architecture(device) + "a" * (device is H200)
    pairs = [job for job in compile_jobs(arch, True) if "FA2_HEAD_DIM_V" in job.defines]
    assert {(job.defines["FA2_HEAD_DIM"], job.defines["FA2_HEAD_DIM_V"]) for job in pairs} == {(192, 128)}
    assert all("head_dim 192/128" in job.label for job in pairs)
    compiled = [dict(job.defines) for job in pairs]
    wanted = Case(2048, 2048, 192, "float16", True, head_dim_v=128)
    launches = plan_forward(problem_of(wanted, False), device).launches
    for deterministic in (False, True):
        launches += plan_backward(problem_of(wanted, True), device, deterministic).launches
    assert all(launch.defines in compiled for launch in launches)


# ---- the backward of sm_90 -------------------------------------------------------------------------------------------


def backward_problem(*args: Any, **options: Any) -> AttentionProblem:
    return problem_of(Case(*args, **options), True)


def named(plan: BackwardPlan, name: str) -> plans.KernelLaunch:
    (launch,) = (each for each in plan.launches if each.name == name)
    return launch


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
    assert plan.why_not_sm90 == objection and plan.family == ("sm80" if objection else "sm90")
    assert main.source == f"{plan.family}/flash_bwd.cu" and main.arch == ("sm_90" if objection else "sm_90a")
    assert f"  sm_{plan.family[2:]} kernel" + (f": {objection}" if objection else "") in str(plan).splitlines()
    if objection:
        with pytest.raises(InvalidArgument, match=re.escape(objection)):
            plan_backward(wanted, H200, False, family="sm90")
    else:
        assert plan_backward(wanted, H200, False, why_not_sm90="NVRTC is no good").family == "sm80"
    assert plan_backward(wanted, A100, False).family == "sm80"


@pytest.mark.parametrize(
    "head_dims, row", [((256, 256), (256, 0)), ((136, 136), (192, 0)), ((192, 128), (192, 128)), ((40, 160), (192, 0))]
)
def test_wide_heads_on_demand(head_dims: tuple[int, int], row: tuple[int, int]) -> None:
    """The Hopper backward above head_dim 128 is there, but only for FA2CUPY_KERNEL=sm90."""
    head_dim, head_dim_v = head_dims
    wanted = backward_problem(300, 200, head_dim, "bfloat16", False, head_dim_v=head_dim_v)
    assert plan_backward(wanted, H200, False).family == "sm80"
    plan = plan_backward(wanted, H200, False, family="sm90")
    tile, main = plan.tile, named(plan, "flash_bwd")
    assert isinstance(tile, BwdTileSm90) and (tile.head_dim, tile.head_dim_v) == row
    assert main.source == "sm90/flash_bwd_wide.cu" and main.config.block == (512, 1, 1)
    assert named(plan, "flash_bwd_preprocess").config.block == (128, 1, 1)


@pytest.mark.parametrize("tile", BWD_TILES_SM90_WIDE, ids=lambda tile: f"{tile.head_dim}/{tile.head_dim_v}")
def test_wide_rows_of_the_backward_of_sm90(tile: BwdTileSm90) -> None:
    assert tile.shared_mem_bytes() <= SHARED_MEMORY["sm_90"] and tile.shared_mem_bytes() % 1024 == 0
    assert tile.block_m == tile.block_n == 64 and tile.num_warps == 16 and tile.wide
    assert tile.dq_warps == tile.dq_warps_m == 4 and tile.dq_tile_floats() == 64 * tile.head_dim


@pytest.mark.parametrize("tile", BWD_TILES_SM90, ids=lambda tile: str(tile.head_dim))
def test_rows_of_the_backward_of_sm90(tile: BwdTileSm90) -> None:
    assert tile.shared_mem_bytes() <= SHARED_MEMORY["sm_90"] and tile.shared_mem_bytes() % 1024 == 0
    assert tile.block_n == 128 and tile.num_warps == 12 and tile.block_m % 64 == 0
    assert tile.dq_warps == 8 and tile.dq_tile_floats() == tile.block_m * tile.head_dim


def test_launches_of_the_backward_of_sm90() -> None:
    wanted = backward_problem(350, 300, 96, "float16", True, 2, (8, 2), head_dim_v=72)
    plan = plan_backward(wanted, H200, False)
    tile, main = plan.tile, named(plan, "flash_bwd")
    assert isinstance(tile, BwdTileSm90) and tile.head_dim == 128 and plan.head_splits == 4
    assert main.config.grid == (3 * 2 * 2 * 4, 1, 1) and main.config.block == (384, 1, 1)
    assert main.defines["FA2_HEAD_DIM"] == main.defines["FA2_HEAD_DIM_V"] == 128
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
    assert beside.pointers[9:11] == tuple((each.position, each.add_bytes) for each in main.tensor_maps[4:])
    assert main.pointers == beside.pointers[7:9] + beside.pointers[11:] and beside.arch == "sm_90"
    params, same = BwdTmaParams.from_buffer_copy(main.params), BwdParams.from_buffer_copy(beside.params)
    assert ctypes.sizeof(BwdTmaParams) % 64 == 0 and BwdTmaParams.dk.offset == 768
    for name in ("shape", "dk_strides", "dv_strides"):
        assert bytes(getattr(params, name)) == bytes(getattr(same, name))
    assert (params.head_splits, params.head_dim_v, params.softmax_scale) == (4, 72, same.softmax_scale)
    assert [each.name for each in plan.launches] == [
        "flash_bwd_preprocess",
        "flash_bwd",
        "flash_bwd_postprocess",
        "flash_bwd_combine",
        "fill_empty",
    ]
    many = plan_backward(backward_problem(4096, 4096, 64, "float16", True, 2, (8, 8)), H200, False)
    assert named(many, "flash_bwd").config.grid == (132, 1, 1)


def test_sections_of_the_backward_of_sm90() -> None:
    """As even as the forward's; deterministic causal ones end with their longest blocks, and are longer."""
    for seqlen, section, turns in ((512, 64, 64), (4096, 8, 36), (16384, 2, 12)):
        wanted = backward_problem(seqlen, seqlen, 128, "bfloat16", True, 4, (16, 16))
        sections = [
            BwdTmaParams.from_buffer_copy(named(plan_backward(wanted, H200, deterministic), "flash_bwd").params)
            for deterministic in (False, True)
        ]
        assert [params.shape.heads_per_section for params in sections] == [section, turns], seqlen


# ---- and its launches ------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """A driver that records launches, and kernels that need no compiling."""
    loaded = SimpleNamespace(function=lambda device_index, shared_mem_bytes: 0x1234)
    monkeypatch.setattr(jit, "kernel", lambda *args, **options: loaded)
    monkeypatch.setattr(jit, "kernels", lambda *args, **options: ())
    tensor_map.encode.cache_clear()
    with fake_driver(monkeypatch) as found:
        found["params_bytes"] = ctypes.sizeof(FwdTmaParams)
        with driver.device_guard(0):
            yield found
    tensor_map.encode.cache_clear()


MAPS = ("q", "k", "v", "out")


def arrived(fake: FakeDriver, index: int = -1) -> tuple[dict[str, FakeMap], FwdTmaParams]:
    """The maps of a launch, and its struct."""
    content = bytes(fake.launches[index].params[: ctypes.sizeof(FwdTmaParams)])
    params = FwdTmaParams.from_buffer_copy(content)
    return {name: FakeMap.from_buffer_copy(bytes(getattr(params, name))) for name in MAPS}, params


CAUSAL = problem(250, 200, causal=True)
Q_SKIPPED, LSE_SKIPPED = 50 * 2 * 4 * 64, 50 * 4


def test_bound_launch(fake: FakeDriver) -> None:
    launch = main_launch(plan_forward(CAUSAL, H200))
    bound = dataclasses.replace(plan_forward(CAUSAL, H200), launches=(launch,)).bind(0)
    pointers = (0x10000, 0x20000, 0x30000, 0x40000, 0x50004)
    for number in range(3):
        bound(pointers, 7)
        maps, params = arrived(fake)
        assert [each.address for each in maps.values()] == [0x10000 + Q_SKIPPED, 0x20000, 0x30000, 0x40000 + Q_SKIPPED]
        assert params.lse == 0x50004 + LSE_SKIPPED
        assert fake.launches[-1].stream == 7 and len(fake.launches) == number + 1
    assert fake["encode_count"] == 4
    content = bytes(fake.launches[-1].params[: len(launch.params)])
    assert content == launch.pack(pointers)
    assert content[520:] == launch.params[520:]  # strides, shape and scale, as planned
    # Everything may change, alone or together, and come back.
    for position in (0, 1, 2, 3, 4, None, 2, None):
        changed = tuple(p + 0x1000 * (position in (i, None)) for i, p in enumerate(pointers))
        bound(changed, 0)
        assert bytes(fake.launches[-1].params[: len(launch.params)]) == launch.pack(changed)
        bound(pointers, 0)
        assert bytes(fake.launches[-1].params[: len(launch.params)]) == content
    assert fake["encode_count"] == 8


def test_pack_takes_another_encoder() -> None:
    launch = main_launch(plan_forward(CAUSAL, H200))
    seen = []

    def encode(spec: tensor_map.TensorMapSpec, pointer: int) -> bytes:
        seen.append((spec, pointer))
        return bytes([len(seen)]) * 128

    packed = launch.pack((1 << 20, 2 << 20, 3 << 20, 4 << 20, 5 << 20), encode)
    assert bytes(packed[:512]) == b"".join(bytes([number]) * 128 for number in (1, 2, 3, 4))
    assert [pointer for _, pointer in seen] == [(1 << 20) + Q_SKIPPED, 2 << 20, 3 << 20, (4 << 20) + Q_SKIPPED]
    assert [spec for spec, _ in seen] == [each.spec for each in launch.tensor_maps]
    assert FwdTmaParams.from_buffer_copy(packed).lse == (5 << 20) + LSE_SKIPPED


def test_a_refused_map_leaves_nothing_wrong(fake: FakeDriver) -> None:
    bound = plan_forward(problem(), H200).bind(0)
    good = (0x10000, 0x20000, 0x30000, 0x40000, 0x50000)
    bound(good, 0)
    with pytest.raises(LaunchError, match=r"cuTensorMapEncodeTiled.*at address 0x20008"):
        bound((0x11000, 0x20008, 0x31000, 0x41000, 0x51000), 0)
    assert len(fake.launches) == 1
    bound(good, 0)
    maps, params = arrived(fake)
    assert [each.address for each in maps.values()] == list(good[:4]) and params.lse == good[4]


def test_threads_launch_their_own_arrays(fake: FakeDriver) -> None:
    bound = plan_forward(problem(), H200).bind(0)
    barrier = threading.Barrier(6)

    def work(number: int) -> None:
        barrier.wait()
        for step in range(100):
            bound(tuple((number << 32) + (i << 16) + 16 * (step % 7) for i in range(5)), number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake.launches) == 600
    for index, launch in enumerate(fake.launches):
        maps, params = arrived(fake, index)
        addresses = [*(each.address for each in maps.values()), params.lse]
        assert {address >> 32 for address in addresses} == {launch.stream}
        assert len({address & 0xFFFF for address in addresses}) == 1
