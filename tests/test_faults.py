"""Faults that users met, each with the right outcome; tests/frameworks has those of torch and JAX arrays."""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fa2cupy
from fa2cupy import __main__, locks
from fa2cupy.cli import backends, demo
from fa2cupy.errors import InvalidArgument, InvalidType, LaunchError
from fa2cupy.frameworks import CUPY
from fa2cupy.jit import Source, driver
from fa2cupy.jit.cache import open_cache
from fa2cupy.prepared import PREPARED
from tests import dlpack_producer
from tests.dlpack_producer import Producer
from tests.fake_driver import FakeDriver, fake_driver
from tests.fake_gpu import FakeGpu, cupy_array, to_cupy

kernel_module = sys.modules["fa2cupy.jit.kernel"]
SHAPE = (2, 5, 4, 16)
ROOT = Path(__file__).parent.parent


# ----------------------------------------------------------------------------------------------------------------------
# Arrays


@pytest.mark.parametrize("prepared", [False, True])
def test_fault_cupy_array_without_memory(gpu: FakeGpu, prepared: bool) -> None:
    import cupy

    x = {name: cupy_array(SHAPE, np.float16) for name in ("q", "k", "v", "out")}
    null = cupy.ndarray(SHAPE, np.float16, cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(0, 1280, None, 0), 0))
    gpu.compute = False
    for name in x:
        PREPARED.clear()
        if prepared:
            fa2cupy.attention(**x)
        launches = len(gpu.launches)
        with pytest.raises(InvalidArgument, match=f"^{name} has no memory: its pointer is null"):
            fa2cupy.attention(**{**x, name: null})
        assert len(gpu.launches) == launches
    empty = cupy_array((2, 0, 4, 16), np.float16)
    for _ in range(2):
        fa2cupy.attention(empty, x["k"], x["k"])


class ReadOnlyProducer(Producer):
    """Refuses, as NumPy and JAX do, to export read-only memory to who cannot be told that it is."""

    asked: Any = ()

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None) -> Any:
        self.asked = max_version
        if max_version is None:
            raise BufferError("cannot export a readonly array")
        return super().__dlpack__(stream)


def read_only(array: np.ndarray, device: tuple[int, int]) -> ReadOnlyProducer:
    return ReadOnlyProducer(array, device=device, versioned=True, readonly=True)


def test_fault_read_only_producers_on_the_cpu() -> None:
    values = np.random.default_rng(0).standard_normal(SHAPE)
    producer = read_only(values, (1, 0))
    np.testing.assert_array_equal(fa2cupy.attention(producer, values, values), fa2cupy.attention(*[values] * 3))
    assert producer.asked == (1, 0)
    with pytest.raises(InvalidArgument, match="out is read-only: an output must be writable"):
        fa2cupy.attention(values, values, values, out=read_only(values.copy(), (1, 0)))
    values.flags.writeable = False
    assert fa2cupy.attention(values, values, values).shape == SHAPE


def test_fault_read_only_producers_on_a_gpu(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda index: type("Stream", (), {"ptr": 0}))
    gpu.compute = False
    device = (2, 0)
    memory = np.zeros(SHAPE, np.float16)
    q = to_cupy(memory)
    out = fa2cupy.attention(read_only(memory, device), q, q)
    assert type(out) is cupy.ndarray
    for _ in range(2):
        with pytest.raises(InvalidArgument, match="out is read-only"):
            fa2cupy.attention(q, q, q, out=read_only(memory, device))
        fa2cupy.attention(q, q, q, out=to_cupy(memory))  # the second time there is a prepared call
    assert not CUPY.readonly(q) and CUPY.readonly(gpu_array := _import(read_only(memory, device))[1:])
    assert gpu_array.shape == (1, *SHAPE[1:])


def _import(producer: Producer) -> Any:
    from fa2cupy.frameworks.dlpack import from_producer

    return from_producer(producer, "q")


def test_fault_producer_from_before_versions() -> None:
    values = np.random.default_rng(0).standard_normal(SHAPE)
    producer = Producer(values)  # its __dlpack__ has no max_version
    np.testing.assert_array_equal(fa2cupy.attention(producer, values, values), fa2cupy.attention(*[values] * 3))

    class Broken(Producer):
        def __dlpack__(self, **_: Any) -> Any:
            raise TypeError("it is broken")

    with pytest.raises(InvalidArgument, match=r"k: its __dlpack__ failed with TypeError: it is broken"):
        fa2cupy.attention(values, Broken(values), values)


def test_fault_producer_without_memory() -> None:
    class Null(Producer):
        def __dlpack__(self, stream: Any = None) -> Any:
            capsule = super().__dlpack__(stream)
            managed = dlpack_producer._alive[self.tickets[-1]][1]
            managed.dl_tensor.data = None
            return capsule

    values = np.zeros(SHAPE)
    with pytest.raises(InvalidArgument, match="v has no memory: the pointer in its DLPack capsule is null"):
        fa2cupy.attention(values, values, Null(values))
    assert fa2cupy.attention(values, values[:, :0], Null(values[:, :0])).shape == SHAPE
