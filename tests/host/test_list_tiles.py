"""Lists of tiles (smxx/list_tiles.cu), beside the same lists made by a loop, and the rows that nobody else fills."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pytest

from fa2cupy.kernels import common
from fa2cupy.kernels.listed import Lists, Segments
from fa2cupy.kernels.params import ListedPlace, ListedPosition
from fa2cupy.kernels.smxx import find_segments, list_tiles
from fa2cupy.problem import AttentionProblem
from fa2cupy.spec import DropoutSpec, WindowSpec
from tests.host import build, run
from tests.host.build import Mutation
from tests.host.kernel_run import Tensor, device, run_launches
from tests.host.lengths import Lengths, starts
from tests.host.run import Schedule

SOURCE = "smxx/list_tiles.cu"
FIELDS = tuple(name for name, *_ in ListedPlace._fields_)
HEADS, HEADS_K = 3, 1
BLOCK_M, BLOCK_N = 64, 32
RUNS = (8, 2)  # of equal short sequences, of others: smxx/list_tiles.cu
THREADS = 1024  # sequences that are looked at together


@dataclass(frozen=True)
class Listing:
    """What is to be listed, and for whom. window of `lengths`: both ends are numbers. short_keys: of segments.
    positioned: for who must know which rows of their sequence tiles are: with dropout."""

    lengths: Lengths
    backward: bool = False
    in_order: bool = False
    head_dim: int = 16
    blocks: tuple[int, int] = (BLOCK_M, BLOCK_N)
    short_keys: int = 0
    positioned: bool = False


@dataclass
class Made:
    """What a launch has made of it: each list with `ListedPlace`s as tuples, and the results by name."""

    queries: list[tuple[int, ...]]
    keys: list[tuple[int, ...]]
    results: dict[str, np.ndarray]
    lists: Lists
    shorts: list[tuple[int, ...]] | None = None


def expected(listing: Listing) -> tuple[dict[tuple[int, ...], int], ...]:
    """Of queries and of keys, in order: how many blocks are met by the one of a tile's run that meets most under a
    diagonal. By loops over all that is visible.
    """
    lengths, (block_m, block_n) = listing.lengths, listing.blocks
    seen = []
    for b, ((first_q, sq), (first_k, sk)) in enumerate(zip(lengths.runs("q"), lengths.runs("k"), strict=True)):
        visible = lengths.visible(sq, sk)
        # Queries that see no key, and keys that no query sees, are dropped; all of them lead.
        first_q, first_k = first_q + sq - int(visible.any(1).sum()), first_k + sk - int(visible.any(0).sum())
        visible = visible[visible.any(1)][:, visible.any(0)]
        batch = lengths.number(b)
        seen.append(((first_q, visible.shape[0], first_k, visible.shape[1], batch, batch), visible))
    queries: dict[tuple[int, ...], int] = {}
    keys: dict[tuple[int, ...], int] = {}
    first_tile = 0
    for b, (sequence, visible) in enumerate(seen):
        together = seen[b // THREADS * THREADS :][:THREADS]
        blocks_q, blocks_k = -(-visible.shape[0] // block_m), -(-visible.shape[1] // block_n)
        run_q = RUNS[blocks_q > 16 or len({-(-x.shape[0] // block_m) for _, x in together} - {0}) > 1]
        run_k = RUNS[blocks_k > 16 or len({-(-x.shape[1] // block_n) for _, x in together} - {0}) > 1]
        for block in range(blocks_q):
            most = min(block // run_q * run_q + run_q, blocks_q) - 1
            met = np.nonzero(visible[most * block_m : (most + 1) * block_m].any(0))[0] // block_n
            first = met[0] if lengths.window else 0
            queries[(*sequence, block, first_tile + block)] = met[-1] - first + 1
        for block in range(blocks_k):
            most = block // run_k * run_k
            met = np.nonzero(visible[:, most * block_n : (most + 1) * block_n].any(1))[0] // block_m
            last = met[-1] if lengths.window else blocks_q - 1
            keys[(*sequence, block, first_tile)] = last - met[0] + 1
        first_tile += blocks_q
    return queries, keys


def _tensor(lengths: Lengths, name: str, head_dim: int) -> Tensor:
    side = "k" if name in ("dk", "dv") else "q"
    batch, rows, heads = lengths.batch(side), getattr(lengths, f"rows_{side}"), HEADS_K if side == "k" else HEADS
    if name == "lse":
        return Tensor((batch, heads, rows), (heads * rows, rows, 1), "float32")
    return Tensor((batch, rows, heads, head_dim), (rows * heads * head_dim, heads * head_dim, head_dim, 1), "bfloat16")


def make(
    listing: Listing,
    schedule: Schedule = Schedule.LOWEST_FIRST,
    mutation: Mutation | None = None,
    plant: str | None = None,
    arrays: dict[str, np.ndarray] | None = None,
) -> Made:
    """arrays: other lengths than those of the listing."""
    lengths, width = listing.lengths, listing.head_dim
    written = ("dq", "dk", "dv") if listing.backward else ("out", "lse")
    tensors = {name: _tensor(lengths, name, width) for name in written}
    strides = {name: each.strides[:3] for name, each in tensors.items()}
    strides = {name: (first if tensors[name].shape[0] > 1 else 0, *rest) for name, (first, *rest) in strides.items()}
    problem = AttentionProblem(
        lengths.problem_batch, lengths.rows_q, lengths.rows_k, HEADS, HEADS_K, width, width, "bfloat16",
        lengths.causal and lengths.window is None, 1.0,
        tuple(strides.items()),
        width % 8 == 0,
        window=None if lengths.window is None else WindowSpec(*lengths.window),
        dropout=DropoutSpec(8192, 4, moves=True) if listing.positioned else None,
        lengths=lengths.spec,
    )  # fmt: skip
    assert problem.positioned == listing.positioned
    lists = Lists.of(problem, *listing.blocks, has_keys=listing.backward, offset=256, short_keys=listing.short_keys)
    segments = Segments(problem.batch, lists, listing.short_keys) if problem.lengths.segments else None
    workspace = Tensor(((segments or lists).end // 4,), (1,), "float32")
    names = common.pointer_names(problem, written)
    gpu = device("sm_90")
    listed = list_tiles.launch(problem, gpu, lists, written, names, in_order=listing.in_order, segments=segments)
    found = (find_segments.launch(problem, gpu, segments, names),) if segments else ()
    arrays = {"dropout_seed": np.zeros(4, np.uint32), **(lengths.arrays if arrays is None else arrays)}
    pointers = [tensors[name].pointer if name in tensors else arrays[name].ctypes.data for name in names]
    run_launches((*found, listed), (*pointers, workspace.pointer), workspace, schedule, plant=plant, mutation=mutation)
    for name, tensor in {**tensors, "workspace": workspace}.items():
        assert tensor.untouched_outside(), f"{name}: something outside was written"
    words = workspace.values.view(np.int32)
    counts = words[lists.offsets["counts"] // 4 :]

    def entries(start: int, count: int) -> list[tuple[int, ...]]:
        """The `ListedPlace`s of a list, whose positions are right if they have any."""
        size = ctypes.sizeof(ListedPosition if listing.positioned else ListedPlace) // 4
        rows = words[start // 4 :][: size * count].reshape(-1, size).tolist()
        if listing.positioned:
            check_positions(lengths, rows)
        return [tuple(row[: len(FIELDS)]) for row in rows]

    keys = entries(lists.offsets["tiles_k"], counts[1]) if listing.backward else []
    results = {name: tensor.values for name, tensor in tensors.items()}
    made = Made(entries(lists.offsets["tiles_q"], counts[0]), keys, results, lists)
    if segments is not None and listing.short_keys:
        assert counts[2] == counts[3]
        made.shorts = entries(segments.offsets["shorts"], counts[2])
    return made


def check_positions(lengths: Lengths, rows: list[list[int]]) -> None:
    """AssertionError unless each tile says how many stored rows of its sequence, or of its segment's row of the batch,
    are in front of those that are computed."""
    for first_q, _, first_k, _, batch, _, _, _, in_front_q, in_front_k, *rest in rows:
        begin_q, begin_k = (0 if x is None else x[batch] for x in (lengths.cu_seqlens_q, lengths.cu_seqlens_k))
        assert (in_front_q, in_front_k) == (first_q - begin_q, first_k - begin_k) and rest == [0, 0]


def filled(lengths: Lengths, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Poison where a row sees something, zeros (-inf) elsewhere."""
    seen = lengths.seen("k" if name in ("dk", "dv") else "q")
    if name == "lse":
        poison = np.full(1, 0xFFFFFFFF, np.uint32).view(np.float32)
        return np.broadcast_to(np.where(seen, poison, np.float32(-np.inf))[:, None, :], shape)
    return np.broadcast_to(np.where(seen, 0xFFFF, 0).astype(np.uint16)[:, :, None, None], shape)


def check(
    listing: Listing,
    schedule: Schedule = Schedule.LOWEST_FIRST,
    mutation: Mutation | None = None,
    plant: str | None = None,
) -> None:
    """AssertionError unless the lists are right and in order, and exactly the rows that nobody sees are filled."""
    made = make(listing, schedule, mutation, plant)
    lists = list(zip((made.queries, made.keys), expected(listing), strict=True))
    for got, wanted in lists[: 1 + listing.backward]:
        assert len(got) == len(wanted) and set(got) == set(wanted)
        if listing.in_order:
            assert got == list(wanted)
        else:  # above 512 blocks a bin is for several numbers
            counts = [wanted[each] if wanted[each] < 512 else 512 + wanted[each] // 8 for each in got]
            assert counts == sorted(counts, reverse=True)
            if len(set(counts)) == 1:  # then those of a warp stay together
                natural = {each: number for number, each in enumerate(wanted)}
                numbers = [natural[each] for each in got]
                assert all(b == a + 1 or b % 32 == 0 for a, b in itertools.pairwise(numbers))
    for name, values in made.results.items():
        assert np.array_equal(values, filled(listing.lengths, name, values.shape), equal_nan=True), name


_ODD = Lengths(700, 900, 6, starts(1, 0, 300, 64, 65, 129), starts(0, 7, 200, 300, 31, 33))
_LENGTHS = {
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
}
_LENGTHS["equal"] = Lengths(5070, 5070, 40, *[starts(*[130] * 39, 0)] * 2, causal=True)  # of two warps
CASES = {name: Listing(lengths) for name, lengths in _LENGTHS.items()}
CASES |= {f"{name}-backward": Listing(each, True, n % 2 == 0) for n, (name, each) in enumerate(_LENGTHS.items())}
CASES |= {f"{name}-sorted": Listing(_LENGTHS[name], True) for name in ("packed", "gaps", "causal", "equal")}
CASES |= {f"unaligned-{backward}": Listing(_LENGTHS["causal"], backward, head_dim=13) for backward in (False, True)}
CASES |= {
    f"{name}-positioned": Listing(_LENGTHS[name], n % 2 == 0, n % 3 == 0, positioned=True)
    for n, name in enumerate(("gaps", "causal", "window", "dense", "queries-packed", "late-start"))
}
# Equal ones first, then others, with tiles for all warps.
CASES["turning-sorted"] = Listing(
    Lengths(18044, 18044, 1124, *[starts(*[1] * 1024, *[170] * 99, 190)] * 2, causal=True), True, blocks=(16, 16)
)
# Twice and a bit as many sequences as threads.
CASES |= {
    f"many-{in_order}": Listing(
        Lengths(3600, 2200, 2100, starts(*[1, 2] * 1050), starts(*[1] * 2100)), True, in_order, blocks=(16, 16)
    )
    for in_order in (False, True)
}


@pytest.mark.parametrize("name", CASES)
def test_lists(name: str) -> None:
    for schedule in Schedule:
        check(CASES[name], schedule)


@pytest.mark.parametrize("in_order", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_long_one_among_short_ones(in_order: bool) -> None:
    """A few rounds of sequences, many of them empty, and one with more tiles than there are threads."""
    rng = np.random.default_rng(1)
    lengths_q, lengths_k = rng.choice([0, 0, 1, 5, 34], 2100), rng.choice([0, 1, 40], 2100)
    lengths_q[1500], lengths_k[1500] = 18000, 9000
    rows_q, rows_k = int(lengths_q.sum()) + 5, int(lengths_k.sum())
    lengths = Lengths(rows_q, rows_k, 2100, starts(*lengths_q), starts(*lengths_k), causal=True)
    check(Listing(lengths, in_order=in_order, blocks=(16, 16)))


@pytest.mark.parametrize("cu_seqlens", [(0, 700, 0, 700, 0, 700, 1), (-5, 1 << 30, -9, 3, 2, 1, -1), (700,) * 7])
def test_wrong_lengths_stay_inside(cu_seqlens: tuple[int, ...]) -> None:
    """And no list is longer than there is room for, nor means rows that there are not."""
    wrong = dataclasses.replace(
        _ODD, cu_seqlens_q=cu_seqlens, seqused_k=(-3, 1 << 30, 5, 9, -(1 << 31), 7), leftpad_k=(1 << 30, -7, 2, 1, 0, 3)
    )
    for backward in (False, True):
        made = make(Listing(wrong, backward))
        lists = made.lists
        assert len(made.queries) <= lists.tiles_of_head_q and len(made.keys) <= lists.tiles_of_head_k
        for number, entries in enumerate((made.queries, made.keys)):
            for first_q, seqlen_q, first_k, seqlen_k, *_, tile in entries:
                assert first_q >= 0 and first_q + seqlen_q <= wrong.rows_q
                assert first_k >= 0 and first_k + seqlen_k <= wrong.rows_k
                assert tile + (-(-seqlen_q // BLOCK_M) if number else 1) <= lists.tiles_of_head_q


def test_an_entry_is_two_reads() -> None:
    assert ctypes.sizeof(ListedPlace) == 32


SEQUENCES = "common/sequences.cuh"
# Barriers of the list's maker that only segments come by.
OF_SEGMENTS = (
    "if constexpr (kSegments) griddepcontrol_wait();  // the segments are found",
    "__syncthreads();  // the ends are there",
    "__syncthreads();  // all know whether there is",
    "__syncthreads();  // how many they are is there; nobody changes it before the next of these sums",
)
# Case, what stands there, what is put there instead; in the kernel, or in the header.
MUTANTS = [
    ("packed-sorted", "ends[s + step - 1] <= index", "ends[s + step - 1] < index"),
    ("packed-sorted", "kBins - 1 - min(bin, kBins - 1)", "min(bin, kBins - 1)"),
    ("causal", "queries.first + unseen_q", "queries.first"),
    ("packed-backward", "place = listed + up_to_here - 1;", "place = listed + up_to_here;"),
    ("many-True", "listed += smem.bin_q[0];", "listed += 0;"),
    ("gaps", "run.first += in_front, run.seqlen -= in_front;", "run.first += in_front;"),
    ("gaps", "at < stretch.seen_from || at >= stretch.seen_to", "at < stretch.seen_from"),
    ("queries-packed", "own.starts[count + half - 1] <= at", "own.starts[count + half - 1] < at"),
    ("causal", "own.seqlen - other.seqlen - reach, 0)", "own.seqlen - other.seqlen - reach - 1, 0)"),
    ("causal", "own.seqlen - other.seqlen - reach, 0)", "own.seqlen - other.seqlen - reach + 1, 0)"),
    ("window-backward", "return {params.left, params.right};", "return {params.right, params.left};"),
    ("late-start-positioned", "queries.first - start_q", "queries.first"),
    ("gaps-positioned", "keys.first - start_k", "keys.first - start_q"),
    ("causal-positioned", "smem.set(thread, sequence.in_front_q, sequence", "smem.set(thread, 0, sequence"),
    ("packed-backward", "kOfKeys ? first_tile_q : first_tile_q + block", "first_tile_q + block"),
]


@pytest.mark.parametrize(("name", "old", "new"), MUTANTS, ids=[f"{m[0]}-{n}" for n, m in enumerate(MUTANTS)])
def test_mutants(name: str, old: str, new: str) -> None:
    with pytest.raises((AssertionError, run.HostRunError)):
        in_header = old in (build.source_module.root() / SEQUENCES).read_text()
        check(CASES[name], mutation=Mutation(SEQUENCES if in_header else SOURCE, old, new))


def barriers_of(*paths: str) -> dict[str, str]:
    """What can be left out of sources: what stands there, by the plant that does it."""
    found = {}
    for path in paths:
        for number, line in enumerate((build.source_module.root() / path).read_text().splitlines(), 1):
            if "__syncthreads(" in line.split("//")[0] or "griddepcontrol_wait(" in line:
                found[f"{path.split('/')[1]}:{number}"] = line.strip()
    return found


def is_caught(plant: str, checks: Iterable[Callable[[Schedule, str], None]]) -> bool:
    """Whether one of them shows it."""
    for check_one in checks:
        for schedule in (*Schedule, *3 * (Schedule.RANDOM,)):
            try:
                check_one(schedule, plant)
            except (AssertionError, run.HostRunError):
                return True
    return False


def test_every_barrier_is_needed() -> None:
    """Left out, each is caught; those for segments in test_segments.py."""
    names = ("packed-sorted", "packed-backward", "equal-sorted", "turning-sorted", "many-False", "many-True")
    checks = [lambda schedule, plant, name=name: check(CASES[name], schedule, plant=plant) for name in names]
    barriers = {plant: line for plant, line in barriers_of(SOURCE, SEQUENCES).items() if line not in OF_SEGMENTS}
    assert len(barriers) >= 5
    unseen = {plant: line for plant, line in barriers.items() if not is_caught(plant, checks)}
    assert not unseen, f"left out, and nothing showed: {unseen}"
