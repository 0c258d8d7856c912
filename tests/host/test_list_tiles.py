"""Lists of tiles (smxx/list_tiles.cu), beside the same lists made by a loop, and the rows that nobody else fills."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest

from fa2cupy.kernels import common
from fa2cupy.kernels.listed import Lists
from fa2cupy.kernels.params import ListedTile
from fa2cupy.kernels.smxx import list_tiles
from fa2cupy.problem import AttentionProblem
from fa2cupy.spec import LengthsSpec, WindowSpec
from tests.host import build, run
from tests.host.build import Mutation
from tests.host.kernel_run import device
from tests.host.run import Schedule

FIELDS = tuple(name for name, _ in ListedTile._fields_)
HEADS, HEADS_K, HEAD_DIM = 3, 1, 16
GUARD = 4096  # bytes on both sides of everything


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The arrays of a call, each None where there is none; rows: of q and k, of all or of a row of the batch."""

    rows_q: int
    rows_k: int
    sequences: int
    cu_seqlens_q: tuple[int, ...] | None = None
    cu_seqlens_k: tuple[int, ...] | None = None
    seqused_q: tuple[int, ...] | None = None
    seqused_k: tuple[int, ...] | None = None
    leftpad_k: tuple[int, ...] | None = None
    causal: bool = False
    window: tuple[int, int] | None = None
    backward: bool = False
    in_order: bool = False
    head_dim: int = HEAD_DIM

    @property
    def spec(self) -> LengthsSpec:
        given = {name: getattr(self, name) is not None for name in _ARRAYS}
        return LengthsSpec(self.sequences, **given)


_ARRAYS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k")


def runs(lengths: Lengths, side: str) -> list[tuple[int, int]]:
    """(first row, length) of each sequence on a side, of right lengths."""
    starts, used = getattr(lengths, f"cu_seqlens_{side}"), getattr(lengths, f"seqused_{side}")
    found = []
    for b in range(lengths.sequences):
        first, length = (starts[b], starts[b + 1] - starts[b]) if starts else (0, getattr(lengths, f"rows_{side}"))
        if used:
            length = used[b]
        if side == "k" and lengths.leftpad_k:
            first, length = first + lengths.leftpad_k[b], length - lengths.leftpad_k[b]
        found.append((first, length))
    return found


def visible(lengths: Lengths, seqlen_q: int, seqlen_k: int) -> np.ndarray:
    """(seqlen_q, seqlen_k) bool."""
    distance = np.arange(seqlen_k)[None, :] - np.arange(seqlen_q)[:, None] - (seqlen_k - seqlen_q)
    left, right = lengths.window or (1 << 20, 0 if lengths.causal else 1 << 20)
    return np.asarray((distance >= -left) & (distance <= right))


def expected(lengths: Lengths, block_m: int, block_n: int) -> tuple[list[dict[str, int]], list[dict[str, int]]]:
    """Both lists, in order, each entry with `blocks`: how many it meets. By loops over all that is visible."""
    queries, keys = [], []
    first_tile = 0
    for b, ((first_q, sq), (first_k, sk)) in enumerate(zip(runs(lengths, "q"), runs(lengths, "k"), strict=True)):
        seen = visible(lengths, sq, sk)
        # Queries that see no key, and keys that no query sees, are dropped; all of them lead.
        sq, sk = int(seen.any(1).sum()), int(seen.any(0).sum())
        drop_q, drop_k = len(seen) - sq, seen.shape[1] - sk
        first_q, first_k, seen = first_q + drop_q, first_k + drop_k, seen[drop_q:, drop_k:]
        here = dict(zip(FIELDS, (first_q, sq, first_k, sk, b, b), strict=False))
        blocks_q, blocks_k = -(-sq // block_m), -(-sk // block_n)
        for block in range(blocks_q):
            which = np.nonzero(seen[block * block_m : (block + 1) * block_m].any(0))[0] // block_n
            first = which[0] if len(which) and lengths.window else 0
            if len(which):
                queries.append(here | {"block": block, "tile": first_tile + block, "blocks": which[-1] - first + 1})
        for block in range(blocks_k):
            which = np.nonzero(seen[:, block * block_n : (block + 1) * block_n].any(1))[0] // block_m
            if len(which):
                last = which[-1] if lengths.window else blocks_q - 1
                keys.append(here | {"block": block, "tile": first_tile, "blocks": int(last - which[0]) + 1})
        first_tile += blocks_q
    return queries, keys


class Block:
    """Bytes between guards, all of them poison."""

    def __init__(self, nbytes: int) -> None:
        raw = np.full(nbytes + 2 * GUARD + 256, 0xFF, np.uint8)
        start = -raw.ctypes.data % 256
        self.all = raw[start : start + nbytes + 2 * GUARD]
        self.bytes = self.all[GUARD : GUARD + nbytes]
        self.pointer = self.bytes.ctypes.data

    def is_untouched_outside(self) -> bool:
        return bool((self.all[:GUARD] == 0xFF).all() and (self.all[GUARD + len(self.bytes) :] == 0xFF).all())


@dataclasses.dataclass
class Made:
    """What a launch has made of lengths: both lists, and the results by name."""

    queries: list[dict[str, int]]
    keys: list[dict[str, int]]
    results: dict[str, np.ndarray]
    lists: Lists


def make(
    lengths: Lengths,
    block_m: int = 64,
    block_n: int = 32,
    schedule: Schedule = Schedule.LOWEST_FIRST,
    mutation: Mutation | None = None,
    plant: str | None = None,
) -> Made:
    spec = lengths.spec
    width = lengths.head_dim
    shapes = {
        name: ((1 if packed else lengths.sequences), rows, heads, width)
        for name, packed, rows, heads in (
            ("out", spec.packed_q, lengths.rows_q, HEADS),
            ("dq", spec.packed_q, lengths.rows_q, HEADS),
            ("dk", spec.packed_k, lengths.rows_k, HEADS_K),
            ("dv", spec.packed_k, lengths.rows_k, HEADS_K),
        )
    }
    shapes["lse"] = (shapes["out"][0], HEADS, lengths.rows_q)
    strides = {}
    for name, (batch, second, third, *last) in shapes.items():
        inner = third * (last or [1])[0]
        strides[name] = (second * inner if batch > 1 else 0, inner, (last or [1])[0])
    problem = AttentionProblem(
        lengths.sequences, lengths.rows_q, lengths.rows_k, HEADS, HEADS_K, width, width, "bfloat16",
        lengths.causal and lengths.window is None, 1.0, tuple(strides.items()), width % 8 == 0,
        window=None if lengths.window is None else WindowSpec(*lengths.window), lengths=spec,
    )  # fmt: skip
    lists = Lists.of(problem, block_m, block_n, has_keys=lengths.backward, offset=256)
    results = ("dq", "dk", "dv") if lengths.backward else ("out", "lse")
    blocks = {name: Block(int(np.prod(shapes[name])) * (4 if name == "lse" else 2)) for name in results}
    blocks["workspace"] = Block(lists.end)
    names = common.pointer_names(problem, results)
    launch = list_tiles.launch(problem, device("sm_90"), lists, results, names, in_order=lengths.in_order)
    arrays = {name: np.array(getattr(lengths, name), np.int32) for name in spec.arrays()}
    pointers = tuple(blocks[name].pointer if name in blocks else arrays[name].ctypes.data for name in names)
    library = build.library(launch.source, launch.name, launch.defines, mutation=mutation)
    params = launch.pack((*pointers, blocks["workspace"].pointer))
    run.launch(library, launch.config, params, schedule, plant=plant)
    for name, block in blocks.items():
        assert block.is_untouched_outside(), f"{name}: something outside was written"
    space = blocks["workspace"].bytes
    counts = space[lists.offsets["counts"] :][:8].view(np.int32)
    entries = []
    for field, count in (("tiles_q", counts[0]), ("tiles_k", counts[1] if lengths.backward else 0)):
        words = space[lists.offsets.get(field, 0) :][: 32 * count].view(np.int32).reshape(-1, len(FIELDS))
        entries.append([dict(zip(FIELDS, map(int, row), strict=True)) for row in words])
    values = {
        name: blocks[name].bytes.view(np.float32 if name == "lse" else np.uint16).reshape(shapes[name])
        for name in results
    }
    return Made(*entries, values, lists)


def judge(lengths: Lengths, made: Made, block_m: int, block_n: int) -> None:
    """AssertionError unless the lists are right and in order, and exactly the rows that nobody sees are filled."""
    lists = zip((made.queries, made.keys), expected(lengths, block_m, block_n), strict=True)
    for got, wanted in list(lists)[: 1 + lengths.backward]:
        blocks = {tuple(each[name] for name in FIELDS): each["blocks"] for each in wanted}
        found = [tuple(each.values()) for each in got]
        assert len(found) == len(set(found)) and set(found) == set(blocks)
        if lengths.in_order:
            assert found == list(blocks)
        else:
            counts = [blocks[each] for each in found]
            coarse = [count if count < 512 else 512 + count // 8 for count in counts]
            assert coarse == sorted(coarse, reverse=True)
    for name, got in made.results.items():
        side = "k" if name in ("dk", "dv") else "q"
        assert np.array_equal(got, filled(lengths, name, got.shape, side), equal_nan=True), name


def filled(lengths: Lengths, name: str, shape: tuple[int, ...], side: str) -> np.ndarray:
    """Poison where a tile has rows that see something, zeros (-inf) elsewhere."""
    is_packed = getattr(lengths, f"cu_seqlens_{side}") is not None
    sees = np.zeros((1 if is_packed else lengths.sequences, getattr(lengths, f"rows_{side}")), bool)
    for b, ((first_q, sq), (first_k, sk)) in enumerate(zip(runs(lengths, "q"), runs(lengths, "k"), strict=True)):
        seen = visible(lengths, sq, sk)
        first, which = (first_q, seen.any(1)) if side == "q" else (first_k, seen.any(0))
        sees[0 if is_packed else b, first : first + len(which)] |= which
    if name == "lse":
        poison = np.full(1, 0xFFFFFFFF, np.uint32).view(np.float32)
        return np.broadcast_to(np.where(sees, poison, np.float32(-np.inf))[:, None, :], shape)
    return np.broadcast_to(np.where(sees, 0xFFFF, 0).astype(np.uint16)[:, :, None, None], shape)


def check(lengths: Lengths, block_m: int = 64, block_n: int = 32, **options: object) -> None:
    judge(lengths, make(lengths, block_m, block_n, **options), block_m, block_n)  # type: ignore[arg-type]


def starts(*lengths: int) -> tuple[int, ...]:
    return tuple(int(n) for n in np.cumsum((0, *lengths)))


_ODD = Lengths(700, 900, 6, starts(1, 0, 300, 64, 65, 129), starts(0, 7, 200, 300, 31, 33))
CASES = {
    "packed": _ODD,
    "causal": dataclasses.replace(_ODD, causal=True),
    "window": dataclasses.replace(_ODD, window=(40, 3)),
    "gaps": dataclasses.replace(
        _ODD, seqused_q=(1, 0, 17, 64, 0, 128), seqused_k=(0, 7, 130, 0, 31, 1), leftpad_k=(0, 3, 64, 0, 31, 0)
    ),
    "late-start": Lengths(300, 400, 2, (40, 140, 250), (300, 310, 400), causal=True),
    "dense": Lengths(150, 170, 3, seqused_q=(150, 0, 70), seqused_k=(170, 20, 0), leftpad_k=(100, 5, 0), causal=True),
    "queries-packed": Lengths(200, 120, 3, starts(100, 0, 64), None, leftpad_k=(0, 3, 100), window=(20, 20)),
    "keys-packed": Lengths(90, 200, 2, None, starts(150, 50), seqused_q=(13, 90), causal=True),
    "no-keys": Lengths(100, 50, 2, starts(60, 40), starts(0, 0)),
    "unaligned": dataclasses.replace(_ODD, head_dim=13, causal=True),
}


def variants() -> Iterator[tuple[str, Lengths]]:
    for number, (name, lengths) in enumerate(CASES.items()):
        yield name, lengths
        yield f"{name}-backward", dataclasses.replace(lengths, backward=True, in_order=number % 2 == 0)
        if number < 4:
            yield f"{name}-sorted", dataclasses.replace(lengths, backward=True)


@pytest.mark.parametrize(("name", "lengths"), list(variants()), ids=[name for name, _ in variants()])
def test_lists(name: str, lengths: Lengths) -> None:
    for schedule in Schedule:
        check(lengths, schedule=schedule)


@pytest.mark.parametrize("in_order", [False, True])
def test_more_sequences_than_threads(in_order: bool) -> None:
    """A few rounds of sequences, many of them empty, and one with more tiles than there are threads."""
    rng = np.random.default_rng(1)
    lengths_q = rng.choice([0, 0, 1, 5, 34], 2100)
    lengths_k = rng.choice([0, 1, 40], 2100)
    lengths_q[1500], lengths_k[1500] = 18000, 9000
    case = Lengths(
        int(lengths_q.sum()) + 5,
        int(lengths_k.sum()),
        2100,
        starts(*lengths_q),
        starts(*lengths_k),
        causal=True,
        in_order=in_order,
    )
    check(case, 16, 16)


@pytest.mark.parametrize("cu_seqlens", [(0, 700, 0, 700, 0, 700, 1), (-5, 1 << 30, -9, 3, 2, 1, -1), (700,) * 7])
def test_wrong_lengths_stay_inside(cu_seqlens: tuple[int, ...]) -> None:
    """And no list is longer than there is room for, nor means rows that there are not."""
    for backward in (False, True):
        case = dataclasses.replace(
            _ODD, cu_seqlens_q=cu_seqlens, backward=backward, seqused_k=(-3, 1 << 30, 5, 9, -(1 << 31), 7),
            leftpad_k=(1 << 30, -7, 2, 1, 0, 3),
        )  # fmt: skip
        made = make(case)
        assert len(made.queries) <= made.lists.tiles_of_head_q and len(made.keys) <= made.lists.tiles_of_head_k
        for each in made.queries + made.keys:
            assert each["first_q"] >= 0 and each["first_q"] + each["seqlen_q"] <= case.rows_q
            assert each["first_k"] >= 0 and each["first_k"] + each["seqlen_k"] <= case.rows_k
            blocks = -(-each["seqlen_q"] // 64)
            assert each["tile"] + (blocks if each in made.keys else 1) <= made.lists.tiles_of_head_q


def test_entries_are_two_reads() -> None:
    assert ctypes.sizeof(ListedTile) == 32


SOURCE = "smxx/list_tiles.cu"
MUTANTS = [
    ("packed-sorted", "ends[s + step - 1] <= index", "ends[s + step - 1] < index"),
    ("packed-sorted", "kBins - 1 - min(bin, kBins - 1)", "min(bin, kBins - 1)"),
    ("causal", "queries.first + unseen_q", "queries.first"),
    ("packed-backward", "place = listed + up_to_here - 1;", "place = listed + up_to_here;"),
    ("packed-backward", "listed += smem.bin_q[0];", "listed += 0;"),
    ("gaps", "run.first += padding, run.seqlen -= padding;", "run.first += padding;"),
    ("gaps", "row < seen_from || row >= seen_to", "row < seen_from"),
    ("queries-packed", "own.cu_seqlens[count + half - 1] <= at", "own.cu_seqlens[count + half - 1] < at"),
    ("causal", "own.seqlen - other.seqlen - reach, 0)", "own.seqlen - other.seqlen - reach - 1, 0)"),
    ("causal", "own.seqlen - other.seqlen - reach, 0)", "own.seqlen - other.seqlen - reach + 1, 0)"),
    ("window-backward", "return {params.left, params.right};", "return {params.right, params.left};"),
    ("packed-backward", "kOfKeys ? first_tile_q : first_tile_q + block", "first_tile_q + block"),
]


@pytest.mark.parametrize(("name", "old", "new"), MUTANTS, ids=[f"{m[0]}-{n}" for n, m in enumerate(MUTANTS)])
def test_mutants(name: str, old: str, new: str) -> None:
    with pytest.raises((AssertionError, run.HostRunError)):
        check(dict(variants())[name], mutation=Mutation(SOURCE, old, new))


def test_every_barrier_is_needed() -> None:
    text = (build.source_module.root() / SOURCE).read_text().splitlines()
    for number, line in enumerate(text, 1):
        if "__syncthreads(" not in line.split("//")[0]:
            continue
        caught = False
        for name in ("packed-sorted", "packed-backward", "many"):
            case = dict(variants()).get(name) or Lengths(
                4000, 3000, 2100, starts(*([1, 2] * 1050), 0)[:2101], starts(*([1] * 2100)), backward=True
            )
            for schedule in (*Schedule, *3 * (Schedule.RANDOM,)):
                try:
                    check(case, schedule=schedule, plant=f"list_tiles.cu:{number}")
                except (AssertionError, run.HostRunError):
                    caught = True
                    break
            if caught:
                break
        assert caught, f"left out, and nothing showed: {SOURCE}:{number} {line.strip()}"
