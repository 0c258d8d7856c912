"""Runs under the address and undefined-behaviour sanitizers: a process of their own, started with libasan."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.host import build

ROOT = Path(__file__).resolve().parent.parent.parent


@functools.cache
def _libasan() -> str:
    asked = [build.CXX, "-print-file-name=libasan.so"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


def python(*args: str) -> subprocess.CompletedProcess[str]:
    """This interpreter, with the sanitizers watching every library that tests.host compiles."""
    environment = {
        **os.environ,
        "FA2_HOST_SANITIZE": "1",
        "LD_PRELOAD": _libasan(),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=77",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=environment, capture_output=True, text=True)


def pytest(*args: str) -> subprocess.CompletedProcess[str]:
    """Tests, as `python` runs them."""
    return python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *args)


class _Memory:
    """Bytes from malloc, exactly as many as asked for: the sanitizer knows where they end."""

    def __init__(self, nbytes: int) -> None:
        self._libc = ctypes.CDLL(None)
        self._libc.malloc.restype, self._libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
        self._libc.free.argtypes = (ctypes.c_void_p,)
        self.address = self._libc.malloc(nbytes)
        self.__array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}

    def __del__(self) -> None:
        self._libc.free(self.address)


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array in memory of its own that malloc gave, to the byte."""
    dtype = np.dtype(dtype)
    nbytes = dtype.itemsize * int(np.prod(shape))
    return np.asarray(_Memory(nbytes)).view(dtype).reshape(shape)
