"""Plans of a backward whose tiles come from lists: bounds, workspaces, the order of the lists, and nothing to do."""

from __future__ import annotations

import ctypes
import dataclasses

import pytest

from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.kernels import BackwardPlan, KernelLaunch, plan_backward
from fa2cupy.kernels.backward import ARRAYS
from fa2cupy.kernels.listed import Lists
from fa2cupy.kernels.params import BwdParams, BwdTmaParams, ListedPlace, ListParams, composed
from fa2cupy.problem import AttentionProblem
from fa2cupy.spec import LengthsSpec, WindowSpec
from tests.plan_cases import A100, H200, backward_problem, named

SOURCES = ["smxx/list_tiles.cu", "smxx/flash_bwd_preprocess.cu", "main", "smxx/flash_bwd_postprocess.cu"]


def packed(
    tokens_q: int,
    tokens_k: int,
    sequences: int,
    head_dim: int = 128,
    heads: tuple[int, int] = (8, 2),
    **changes: object,
) -> AttentionProblem:
    problem = backward_problem(tokens_q, tokens_k, head_dim, "bfloat16", True, 1, heads)
    lengths = LengthsSpec(sequences, cu_seqlens_q=True, cu_seqlens_k=True)
    return dataclasses.replace(problem, batch=sequences, lengths=lengths, **changes)  # type: ignore[arg-type]


def lists_of(launch: KernelLaunch, struct: type[ctypes.Structure] = BwdParams) -> ctypes.Structure:
    """The parameters of a launch that takes tiles from lists."""
    return composed(struct, (ListParams,)).from_buffer_copy(launch.params)


def pointed(plan: BackwardPlan, launch: KernelLaunch) -> dict[str, int]:
    """Where in the workspace a launch's pointers lead, by the fields of its struct."""
    struct = composed(BwdParams, (ListParams,))
    offsets = {getattr(struct, field).offset: field for part in (BwdParams, ListParams) for field, *_ in part._fields_}
    return {
        offsets[offset]: add for offset, position, add in launch.pointers if position == 11
    }  # behind both cu_seqlens


@pytest.mark.parametrize(("device", "block_m", "wide"), [(H200, 64, 128), (A100, 64, 128)])
def test_launches(device: DeviceInfo, block_m: int, wide: int) -> None:
    plan = plan_backward(packed(5000, 7000, 30), device, False)
    sources = [launch.source for launch in plan.launches]
    assert [*sources[:2], "main", *sources[3:]] == SOURCES and sources[2].endswith("/flash_bwd.cu")
    most_q, most_k = (5000 + 30 * (block_m - 1)) // block_m, (7000 + 30 * (wide - 1)) // wide
    assert plan.tile.block_m == block_m and plan.splits == 1
    for launch in plan.launches[1:]:
        assert launch.defines["FA2_LISTED"] == 1
    for name in ("flash_bwd_preprocess", "flash_bwd_postprocess"):
        params = lists_of(named(plan, name))
        assert (params.tiles_of_head_q, params.tiles_of_head_k) == (most_q, most_k)
        assert (params.rows_q, params.rows_k, params.shape.batch) == (5000, 7000, 1)
        assert named(plan, name).config.grid == (8 * most_q, 1, 1)
    grid = named(plan, "flash_bwd").config.grid
    assert grid == ((132 if device is H200 else 2 * most_k), 1, 1)


def test_workspaces_do_not_overlap() -> None:
    plan = plan_backward(packed(5000, 7000, 30), A100, False)
    lists, tiles = pointed(plan, plan.launches[1]), 8 * ((5000 + 30 * 63) // 64)
    sizes = {
        "counts": 8,
        "tiles_q": (5000 + 30 * 63) // 64 * ctypes.sizeof(ListedPlace),
        "tiles_k": (7000 + 30 * 127) // 128 * ctypes.sizeof(ListedPlace),
        "lse_log2": tiles * 64 * 4,
        "softmax_d": tiles * 64 * 4,
        "dq_accum": tiles * 64 * 128 * 4,
        "dq_turn": tiles * 4,
    }
    ends = 0
    for field, offset in sorted(lists.items(), key=lambda item: item[1]):
        assert offset >= ends, field
        ends = offset + sizes.get(field, 0)
    assert set(sizes) <= set(lists) and ends <= plan.workspace_bytes


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("deterministic", [False, True])
def test_order(head_dim: int, deterministic: bool) -> None:
    """In turn: lists in the order of the sequences, and a thread block (a cluster) for each tile that there can be."""
    plan = plan_backward(packed(5000, 7000, 30, head_dim), H200, deterministic)
    assert plan.launches[0].defines["FA2_IN_ORDER"] == deterministic
    main = named(plan, "flash_bwd")
    params = lists_of(main, BwdTmaParams)
    cluster = int(main.defines["FA2_CLUSTER"])
    clusters = 2 * params.tiles_of_head_k if deterministic else 132 // cluster
    assert main.config.grid == (cluster * clusters, 1, 1)
    assert main.defines["FA2_CLEAR_DQ"] == (head_dim == 256 and not deterministic)


def test_sums_begin_with_zeros_where_sequences_are_long() -> None:
    for sequences, cleared in ((2, 1), (300, 0)):
        plan = plan_backward(packed(16384, 16384, sequences), H200, False)
        assert named(plan, "flash_bwd").defines["FA2_CLEAR_DQ"] == cleared


def test_maps_end_with_sequences() -> None:
    main = named(plan_backward(packed(5000, 7000, 30), H200, False), "flash_bwd")
    rows = [spec.dims[1] for *_, spec in main.tensor_maps if spec.dtype == "bfloat16"]
    assert sorted(rows) == [5000, 5000, 7000, 7000]
    for _, _, add_bytes, spec in main.tensor_maps:
        if spec.dtype == "bfloat16":
            assert len(spec.dims) == 5 and add_bytes == -spec.dims[1] * spec.strides_bytes[0]


@pytest.mark.parametrize("device", [H200, A100])
def test_nothing_to_do(device: DeviceInfo) -> None:
    """Without queries, or keys, there are rows to fill; without either, nothing."""
    for tokens_q, tokens_k in ((0, 70), (70, 0)):
        plan = plan_backward(packed(tokens_q, tokens_k, 3), device, False)
        assert [launch.source for launch in plan.launches] == SOURCES[:1] and plan.workspace_bytes > 0
    assert plan_backward(packed(0, 0, 3), device, False).launches == ()


def test_a_window_reaches_the_lists() -> None:
    problem = packed(5000, 7000, 30, causal=False, window=WindowSpec(200, 10))
    plan = plan_backward(problem, A100, True)
    for launch in plan.launches:
        assert ("FA2_BAND" in launch.defines) == (launch.name in ("list_tiles", "flash_bwd"))


def segmented(batch: int, seqlen: int, head_dim: int = 128, heads: tuple[int, int] = (8, 2)) -> AttentionProblem:
    problem = backward_problem(seqlen, seqlen, head_dim, "bfloat16", True, batch, heads)
    return dataclasses.replace(problem, lengths=LengthsSpec(batch * seqlen, segments=True))


OF_SEGMENTS = ["find_segments", "list_tiles", "flash_bwd_preprocess", "flash_bwd", "flash_bwd_postprocess"]
OF_SHORTS = ["flash_bwd_preprocess", "flash_bwd"]


@pytest.mark.parametrize("device", [H200, A100])
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_room_for_tiles_grows_with_tokens(device: DeviceInfo, head_dim: int) -> None:
    """Up to twice a dense batch, not to a tile for each token: short segments are computed by themselves."""
    problem = segmented(4, 8192, head_dim)
    plan = plan_backward(problem, device, False)
    assert [launch.name for launch in plan.launches] == OF_SEGMENTS + OF_SHORTS
    params = composed(BwdParams, (ListParams,)).from_buffer_copy(plan.launches[2].params)
    dense = 4 * -(-8192 // plan.tile.block_m)
    short_keys = int(plan.launches[-1].defines["FA2_BLOCK_N"])  # type: ignore[call-overload]
    assert (
        dense
        <= params.tiles_of_head_q
        <= 4 * (8192 + (2 + 8192 // short_keys) * plan.tile.block_m) // plan.tile.block_m
    )
    without = plan_backward(dataclasses.replace(problem, lengths=None), device, False)
    assert plan.workspace_bytes <= 2.1 * without.workspace_bytes


@pytest.mark.parametrize("device", [H200, A100])
@pytest.mark.parametrize(
    ("longest", "keys"), [(1, 1), (40, 40), (128, 129), (300, 129), (1, 129), (2000, 2000), (3, 300)]
)
def test_what_is_not_short_has_room(device: DeviceInfo, longest: int, keys: int) -> None:
    """The worst that segments of more than `short_keys` keys can do."""
    problem = segmented(2, 4096, 64)
    plan = plan_backward(problem, device, False)
    short_keys = int(plan.launches[-1].defines["FA2_BLOCK_N"])  # type: ignore[call-overload]
    block_m, wide = plan.tile.block_m, plan.tile.cluster * plan.tile.block_n
    lists = Lists.of(problem, block_m, wide, has_keys=True, short_keys=short_keys)
    keys = max(keys, short_keys + 1)
    count = min(4096 // keys, 4096 // longest)
    for rest in (4096 - count * longest, 0):  # the last one may have all queries that are left
        tiles_q = (count - 1) * -(-longest // block_m) + -(-(longest + rest) // block_m)
        assert 2 * tiles_q <= lists.tiles_of_head_q
    assert 2 * ((count - 1) * -(-keys // wide) + -(-(4096 - (count - 1) * keys) // wide)) <= lists.tiles_of_head_k


def test_short_segments_need_no_memory_of_their_own() -> None:
    """But statistics, row by row, where those of the tiles were. In any order of the lists: nobody waits for them."""
    for deterministic in (False, True):
        problem = segmented(4, 8192)
        plan = plan_backward(problem, A100, deterministic)
        before, main = plan.launches[-2:]
        assert before.defines["FA2_SHORT"] == main.defines["FA2_SHORT"] == 1 and main.defines["FA2_DETERMINISTIC"] == 0
        assert main.config.grid[0] <= 108 * 16 and before.config.grid[0] <= 108 * 16
        assert not main.config.overlaps_previous
        names = (*ARRAYS, "segment_ids_q", "segment_ids_k")
        struct = composed(BwdParams, (ListParams,))
        place = {
            getattr(struct, field).offset: field for part in (BwdParams, ListParams) for field, *_ in part._fields_
        }
        of = [
            {place[offset]: add for offset, position, add in launch.pointers if position == len(names)}
            for launch in (plan.launches[2], before, main)
        ]
        assert of[1] == of[2] and of[0]["counts"] + 8 == of[1]["counts"]
        assert of[1]["tiles_q"] == of[1]["tiles_k"] not in (of[0]["tiles_q"], of[0]["tiles_k"])
        assert of[1]["lse_log2"] == of[0]["lse_log2"] and of[1]["softmax_d"] - of[1]["lse_log2"] >= 4 * 4 * 8192 * 8
        assert of[1]["softmax_d"] + 4 * 4 * 8192 * 8 <= plan.workspace_bytes
        assert max(of[1]["tiles_q"], of[0]["tiles_k"]) + 32 * 4 * 8192 <= of[0]["lse_log2"]


def test_rows_of_one_token_have_room_for_any_segments() -> None:
    plan = plan_backward(segmented(3, 1), H200, False)
    assert [launch.name for launch in plan.launches] == OF_SEGMENTS
    assert plan_backward(segmented(3, 0), H200, False).launches == ()
