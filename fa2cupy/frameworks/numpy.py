"""NumPy arrays: always on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from fa2cupy.errors import InvalidType
from fa2cupy.frameworks.base import Device, Framework

__all__ = ["NUMPY", "Numpy"]


class Numpy(Framework):
    name = "NumPy"
    namespace = "numpy"

    def check(self, array: np.ndarray, argument: str) -> None:
        if isinstance(array, np.ma.MaskedArray):
            raise InvalidType(f"{argument} is a masked array, whose mask would be ignored: pass {argument}.data")

    def device(self, array: np.ndarray, argument: str) -> Device:
        return Device("cpu", 0)

    def dtype(self, array: Any) -> str:
        return str(array.dtype.name if array.dtype.isnative else array.dtype.str)

    def byte_strides(self, array: Any) -> tuple[int, ...]:
        return tuple(array.strides)

    def itemsize(self, array: Any) -> int:
        return int(array.dtype.itemsize)

    def pointer(self, array: np.ndarray, argument: str) -> int:
        return array.ctypes.data

    def readonly(self, array: np.ndarray) -> bool:
        return not array.flags.writeable

    def to_numpy(self, array: np.ndarray) -> np.ndarray:
        return array.view(np.ndarray)

    def seed(self, numbers: tuple[int, int], like: Any) -> Any:
        return np.array(numbers, np.int64)

    def to_host(self, array: Any) -> np.ndarray:
        return np.array(array)

    def from_host(self, array: np.ndarray, like: Any) -> Any:
        return array

    def from_numpy(self, array: np.ndarray, dtype: str, like: np.ndarray) -> np.ndarray:
        return array.view(like.dtype) if dtype == "bfloat16" else array


NUMPY = Numpy()
