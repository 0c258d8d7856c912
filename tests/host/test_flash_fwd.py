"""cuda_src/{sm80,sm90}/flash_fwd.cu and smxx/fill_unseen.cu, run on the CPU under three schedules."""

from __future__ import annotations

import dataclasses

import pytest

from fa2cupy.kernels import plan_forward
from fa2cupy.kernels.sm90.flash_fwd import FWD_TILES_SM90, FwdTileSm90
from fa2cupy.problem import AttentionProblem
from tests.gpu.cases import DTYPES, Case
from tests.host import cases
from tests.host.build import Mutation
from tests.host.kernel_run import HostCase, check, device, execute, judge, prepare
from tests.host.run import Schedule
from tests.reference import HEAD_DIM_PAIRS

BACKWARD = False
USUAL_SPECIALS = list(cases.special_cases(BACKWARD))
COVERING = cases.covering_groups(BACKWARD)


def run_all(host_cases: list[HostCase]) -> None:
    """On the case's GPU; and what is for Hopper on an A100 as well, so that both kernels see the same shapes."""
    for host_case in host_cases:
        check(host_case, BACKWARD)
        if host_case.arch == "sm_90":
            check(dataclasses.replace(host_case, arch="sm_80"), BACKWARD)


@pytest.mark.parametrize("host_cases", [pytest.param(group, id=name) for name, group in COVERING.items()])
def test_covering_array(host_cases: list[HostCase]) -> None:
    for host_case in host_cases:
        check(host_case, BACKWARD)


@pytest.mark.parametrize("host_cases", [pytest.param(group, id=name) for name, group in USUAL_SPECIALS])
def test_special_cases(host_cases: list[HostCase]) -> None:
    run_all(host_cases)


@pytest.mark.parametrize(
    ("causal", "tile"),
    [
        pytest.param(causal, tile, id=f"{'causal' if causal else 'full'}-{number}-{tile.head_dim}")
        for causal, rows in FWD_TILES_SM90.items()
        for number, tile in enumerate(rows)
    ],
)
def test_rows_of_hopper(causal: bool, tile: FwdTileSm90) -> None:
    """Each thread block has four tiles, more than any row has buffers of Q: of one block of keys, of two, of more.

    Rows take turns in dtype, which is another binary.
    """
    m, n = tile.block_m, tile.block_n
    dtype = DTYPES[(FWD_TILES_SM90[causal].index(tile) + causal) % 2]
    usual = Case(m // 2 + 1, n - 3, tile.head_dim, dtype, causal, 2, (8, 2), head_dim_v=tile.head_dim_v or None)
    for case in (
        usual,
        dataclasses.replace(usual, seqlen_q=m + 9, seqlen_k=m + 9, batch=1, heads=(8, 8), seed=1),
        dataclasses.replace(usual, seqlen_q=m + 77, seqlen_k=m + 2 * n + 3, batch=1, heads=(8, 1), seed=2),
    ):
        check(HostCase(case, tile=tile), BACKWARD)


@pytest.mark.parametrize("causal", [False, True])
def test_own_o_of_three_warpgroups(causal: bool) -> None:
    """No row has that, but the kernel does; causal, some tiles of a head meet one block of keys and others more."""
    tile = FwdTileSm90(64, 192, 192, 1, 2, True, "", own_o=True)
    for seqlen_q, seqlen_k in ((401, 401), (77, 150)):
        check(HostCase(Case(seqlen_q, seqlen_k, 64, "float16", causal, 1, (8, 2), seed=seqlen_k), tile=tile), BACKWARD)


def test_lengths() -> None:
    """Causal and not, on Hopper and on another GPU, each of both once; `test_long_lengths` has all four."""
    for number, host_case in enumerate(cases.length_cases(64, DTYPES, 1 << 16)):
        arch = ("sm_90", "sm_80")[(number // 2 + number) % 2]
        check(dataclasses.replace(host_case, arch=arch), BACKWARD)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", cases.HEAD_DIMS)
def test_head_dims(head_dim: int, dtype: str) -> None:
    run_all(cases.head_dim_cases(head_dim, dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "head_dim_v"), HEAD_DIM_PAIRS)
def test_head_dims_of_v(head_dim: int, head_dim_v: int) -> None:
    run_all(cases.head_dim_v_cases(head_dim, head_dim_v))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90"])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 192, 256])
def test_all_tiles(head_dim: int, arch: str, dtype: str) -> None:
    run_all(cases.arch_cases(head_dim, arch, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_long_lengths(head_dim: int, dtype: str) -> None:
    run_all(cases.length_cases(head_dim, (dtype,), 1 << 20))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_random_cases(dtype: str) -> None:
    run_all(cases.some_random_cases(250, (32, 40, 59, 64, 111, 128, 192, 256), dtype))


@pytest.mark.parametrize(
    "case, arch",
    [
        (Case(520, 70, 64, "bfloat16", True, heads=(4, 2)), "sm_90"),
        (Case(520, 70, 256, "float16", True, heads=(2, 2)), "sm_90"),
        (Case(330, 100, 128, "bfloat16", True), "sm_80"),
        (Case(530, 70, 64, "bfloat16", False, heads=(4, 2), window=(20, 7)), "sm_90"),
        (Case(330, 100, 128, "bfloat16", False, window=(-1, 5)), "sm_80"),
    ],
)
def test_queries_that_see_no_key(case: Case, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to the kernel, which plans never do: tiles that meet no key block are skipped, and keep what was there; in
    the tile after them such rows become 0, and -inf in lse."""
    prepared = prepare(HostCase(case, arch), BACKWARD)
    main, fill = prepared.plan.launches
    monkeypatch.setattr(AttentionProblem, "empty_rows", 0)
    monkeypatch.setattr(AttentionProblem, "empty_keys", 0)
    (whole,) = plan_forward(prepared.plan.problem, device(arch), prepared.plan.tile).launches
    assert whole.name == main.name and case.seqlen_q - case.seqlen_k > prepared.plan.tile.block_m
    whole = dataclasses.replace(whole, defines={**whole.defines, "FA2_UNSEEN_ROWS": 1})
    prepared = dataclasses.replace(prepared, plan=dataclasses.replace(prepared.plan, launches=(fill, whole)))
    execute(prepared, Schedule.LOWEST_FIRST)
    judge(prepared)
    unguarded = Mutation("common/softmax.cuh", "kUnseenRows && sum[i][h] == 0.f ? 0.f : rcp", "rcp")
    execute(prepared, Schedule.LOWEST_FIRST, mutation=unguarded)
    with pytest.raises(AssertionError):
        judge(prepared)
