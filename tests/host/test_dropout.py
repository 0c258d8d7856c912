"""What dropout keeps: its bits in both layouts, beside NumPy; and in every main kernel, run on the CPU under three
schedules. Bounds of both, each changed and caught."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fa2cupy.jit.kernel import LaunchConfig
from fa2cupy.spec import DropoutParams, DropoutSpec
from tests.covering import chosen
from tests.gpu.cases import DTYPES, Case
from tests.host import build, lengths, run
from tests.host.build import Mutation
from tests.host.kernel_run import HostCase, check, keep_of, seed_of
from tests.host.lengths import LengthsCase, lengths_of, segments_of
from tests.host.run import Schedule
from tests.host.test_plants import AnyCase, is_caught
from tests.host.test_plants import check as check_any
from tests.host.test_segments import MIXED, TINY

HERE = Path(__file__).resolve().parent


def some(every: Sequence[Any], usual: Collection[int]) -> list[Any]:
    """Parameters, of which `make test` has the usual ones."""
    return [
        pytest.param(*(each if isinstance(each, tuple) else (each,)), marks=[] if n in usual else pytest.mark.slow)
        for n, each in enumerate(every)
    ]


class Params(ctypes.Structure):
    """The twin of `KeptParams`."""

    _fields_ = (
        ("dropout", DropoutParams),
        ("kept", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("query", "key", "head", "batch", "as_much")),
    )


@dataclasses.dataclass(frozen=True)
class Drawn:
    """An accumulator of scores: its layout and size; where its first element stands; of which head and sequence."""

    transposed: bool
    m_tiles: int
    n_tiles: int
    query: int = 0
    key: int = 0
    head: int = 1
    batch: int = 2
    threshold: int = 8192
    words: int = 4
    in_front: tuple[int, int] = (0, 0)
    one_by_one: bool = False


def kept_by_kernel(drawn: Drawn, seed: np.ndarray, mutation: Mutation | None = None) -> np.ndarray:
    """(queries, keys) bool."""
    defines = {
        "FA2_BF16": 1, "FA2_HEAD_DIM": 64, "FA2_ALIGNED": 1, "FA2_BLOCK_M": 64, "FA2_BLOCK_N": 64, "FA2_NUM_WARPS": 1,
        "FA2_CAUSAL": 0, "FA2_PARAMS_BYTES": ctypes.sizeof(Params), "FA2_DROPOUT": 1,
        "FA2_ONE_BY_ONE": int(drawn.one_by_one), "FA2_TRANSPOSED": int(drawn.transposed),
        "FA2_M_TILES": drawn.m_tiles, "FA2_N_TILES": drawn.n_tiles,
    }  # fmt: skip
    library = build.library("kept.cu", "kept", defines, directory=HERE, mutation=mutation)
    out = np.full((16 * drawn.m_tiles, 8 * drawn.n_tiles), -1, np.int32)
    params = Params(DropoutSpec(drawn.threshold, drawn.words, *drawn.in_front).params(), out.ctypes.data)
    params.dropout.dropout_seed = seed.ctypes.data
    for name in ("query", "key", "head", "batch"):
        setattr(params, name, getattr(drawn, name))
    run.launch(library, LaunchConfig((1, 1, 1), (32, 1, 1)), bytes(params))
    assert np.isin(out, (56, 63)).all(), "has() and drop() disagree, or before() changes what it is given"
    kept = out == 63
    return kept.T if drawn.transposed else kept


def is_right(drawn: Drawn, mutation: Mutation | None = None) -> bool:
    seed = seed_of(5, drawn.words)
    got = kept_by_kernel(drawn, seed, mutation)
    starts = drawn.query + drawn.in_front[0], drawn.key + drawn.in_front[1]
    queries, keys = (slice(start, start + size) for start, size in zip(starts, got.shape, strict=True))
    expected = keep_of(seed, drawn.batch + 1, drawn.head + 1, queries, keys, drawn.threshold / 2**15)
    return bool((got == expected[drawn.batch, drawn.head]).all())


# (transposed, blocks of 16 rows, blocks of 8 columns) of the kernels' rows, and of all that they could be.
SIZES = ((False, 1, 16), (False, 1, 8), (False, 2, 22), (True, 1, 8), (True, 1, 16), (True, 3, 4))


@pytest.mark.parametrize("transposed, m_tiles, n_tiles", SIZES)
def test_bits(transposed: bool, m_tiles: int, n_tiles: int) -> None:
    """Wherever an accumulator stands in its tiles, and its tiles in a sequence; all of the seed; all thresholds."""
    rows, cols = 16 * m_tiles, 8 * n_tiles
    for place, (row, col) in enumerate(((0, 0), (3, 0), (0, 5), (1000, 77), ((1 << 26) // rows, (1 << 26) // cols))):
        query, key = (col * cols, row * rows) if transposed else (row * rows, col * cols)
        threshold = (8192, 1, 0x7C00, 31744, 16384)[place]
        drawn = Drawn(transposed, m_tiles, n_tiles, query, key, words=(4, 2, 8, 4, 4)[place], threshold=threshold)
        assert is_right(drawn), drawn


@pytest.mark.parametrize("transposed, m_tiles, n_tiles", SIZES)
def test_bits_one_by_one(transposed: bool, m_tiles: int, n_tiles: int) -> None:
    """Rows in front, of any number; and thresholds above that of an infinite half number."""
    rows, cols = 16 * m_tiles, 8 * n_tiles
    query, key = (3 * cols, 2 * rows) if transposed else (2 * rows, 3 * cols)
    drawn = Drawn(transposed, m_tiles, n_tiles, query, key, one_by_one=True)
    for in_front in ((0, 0), (1, 0), (0, 8), (16, 11), (13, 7), (32, 64)):
        assert is_right(dataclasses.replace(drawn, in_front=in_front)), in_front
    for threshold in (0x7C01, 32440, 32767):
        assert is_right(dataclasses.replace(drawn, threshold=threshold)), threshold


DROPOUT = "common/dropout.cuh"
_PLAIN, _TRANSPOSED = Drawn(False, 2, 22, 64, 176, words=8), Drawn(True, 2, 8, 64, 32)
_SHIFTED = Drawn(False, 2, 22, 64, 176, in_front=(5, 3), one_by_one=True)
_SHIFTED_QUERIES = Drawn(False, 2, 22, 64, 176, in_front=(5, 0), one_by_one=True)
_SHIFTED_TRANSPOSED = Drawn(True, 2, 8, 64, 32, in_front=(5, 3), one_by_one=True)
_HIGH = Drawn(True, 2, 8, 64, 32, threshold=0x7C01, one_by_one=True)

# Of the bits alone: what stands there, what is put there instead.
MUTANTS_OF_BITS = [
    (_PLAIN, "round <= 7", "round <= 6"),
    (_PLAIN, "product.y ^ (0x9e3779b9u * round) ^ c1", "product.y ^ (0x9e3779b9u * (round - 1)) ^ c1"),
    (_PLAIN, "round < 10", "round < 9"),
    (_PLAIN, "x / 16 * 8 + x % 8", "x / 2"),
    (_PLAIN, "if (params.words >= 4)", "if (params.words > 8)"),
    (_PLAIN, "if (params.words >= 8)", "if (params.words > 8)"),
    (_PLAIN, "counter.w += seed[6]", "counter.w += seed[5]"),
    (_TRANSPOSED, "static_cast<uint32_t>(query_batch(tile)), static_cast<uint32_t>(head)",
     "static_cast<uint32_t>(head), static_cast<uint32_t>(query_batch(tile))"),
    (_PLAIN, "(rows + 8 * i) ^ of_rows", "(rows + 4 * i) ^ of_rows"),
    (_TRANSPOSED, "const bool second = kTransposed ? j % 2 : e / 2", "const bool second = kTransposed ? e / 2 : e / 2"),
    (_PLAIN, "unit / 2 * 8 + unit % 2;", "unit * 4;"),
    (_PLAIN, "ceil_pow2(kNTiles) == kNTiles ?", "ceil_pow2(kNTiles) >= kNTiles ?"),
    (_PLAIN, "kShared ? 8 * second + unit : unit % 16", "kShared ? 8 * second + unit : unit % 17"),
    (_TRANSPOSED, "kShared ? 8 * second + unit : unit % 16", "kShared ? 7 * second + unit : unit % 16"),
    (_TRANSPOSED, "insert(i, true, unit, set_geu_u32_f16x2(abs_f16x2(random.y)",
     "insert(i, true, unit, set_geu_u32_f16x2(abs_f16x2(random.x)"),
    (_SHIFTED_QUERIES, "(drawing.in_front_q || ", "("),
    (_SHIFTED, "query % 16 < 8 ?", "query % 16 <= 8 ?"),
    (_SHIFTED, "key % 16 < 8 ?", "key % 16 <= 8 ?"),
    (_SHIFTED, "params.first_key + keys_in_front(tile)", "params.first_key + keys_in_front(tile) + 1"),
    (_SHIFTED, "<< (units - 1)", "<< 15"),
    (_SHIFTED_TRANSPOSED, "8 * upper + (kTransposed ? 16 * i : col)", "8 * upper + (kTransposed ? 8 * i : col)"),
    (_SHIFTED_TRANSPOSED, "kept[0] |= kept[1] << 8", "kept[0] |= kept[1] << 7"),
    (_HIGH, "> 0x7c00)", "> 0x7c01)"),
]  # fmt: skip


@pytest.mark.parametrize("drawn", dict.fromkeys(mutant[0] for mutant in MUTANTS_OF_BITS))
def test_the_bits_of_the_mutants_are_right(drawn: Drawn) -> None:
    assert is_right(drawn)


@pytest.mark.parametrize("number", some(range(len(MUTANTS_OF_BITS)), range(0, len(MUTANTS_OF_BITS), 4)))
def test_mutants_of_bits(number: int) -> None:
    drawn, old, new = MUTANTS_OF_BITS[number]
    assert not is_right(drawn, Mutation(DROPOUT, old, new))


# Lengths, mask and window; scores and sinks; p and words of the seed. In front of the third and the fourth rows are
# left out, and the last one's p is a NaN among half numbers: these are drawn one by one.
CASES = (
    ((113, 203), True, None, (), "", (0.25, 4)),
    ((203, 150), False, None, ("softcap",), "", (0.1, 8)),
    ((200, 110), True, None, (), "float32", (0.5, 2)),
    ((150, 300), False, (70, 20), ("softcap",), "", (0.25, 8)),
    ((260, 257), False, None, ("alibi_slopes",), "", (2**-15, 4)),
    ((70, 1200), False, None, (), "", (0.98, 4)),
)


def dropout_cases(head_dim: int, arch: str, deterministic: bool) -> list[HostCase]:
    cases = []
    for number, ((seqlen_q, seqlen_k), causal, window, scores, sinks, dropout) in enumerate(CASES):
        case = Case(
            seqlen_q,
            seqlen_k,
            head_dim,
            DTYPES[(number + head_dim // 64) % 2],
            causal,
            1 + (number == 0),
            ((4, 2), (2, 1), (3, 3))[number % 3],
            layout=("bshd", "bhsd")[number % 2],
            deterministic=deterministic,
            seed=number,
            window=window,
        )
        cases.append(HostCase(case, arch, scores=scores, sinks=sinks, dropout=dropout, dlse=number in (0, 3)))
    return cases


EACH = (("sm_80", 64), ("sm_86", 128), ("sm_90", 64), ("sm_90", 128), ("sm_90", 192), ("sm_90", 256))


@pytest.mark.parametrize(("arch", "head_dim"), some(EACH, (0, 3, 5)))
def test_forward(arch: str, head_dim: int) -> None:
    for host_case in dropout_cases(head_dim, arch, False)[head_dim // 64 % 3 :: 3]:
        check(host_case, False)


@pytest.mark.parametrize(("arch", "head_dim"), some(EACH, (1, 2, 3, 4)))
def test_backward(arch: str, head_dim: int) -> None:
    first = (head_dim // 64 + (arch == "sm_86")) % 3
    for host_case in dropout_cases(head_dim, arch, head_dim in (64, 192))[first::3]:
        check(host_case, True)


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [40, 59, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100"])
def test_every_kernel(arch: str, head_dim: int, deterministic: bool, backward: bool) -> None:
    for host_case in dropout_cases(head_dim, arch, deterministic):
        check(host_case, backward)


# Sequences without keys, with rows out of use in front and behind; a window; lists that leave nothing out.
LISTS = (
    lengths_of((70, 130), (0, 5), (33, 9), (140, 64), causal=True),
    lengths_of((65, 200, 3, 17, 4), (100, 1), (4, 0), (129, 129), window=(50, 30)),
    lengths_of((65, 200), (100, 133), (129, 129), packed_k=False),
)


@pytest.mark.parametrize(
    ("arch", "head_dim", "backward"),
    some([(*each, backward) for backward in (False, True) for each in (EACH[0], EACH[3], EACH[5])], (0, 2, 4)),
)
def test_lists(arch: str, head_dim: int, backward: bool) -> None:
    number = (64, 128, 256).index(head_dim)
    case = LengthsCase(LISTS[(number + backward) % 3], head_dim, DTYPES[number % 2], (4, 2), arch, seed=number)
    words, p = (4, 8, 2)[number], (0.25, 0.1, 0.5)[number]
    lengths.check(dataclasses.replace(case, deterministic=number == 0, dropout=(p, words)), backward)


@pytest.mark.parametrize("backward", [False, True])
def test_segments(backward: bool) -> None:
    """Which begin anywhere in their row of the batch; also those that are put apart, and computed whole."""
    case = LengthsCase(segments_of(*MIXED, *TINY, causal=True), 64, arch="sm_100", seed=3, dropout=(0.25, 4))
    lengths.check(case, backward, schedules=(Schedule.RANDOM,))


def test_nothing_is_left_of_a_row() -> None:
    """One key, dropped or not: a row of 0 or of that key's V, divided by what is kept."""
    case = Case(90, 1, 64, "bfloat16", False, 1, (4, 4), seed=3)
    for backward in (False, True):
        check(HostCase(case, "sm_90", dropout=(0.5, 4)), backward)


FWD, FWD90, BWD, BWD90 = "sm80/flash_fwd.cu", "sm90/flash_fwd.cu", "sm80/flash_bwd.cu", "sm90/flash_bwd.cu"
WIDE90, BOTH90, SCORE = "sm90/flash_bwd_wide.cu", "sm90/backward.cuh", "common/score.cuh"
SOFTMAX, PRE = "common/softmax.cuh", "smxx/flash_bwd_preprocess.cu"


def _case(arch: str, head_dim: int = 64, heads: tuple[int, int] = (4, 2), **more: Any) -> HostCase:
    scores, dlse = more.pop("scores", ()), more.pop("dlse", False)
    case = Case(150, 260, head_dim, "bfloat16", False, 1, heads, seed=1, **more)
    return HostCase(case, arch, dropout=(0.25, 4), scores=scores, dlse=dlse)


PLACES: dict[str, AnyCase] = {
    "fwd": _case("sm_80"),
    "fwd-hopper": _case("sm_90", 128),
    "bwd": _case("sm_100", 64),
    "bwd-capped": _case("sm_86", 64, scores=("softcap",)),
    "bwd-hopper": _case("sm_90", 128, dlse=True),
    "bwd-hopper-capped": _case("sm_90", 128, scores=("softcap",)),
    "bwd-hopper-wide": _case("sm_90", 256),
    "bwd-hopper-wide-capped": _case("sm_90", 256, scores=("softcap",)),
    "bwd-hopper-splits": HostCase(Case(256, 256, 128, "bfloat16", True, 1, (8, 1), seed=23), dropout=(0.25, 4)),
}

# Case, file, what stands there, what is put there instead.
MUTANTS = [
    ("fwd", FWD, "kept.drop(acc_s);", ""),
    ("fwd", FWD, "kept.draw(drawing, position_of(n));", "kept.draw(drawing, position_of(n + 1));"),
    ("fwd", FWD, "drawing_of(params, tile, tile.head)", "drawing_of(params, tile, head_k)"),
    ("fwd", SOFTMAX, "inverse *= factor;", ""),
    ("fwd-hopper", FWD90, "kept.draw(drawing, position_of(work, n));", "kept.draw(drawing, position_of(work, n + 1));"),
    ("fwd-hopper", FWD90, "draw_first(next);", "draw_first(work);"),
    ("fwd-hopper", FWD90, "drawing = drawing_of(params, work, work.head);", "drawing = drawing_of(params, work, 0);"),
    ("fwd-hopper", FWD90, "position_of(work, work.visit.end - 1));\n    look",
     "position_of(work, work.visit.end));\n    look"),
    ("bwd", BWD, "if (kDrawn && (kPicked ? place_of(step) == 0 : m_block == visit.begin))",
     "if (kDrawn && step.head == tile.head * heads)"),
    ("bwd", BWD, "acc_dv.x[i][j][e] *= inverse_of_kept(params)", "acc_dv.x[i][j][e] *= 1.f"),
    ("bwd", SCORE, "p = kept ? p : 0.f;", ""),
    ("bwd", SCORE, "const float without = -p * d;\n    p = kept ? p : 0.f;",
     "p = kept ? p : 0.f;\n    const float without = -p * d;"),
    ("bwd", PRE, "if constexpr (kDrawn) d *= part_kept(params);", ""),
    ("bwd-capped", BWD, "kept.drop(i, packed.r[i]);", ";"),
    ("bwd-hopper", PRE, "if constexpr (kDrawn) d *= part_kept(params);", ""),
    ("bwd-hopper", BOTH90, "|| step.m_block == work.head_begin;", ";"),
    ("bwd-hopper", BWD90, "acc_dv, inverse_of_kept(params));", "acc_dv, 1.f);"),
    ("bwd-hopper", BWD90, "drawing_of(params, work, step.head)", "drawing_of(params, work, work.head_k)"),
    ("bwd-hopper-splits", BWD90, "acc_dv.x[0][j][e] *= inverse_of_kept(params)", "acc_dv.x[0][j][e] *= 1.f"),
    ("bwd-hopper-splits", BOTH90, "step.left == work.steps || ", ""),
    ("bwd-hopper-capped", BWD90, "kept.drop(0, frag_p.r);", ";"),
    ("bwd-hopper-wide", WIDE90, "kept.of(acc_s)", "acc_s"),
    ("bwd-hopper-wide", WIDE90, "params.softmax_scale : inverse_of_kept(params);", "params.softmax_scale : 1.f;"),
    ("bwd-hopper-wide", SCORE, "kept.has(0, j, e) ? acc_dp.x[0][j][e] : 0.f", "acc_dp.x[0][j][e]"),
    ("bwd-hopper-wide", WIDE90, "kept.draw(drawing, {query, key});", "kept.draw(drawing, {query, key + 64});"),
    ("bwd-hopper-wide-capped", WIDE90, "kept.drop(0, packed.r);", ""),
]  # fmt: skip


FEW = chosen([{"case": mutant[0], "file": mutant[1]} for mutant in MUTANTS])


@pytest.mark.parametrize("name", some(list(PLACES), range(0, len(PLACES), 3)))
def test_the_cases_of_the_mutants_are_right(name: str) -> None:
    check_any(PLACES[name], name.startswith("bwd"))


@pytest.mark.parametrize("number", some(range(len(MUTANTS)), FEW))
def test_mutants(number: int) -> None:
    name, path, old, new = MUTANTS[number]
    assert is_caught(PLACES[name], name.startswith("bwd"), mutation=Mutation(path, old, new))
