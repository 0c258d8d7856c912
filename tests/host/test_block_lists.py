"""cuda_src/smxx/classify_blocks.cu and list_blocks.cu, run on the CPU: lists of blocks and bits of masks given as
arrays, as blocks and as functions, beside those made by loops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from fa2cupy import BlockMask
from fa2cupy.block_mask.lists import BlockLists
from fa2cupy.frameworks.base import Device, TensorRef
from fa2cupy.jit import compiler
from fa2cupy.jit import source as source_module
from fa2cupy.kernels import block_lists
from fa2cupy.kernels.launch import KernelLaunch
from fa2cupy.kernels.smxx.classify_blocks import Seeing
from fa2cupy.tracing import MASK, UserFunction
from tests.block_lists import expected_lists, same_lists
from tests.host import build, run
from tests.host.build import Mutation
from tests.host.kernel_run import Tensor
from tests.host.run import Schedule
from tests.test_block_mask import random_dense

CLASSIFY, LIST = "smxx/classify_blocks.cu", "smxx/list_blocks.cu"
SEEN = "common/seen.cuh"


@dataclass
class Made:
    """What was built: lists, and the counts of entries and partial blocks."""

    lists: BlockLists
    counts: list[int]


@dataclass
class Case:
    """What is built from, and what comes out. arrays: their pointers stand in front."""

    seeing: Callable[[], Seeing]
    arrays: list[np.ndarray]
    dense: np.ndarray
    _expected: list[BlockLists] = field(default_factory=list)

    @property
    def expected(self) -> BlockLists:
        if not self._expected:
            self._expected.append(expected_lists(self.dense))
        return self._expected[0]


def make(
    case: Case,
    schedule: Schedule = Schedule.LOWEST_FIRST,
    *,
    room: tuple[int, int] | None = None,
    mutation: Mutation | None = None,
    plant: str | None = None,
) -> Made:
    """room: for entries and partial blocks, what is needed where it is None."""
    expected = case.expected
    entries, partial = room or (len(expected.entries_q), len(expected.bits))
    building = block_lists.Building(case.dense.shape, entries, partial, len(case.arrays))  # type: ignore[arg-type]
    outputs = {name: Tensor(shape, _strides(shape), "float32") for name, shape in building.shapes.items()}
    workspace = Tensor((building.workspace_bytes // 4,), (1,), "float32")
    pointers = [each.ctypes.data for each in case.arrays]
    pointers += [each.pointer for each in (*outputs.values(), workspace)]
    for number, launch in enumerate(block_lists.plan("sm_90", case.seeing(), building)):
        headers = _headers(launch)
        mutated = mutation if mutation and mutation.path in _files(launch) else None
        library = build.library(_path(launch), launch.name, launch.defines, mutation=mutated, headers=headers)
        run.launch(library, launch.config, launch.pack(tuple(pointers)), schedule, seed=number + 1, plant=plant)
    for name, tensor in {**outputs, "workspace": workspace}.items():
        assert tensor.untouched_outside(), f"{name}: something outside was written"
    lists = BlockLists(*(each.values.view(np.int32) for each in outputs.values()))
    return Made(lists, workspace.values.view(np.int32)[:2].tolist())


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[n + 1 :], dtype=int)) for n in range(len(shape)))


def _path(launch: KernelLaunch) -> str:
    return launch.source if isinstance(launch.source, str) else launch.source.path


def _headers(launch: KernelLaunch) -> tuple[tuple[str, bytes], ...]:
    if isinstance(launch.source, str):
        return ()
    return tuple(each for each in launch.source.headers if each[0].startswith("user/"))


def _files(launch: KernelLaunch) -> set[str]:
    loaded = source_module.load(_path(launch), headers=dict(_headers(launch)))
    return {loaded.path, *(name for name, _ in loaded.headers)}


# ----------------------------------------------------------------------------------------------------------------------
# Cases


def by_array(dense: np.ndarray, given: np.ndarray | None = None) -> Case:
    """given: what is broadcast to `dense`, with its own strides."""
    array = dense if given is None else given
    strides = tuple(0 if n == 1 else s for n, s in zip(array.shape, array.strides, strict=True))
    return Case(lambda: Seeing.by_array(strides, 0), [array], dense)  # type: ignore[arg-type]


def by_blocks(blocks: np.ndarray, size: tuple[int, int], causal: bool, window: tuple[int, int] | None) -> Case:
    mask = BlockMask.from_blocks(blocks, size, causal=causal, window_size=window)
    _, _, seqlen_q, seqlen_k = mask.shape
    left, right = window or (-1, -1)
    right = 0 if causal else right
    off, far = seqlen_k - seqlen_q, seqlen_q + seqlen_k
    band = off - (far if left < 0 else left), off + (far if right < 0 else right)
    strides = tuple(0 if n == 1 else s for n, s in zip(blocks.shape, blocks.strides, strict=True))
    return Case(lambda: Seeing.by_blocks(strides, size, band, 0), [blocks], mask.to_dense())  # type: ignore[arg-type]


def by_function(function: Callable[..., Any] | str, shape: tuple[int, int, int, int], twin: Any, **arrays: Any) -> Case:
    """twin: the function on NumPy arrays."""
    made = UserFunction.of(MASK, function, arrays)
    batch, heads, seqlen_q, seqlen_k = shape
    query, key = np.arange(seqlen_q)[:, None], np.arange(seqlen_k)
    places = np.arange(batch)[:, None, None, None], np.arange(heads)[:, None, None], query, key
    dense = np.ascontiguousarray(np.broadcast_to(twin(*places, query + seqlen_k - seqlen_q), shape))
    given = [arrays[each.name] for each in made.captures if each.rank is not None]

    def seeing() -> Seeing:
        refs = {
            each.name: TensorRef(
                0, arrays[each.name].shape, tuple(s // arrays[each.name].itemsize for s in arrays[each.name].strides),
                each.dtype, Device("cuda", 0), None,
            )
            for each in made.captures
            if each.rank is not None
        }  # fmt: skip
        return Seeing.by_function(made, arrays, refs, 0)

    return Case(seeing, given, dense)


kinds: Any = None  # rebound; the names of fields of the kernel's struct
grid: Any = None
seqlen_q: Any = None


def cases() -> dict[str, Case]:
    rng = np.random.default_rng(5)
    found = {}
    for n, shape in enumerate([(1, 1, 128, 128), (1, 1, 1, 1), (2, 1, 300, 500), (1, 3, 260, 129), (2, 2, 127, 256)]):
        found[f"array-{n}"] = by_array(random_dense(n, shape))
    found["all"] = by_array(np.ones((1, 1, 300, 256), bool))
    found["nothing"] = by_array(np.zeros((1, 2, 300, 256), bool))
    found["long"] = by_array(random_dense(9, (1, 1, 130, 128 * 70 + 5)))
    found["high"] = by_array(random_dense(9, (1, 1, 128 * 40 + 5, 100)))
    found["many"] = by_array(random_dense(8, (6, 50, 5, 140)))  # more rows than threads
    whole = random_dense(3, (2, 2, 300, 400))
    found["strides"] = by_array(whole[:, ::-1, ::2, ::-1], whole[:, ::-1, ::2, ::-1])
    row = whole[:1, :, :1]
    found["broadcast"] = by_array(np.ascontiguousarray(np.broadcast_to(row, (1, 2, 300, 400))), row)
    blocks = rng.random((2, 1, 7, 9)) < 0.5
    for n, size in enumerate(((128, 128), (64, 32), (100, 96), (256, 16))):
        window = (None, (150, 40), (40, -1), (-1, 7))[n]
        found[f"blocks-{n}"] = by_blocks(blocks, size, n == 2, window)
    ids, prefix = np.arange(500) // 90, np.array([3, 300], np.int32)
    found["causal"] = by_function(lambda b, h, q, k: k <= q, (1, 1, 300, 400), lambda b, h, q, k, p: k <= q)
    found["q_pos"] = by_function(
        lambda b, h, q_idx, kv_idx, q_pos: (kv_idx <= q_pos) & (h == 1), (1, 2, 300, 400),
        lambda b, h, q, k, p: (k <= p) & (h == 1),
    )  # fmt: skip
    found["captures"] = by_function(
        lambda b, h, q, k: (kinds[q] == kinds[k]) | (k < grid[b]) | (q - k == seqlen_q), (2, 1, 300, 400),
        lambda b, h, q, k, p: (ids[q] == ids[k]) | (k < prefix[b]) | (q - k == 7), kinds=ids, grid=prefix, seqlen_q=7,
    )  # fmt: skip
    found["text"] = by_function(
        "const int apart = q_idx - kv_idx;\nreturn apart >= 0 && apart < 100 || kv_idx < kinds[b];", (2, 1, 300, 300),
        lambda b, h, q, k, p: ((q - k >= 0) & (q - k < 100)) | (k < prefix[b]), kinds=prefix,
    )  # fmt: skip
    return found


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_lists(name: str) -> None:
    case = CASES[name]
    for schedule in Schedule if case.dense.size < 1 << 20 else (Schedule.RANDOM,):
        made = make(case, schedule)
        assert same_lists(made.lists, case.expected)
        assert made.counts == [len(case.expected.entries_q), len(case.expected.bits)]
    same = BlockMask.from_dense(case.dense)
    assert same_lists(made.lists, same.lists)


def test_more_room_than_needed() -> None:
    case = CASES["array-2"]
    made = make(case, room=(100, 50))
    assert same_lists(made.lists, case.expected) and made.lists.bits.shape[0] == 50


@pytest.mark.parametrize("room", [(24, 3), (5, 1), (0, 0), (3, 100)])
def test_less_room_than_needed_stays_inside(room: tuple[int, int]) -> None:
    """Numbers are wrong then, and the counts say so; but none is of bits that there are not."""
    case = CASES["array-2"]
    made = make(case, room=room)
    assert made.counts == [len(case.expected.entries_q), len(case.expected.bits)]
    for entries in (made.lists.entries_q, made.lists.entries_k):
        used = entries[: made.counts[0]]
        assert (used[:, 1] < max(1, room[1])).all() and (used[:, 1] >= -1).all()


def test_nothing_to_build() -> None:
    for shape in ((1, 1, 0, 5), (2, 1, 5, 0)):
        building = block_lists.Building(shape, 0, 0, 1)
        assert block_lists.plan("sm_90", Seeing.by_array((0, 0, 0, 0), 0), building) == ()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nvrtc_takes_them(arch: str) -> None:
    """Next to nothing is spilled: on sm_90 a predicate."""
    sources: dict[Any, KernelLaunch] = {}
    for name in ("array-0", "blocks-0", "captures", "causal", "text"):
        case = CASES[name]
        building = block_lists.Building(case.dense.shape, 9, 9, len(case.arrays))  # type: ignore[arg-type]
        for launch in block_lists.plan(arch, case.seeing(), building):
            sources[launch.source, tuple(launch.defines.items())] = launch
    assert len(sources) == 6
    for launch in sources.values():
        source = source_module.load(launch.source) if isinstance(launch.source, str) else launch.source
        cubin = compiler.compile(source, arch, launch.defines)
        assert cubin.warnings == () and cubin.kernels[launch.name].spill_bytes <= 4


# ----------------------------------------------------------------------------------------------------------------------
# Whether mistakes are seen

MUTANTS = [
    ("array-2", CLASSIFY, "key < params.seqlen_k &&", ""),
    ("array-2", CLASSIFY, "query < params.seqlen_q &&", ""),
    ("array-3", CLASSIFY, "2 * t + lane % 2", "2 * t + lane / 2 % 2"),
    ("array-3", CLASSIFY, "at.mask % params.num_heads", "0"),
    ("array-2", CLASSIFY, "at.mask / params.num_heads", "0"),
    ("array-2", CLASSIFY, "* 2 * kBlock", "* kBlock"),
    ("array-2", CLASSIFY, "key % 8 / 2 == 1 ? own.y", "key % 8 / 2 == 1 ? own.x"),
    ("array-2", CLASSIFY, "min(+kBlock, params.seqlen_q - at.m * kBlock)", "kBlock"),
    ("array-0", CLASSIFY, "whole ? kFull : some", "some && whole ? kFull : whole"),
    ("q_pos", CLASSIFY, "params.seqlen_k - params.seqlen_q", "0"),
    ("blocks-1", SEEN, "key < query + by.first", "key <= query + by.first"),
    ("blocks-1", SEEN, "key > query + by.last", "key > query + by.last + 1"),
    ("blocks-2", SEEN, "key / by.block_k", "key / by.block_q"),
    ("long", LIST, "n < params.grid.key_blocks; n += 32", "n < params.grid.key_blocks; n += 64"),
    ("many", LIST, "sum_x - own_x", "sum_x"),
    ("many", LIST, "entries += all_x", "entries = all_x"),
    ("array-2", LIST, "(its == entries && other < r)", "(its == entries && other > r)"),
    ("long", LIST, "partial_before + full_before}", "partial_before}"),
    ("array-2", LIST, "own.y + full_before)", "full_before)"),
    ("strides", LIST, "full = own.x + own.y;", "full = own.x;"),
    ("array-2", LIST, "first_partial + partial_before,", "partial_before,"),
]


@pytest.mark.parametrize(("name", "path", "old", "new"), MUTANTS, ids=[f"{m[0]}-{n}" for n, m in enumerate(MUTANTS)])
def test_mutants(name: str, path: str, old: str, new: str) -> None:
    case = CASES[name]
    with pytest.raises((AssertionError, run.HostRunError)):
        made = make(case, mutation=Mutation(path, old, new))
        assert same_lists(made.lists, case.expected)


@pytest.mark.parametrize("path", [CLASSIFY, LIST])
def test_every_barrier_is_needed(path: str) -> None:
    """Left out, each is caught."""
    lines = (source_module.root() / path).read_text().splitlines()
    barriers = [number for number, line in enumerate(lines, 1) if "__syncthreads(" in line.split("//")[0]]
    assert len(barriers) == 2

    def is_caught(number: int) -> bool:
        for name in ("array-2", "long", "many"):
            for schedule in (*Schedule, *3 * (Schedule.RANDOM,)):
                try:
                    made = make(CASES[name], schedule, plant=f"{path.split('/')[1]}:{number}")
                    assert same_lists(made.lists, CASES[name].expected)
                except (AssertionError, run.HostRunError):
                    return True
        return False

    unseen = [lines[number - 1] for number in barriers if not is_caught(number)]
    assert not unseen, f"left out, and nothing showed: {unseen}"
