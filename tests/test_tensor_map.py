"""fa2cupy.jit.tensor_map against a fake driver: what arrives there, what is kept, what is refused."""

from __future__ import annotations

import pickle
import sys
import threading
import timeit
from collections.abc import Iterator

import pytest

from fa2cupy.errors import LaunchError, MissingDependency
from fa2cupy.jit import tensor_map
from fa2cupy.jit.tensor_map import TensorMapSpec, encode, objection
from tests.fake_driver import FakeDriver, FakeMap, fake_driver

# 64 columns, 100 rows, 8 heads, batch of 2: (batch, rows, heads, columns) in memory.
DIMS, STRIDES = (64, 100, 8, 2), (512, 64, 51200)
SPEC = TensorMapSpec.of(DIMS, STRIDES, (64, 128), "bfloat16")
POINTER = 0x7F12_3456_7890


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    encode.cache_clear()
    with fake_driver(monkeypatch) as found:
        yield found
    encode.cache_clear()


def test_everything_arrives(fake: FakeDriver) -> None:
    encoded = encode(SPEC, POINTER)
    assert type(encoded) is bytes and len(encoded) == tensor_map.SIZE == 128
    found = FakeMap.from_buffer_copy(encoded)
    assert found.address == POINTER
    assert tuple(found.dims) == DIMS
    assert tuple(found.strides) == SPEC.strides_bytes == (1024, 128, 102400)
    assert tuple(found.box) == (64, 128, 1, 1)
    assert (found.data_type, found.swizzle, found.l2_promotion) == (9, 3, 3)
    half = TensorMapSpec.of(DIMS, STRIDES, (64, 80), "float16")
    found = FakeMap.from_buffer_copy(encode(half, POINTER))
    assert (found.data_type, tuple(found.box)) == (6, (64, 80, 1, 1))
    floats = TensorMapSpec.of((128, 100, 1, 1), (128, 0, 0), (128, 1), "float32")
    found = FakeMap.from_buffer_copy(encode(floats, POINTER))
    assert (found.data_type, found.swizzle, tuple(found.box)) == (7, 0, (128, 1, 1, 1))
    assert tuple(found.strides) == (512, 512, 512)


def test_shifted(fake: FakeDriver) -> None:
    """Row `row` of a sequence of `length` rows that ends at `end` is where it is in the array, and no row is behind."""
    spec = SPEC.shifted
    found = FakeMap.from_buffer_copy(encode(spec, POINTER - spec.shift_bytes))
    assert found.dims == (64, 100, 8, 101, 2)
    assert found.strides == (1024, 128, 1024, 102400)
    rows, first, length = 100, 30, 45
    for row in (0, 44, 45):
        place, end = rows - length + row, first + length
        assert found.address + (place + end) * found.strides[0] == POINTER + (first + row) * 1024
        assert (place < rows) == (row < length) and end < found.dims[3]


def test_strides_of_size_1_are_replaced(fake: FakeDriver) -> None:
    for columns, legal in ((64, 128), (40, 80), (4, 16), (59, 128)):
        for strides in ((7, -3, 0), (2**60, 1, 5)):
            spec = TensorMapSpec.of((columns, 1, 1, 1), strides, (64, 64), "float16")
            assert spec.strides_bytes == (legal, legal, legal)
            assert objection((columns, 1, 1, 1), strides) == ""
            encode(spec, POINTER)
    assert TensorMapSpec.of((64, 100, 1, 2), (512, 7, 51200), (64, 64), "float16").strides_bytes == (1024, 128, 102400)
    # A stride of 0 is an expanded array's.
    assert TensorMapSpec.of((64, 100, 8, 2), (512, 0, 0), (64, 64), "float16").strides_bytes == (1024, 0, 0)
    assert objection((64, 100, 8, 2), (512, 0, 0)) == ""


@pytest.mark.parametrize(
    ("dims", "strides", "words"),
    [
        (DIMS, (513, 64, 51200), "row stride is 1026 bytes, not a multiple of 16 bytes"),
        (DIMS, (512, 60, 51200), "head stride is 120 bytes, not a multiple of 16 bytes"),
        (DIMS, (512, 64, 51201), "batch stride is 102402 bytes, not a multiple of 16 bytes"),
        (DIMS, (-512, 64, 51200), "row stride is negative"),
        (DIMS, (512, 64, -51200), "batch stride is negative"),
        (DIMS, (512, 64, 2**39), "batch stride is 1099511627776 bytes, not below 2**40"),
        (DIMS, (512, 64, 2**39 - 8), ""),
        ((64, 2**32 + 1, 1, 1), (64, 0, 0), "row count of 4294967297 is above 2**32"),
        ((2**32 + 1, 1, 1, 1), (0, 0, 0), "column count of 4294967297 is above 2**32"),
        ((64, 2**32, 1, 1), (64, 0, 0), ""),
        (DIMS, STRIDES, ""),
    ],
)
def test_objections_are_the_drivers(
    fake: FakeDriver, dims: tuple[int, ...], strides: tuple[int, ...], words: str
) -> None:
    """What is objected to is what the driver refuses."""
    assert objection(dims, strides) == words
    spec = TensorMapSpec.of(dims, strides, (64, 64), "bfloat16")
    if not words:
        encode(spec, POINTER)
        return
    with pytest.raises(LaunchError):
        encode(spec, POINTER)


def test_refusals_name_what_was_refused(fake: FakeDriver) -> None:
    with pytest.raises(LaunchError) as caught:
        encode(SPEC, POINTER + 8)
    message = str(caught.value)
    assert message.startswith("cuTensorMapEncodeTiled: CUDA_ERROR_INVALID_VALUE (1: invalid argument), encoding ")
    assert "dims=(64, 100, 8, 2)" in message and "strides_bytes=(1024, 128, 102400)" in message
    assert message.endswith("at address 0x7f1234567898")
    for box in ((72, 64), (64, 0), (64, 257)):
        with pytest.raises(LaunchError):
            encode(TensorMapSpec.of(DIMS, STRIDES, box, "bfloat16"), POINTER)
    fake["encode_status"] = 700
    with pytest.raises(LaunchError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        encode(SPEC, POINTER)
    fake["encode_status"] = 0
    encode(SPEC, POINTER)  # a refusal is not kept


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    encode.cache_clear()
    with fake_driver(monkeypatch, "libcuda-that-is-not-there.so.1"), pytest.raises(MissingDependency):
        encode(SPEC, POINTER)


def test_maps_are_kept(fake: FakeDriver) -> None:
    first = encode(SPEC, POINTER)
    again = TensorMapSpec.of(list(DIMS), list(STRIDES), (64, 128), "bfloat16")
    assert again == SPEC and hash(again) == hash(SPEC) and again is not SPEC
    assert encode(again, POINTER) is first
    assert fake["encode_count"] == 1
    others = [
        TensorMapSpec.of(DIMS, STRIDES, (64, 128), "float16"),
        TensorMapSpec.of(DIMS, STRIDES, (64, 64), "bfloat16"),
        TensorMapSpec.of(DIMS, (512, 64, 51208), (64, 128), "bfloat16"),
        TensorMapSpec.of((64, 99, 8, 2), STRIDES, (64, 128), "bfloat16"),
    ]
    made = {first, encode(SPEC, POINTER + 16), *(encode(spec, POINTER) for spec in others)}
    assert len(made) == fake["encode_count"] == 6
    copy = pickle.loads(pickle.dumps(SPEC))
    assert copy == SPEC and hash(copy) == hash(SPEC)


def test_memory_is_bounded_and_the_oldest_go_first(fake: FakeDriver) -> None:
    first = encode(SPEC, POINTER)
    for number in range(3 * tensor_map.MAX_ENCODED):
        encode(SPEC, POINTER + 16 * number)
        if number % 100 == 0:
            assert encode(SPEC, POINTER) is first  # used all the time
    assert encode.cache_info().currsize == tensor_map.MAX_ENCODED
    count = fake["encode_count"]
    assert count == 3 * tensor_map.MAX_ENCODED
    encode(SPEC, POINTER + 16)
    assert fake["encode_count"] == count + 1


def test_many_threads(fake: FakeDriver) -> None:
    """More maps than are kept, asked for by all threads at once: none gets another's."""
    failures: list[BaseException] = []
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        try:
            barrier.wait()
            for step in range(1500):
                pointer = POINTER + 16 * ((step * (number + 1)) % 1300)
                assert FakeMap.from_buffer_copy(encode(SPEC, pointer)).address == pointer
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures, failures[0]


def test_a_hit_is_cheap(fake: FakeDriver) -> None:
    """The limit is wide (a loaded machine); 0.1 us is usual."""
    encode(SPEC, POINTER)
    assert min(timeit.repeat(lambda: encode(SPEC, POINTER), number=2000, repeat=9)) / 2000 < 1e-6
