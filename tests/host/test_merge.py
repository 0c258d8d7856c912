"""smxx/merge.cu and smxx/merge_bwd.cu, run on the CPU, beside the formula in float64; each bound changed and caught."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fa2cupy.kernels.smxx import merge
from fa2cupy.kernels.smxx.merge import MergeProblem
from tests import reference
from tests.host import build, run
from tests.host.build import Mutation
from tests.host.kernel_run import Tensor, device
from tests.host.run import Schedule


@dataclass(frozen=True)
class MergeCase:
    """heads_first: in memory heads before rows. pad: elements between heads. unseen: of each piece so many leading rows
    see nothing, and hold NaN; the first of these rows see nothing in any piece.
    """

    pieces: int
    batch: int
    rows: int
    heads: int
    cols: int
    dtype: str
    heads_first: bool = False
    pad: int = 0
    unseen: bool = True
    spread: float = 3.0


CASES = {
    "four": MergeCase(4, 2, 13, 3, 128, "bfloat16"),
    "one-row": MergeCase(2, 3, 1, 2, 64, "float16", heads_first=True),
    "float32": MergeCase(3, 1, 9, 2, 128, "float32", pad=4),
    "wide": MergeCase(2, 1, 10, 1, 576, "bfloat16"),  # each lane takes several pieces of a row
    "wide-odd": MergeCase(2, 1, 9, 1, 270, "float32", pad=2),
    "unaligned": MergeCase(2, 2, 7, 3, 59, "bfloat16", pad=1),
    "unaligned-float32": MergeCase(3, 1, 8, 2, 17, "float32"),
    "narrow": MergeCase(2, 2, 40, 3, 8, "float16"),  # one lane has a row
    "many": MergeCase(11, 1, 9, 2, 64, "bfloat16"),
    "most": MergeCase(32, 1, 5, 1, 32, "float32"),
    "single": MergeCase(1, 1, 20, 2, 64, "bfloat16"),
    "far-apart": MergeCase(2, 1, 16, 2, 64, "float32", spread=3000.0),
}


def strides_of(case: MergeCase, *, dense: bool) -> tuple[int, int, int, int]:
    pitch = case.cols + (0 if dense else case.pad)
    row, head = (pitch, case.rows * pitch) if case.heads_first and not dense else (case.heads * pitch, pitch)
    return case.rows * case.heads * pitch, row, head, 1


def tensor(case: MergeCase, name: str) -> Tensor:
    """Results, and of a backward its gradients, are dense."""
    if "lse" in name:
        shape = (case.batch, case.heads, case.rows)
        return Tensor(shape, (case.heads * case.rows, case.rows, 1), "float32")
    dense = name in ("out", "douts")
    shape = (case.batch, case.rows, case.heads, case.cols)
    return Tensor(shape, strides_of(case, dense=dense), case.dtype)


def values(case: MergeCase, each: Tensor) -> np.ndarray:
    return reference.as_float64(each.values.view(np.float16) if case.dtype == "float16" else each.values)


def put(each: Tensor, x: np.ndarray, dtype: str) -> None:
    each.values[...] = reference.store(x, dtype).view(each.values.dtype)


def problem_of(case: MergeCase, tensors: dict[str, list[Tensor]], backward: bool) -> MergeProblem:
    steps = []
    for name, of_name in tensors.items():
        first = of_name[0]
        strides = tuple(0 if n == 1 else step for n, step in zip(first.shape, first.strides, strict=True))[:3]
        steps.append((name, strides))
    item = 4 if case.dtype == "float32" else 2
    aligned = all(n * item % 16 == 0 for n in (case.cols, case.cols + case.pad))
    sizes = case.batch, case.rows, case.heads, case.cols
    return MergeProblem(case.pieces, *sizes, case.dtype, tuple(steps), aligned, backward)  # type: ignore[arg-type]


@dataclass
class Whole:
    """By the formula, in float64."""

    weights: np.ndarray  # (pieces, batch, heads, rows)
    out: np.ndarray
    lse: np.ndarray


def whole_of(outs: list[np.ndarray], lses: list[np.ndarray]) -> Whole:
    lse = np.logaddexp.reduce(np.stack(lses), axis=0)
    with np.errstate(invalid="ignore"):
        weights = np.where(np.isneginf(lse), 0.0, np.exp(np.stack(lses) - lse))
    parts = [w.swapaxes(1, 2)[..., None] * np.nan_to_num(x) for w, x in zip(weights, outs, strict=True)]
    return Whole(weights, sum(parts, np.zeros_like(outs[0])), lse)


def close(name: str, got: np.ndarray, want: np.ndarray, dtype: str, floor: float) -> None:
    """Within the roundings of the dtype, and float32's of the sum before."""
    ulp = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-22}[dtype]
    assert np.isfinite(got).all(), f"{name} is not finite"
    error = abs(got - want) - ulp * abs(want)
    assert error.max() <= floor, f"{name} is off by {abs(got - want).max():.2e}"


def check(
    case: MergeCase, backward: bool, schedule: Schedule = Schedule.LOWEST_FIRST, mutation: Mutation | None = None
) -> None:
    rng = np.random.default_rng(case.pieces + case.cols)
    names = ("outs", "lses", "out", "lse") + (("dout", "dlse", "douts", "dlses") if backward else ())
    tensors = {name: [tensor(case, name) for _ in range(case.pieces if name.endswith("s") else 1)] for name in names}
    for piece, (out, lse) in enumerate(zip(tensors["outs"], tensors["lses"], strict=True)):
        put(out, rng.standard_normal(out.shape), case.dtype)
        lse.values[...] = case.spread * rng.standard_normal(lse.shape)
        if case.unseen and case.rows > 4:
            lse.values[:, :, : 1 + 2 * (piece % 2)] = -np.inf
            out.values[:, : 1 + 2 * (piece % 2)] = -1 if case.dtype == "float32" else 0xFFFF
            if case.dtype == "float32":
                out.values[:, : 1 + 2 * (piece % 2)] = np.nan
    outs, lses = ([values(case, x) for x in tensors["outs"]], [x.values.astype(float) for x in tensors["lses"]])
    want = whole_of(outs, lses)
    if backward:
        put(tensors["out"][0], want.out, case.dtype)
        tensors["lse"][0].values[...] = want.lse
        put(tensors["dout"][0], rng.standard_normal(want.out.shape), case.dtype)
        tensors["dlse"][0].values[...] = rng.standard_normal(want.lse.shape)
    written = ("douts", "dlses") if backward else ("out", "lse")
    before = {name: [x.bits() for x in tensors[name]] for name in names if name not in written}
    launch = merge.launch(problem_of(case, tensors, backward), device("sm_90"))
    library = build.library(launch.source, launch.name, launch.defines, mutation=mutation)
    pointers = tuple(x.pointer for name in names for x in tensors[name])
    run.launch(library, launch.config, launch.pack(pointers), schedule)
    for name, of_name in tensors.items():
        assert all(x.untouched_outside() for x in of_name), f"{name}: something outside the array was written"
        if name in before:
            assert [x.bits() for x in of_name] == before[name], f"{name} is an input, and was written"
    if not backward:
        got = tensors["lse"][0].values
        assert (np.isneginf(got) == np.isneginf(want.lse)).all()
        seen = ~np.isneginf(want.lse)
        assert np.allclose(got[seen], want.lse[seen], rtol=1e-6, atol=1e-5), "lse"
        close("out", values(case, tensors["out"][0]), want.out, case.dtype, 3e-6)
        return
    out, dout = values(case, tensors["out"][0]), values(case, tensors["dout"][0])
    dlse = tensors["dlse"][0].values.astype(float)
    scale = np.sqrt(case.cols)
    for piece in range(case.pieces):
        weight = want.weights[piece]
        close("dout", values(case, tensors["douts"][piece]), weight.swapaxes(1, 2)[..., None] * dout, case.dtype, 3e-6)
        difference = np.where(weight.swapaxes(1, 2)[..., None] == 0, 0.0, outs[piece] - out)
        wanted = weight * (dlse + (dout * difference).sum(-1).swapaxes(1, 2))
        close("dlse", tensors["dlses"][piece].values, wanted, "float32", 1e-5 * scale)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_merge(backward: bool, name: str) -> None:
    for schedule in Schedule:
        check(CASES[name], backward, schedule)


def test_one_piece_is_the_whole() -> None:
    """Bit by bit."""
    case = dataclasses.replace(CASES["single"], unseen=False)
    tensors: dict[str, list[Any]] = {name: [tensor(case, name)] for name in ("outs", "lses", "out", "lse")}
    rng = np.random.default_rng(1)
    put(tensors["outs"][0], rng.standard_normal(tensors["outs"][0].shape), case.dtype)
    tensors["lses"][0].values[...] = rng.standard_normal(tensors["lses"][0].shape)
    launch = merge.launch(problem_of(case, tensors, False), device("sm_90"))
    library = build.library(launch.source, launch.name, launch.defines)
    pointers = tuple(x.pointer for of_name in tensors.values() for x in of_name)
    run.launch(library, launch.config, launch.pack(pointers))
    assert np.array_equal(tensors["out"][0].values, tensors["outs"][0].values)
    assert np.array_equal(tensors["lse"][0].values, tensors["lses"][0].values)


ROWS, FWD, BWD = "common/pieces.cuh", "smxx/merge.cu", "smxx/merge_bwd.cu"
MUTANTS = [
    ("fwd", "four", ROWS, "row < params.num_rows};", "row <= params.num_rows};"),
    ("fwd", "one-row", ROWS, "batch < params.batch &&", "batch <= params.batch &&"),
    ("fwd", "four", ROWS, "index / 8 % heads", "index / 8 % (heads - 1)"),
    ("fwd", "four", ROWS, "ceil_div(params.num_rows, 8)", "(params.num_rows / 8)"),
    ("fwd", "many", ROWS, "if (first + i >= kPieces) break;", "if (first + i >= kPieces - 1) break;"),
    ("fwd", "four", FWD, "max == -kInfinity ? 0.f : max", "max"),
    ("fwd", "far-apart", FWD, "max == -kInfinity ? 0.f : max", "0.f"),
    ("fwd", "four", FWD, "sum == 0.f ? 0.f : rcp(sum)", "rcp(sum)"),
    ("fwd", "four", FWD, " || weight[first + i] == 0.f)", ")"),
    ("fwd", "wide", FWD, "first > 0 || col >= kLanes * kChunk", "first > 0"),
    ("fwd", "many", FWD, "first > 0 || col >= kLanes * kChunk", "col >= kLanes * kChunk"),
    ("fwd", "wide", FWD, "col < params.cols; col +=", "col < kLanes * kChunk; col +="),
    ("bwd", "four", BWD, "own == -kInfinity ? 0.f : ex2", "ex2"),
    ("bwd", "four", BWD, "weight[i] == 0.f ? 0.f : weight[i]", "weight[i]"),
    ("bwd", "four", BWD, "to_float(chunks[i].x[e]) - to_float(chunk_out.x[e])", "to_float(chunks[i].x[e])"),
    ("bwd", "four", BWD, "lanes = kLanes / 2", "lanes = kLanes / 4"),
    ("bwd", "wide", BWD, "col < params.cols; col +=", "col < kLanes * kChunk; col +="),
    ("bwd", "four", BWD, "lane == 0 && row.is_there", "lane == 0"),
]


@pytest.mark.parametrize(
    ("way", "name", "path", "old", "new"), MUTANTS, ids=[f"{m[0]}-{m[1]}-{n}" for n, m in enumerate(MUTANTS)]
)
def test_mutants(way: str, name: str, path: str, old: str, new: str) -> None:
    with pytest.raises((AssertionError, run.HostRunError)):
        check(CASES[name], way == "bwd", mutation=Mutation(path, old, new))
