"""A fake CUDA driver (fake_libcuda.c, compiled here) behind fa2cupy.jit.driver, for tests without a GPU."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fa2cupy.jit import driver


class Launch(ctypes.Structure):
    """One recorded launch; the C side has the same struct."""

    _fields_ = (
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("context", ctypes.c_uint64),
        ("extra", ctypes.c_uint64),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_mem_bytes", ctypes.c_uint),
        ("num_attrs", ctypes.c_uint),
        ("attr_id", ctypes.c_uint),
        ("attr_value", ctypes.c_int),
        ("params", ctypes.c_ubyte * 1024),
    )


class Load(ctypes.Structure):
    """One recorded module: the context that it was loaded in, how its image starts, the function that was asked for."""

    _fields_ = (("context", ctypes.c_uint64), ("image", ctypes.c_ubyte * 16), ("function", ctypes.c_char * 64))


class FakeMap(ctypes.Structure):
    """What the fake driver writes as a tensor map: the arguments that it was given, and how many maps came before."""

    _fields_ = (
        ("address", ctypes.c_uint64),
        ("all_dims", ctypes.c_uint64 * 5),
        ("all_strides", ctypes.c_uint64 * 4),
        ("all_box", ctypes.c_uint32 * 5),
        ("data_type", ctypes.c_int),
        ("swizzle", ctypes.c_int),
        ("l2_promotion", ctypes.c_int),
        ("number", ctypes.c_int),
        ("padding", ctypes.c_ubyte * 12),
    )

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(n for n in self.all_dims if n)  # as many as the rank

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(self.all_strides[: len(self.dims) - 1])

    @property
    def box(self) -> tuple[int, ...]:
        return tuple(self.all_box[: len(self.dims)])


class FakeDriver:
    """The library and its controls: `fake["launch_status"] = 700`, `fake.launches`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.library = ctypes.CDLL(path)
        self.library.fake_reset()

    def __getitem__(self, name: str) -> int:
        return ctypes.c_int.in_dll(self.library, f"fake_{name}").value

    def __setitem__(self, name: str, value: int) -> None:
        ctypes.c_int.in_dll(self.library, f"fake_{name}").value = value

    def set_compute_capability(self, device: int, cc: tuple[int, int]) -> None:
        (ctypes.c_int * 2 * 4).in_dll(self.library, "fake_cc")[device][:] = cc

    @property
    def last_attribute(self) -> tuple[int, int]:
        return tuple((ctypes.c_int * 2).in_dll(self.library, "fake_last_attribute"))  # type: ignore[return-value]

    @property
    def launches(self) -> list[Launch]:
        return list((Launch * 4096).in_dll(self.library, "fake_launches")[: self["launch_count"]])

    @property
    def loads(self) -> list[Load]:
        return list((Load * 64).in_dll(self.library, "fake_loads")[: self["load_count"]])


@functools.cache
def _library() -> str:
    directory = Path(tempfile.mkdtemp(prefix="fa2cupy-fake-driver-"))
    path = directory / "libcuda.so.1"
    source = Path(__file__).with_name("fake_libcuda.c")
    compiler = os.environ.get("CC", "gcc")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-pthread", "-o", str(path), str(source)], check=True)
    return str(path)


def forget_driver() -> None:
    """Let the next use look for the driver again."""
    driver._driver.cache_clear()
    driver.device_info.cache_clear()


@contextmanager
def fake_driver(monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator[Any]:
    """Replace the driver by the fake one, or by libraries of other names."""
    fake = FakeDriver(_library())
    monkeypatch.setattr(driver, "_library_names", lambda: names or (fake.path,))
    forget_driver()
    yield fake
    forget_driver()
