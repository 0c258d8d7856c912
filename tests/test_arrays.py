"""`fa2cupy/frameworks/`: whose array is it, and what does it say of itself."""

from __future__ import annotations

import gc

import ml_dtypes
import numpy as np
import pytest

import fa2cupy
from fa2cupy.frameworks import CUPY, NUMPY, dlpack, framework_of
from fa2cupy.frameworks.base import Device, contiguous_strides, describe
from fa2cupy.frameworks.dlpack import from_producer
from tests.dlpack_producer import Producer
from tests.fake_gpu import FakeGpu, cupy_array, host_view


def test_frameworks_are_found_by_type() -> None:
    class Subclass(np.ndarray):
        pass

    assert framework_of(np.zeros(3)) is NUMPY
    assert framework_of(np.zeros(3).view(Subclass)) is NUMPY
    assert framework_of(cupy_array((3,), np.float16)) is CUPY
    for other in ([1.0], 1.0, None, np.float32(1), "q", Producer(np.zeros(3))):
        assert framework_of(other) is None


def test_names_in_messages() -> None:
    assert describe([]) == "list"
    assert describe(np.zeros(3)) == "numpy.ndarray"
    assert describe(cupy_array((3,), np.float16)) == "cupy.ndarray"
    assert describe(np.float32(1)) == "numpy.float32"
    assert (str(Device("cpu", 0)), str(Device("cuda", 1))) == ("the CPU", "cuda:1")


def test_contiguous_strides() -> None:
    for shape in ((2, 3, 4, 5), (1, 3, 1, 5), (7,)):
        array = np.empty(shape, np.float16)
        assert contiguous_strides(shape) == tuple(s // 2 for s in array.strides)
    assert len(contiguous_strides((2, 0, 3))) == 3


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint16, ml_dtypes.bfloat16])
def test_refs(dtype: type) -> None:
    array = np.zeros((2, 6, 4, 8), dtype)[:, ::-2, 1:3].transpose(0, 2, 1, 3)
    ref = NUMPY.ref(array, "q")
    assert ref.ptr == array.__array_interface__["data"][0]
    assert ref.shape == (2, 2, 3, 8)
    assert ref.strides == (192, 8, -64, 1)
    assert ref.dtype == np.dtype(dtype).name
    assert ref.device == Device("cpu", 0)
    assert ref.owner is array

    gpu_array = cupy_array((2, 6, 4, 8), dtype, 3)[:, ::-2, 1:3].transpose(0, 2, 1, 3)
    ref = CUPY.ref(gpu_array, "q")
    assert ref.ptr == gpu_array.data.ptr
    assert (ref.shape, ref.strides, ref.dtype) == ((2, 2, 3, 8), (192, 8, -64, 1), np.dtype(dtype).name)
    assert ref.device == Device("cuda", 3)


def test_foreign_byte_order_is_another_dtype() -> None:
    assert NUMPY.dtype(np.zeros(1, ">f2" if np.little_endian else "<f2")) not in ("float16", "bfloat16")


def test_rows() -> None:
    base = np.zeros((2, 3, 4, 8), np.float16)
    assert NUMPY.has_contiguous_rows(base)
    assert NUMPY.has_contiguous_rows(base[:, ::-1])
    assert NUMPY.has_contiguous_rows(base[..., :1])
    assert NUMPY.has_contiguous_rows(base[..., ::5][..., :1])  # one element: its stride is junk
    assert NUMPY.has_contiguous_rows(base[:0, ..., ::2])
    assert not NUMPY.has_contiguous_rows(base[..., ::2])
    assert not NUMPY.has_contiguous_rows(base[..., ::-1])
    assert not NUMPY.has_contiguous_rows(base.transpose(0, 1, 3, 2))
    field = np.zeros((2, 3, 4, 2), np.dtype([("x", np.float16), ("y", np.uint8)]))["x"]
    assert not NUMPY.is_strided_by_element(field)
    assert NUMPY.is_strided_by_element(base[::-1, ::2])


def test_signature_of_cupy_arrays() -> None:
    def key(array: object) -> object:
        return CUPY.signature((array, None))[0]

    q = cupy_array((2, 3, 4, 8), np.float16)
    signature, pointers = CUPY.signature((q, None))
    assert pointers == [q.data.ptr, 0]
    assert hash(signature) is not None
    assert key(q) == key(cupy_array((2, 3, 4, 8), np.float16))
    different = [
        cupy_array((2, 3, 4, 8), ml_dtypes.bfloat16),
        cupy_array((2, 3, 4, 8), np.uint16),
        cupy_array((2, 3, 4, 8), np.float16, 1),
        cupy_array((2, 3, 4, 8), np.float16, offset=2),
        cupy_array((2, 3, 4, 8), np.float16, offset=8),
        cupy_array((2, 3, 8, 4), np.float16),
        cupy_array((2, 6, 4, 8), np.float16)[:, ::2],
        cupy_array((2, 3, 4, 8), np.float16)[:, ::-1],
    ]
    assert len({key(array) for array in (q, *different)}) == 1 + len(different)


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint16, ml_dtypes.bfloat16])
def test_reads_capsules(versioned: bool, dtype: type) -> None:
    array = np.zeros((2, 6, 4, 8), dtype)[:, ::-2]
    producer = Producer(array, versioned=versioned, readonly=versioned, byte_offset=64)
    read = dlpack.read(producer.__dlpack__())
    assert read.ptr == array.__array_interface__["data"][0]
    assert read.shape == array.shape
    assert read.strides == tuple(s // array.itemsize for s in array.strides)
    assert (read.dtype, read.itemsize) == (np.dtype(dtype).name, np.dtype(dtype).itemsize)
    assert read.device == (dlpack.CPU, 0)
    assert read.readonly == versioned
    assert not producer.released
    del read
    gc.collect()
    assert producer.released


def test_null_strides_mean_contiguous() -> None:
    array = np.zeros((2, 3, 4), np.float16)
    assert dlpack.read(Producer(array, null_strides=True).__dlpack__()).strides == (12, 4, 1)


def test_real_capsules() -> None:
    array = np.zeros((2, 3), np.float32)
    assert dlpack.read(array.__dlpack__()).ptr == array.ctypes.data
    versioned = dlpack.read(array.__dlpack__(max_version=(1, 0)))
    assert (versioned.ptr, versioned.dtype) == (array.ctypes.data, "float32")


def test_not_a_capsule() -> None:
    array = np.zeros((2, 3), np.float32)
    used = array.__dlpack__()
    np.from_dlpack(_Once(used))
    for capsule in (used, None, "capsule"):
        with pytest.raises(fa2cupy.InvalidType, match="unconsumed DLPack capsule"):
            dlpack.read(capsule)


class _Once:
    def __init__(self, capsule: object) -> None:
        self.capsule = capsule

    def __dlpack__(self, **_: object) -> object:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint16, ml_dtypes.bfloat16])
def test_producers_on_the_cpu_become_numpy(dtype: type) -> None:
    base = np.arange(2 * 6 * 4 * 8).reshape(2, 6, 4, 8).astype(dtype)
    producer = Producer(base[:, ::-2, 1:].transpose(0, 2, 1, 3))
    array = from_producer(producer, "q")
    assert type(array) is np.ndarray
    assert array.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(array, producer.array)
    assert np.shares_memory(array, base)
    view = array[:1]
    del array
    gc.collect()
    assert not producer.released
    del view
    gc.collect()
    assert producer.released


def test_readonly_and_empty_producers() -> None:
    array = from_producer(Producer(np.zeros((2, 3)), versioned=True, readonly=True), "q")
    assert not array.flags.writeable
    assert from_producer(Producer(np.zeros((2, 0, 3), np.float16)), "q").shape == (2, 0, 3)


def test_empty_producers_on_a_gpu(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda device=-1: type("Stream", (), {"ptr": 0}))
    array = from_producer(Producer(np.zeros((2, 0, 3), np.float16), device=(dlpack.CUDA, 1)), "q")
    assert (array.shape, array.data.device_id) == ((2, 0, 3), 1)


@pytest.mark.parametrize(("current", "asked_for"), [(0, 1), (2, 2), (0x7F0012345678, 0x7F0012345678)])
def test_producers_on_a_gpu_become_cupy(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, current: int, asked_for: int
) -> None:
    import cupy

    class Stream:
        ptr = current

    asked = []
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda device=-1: asked.append(device) or Stream)
    base = np.arange(2 * 6 * 4 * 8).reshape(2, 6, 4, 8).astype(ml_dtypes.bfloat16)
    producer = Producer(base[:, ::-2], device=(dlpack.CUDA, 1))
    array = from_producer(producer, "q")
    assert framework_of(array) is CUPY
    assert (producer.streams, asked) == ([asked_for], [1])
    assert array.data.device_id == 1
    np.testing.assert_array_equal(host_view(array), producer.array)
    assert not producer.released
    del array
    gc.collect()
    assert producer.released
