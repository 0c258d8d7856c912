"""The instrument itself: what it computes is right, and each rule that it watches is seen to be watched."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest

from fa2cupy.jit.kernel import LaunchConfig
from tests import reference
from tests.host import build, run, sanitized
from tests.host.run import HostRunError, Schedule

HERE = Path(__file__).resolve().parent
SHARED_BYTES = 16 * 32 * 2 + 128 * 4


class Params(ctypes.Structure):
    """The twin of `InstrumentParams`."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("counter", ctypes.c_void_p),
        ("which", ctypes.c_int),
        ("n", ctypes.c_int),
    )


def launch(
    which: int,
    *,
    a: np.ndarray | None = None,
    b: np.ndarray | None = None,
    out: np.ndarray | None = None,
    counter: np.ndarray | None = None,
    n: int = 0,
    threads: int = 32,
    grid: tuple[int, int, int] = (1, 1, 1),
    schedule: Schedule = Schedule.LOWEST_FIRST,
    plant: str | None = None,
    shared: int = SHARED_BYTES,
) -> list[run.Site]:
    library = build.library("instrument.cu", "instrument", {}, directory=HERE)
    pointers = [None if x is None else x.ctypes.data for x in (a, b, out, counter)]
    config = LaunchConfig(grid, (threads, 1, 1), (1, 1, 1), shared)
    return run.launch(library, config, bytes(Params(*pointers, which, n)), schedule, plant=plant)


def line_of(text: str) -> str:
    """The place of the one line of instrument.cu that contains `text`."""
    lines = [n for n, line in enumerate((HERE / "instrument.cu").read_text().splitlines(), 1) if text in line]
    assert len(lines) == 1, f"{text!r} is in {len(lines)} lines"
    return f"instrument.cu:{lines[0]}"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def aligned(x: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 16 bytes."""
    buffer = np.empty(x.nbytes + 16, np.uint8)
    start = -buffer.ctypes.data % 16
    y = buffer[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    y[...] = x
    return y


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("which, dtype", [(0, "float16"), (1, "bfloat16")])
def test_product_of_fragments(which: int, dtype: str, schedule: Schedule, rng: np.random.Generator) -> None:
    a, b = (reference.store(rng.standard_normal(shape), dtype) for shape in ((16, 16), (16, 8)))
    out = np.full((16, 8), np.nan, np.float32)
    stored = b if which == 1 else np.ascontiguousarray(b.T)
    launch(which, a=a, b=stored, out=out, schedule=schedule)
    np.testing.assert_allclose(out, 1 + reference.as_float64(a) @ reference.as_float64(b), rtol=1e-5, atol=1e-5)


def test_conversions_agree_with_numpy(rng: np.random.Generator) -> None:
    edges = [0.0, -0.0, 1.0, 65504.0, 65519.9, 65520.0, 1e30, np.inf, -np.inf, np.nan, 6.1e-5, 6.0e-8, 2.98e-8, 2.99e-8]
    bits = rng.integers(0, 1 << 32, 20000, dtype=np.uint32).view(np.float32)
    half_range = (rng.standard_normal(20000) * 2.0 ** rng.integers(-28, 18, 20000)).astype(np.float32)
    ties = np.arange(4096, dtype=np.uint32).view(np.float32) + (np.arange(4096, dtype=np.uint32) << 12).view(np.float32)
    x = np.concatenate([np.array(edges, np.float32), bits, half_range, ties])
    out = np.zeros(2 * 65536, np.float32)
    packed = np.zeros((len(x), 2), np.int32)
    launch(2, b=x.view(np.uint16), out=out, counter=packed, n=len(x))

    every = np.arange(65536, dtype=np.uint16)
    np.testing.assert_array_equal(out[:65536], every.view(np.float16).astype(np.float32))
    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_array_equal(out[65536:], reference.as_float64(every).astype(np.float32))
        halves = x.astype(np.float16)
    number = ~np.isnan(x)
    np.testing.assert_array_equal(packed[number, 0].astype(np.uint16), halves[number].view(np.uint16))
    np.testing.assert_array_equal(
        packed[number, 1].view(np.uint32) >> 16, reference.store(x[number].astype(np.float64), "bfloat16")
    )
    assert np.isnan(packed[~number, 0].astype(np.uint16).view(np.float16)).all()
    assert np.isnan(reference.as_float64((packed[~number, 1].view(np.uint32) >> 16).astype(np.uint16))).all()


def test_ids_and_shuffles() -> None:
    out, lanes = np.full(24, np.nan, np.float32), np.zeros(32, np.int32)
    launch(7, out=out, counter=lanes, grid=(2, 3, 4))
    assert (out == 7).all()
    assert lanes.tolist() == [100 + (t ^ 3) for t in range(32)]


# ----------------------------------------------------------------------------------------------------------------------
# Copies, barriers, and what happens without them


def run_copies(schedule: Schedule, plant: str | None, twice: bool, rng: np.random.Generator) -> np.ndarray:
    a, b = (aligned(rng.integers(0, 1000, 512).astype(np.uint16)) for _ in range(2))
    out = np.full(256 if twice else 128, np.nan, np.float32)
    counter = np.zeros(1, np.int32) if twice else None
    launch(3, a=a, b=b, out=out, counter=counter, n=16, threads=128, schedule=schedule, plant=plant)
    place = (8 * np.arange(128) + 128) % 512
    return out == np.concatenate([a[place], b[place]])[: len(out)]


@pytest.mark.parametrize("schedule", Schedule)
def test_copies_land_at_their_wait(schedule: Schedule, rng: np.random.Generator) -> None:
    assert run_copies(schedule, None, True, rng).all()


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("text", ["the copies of the other threads", "the second copies of", "everybody has read"])
def test_a_missing_barrier_shows(text: str, schedule: Schedule, rng: np.random.Generator) -> None:
    assert not run_copies(schedule, line_of(text), True, rng).all()


def test_a_missing_wait_shows(rng: np.random.Generator) -> None:
    sites = launch(3, a=aligned(np.zeros(512, np.uint16)), out=np.zeros(128, np.float32), n=16, threads=128)
    (wait,) = (site for site in sites if site.name == "cp_async_wait_group")
    with pytest.raises(HostRunError, match="copies that it never waited for"):
        run_copies(Schedule.LOWEST_FIRST, wait.plant, False, rng)
    assert not run_copies(Schedule.LOWEST_FIRST, wait.plant, True, rng).all()


def test_copies_read_only_what_they_say(rng: np.random.Generator) -> None:
    a = aligned(rng.integers(1, 1000, 512).astype(np.uint16))
    for valid in (0, 6, 16):
        out = np.full(128, np.nan, np.float32)
        launch(3, a=a, out=out, n=valid, threads=128)
        # Thread 47 reads element 504, the first of the last 16 bytes.
        assert out[47] == (a[504] if valid else 0)


def test_groups_land_in_order(rng: np.random.Generator) -> None:
    a, b = (aligned(rng.integers(0, 1000, 256).astype(np.uint16)) for _ in range(2))
    out = np.zeros((3, 32), np.float32)
    launch(4, a=a, b=b, out=out)
    assert (out[0] == a[::8]).all()
    assert (out[1] == 0xFFFF).all(), "in flight: poison"
    assert (out[2] == b[::8]).all()


@pytest.mark.parametrize("schedule", Schedule)
def test_lanes_of_a_warp_are_not_in_step(schedule: Schedule) -> None:
    expected = np.arange(32) ^ 1
    for plant in (None, line_of("the neighbour has written")):
        out = np.zeros(32, np.float32)
        launch(5, out=out, schedule=schedule, plant=plant)
        assert (out == expected).all() == (plant is None)


@pytest.mark.parametrize("schedule", Schedule)
def test_blocks_wait_for_each_other(schedule: Schedule) -> None:
    out, counter = np.zeros(1, np.float32), np.zeros(1, np.int32)
    launch(6, out=out, counter=counter, n=-1, grid=(5, 1, 1), threads=64, schedule=schedule)
    assert counter[0] == 5
    expected = 0.0
    for block in range(5):
        expected = expected / 2 + block
    assert out[0] == expected, "in the order of the block index, whichever block started first"


def test_a_release_that_never_comes() -> None:
    with pytest.raises(
        HostRunError, match=r"deadlock in block .*threads 0-0 wait at a word that no other thread changes"
    ):
        launch(6, out=np.zeros(1, np.float32), counter=np.zeros(1, np.int32), n=1, grid=(3, 1, 1), threads=64)


# ----------------------------------------------------------------------------------------------------------------------
# Broken rules


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize(
    "which, threads, n, message",
    [
        (10, 32, 0, "divergent warp: this lane is at __shfl_xor_sync"),
        (
            11,
            32,
            0,
            "__syncwarp .*(needs the whole warp|the thread ends while lanes)|the thread ends while lanes .*__syncwarp",
        ),
        (12, 96, 0, r"deadlock in block \(0, 0, 0\): threads 0-31 wait at __syncthreads .*; 32-63 ended; 64-95 wait"),
        (13, 96, 0, "divergent barrier 0"),
        (14, 32, 0, "16 bytes at offset 1536 of 1536 bytes of shared memory"),
        (15, 32, 0, "offset 8 of shared memory is not 16-byte aligned"),
        (16, 32, 0, "the thread ends with 1 asynchronous copies that it never waited for"),
        (17, 32, 0, "cp.async: global address .* is not 16-byte aligned"),
    ],
)
def test_a_broken_rule_is_reported(which: int, threads: int, n: int, message: str, schedule: Schedule) -> None:
    a = aligned(np.zeros(512, np.uint16))
    with pytest.raises(HostRunError, match=message):
        launch(which, a=a, n=n, threads=threads, schedule=schedule)


@pytest.mark.parametrize("schedule", Schedule)
def test_lanes_meet_before_they_read_what_others_have_copied(schedule: Schedule) -> None:
    a, out = np.arange(256, dtype=np.uint16), np.zeros(32, np.float32)
    launch(24, a=a, out=out, n=1, schedule=schedule)
    with pytest.raises(HostRunError, match="lane 0 reads what thread 1 has copied, but they have not met since"):
        launch(24, a=a, out=out, schedule=schedule)


def test_shared_memory_is_poisoned() -> None:
    out = np.zeros(32, np.float32)
    launch(21, out=out)
    assert np.isnan(out).all()


def test_variables_are_poisoned() -> None:
    out = np.zeros(32, np.float32)
    launch(22, out=out, n=0)
    assert (abs(out) > 1e30).all()


def test_launch_is_checked() -> None:
    with pytest.raises(HostRunError, match="whole warps"):
        launch(0, threads=33)
    with pytest.raises(HostRunError, match="the kernel needs 1536 bytes of shared memory, the launch has 1535"):
        launch(0, shared=SHARED_BYTES - 1)
    library = build.library("instrument.cu", "instrument", {}, directory=HERE)
    with pytest.raises(HostRunError, match="the kernel's parameters have 40 bytes, the host's have 4"):
        run.launch(library, LaunchConfig((1, 1, 1), (32, 1, 1)), bytes(4))


def test_a_mutation_must_match_once() -> None:
    with pytest.raises(build.BuildError, match="2 times"):
        build.Mutation("x.cu", "a", "b").apply("a a")
    assert build.Mutation("x.cu", "a", "b").apply("a c") == "b c"


# ----------------------------------------------------------------------------------------------------------------------
# What only a sanitized process sees: it dies, and says why


@pytest.mark.parametrize(
    "which, n, message",
    [
        (14, 0, "16 bytes at offset 1536"),  # the world's own checks come first
        (18, 0, "heap-buffer-overflow"),
        (19, 32, "heap-buffer-overflow"),
        (20, 0, "stack-overflow|SEGV"),
        (23, 1, "signed integer overflow"),
    ],
)
def test_sanitizers(which: int, n: int, message: str) -> None:
    done = sanitized.python(
        "-c",
        "from tests.host import sanitized, test_instrument as t; import numpy as np;"
        f"t.launch({which}, out=sanitized.empty((32,), np.float32), counter=np.ones(1, np.int32), n={n})",
    )
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr[-3000:]


def test_no_false_alarm_under_sanitizers() -> None:
    names = "product or conversions or copies or groups or blocks_wait or broken_rule or ids"
    done = sanitized.pytest(__file__, "-k", f"({names}) and not sanit")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
