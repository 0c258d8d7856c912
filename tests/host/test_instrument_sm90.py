"""The instrument's sm_90 half: bulk copies, mbarriers and wgmma compute what they should, and every rule is watched."""

from __future__ import annotations

import ctypes
import enum
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from fa2cupy.jit.kernel import LaunchConfig
from tests.host import build, run, sanitized, tensor_map
from tests.host.run import HostRunError, Schedule

HERE = Path(__file__).resolve().parent
SOURCE = "instrument_sm90.cu"
WIDTHS = (32, 64, 96, 128, 192, 256)
SHARED_BYTES = 4 * 64 * 128 + 4 * 256 * 128 + 1024
ALONG, DOWN, DOWN_RS, RING, STORE, REGISTERS, FLOATS, SUM, PAIR = range(9)


class Params(ctypes.Structure):
    """The twin of `InstrumentParams`."""

    _fields_ = (
        *((name, ctypes.c_ubyte * tensor_map.BYTES) for name in "abc"),
        ("out", ctypes.c_void_p),
        ("counter", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("which", "n", "flaw", "row", "head", "batch")),
        ("padding", ctypes.c_ubyte * 24),
    )


def _flaws() -> dict[str, int]:
    (names,) = re.findall(r"enum Flaw \{(.*?)\}", (HERE / SOURCE).read_text(), re.DOTALL)
    return {name: number for number, name in enumerate(re.findall(r"\w+", names))}


Flaw = enum.IntEnum("Flaw", _flaws(), start=0)  # type: ignore[misc]


def line_of(text: str) -> str:
    """The place of the one line of the source that contains `text`."""
    lines = [n for n, line in enumerate((HERE / SOURCE).read_text().splitlines(), 1) if text in line]
    assert len(lines) == 1, f"{text!r} is in {len(lines)} lines"
    return f"{SOURCE}:{lines[0]}"


def bits(x: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers that the type holds exactly, as 16 bits; 16-byte aligned, with rows of a multiple of 16 bytes."""
    if dtype == "float16":
        flat = x.astype(np.float16).view(np.uint16)
    else:
        flat = (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    buffer = sanitized.empty((flat.size + 8,), np.uint16) if build.sanitizing() else np.empty(flat.size + 8, np.uint16)
    start = -buffer.ctypes.data % 16 // 2
    y = buffer[start : start + flat.size].reshape(x.shape)
    y[...] = flat
    return y


def as_map(x: np.ndarray, rows: int, columns: int | None = None) -> bytes:
    """Of (batch, head, row, column) bits, or the last two of them; `columns`: as if there were fewer of them."""
    x = x.reshape((1,) * (4 - x.ndim) + x.shape)
    dims = (columns or x.shape[3], x.shape[2], x.shape[1], x.shape[0])
    strides = (x.strides[2], x.strides[1], x.strides[0])
    return tensor_map.pack(x.ctypes.data, dims, strides, (64, rows), "bfloat16")


def launch(
    which: int,
    maps: Iterable[bytes],
    out: np.ndarray | None = None,
    *,
    n: int = 0,
    flaw: str = "kNone",
    at: tuple[int, int, int] = (0, 0, 0),
    threads: int = 128,
    blocks: int = 1,
    cluster: int = 1,
    counter: np.ndarray | None = None,
    schedule: Schedule = Schedule.LOWEST_FIRST,
    plant: str | None = None,
    seed: int = 1,
) -> list[run.Site]:
    params = Params(out=out.ctypes.data if out is not None else None, which=which, n=n, flaw=Flaw[flaw])
    params.row, params.head, params.batch = at
    params.counter = counter.ctypes.data if counter is not None else None
    for name, words in zip("abc", maps, strict=False):
        setattr(params, name, (ctypes.c_ubyte * tensor_map.BYTES)(*words))
    defines = {"FA2_HEAD_DIM": 64, "FA2_ALIGNED": 1, "FA2_BF16": 1, "FA2_PARAMS_BYTES": ctypes.sizeof(Params)}
    library = build.library(SOURCE, "instrument", defines, directory=HERE)
    config = LaunchConfig((blocks, 1, 1), (threads, 1, 1), (1, 1, 1), SHARED_BYTES)
    return run.launch(library, config, bytes(params), schedule, plant=plant, seed=seed, cluster=cluster)


def integers(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(-8, 9, shape).astype(np.float32)


def along(n: int = 64, **options: object) -> tuple[np.ndarray, np.ndarray, list[run.Site]]:
    a, b = integers(64, 128), integers(n, 128)
    out = np.full((64, n), np.nan, np.float32)
    a_bits, b_bits = bits(a, "bfloat16"), bits(b, "bfloat16")
    sites = launch(ALONG, (as_map(a_bits, 64), as_map(b_bits, n)), out, n=n, **options)  # type: ignore[arg-type]
    return out, a @ b.T, sites


def ring(rounds: int = 9, **options: object) -> tuple[np.ndarray, np.ndarray]:
    a, b = integers(rounds, 64, 64), integers(rounds, 64, 64) + 1
    out = np.full((64, 64), np.nan, np.float32)
    a_bits, b_bits = (bits(x.reshape(-1, 64), "bfloat16") for x in (a, b))
    maps = (as_map(a_bits, 64), as_map(b_bits, 64))
    launch(RING, maps, out, n=rounds, threads=384, **options)  # type: ignore[arg-type]
    return out, np.einsum("imk,ink->mn", a, b)


def stored(
    rows: int = 64, columns: int = 128, at: tuple[int, int, int] = (0, 0, 0), **options: object
) -> tuple[np.ndarray, np.ndarray]:
    """What the bulk store leaves of (2, 3, rows, 128), all ones before, and what it should."""
    a = integers(2, 3, 64, 128)
    a_bits, c_bits = bits(a, "bfloat16"), bits(np.ones((2, 3, rows, 128)), "bfloat16")
    expected = c_bits.copy()
    launch(STORE, (as_map(a_bits, 64), b"", as_map(c_bits, 64, columns)), at=at, **options)  # type: ignore[arg-type]
    row, head, batch = at
    source = np.zeros((64, 128), np.float32)
    if head < 3:
        moved = a[batch, head, max(row, 0) : 64 + min(row, 0)]
        source[max(-row, 0) : max(-row, 0) + len(moved)] = moved
        end, begin = min(rows, row + 64), max(row, 0)
        expected[batch, head, begin:end, :columns] = bits(-source, "bfloat16")[begin - row : end - row, :columns]
    return c_bits, expected


def floats(columns: int = 96, row: int = 0, **options: object) -> tuple[np.ndarray, np.ndarray]:
    """A box of two rows of 96 floats from five rows of `columns`, and what it should hold."""
    x = integers(5, 96)
    words = tensor_map.pack(x.ctypes.data, (columns, 5, 1, 1), (x.strides[0],) * 3, (96, 2), "float32")
    expected, moved = np.zeros((2, 96), np.float32), x[row : row + 2, :columns]
    expected[: len(moved), :columns] = moved
    out = np.full((2, 96), np.nan, np.float32)
    launch(FLOATS, (words,), out, n=out.size, at=(row, 0, 0), **options)  # type: ignore[arg-type]
    return out, expected


def summed(blocks: int = 7, **options: object) -> tuple[np.ndarray, np.ndarray]:
    """What as many blocks make of floats that nobody has set."""
    buffer = np.full(44, np.nan, np.float32)
    start = -buffer.ctypes.data % 16 // 4
    out, counter = buffer[start : start + 40], np.zeros(1, np.int32)
    launch(SUM, (), out, n=out.size, threads=32, blocks=blocks, counter=counter, **options)  # type: ignore[arg-type]
    assert counter[0] == (1 << 30) + blocks
    return out, (np.arange(40) * blocks + blocks * (blocks - 1) // 2).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Right


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("n", WIDTHS)
def test_product_along_rows(n: int, schedule: Schedule) -> None:
    out, expected, _ = along(n, schedule=schedule)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("which", [DOWN, DOWN_RS], ids=["ss", "rs"])
def test_product_down_rows(which: int, n: int, schedule: Schedule) -> None:
    a, b = integers(64, 64), integers(64, n)
    out = np.full((64, n), np.nan, np.float32)
    a_bits, b_bits = bits(a, "float16"), bits(b, "float16")
    launch(which, (as_map(a_bits, 64), as_map(b_bits, 64)), out, n=n, schedule=schedule)
    np.testing.assert_array_equal(out, a @ b)


def half_of_b(n: int) -> tuple[np.ndarray, np.ndarray]:
    """The product with n columns of B from column 32 on, down its rows: as it came out, and as it should."""
    a, b = integers(64, 64), integers(64, 64)
    out = np.full((64, n), np.nan, np.float32)
    a_bits, b_bits = bits(a, "float16"), bits(b, "float16")
    launch(DOWN, (as_map(a_bits, 64), as_map(b_bits, 64)), out, n=n, at=(32, 0, 0))
    return out, a @ b[:, 32 : 32 + n]


def test_half_a_panel() -> None:
    np.testing.assert_array_equal(*half_of_b(32))
    with pytest.raises(HostRunError, match="columns that leave the row"):
        half_of_b(64)


@pytest.mark.parametrize("at", [(0, 0, 0), (30, 2, 1), (-7, 1, 0), (100, 0, 0), (0, 3, 0), (0, 0, -1)])
def test_loads_fill_up_with_zeros(at: tuple[int, int, int]) -> None:
    """Past the rows, the columns, the heads and the batches."""
    row, head, batch = at
    a, b = integers(2, 3, 70, 128), integers(2, 3, 80, 128)
    filled = [np.zeros((64, 128), np.float32), np.zeros((64, 128), np.float32)]
    for x, to, columns in ((a, filled[0], 107), (b, filled[1], 128)):
        for r in range(64):
            if 0 <= row + r < x.shape[2] and head < 3 and batch >= 0:
                to[r, :columns] = x[batch, head, row + r, :columns]
    a_bits, b_bits = bits(a, "bfloat16"), bits(b, "bfloat16")
    out = np.full((64, 64), np.nan, np.float32)
    launch(ALONG, (as_map(a_bits, 64, 107), as_map(b_bits, 64)), out, n=64, at=at)
    np.testing.assert_array_equal(out, filled[0] @ filled[1].T)


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("columns, row", [(96, 0), (96, 3), (96, 4), (90, 1), (3, 4)])
def test_floats_are_not_swizzled(columns: int, row: int, schedule: Schedule) -> None:
    out, expected = floats(columns, row, schedule=schedule)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_the_first_block_writes_and_the_others_add(blocks: int, schedule: Schedule, seed: int) -> None:
    out, expected = summed(blocks, schedule=schedule, seed=seed + 1)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize(
    "rows, columns, at",
    [(64, 128, (0, 0, 0)), (40, 100, (0, 2, 1)), (64, 59, (30, 1, 0)), (64, 64, (-9, 0, 1)), (64, 8, (0, 3, 0))],
)
def test_stores_stay_inside(rows: int, columns: int, at: tuple[int, int, int], schedule: Schedule) -> None:
    got, expected = stored(rows, columns, at, schedule=schedule)
    np.testing.assert_array_equal(got & 0x7FFF, expected & 0x7FFF)
    zero = (expected & 0x7FFF) == 0
    np.testing.assert_array_equal(got[~zero], expected[~zero])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("rounds", [1, 2, 9])
def test_ring(rounds: int, schedule: Schedule, seed: int) -> None:
    out, expected = ring(rounds, schedule=schedule, seed=seed + 1)
    np.testing.assert_array_equal(out, expected)


# ----------------------------------------------------------------------------------------------------------------------
# Wrong: each of these shows under some schedule, as a message or as a wrong result


WRONG = "wrong result"


def failures(compute: object, **options: object) -> str:
    """What a mistake leads to, schedule by schedule."""
    seen = []
    runs = [(Schedule.LOWEST_FIRST, 1), (Schedule.HIGHEST_FIRST, 1), *((Schedule.RANDOM, seed) for seed in range(8))]
    for schedule, seed in runs:
        try:
            out, expected = compute(schedule=schedule, seed=seed, **options)[:2]  # type: ignore[operator]
            seen.append("right" if np.array_equal(out, expected) else WRONG)
        except HostRunError as error:
            seen.append(str(error))
    return "\n".join(seen)


@pytest.mark.parametrize(
    "flaw, message",
    [
        ("kWrongParity", "the bulk load of instrument_sm90.cu:.* is still filling"),
        ("kFewBytes", r"a bulk load of 8192 bytes .* expects only 7168 more in phase 0"),
        (
            "kManyBytes",
            r"deadlock .* mbarrier_wait .* for parity 0 of the mbarrier at offset \d+, .* lacks .* and 1024 bytes",
        ),
        ("kWrongStride", WRONG),
        ("kReadEarly", WRONG),
        ("kWriteEarly", "has written to element 1 of an accumulator"),
        ("kUnwaitedLoad", "ends with 1 bulk loads that nobody waited for"),
        ("kOtherDescriptor", "divergent warpgroup: its warps differ in the descriptor of B"),
        ("kOneWarpMore", "divergent warpgroup: its warps differ in the place"),
        ("kUnaligned", "offset 128 of shared memory is not 1024-byte aligned"),
        ("kOverwritten", "the mbarrier at offset .* was overwritten"),
        ("kNoMap", "was not made by tests/host/tensor_map.py"),
    ],
)
def test_flaws_of_a_product(flaw: str, message: str) -> None:
    assert re.search(message, failures(along, flaw=flaw)), failures(along, flaw=flaw)


def test_panels_are_a_stride_apart() -> None:
    a, b = integers(64, 64), integers(64, 128)
    out = np.full((64, 128), np.nan, np.float32)
    a_bits, b_bits = bits(a, "float16"), bits(b, "float16")
    launch(DOWN, (as_map(a_bits, 64), as_map(b_bits, 64)), out, n=128, flaw="kWrongLeading")
    assert not np.array_equal(out, a @ b)


@pytest.mark.parametrize(
    "text, message",
    [
        ("fence_mbarrier_init();", "without fence_mbarrier_init"),
        ("everybody knows the barriers", "there is no mbarrier at offset"),
        ("the operands' bytes", "expects only 0 more"),
        ("for the operands", "is still filling"),
        ("before the products", "there was no wgmma_fence since"),
        ("for the products", "wgmmas that it never waited for"),
    ],
)
def test_what_is_left_out_of_a_product(text: str, message: str) -> None:
    seen = failures(along, plant=line_of(text))
    assert re.search(message, seen), seen


@pytest.mark.parametrize(
    "flaw, message",
    [
        ("kTwoArrivals", "is still (filling|reading)|wrong result"),
        ("kSourceReused", "writes to offset .* of shared memory, which .* is still reading"),
    ],
)
def test_flaws_of_a_ring(flaw: str, message: str) -> None:
    seen = failures(ring, flaw=flaw)
    assert re.search(message, seen), seen


@pytest.mark.parametrize(
    "text, message",
    [
        ("until the buffer is free", "all 1 arrivals of phase 0 at the mbarrier at offset .* have come already"),
        ("until the buffer is full", "is still filling"),
        ("wgmma_fence();  // of the ring", "there was no wgmma_fence since"),
        ("wgmma_wait_group<0>();  // of the ring", "is still reading|wgmmas that it never waited for"),
        ("// the buffer is free", r"deadlock .* wait at mbarrier_wait .* parity 0 of the mbarrier at offset \d+"),
    ],
)
def test_what_is_left_out_of_a_ring(text: str, message: str) -> None:
    seen = failures(ring, plant=line_of(text))
    assert re.search(message, seen), seen


@pytest.mark.parametrize(
    "options, message",
    [
        ({"flaw": "kWrongCount"}, "barrier 3 has (96|128) threads at .*, but (96|128) at"),
        ({"flaw": "kTooFewThreads"}, "bar_sync: barrier 3 of 256 threads: whole warps of the block"),
        ({"flaw": "kTooFewThreads", "threads": 256}, WRONG),
        ({"plant": "what this thread stored"}, "which thread .* has stored without fence_proxy_async"),
        ({"plant": "everybody has stored"}, "without fence_proxy_async|wrong result"),
        ({"plant": "the store has read"}, "bulk stores that it never waited for"),
        ({"plant": "the buffer may be written again"}, "deadlock .* for barrier 4: 127 of 128 threads have come"),
        ({"plant": "until it may"}, "deadlock .* for barrier 4: 32 of 128 threads have come"),
        ({"flaw": "kSourceReused"}, "which thread .* has stored without fence_proxy_async|wrong result"),
    ],
)
def test_flaws_of_a_store(options: dict[str, object], message: str) -> None:
    if isinstance(plant := options.get("plant"), str):
        options = {**options, "plant": line_of(plant)}
    seen = failures(stored, **options)
    assert re.search(message, seen), seen


@pytest.mark.parametrize(
    "options, message",
    [
        ({"flaw": "kNeverFirst"}, WRONG),
        ({"flaw": "kAlwaysFirst"}, WRONG),
        ({"flaw": "kUnwaitedFirst"}, WRONG),
        ({"flaw": "kFewBytes"}, "the bulk store .* 152 bytes .* all have to be multiples of 16"),
        ({"flaw": "kUnaligned"}, "the bulk store .* between offset 8 and .* all have to be multiples of 16"),
        ({"plant": "what this lane stored of the sum"}, "which thread .* has stored without fence_proxy_async"),
        ({"plant": "the sum's floats are there"}, "which thread .* has stored without fence_proxy_async|wrong result"),
        ({"plant": "they are in global memory"}, "releases a counter while 1 of its bulk stores or additions"),
    ],
)
def test_flaws_of_a_sum(options: dict[str, str], message: str) -> None:
    if "plant" in options:
        options = {"plant": line_of(options["plant"])}
    seen = failures(summed, **options)
    assert re.search(message, seen), seen


def test_flaws_of_floats() -> None:
    assert "offset 32832 of shared memory is not 128-byte aligned" in failures(floats, flaw="kUnaligned")
    assert WRONG in failures(floats, plant=line_of("for the floats"))


def test_registers_are_given_before_they_are_taken() -> None:
    launch(REGISTERS, (), threads=384)
    with pytest.raises(HostRunError, match=r"deadlock .* wait at setmaxnreg_inc"):
        launch(REGISTERS, (), threads=384, n=1)


def test_every_synchronisation_is_reported() -> None:
    _, _, sites = along()
    names = {site.name for site in sites}
    assert names >= {"fence_mbarrier_init", "mbarrier_arrive_expect_tx", "mbarrier_wait", "wgmma_fence"}
    assert names >= {"wgmma_wait_group", "__syncthreads"}


@pytest.mark.parametrize(
    "changes",
    [
        {"pointer": 8},
        {"dims": (64, 0, 1, 1)},
        {"strides_bytes": (8, 16, 16)},
        {"box": (32, 8)},
        {"box": (64, 257)},
        {"dims": (64, 8, 1, 9, 1)},
    ],
)
def test_a_map_is_checked(changes: dict[str, object]) -> None:
    good: dict[str, object] = {"pointer": 4096, "dims": (64, 8, 1, 1), "strides_bytes": (128, 128, 128), "box": (64, 8)}
    assert len(tensor_map.pack(**good, dtype="float16")) == tensor_map.BYTES  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        tensor_map.pack(**{**good, **changes}, dtype="float16")  # type: ignore[arg-type]


@pytest.mark.parametrize("columns", [2, 6, 260])
def test_a_map_of_floats_is_checked(columns: int) -> None:
    dims, strides = (columns, 8, 1, 1), (2048, 2048, 2048)
    assert len(tensor_map.pack(4096, dims, strides, (128, 1), "float32")) == tensor_map.BYTES
    with pytest.raises(ValueError):
        tensor_map.pack(4096, dims, strides, (columns, 1), "float32")


def test_no_false_alarm_under_sanitizers() -> None:
    done = sanitized.pytest(__file__, "-k", "(down_rows and 96) or zeros or (ring and 9) or (inside and LOWEST)")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def pair(**options: object) -> tuple[np.ndarray, np.ndarray]:
    a = integers(128, 64)
    out = np.full((128, 64), np.nan, np.float32)
    a_bits = bits(a, "bfloat16")
    launch(PAIR, (as_map(a_bits, 64),), out, blocks=2, cluster=2, **options)  # type: ignore[arg-type]
    return out, np.concatenate([a[64:].T @ a[:64], a[:64].T @ a[64:]])


@pytest.mark.parametrize("schedule", Schedule)
def test_blocks_of_a_cluster_send_to_each_other(schedule: Schedule) -> None:
    """And a product whose A is stored with the sum running down its rows."""
    for seed in range(1, 1 + 9 * (schedule is Schedule.RANDOM) + 1):
        out, expected = pair(schedule=schedule, seed=seed)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("kFewBytes", r"a bulk load of 8192 bytes .*, but the mbarrier .* expects only 7168 more"),
        ("kSourceReused", r"the bulk load .* writes to .*, which .* is still reading"),
        ("kReadEarly", r"follows a wait for an mbarrier, and no wgmma_fence is between|no wgmma_fence since"),
        ("kTwoArrivals", r"phase 1 of the mbarrier .* ends before 128 threads have seen the end of the one"),
    ],
)
def test_rules_of_clusters(flaw: str, message: str) -> None:
    with pytest.raises(HostRunError, match=message):
        pair(flaw=flaw)


def test_what_blocks_of_a_cluster_owe_each_other() -> None:
    """A barrier that is used before it is initialised, a block that ends too early, and clusters that do not add up."""
    early = line_of("// the other block's barriers are there")
    with pytest.raises(HostRunError, match=r"there is no mbarrier|has ended"):
        pair(plant=early)
    gone = line_of("// until this block's has")
    with pytest.raises(HostRunError, match="has ended"):
        pair(plant=gone)
    with pytest.raises(HostRunError, match="a grid of 3 blocks in clusters of 2"):
        launch(PAIR, (), blocks=3, cluster=2)
