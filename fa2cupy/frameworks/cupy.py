"""CuPy arrays: always on a GPU, allocated from CuPy's pool."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.frameworks.base import Device, GpuFramework, describe
from fa2cupy.frameworks.dlpack import ReadOnly
from fa2cupy.frameworks.numpy import Numpy

__all__ = ["CUPY"]


class _Cupy(Numpy, GpuFramework):
    """CuPy arrays: dtypes and strides are NumPy's, memory and streams are CUDA's."""

    name = "CuPy"
    namespace = "cupy"
    allocates_in_capture = False

    def check(self, array: Any, argument: str) -> None:
        if not hasattr(array, "data") or not hasattr(array, "strides"):  # cupyx.scipy.sparse and the like
            raise InvalidType(f"{argument} is a {describe(array)}: a cupy.ndarray is needed")
        if array.size and not array.data.ptr:
            raise InvalidArgument(f"{argument} has no memory: its pointer is null")

    def device(self, array: Any, argument: str) -> Device:
        return Device("cuda", array.data.device_id)

    def pointer(self, array: Any, argument: str) -> int:
        return int(array.data.ptr)

    def readonly(self, array: Any) -> bool:
        return isinstance(getattr(array.data.mem, "_owner", None), ReadOnly)

    def contiguous(self, array: Any) -> Any:
        return array.copy(order="C")

    def as_int32(self, array: Any) -> Any:
        return array.clip(-(2**31), 2**31 - 1).astype(np.int32, order="C")

    def signature(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], list[int]]:
        key: list[Any] = []
        pointers = []
        for array in arrays:
            if array is None:
                key.append(None)
                pointers.append(0)
            else:
                memory = array.data
                pointer = memory.ptr
                if not pointer and array.size:
                    raise InvalidArgument("no memory")  # the first call's checks say whose
                key.append((type(array), array.shape, array.strides, array.dtype, memory.device_id, pointer & 15))
                pointers.append(pointer)
        return tuple(key), pointers

    def seed(self, numbers: tuple[int, int], like: Any) -> Any:
        """Without a copy from the host, which might wait."""
        from fa2cupy.jit import driver

        index = like.data.device_id
        with driver.device_guard(index):
            if self.is_capturing(self.stream(index)(index), index):
                raise InvalidArgument(
                    f"dropout_seed={numbers} becomes an array, which CuPy cannot allocate inside a CUDA graph "
                    "capture: pass an array, int64 (2,)"
                )
            array = self.allocator((2,), "int64", like)()
            for place, number in enumerate(numbers):
                array[place : place + 1].fill(number)
        return array

    def to_host(self, array: Any) -> np.ndarray:
        return cast("np.ndarray", array.get())

    def from_host(self, array: np.ndarray, like: Any) -> Any:
        with like.device:
            return sys.modules["cupy"].asarray(array)

    @property
    def address(self) -> Callable[[Any], int]:
        return operator.attrgetter("data.ptr")

    def is_capturing(self, stream: int, device_index: int) -> bool:
        # The legacy default stream cannot be captured, and asking about it while another stream is would be an error.
        return stream not in (0, 1) and bool(sys.modules["cupy"].cuda.runtime.streamIsCapturing(stream))

    def allocator(self, shape: tuple[int, ...], dtype: str, like: Any, swapped: bool = False) -> Callable[[], Any]:
        assert not swapped
        numpy_dtype = like.dtype if self.dtype(like) == dtype else np.dtype(dtype)
        return functools.partial(sys.modules["cupy"].ndarray, shape, numpy_dtype)

    def scratch(self, size: int, like: Any) -> tuple[Callable[[], Any], Callable[[Any], int]]:
        # An ndarray around the memory would take longer to make than the memory.
        return functools.partial(sys.modules["cupy"].cuda.alloc, size), operator.attrgetter("ptr")

    def stream(self, device_index: int) -> Callable[[int], int]:
        get_current_stream = sys.modules["cupy"].cuda.get_current_stream
        return lambda index: get_current_stream(index).ptr

    def to_numpy(self, array: Any) -> np.ndarray:
        raise TypeError("CuPy arrays are never on the CPU")


CUPY = _Cupy()
