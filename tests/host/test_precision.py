"""float32 and float64 by the kernels of sm_80, run on the CPU: every choice of them, and how accurate they are."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fa2cupy.jit.kernel import LaunchConfig
from fa2cupy.kernels.sm80.flash_fwd import FwdTile
from fa2cupy.kernels.sm80.flash_fwd import table as forward_table
from fa2cupy.kernels.tiles import SHARED_MEMORY
from tests.gpu import tf32_sums
from tests.gpu.cases import Case
from tests.host import build, cases, lengths, run
from tests.host.build import Mutation
from tests.host.kernel_run import HostCase, Prepared, check, execute, judge, prepare
from tests.host.lengths import Lengths, LengthsCase, segments_of, starts
from tests.host.run import HostRunError, Schedule

FEW = {backward: cases.wide_groups(backward, 1) for backward in (False, True)}
MANY = {backward: cases.wide_groups(backward, 2) for backward in (False, True)}
ONCE = (Schedule.LOWEST_FIRST,)


@pytest.mark.parametrize(
    ("backward", "host_cases"),
    [
        pytest.param(backward, group, id=f"{'backward' if backward else 'forward'}-{name}", marks=marks)
        for groups, marks in ((FEW, ()), (MANY, (pytest.mark.slow,)))
        for backward, named in groups.items()
        for name, group in named.items()
    ],
)
def test_covering_array(backward: bool, host_cases: list[HostCase]) -> None:
    for host_case in host_cases:
        check(host_case, backward, schedules=(Schedule.RANDOM,))


def rms_errors(prepared: Prepared) -> dict[str, float]:
    """Relative to the reference's rms."""
    errors = {}
    for name in (name for name in prepared.results if name != "lse"):
        ref, got = prepared.expected.bounds[name].ref, prepared.tensors[name].values
        errors[name] = float(np.sqrt(np.mean((got - ref) ** 2) / np.mean(ref**2)))
    return errors


# ----------------------------------------------------------------------------------------------------------------------
# Accuracy

LONG = (
    (False, Case(40, 2048, 64, "float32", False, 1, (1, 1), seed=1)),
    (True, Case(384, 384, 64, "float32", False, 1, (1, 1), seed=1)),
)


@pytest.mark.parametrize(("backward", "case"), LONG, ids=["forward", "backward"])
def test_float32_is_as_accurate_as_float32(backward: bool, case: Case) -> None:
    """Its rms error is at most 1.25 times that of the formula in NumPy's float32; in sums without end it is more."""
    prepared = prepare(HostCase(case, "sm_100"), backward)
    execute(prepared, Schedule.LOWEST_FIRST)
    judge(prepared)
    model = {
        name: np.sqrt(np.mean((bound.model - bound.ref) ** 2) / np.mean(bound.ref**2))
        for name, bound in prepared.expected.bounds.items()
        if bound.model is not None
    }
    errors = rms_errors(prepared)
    assert all(errors[name] <= 1.25 * model[name] for name in errors), (errors, model)
    launches = tuple(
        dataclasses.replace(launch, defines={**launch.defines, "FA2_PROMOTE": 0})
        if "FA2_PROMOTE" in launch.defines
        else launch
        for launch in prepared.plan.launches
    )
    prepared.plan = dataclasses.replace(prepared.plan, launches=launches)
    execute(prepared, Schedule.LOWEST_FIRST)
    chained = rms_errors(prepared)
    assert all(chained[name] > 2 * model[name] for name in errors), (chained, model)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_inputs_of_mean_1_and_outliers(backward: bool) -> None:
    for dtype in ("float32", "float64"):
        plain = Case(100, 200, 64, dtype, False, 1, (1, 1), seed=2)
        for case in (dataclasses.replace(plain, mean=1.0), dataclasses.replace(plain, outliers=True)):
            check(HostCase(case, "sm_100"), backward, schedules=ONCE)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_tf32(backward: bool) -> None:
    """As accurate as a model whose inputs, P and dS have 10 bits behind the point; and no better than that."""
    case = Case(200, 260, 64, "float32", True, 1, (2, 1), seed=1, precision="tf32")
    prepared = prepare(HostCase(case, "sm_100"), backward)
    execute(prepared, Schedule.LOWEST_FIRST)
    judge(prepared)
    assert all(1e-4 < error < 1e-3 for error in rms_errors(prepared).values())


def test_script_for_a_gpu_measures_what_it_says() -> None:
    """tests/gpu/tf32_sums.py on the CPU, whose products cut their sums off: it finds that."""
    a, b = tf32_sums.inputs(512, 0.0)
    found = {}
    for name, which in tf32_sums.CHAINS.items():
        library = build.library("tf32_sums.cu", "tf32_sums", {}, directory=tf32_sums.HERE)
        out = np.zeros(128, np.float32)
        params = tf32_sums.Params(a.ctypes.data, b.ctypes.data, out.ctypes.data, 512, which, 32)
        run.launch(library, LaunchConfig((1, 1, 1), (32, 1, 1)), bytes(params))
        found[name] = tf32_sums.errors(out, a, b, name.startswith("1"))
    chained, fresh = found["3 products, one accumulator"], found["3 products, anew every 16"]
    assert chained[0] > 5 * fresh[0] and chained[1] < -5 * abs(fresh[1])
    assert found["1 product, one accumulator"][1] < -5 * abs(found["1 product, anew every 16"][1])
    assert fresh[0] < found["3 products, anew every 32"][0] < found["3 products, anew every 64"][0] < chained[0]
    assert fresh[0] < 1.5 * found["fma, one accumulator"][0]


# ----------------------------------------------------------------------------------------------------------------------
# Numbers that are none


def run_forward(dtype: str, precision: str | None, change: dict[str, float]) -> np.ndarray:
    """out (queries, head_dim) of ordinary numbers, with element (5, 3) of some arrays changed."""
    case = Case(32, 48, 16, dtype, False, 1, (1, 1), seed=1, precision=precision)
    prepared = prepare(HostCase(case, "sm_100"), False)
    for name, value in change.items():
        prepared.tensors[name].values[0, 5, 0, 3] = value
    execute(prepared, Schedule.LOWEST_FIRST)
    return prepared.tensors["out"].values[0, :, 0].copy()


@pytest.mark.parametrize("dtype, precision", [("float32", None), ("float32", "tf32"), ("float64", None)])
def test_numbers_that_are_none(dtype: str, precision: str | None) -> None:
    """NaN spreads as far as the formula lets it, also the one that GPUs make, whose bits are all set; infinities are
    those of the formula, or NaN (docs/numerics.md); numbers too small for float32's exponent are 0."""
    plain = run_forward(dtype, precision, {})
    word, bits = (np.uint32, 0x7FFFFFFF) if dtype == "float32" else (np.uint64, 0x7FFFFFFFFFFFFFFF)
    for nan in (np.nan, np.array(bits, word).view(dtype)[()]):
        of_query = run_forward(dtype, precision, {"q": nan})
        assert np.isnan(of_query[5]).all()
        np.testing.assert_array_equal(np.delete(of_query, 5, 0), np.delete(plain, 5, 0))
        of_value = run_forward(dtype, precision, {"v": nan})
        assert np.isnan(of_value[:, 3]).all()
        np.testing.assert_array_equal(np.delete(of_value, 3, 1), np.delete(plain, 3, 1))
        assert np.isnan(run_forward(dtype, precision, {"k": nan})).all()
    of_infinity = run_forward(dtype, precision, {"v": np.inf})
    exact = dtype == "float64" or precision == "tf32"
    assert (of_infinity[:, 3] == np.inf).all() if exact else np.isnan(of_infinity[:, 3]).all()
    np.testing.assert_array_equal(np.delete(of_infinity, 3, 1), np.delete(plain, 3, 1))
    tiny, zero = (run_forward(dtype, precision, {"v": value}) for value in (1e-310 if dtype == "float64" else 1e-40, 0))
    np.testing.assert_allclose(tiny, zero, rtol=0, atol=1e-38)


# ----------------------------------------------------------------------------------------------------------------------
# Everything that the kernels can do besides

FEATURES = (
    HostCase(Case(70, 133, 64, "float32", False, 1, (2, 1), seed=3, window=(20, 7)), "sm_100", scores=("softcap",)),
    HostCase(
        Case(70, 70, 40, "float64", True, 1, (4, 2), seed=4), "sm_100", dlse=True, scores=("softcap", "alibi_slopes")
    ),
    HostCase(
        Case(90, 60, 64, "float32", True, 1, (2, 2), seed=5),
        "sm_86",
        sinks="float32",
        dlse=True,
        scores=("alibi of batch",),
    ),
    HostCase(Case(33, 100, 64, "float64", False, 1, (8, 1), seed=6, scale=-0.2), "sm_80", sinks="float64"),
)
DROPPED = (
    HostCase(Case(40, 60, 130, "float64", True, 1, (2, 1), seed=7), "sm_86", dropout=(0.25, 4)),
    HostCase(Case(70, 90, 64, "float32", True, 1, (4, 1), seed=8, deterministic=True), "sm_100", dropout=(0.25, 8)),
    HostCase(
        Case(90, 70, 128, "float32", True, 1, (2, 2), seed=9, precision="tf32"), "sm_86", dropout=(0.5, 2),
        sinks="float32", scores=("softcap",),
    ),
    HostCase(Case(60, 70, 250, "float32", False, 1, (1, 1), seed=10, window=(30, 9)), "sm_100", dropout=(0.25, 2)),
    HostCase(Case(60, 70, 250, "float64", False, 1, (1, 1), seed=11), "sm_100", dropout=(0.25, 2)),
    HostCase(Case(140, 150, 64, "float32", False, 1, (2, 1), seed=12), "sm_100", mask="heads"),
    HostCase(Case(140, 150, 64, "float64", False, 1, (2, 1), seed=13), "sm_86", mask="heads"),
)  # fmt: skip


# Packed, with a gap, sequences of no keys and of no queries; and a batch of rows in use, on the side of the keys.
PACKED = Lengths(150, 260, 4, starts(1, 80, 0, 60), starts(130, 40, 7, 70), seqused_q=(1, 77, 0, 60), causal=True)
USED = Lengths(33, 100, 2, seqused_k=(90, 20), leftpad_k=(7, 0), window=(25, 5))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("of_lengths, dtype", [(PACKED, "float32"), (USED, "float64")])
def test_lengths(of_lengths: Lengths, dtype: str, backward: bool) -> None:
    lengths.check(LengthsCase(of_lengths, 64, dtype, arch="sm_86", deterministic=True), backward, schedules=ONCE)


# Segments; and some that are so short that a backward has no room for tiles of all, and computes some whole.
SEGMENTS = segments_of(((70, 90), (0, 33), (30, 40, 2), (65, 0)), ((1, 1),), ((20, 60, 5), (3, 70)), causal=True)
SHORT = segments_of(tuple((1 + n % 5, 1 + n % 5, n % 11 == 0) for n in range(60)), ((2, 3),) * 20, causal=True)
OF_LENGTHS = (
    LengthsCase(
        SEGMENTS, 64, "float64", arch="sm_100", sinks="float32", scores=("softcap",), dropout=(0.5, 2), dlse=True
    ),
    LengthsCase(PACKED, 64, "float32", arch="sm_100", scores=("alibi of batch",), dropout=(0.25, 4)),
    LengthsCase(SHORT, 40, "float32", arch="sm_86", sinks="float32", head_dim_v=24),
    LengthsCase(SHORT, 40, "float64", arch="sm_80"),
)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if n else ()) for n, case in enumerate(OF_LENGTHS)]
)
def test_lengths_with_features(case: LengthsCase, backward: bool) -> None:
    lengths.check(case, backward, schedules=ONCE)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "host_case",
    [*FEATURES, *(pytest.param(case, marks=pytest.mark.slow if n > 1 else ()) for n, case in enumerate(DROPPED))],
    ids=str,
)
def test_features(host_case: HostCase, backward: bool) -> None:
    check(host_case, backward, schedules=ONCE)


# ----------------------------------------------------------------------------------------------------------------------
# What a wrong index or a missing product would do

_F32, _F64, _TILE = "sm80/operand_f32.cuh", "sm80/operand_f64.cuh", "sm80/tile.cuh"
_FWD, _BWD, _REAL = "sm80/flash_fwd.cu", "sm80/flash_bwd.cu", "common/real.cuh"
_POST = "smxx/flash_bwd_postprocess.cu"
MUTATED = {
    "f32": HostCase(Case(40, 70, 64, "float32", True, 1, (2, 1), seed=1), "sm_86"),
    "f32-parts": HostCase(Case(40, 70, 64, "float32", False, 1, (8, 1), seed=2), "sm_100"),
    "f64": HostCase(Case(40, 70, 40, "float64", True, 1, (2, 1), seed=3), "sm_86"),
    "f64-new": HostCase(Case(40, 70, 64, "float64", False, 1, (2, 1), seed=4), "sm_100"),
    "f64-widest": HostCase(Case(20, 30, 250, "float64", False, 1, (1, 1), seed=6), "sm_100"),
    "f64-wide": HostCase(Case(20, 30, 130, "float64", True, 1, (2, 1), seed=5), "sm_86"),
}
MUTANTS = (
    ("f32", False, _F32, "a.small, b.big[2 * n]", "a.big, b.big[2 * n]"),
    ("f32", False, _F32, "a.big, b.small[2 * n]", "a.big, b.big[2 * n]"),
    ("f32", False, _F32, "(k * 16 + half * 8 + place) * kRowBytes", "(k * 16 + half * 8) * kRowBytes"),
    ("f32", False, _F32, "words[high][2 + h] = __float_as_uint(y)", "words[high][2 + h] = __float_as_uint(x)"),
    ("f32", False, _TILE, "even[2 * h], y = odd[2 * h]", "even[2 * h], y = odd[2 * h + 1]"),
    ("f32", True, _F32, "(i * 16 + row * 8) * kRowBytes", "(i * 16) * kRowBytes"),
    ("f32", True, _F32, "r[half][2 * row] = rows.x", "r[half][2 * row] = rows.y"),
    ("f32", True, _TILE, "kRowsApart = kOfTransposed ? 1 : 8", "kRowsApart = 8"),
    ("f32-parts", True, _POST, "dq_offset(warp, lane, i, j + n, 0)", "dq_offset(warp, lane, i, j, 0)"),
    ("f32-parts", True, _BWD, "kCols + col + 2 * accumulator_col()", "kCols + col + accumulator_col()"),
    ("f64", False, _F64, "words[high][h] = is_swapped() ? y : x", "words[high][h] = x"),
    ("f64", False, _F64, "other = is_swapped() ? -kRowBytes : kRowBytes", "other = kRowBytes"),
    ("f64", False, _F64, "a[i], b[i / 2]", "a[i], b[i % 2]"),
    ("f64", False, _REAL, "f, 0.0013333558146789949)", "f, 0.0013333558)"),
    ("f64", False, _REAL, "nan ? 0x7ff80000 : high < 0 ? 0", "nan ? 0x7ff80000 : high < 0 ? 0x3ff00000"),
    ("f64", True, _F64, "if (is_swapped()) other = -other;", ""),
    ("f64-widest", True, _BWD, "i, kFirst + j, e), x[e])", "i, j, e), x[e])"),
    ("f64-new", False, _F64, "mma_m16n8k8_f64(d, a, b[0], b[1])", "mma_m16n8k8_f64(d, a, b[1], b[0])"),
    ("f64-wide", False, _FWD, "warp_id() % kRowWarps * kOTiles * 8", "0"),
    ("f64-wide", False, _FWD, "warp_id() / kRowWarps * kMTiles", "warp_id() * kMTiles"),
)
_USUAL = (0, 6, 10, 15)


@pytest.mark.parametrize(
    "name, backward, path, find, replace",
    [
        pytest.param(*mutant, id=f"{mutant[0]}-{number}", marks=[] if number in _USUAL else pytest.mark.slow)
        for number, mutant in enumerate(MUTANTS)
    ],
)
def test_every_mutant_is_caught(name: str, backward: bool, path: str, find: str, replace: str) -> None:
    mutation = Mutation(path, find, replace)
    with pytest.raises((AssertionError, HostRunError)):
        check(MUTATED[name], backward, schedules=ONCE, mutation=mutation)


def _rows() -> list[tuple[str, str, FwdTile]]:
    """Each row of the forward's tables once."""
    found = {
        dataclasses.replace(tile, note=""): (arch, arithmetic, tile)
        for arch in ("sm_80", "sm_86", "sm_90")
        for arithmetic in ("float32", "tf32", "float64")
        for tile in forward_table(arithmetic, SHARED_MEMORY[arch])
    }
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("arch, arithmetic, tile", _rows())
def test_rows_of_the_forward(arch: str, arithmetic: str, tile: FwdTile) -> None:
    dtype, precision = ("float32", "tf32") if arithmetic == "tf32" else (arithmetic, None)
    case = Case(70, 100, tile.head_dim, dtype, True, 1, (2, 1), seed=tile.head_dim, precision=precision)
    prepared = prepare(HostCase(case, "sm_100" if arch == "sm_90" else arch), False)
    assert prepared.plan.tile == tile
    execute(prepared, Schedule.RANDOM)
    judge(prepared)
