"""Plans of the forward: which kernel and tile, and what it is launched with."""

from __future__ import annotations

import ctypes
import functools
import re
from typing import Any

import pytest

from fa2cupy import jit, log
from fa2cupy.errors import Fa2Warning, InvalidArgument
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.kernels import common, plan_backward, plan_forward, planner
from fa2cupy.kernels.params import FillParams, FwdParams, FwdTmaParams
from fa2cupy.kernels.sm80.flash_fwd import FwdTile
from fa2cupy.kernels.sm90.flash_fwd import FWD_TILES_SM90, FwdTileSm90, rows_for
from fa2cupy.kernels.tiles import SHARED_MEMORY
from fa2cupy.problem import AttentionProblem
from tests.gpu.cases import Case, problem_of
from tests.plan_cases import A100, B200, H200, backward_problem, main_launch, problem, with_strides

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
    assert plan.objection == objection
    if objection:
        assert plan.family == "sm80" and isinstance(plan.tile, FwdTile) and launch.tensor_maps == ()
        assert (launch.source, launch.arch) == ("sm80/flash_fwd.cu", common.arch_of(device))
        assert f"  sm_80 kernel: {objection}" in str(plan).splitlines()
    else:
        assert plan.family == "sm90" and isinstance(plan.tile, FwdTileSm90) and len(launch.tensor_maps) == 4
        assert (launch.source, launch.name, launch.arch) == ("sm90/flash_fwd.cu", "flash_fwd", "sm_90a")
        assert "  sm_90 kernel" in str(plan).splitlines()


def test_objections_of_a_compiler() -> None:
    asked = []

    def compiler(arch: str, row: Any) -> str:
        asked.append(arch)
        return "NVRTC is no good" if arch == "sm_90a" else ""

    plan = plan_forward(problem(), H200, compiler=compiler)
    assert plan.family == "sm80" and "sm_80 kernel: NVRTC is no good" in str(plan)
    assert "device 0 (A100)" in plan_forward(problem(), A100, compiler=compiler).objection
    assert asked == ["sm_90a", "sm_90", "sm_80"]
    plan_forward(problem(5, 0), H200, compiler=compiler)  # nothing that it could not compile
    plan_backward(backward_problem(5, 0, 64, "bfloat16", False), H200, False, compiler=compiler)
    assert len(asked) == 3


def test_the_faster_way_of_a_compiler_that_serialises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per kernel: only the forward of head_dim up to 64 is faster on sm_80 then; and what is asked for is taken."""
    monkeypatch.setattr(jit, "expected_nvrtc_build", lambda: "12.8.93 CL-1")
    monkeypatch.setattr(jit, "wgmma_objection", lambda build: "")

    def families(serialised: bool, family: str | None = None) -> list[str]:
        monkeypatch.setattr(jit, "serialises_wgmma", lambda build: serialised)
        ask = functools.partial(planner._nvrtc_objection, family)
        plans = [
            plan_forward(problem(head_dim=head_dim), H200, family=family, compiler=functools.partial(ask, False))
            for head_dim in (32, 64, 96, 128)
        ]
        wanted = backward_problem(128, 128, 64, "bfloat16", False)
        plans.append(plan_backward(wanted, H200, False, family=family, compiler=functools.partial(ask, True)))
        return [plan.family for plan in plans]

    log.warn_once.cache_clear()
    with pytest.warns(Fa2Warning, match=r"12\.8\.93 CL-1 serialises wgmma.*head_dim 64 slower than that of sm_80"):
        assert families(True) == ["sm80", "sm80", "sm90", "sm90", "sm90"]
    assert families(False) == families(True, "sm90") == ["sm90"] * 5


def test_a_given_tile_chooses_its_kernel() -> None:
    row = FwdTileSm90(64, 192, 64, 1, 3, False, "")
    plan = plan_forward(problem(), H200, row)
    assert plan.tile is row and plan.family == "sm90"
    assert main_launch(plan).config.block == (512, 1, 1)
    usual = plan_forward(problem(), H200, family="sm80")
    given = plan_forward(problem(), H200, usual.tile)
    assert given.launches == usual.launches and given.family == "sm80"
    assert "  sm_80 kernel" in str(given).splitlines()


def test_thin_grids_take_smaller_tiles() -> None:
    """A forward tile of 128 rows, unless its grid leaves multiprocessors without a block."""
    for heads, seqlen, block_m in ((16, 2048, 128), (8, 2048, 64), (132, 1, 64), (133, 1, 128)):
        problem = problem_of(Case(seqlen, seqlen, 128, "bfloat16", False, 1, (heads, heads)), False)
        assert plan_forward(problem, H200, family="sm80").tile.block_m == block_m, (heads, seqlen)


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
        row = rows_for(head_dim, head_dim, causal, 1000)[0]
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
        row = rows_for(head_dim, head_dim_v, causal, 1000)[0]
        assert (row.head_dim, row.head_dim_v) == pair
    for row in FWD_TILES_SM90[causal]:
        assert (row.head_dim, row.head_dim_v) in ((64, 0), (96, 0), (128, 0), (192, 128), (192, 0), (256, 0))
        assert row.block_m % 64 == row.block_n % 16 == 0
        assert row.num_warps == 4 + row.block_m // 16
        panels, panels_v = -(-row.head_dim // 64), -(-(row.head_dim_v or row.head_dim) // 64)
        q_rows, k_rows = row.num_q_stages * row.block_m, row.num_kv_stages * row.block_n
        tiles = 64 * 2 * (panels * q_rows + (panels + panels_v) * k_rows + panels_v * 64 * row.own_o)
        assert row.shared_mem_bytes() == tiles + 1024 <= SHARED_MEMORY["sm_90"]
        assert row.note.startswith(f"{row.shared_mem_bytes() // 1024} KB")
        assert row.num_q_stages == 1 or not row.own_o


@pytest.mark.parametrize("causal", [False, True])
def test_rows_of_short_sequences(causal: bool) -> None:
    """As many queries as a row serves, and one more."""
    for head_dim, seqlen_q, kept, expected in (
        (64, 1024, (128, 128, 3, False), (192, 128, 3, False)),
        (128, 1024, (128, 128, 2 + causal, False), (128, 128, 2, False)),
        (256, 2048, (128, 64, 1, True), (128, 64 if causal else 80, 1, causal)),
    ):
        for seqlen, wanted in ((seqlen_q, kept), (seqlen_q + 1, expected)):
            row = rows_for(head_dim, head_dim, causal, seqlen)[0]
            assert (row.block_m, row.block_n, row.num_q_stages, row.own_o) == wanted, (head_dim, seqlen)
        assert not row.short


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
        "FA2_OWN_O": 0,
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
        (2048, True, 192, 88),
        (1024, False, 128, 64),
        (1025, False, 192, 48),
    ):
        plan = plan_forward(problem(seqlen, seqlen, causal=causal), H200)
        assert plan.tile.block_m == block_m and main_launch(plan).config.grid == (blocks, 1, 1)


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
        assert launch.pointers == ((512, 4, empty * 4),)
        assert FwdTmaParams.from_buffer_copy(launch.params).shape.seqlen_q == 200
        assert [each.name for each in plan.launches] == ["flash_fwd"] + ["fill_unseen"] * bool(empty)


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
    (fill,) = (each for each in plan.launches if each.name == "fill_unseen")
    assert FillParams.from_buffer_copy(fill.params).head_dim == 120


def test_nothing_to_do_on_sm90() -> None:
    for seqlen_q, seqlen_k in ((0, 100), (100, 0), (0, 0)):
        for family in (None, "sm90"):
            plan = plan_forward(problem(seqlen_q, seqlen_k), H200, family=family)
            assert {launch.name for launch in plan.launches} <= {"fill_unseen"}
