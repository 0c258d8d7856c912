"""An array as numbers, and the interface to an array library.

`Framework` is the interface, `GpuFramework` the larger one of those whose memory and streams we use ourselves: JAX's
outputs are XLA's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fa2cupy.frameworks.overlap import Extent

__all__ = [
    "ITEMSIZE",
    "WORKSPACE_ALIGNMENT",
    "Device",
    "Framework",
    "GpuFramework",
    "TensorRef",
    "contiguous_strides",
    "describe",
    "swap",
]

# A workspace is one block, this aligned (bytes). CuPy's and torch's allocators align to 512.
WORKSPACE_ALIGNMENT = 256

ITEMSIZE = {"float16": 2, "bfloat16": 2, "uint16": 2, "float32": 4, "float64": 8, "int32": 4, "int64": 8, "bool": 1}
ITEMSIZE |= {"uint32": 4, "uint64": 8}  # of a dropout_seed
ITEMSIZE |= {"uint8": 1, "int8": 1, "float8_e4m3fn": 1}  # of caches


@dataclass(frozen=True, slots=True)
class Device:
    """kind: 'cpu' or 'cuda'; index: the CUDA ordinal (0 on the CPU)."""

    kind: str
    index: int

    def __str__(self) -> str:
        return "the CPU" if self == Device("cpu", 0) else f"{self.kind}:{self.index}"


@dataclass(frozen=True, slots=True)
class TensorRef:
    """An array as numbers: strides in elements, dtype a name such as 'bfloat16'. `owner` keeps the memory alive."""

    ptr: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: Device
    owner: object


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a C-contiguous array."""
    strides, step = [0] * len(shape), 1
    for i in range(len(shape) - 1, -1, -1):
        strides[i] = step
        step *= max(1, shape[i])
    return tuple(strides)


def swap(lengths: Sequence[int]) -> tuple[int, ...]:
    """A shape, or strides, in the other layout."""
    first, second, third, fourth = lengths
    return first, third, second, fourth


def describe(array: object) -> str:
    """The type of an argument as an error message names it: 'torch.Tensor', 'list'."""
    kind = type(array)
    module = kind.__module__
    return (
        kind.__qualname__ if module in ("builtins", "__main__") else f"{module.partition('.')[0]}.{kind.__qualname__}"
    )


class Framework(ABC):
    """What one array library does differently. `name` is how an error message calls it, `namespace` the module with
    its functions of arrays.
    """

    name: str
    namespace: str

    @abstractmethod
    def check(self, array: Any, argument: str) -> None:
        """Raise for arrays of this library that cannot be used at all."""

    @abstractmethod
    def device(self, array: Any, argument: str) -> Device: ...

    @abstractmethod
    def dtype(self, array: Any) -> str:
        """Name of the dtype, whether attention supports it or not."""

    def shape(self, array: Any) -> tuple[int, ...]:
        return tuple(array.shape)

    @abstractmethod
    def byte_strides(self, array: Any) -> tuple[int, ...]: ...

    @abstractmethod
    def itemsize(self, array: Any) -> int: ...

    @abstractmethod
    def pointer(self, array: Any, argument: str) -> int: ...

    def readonly(self, array: Any) -> bool:
        return False

    def check_call(  # noqa: B027 - most have nothing to check
        self, arrays: Sequence[Any], function: str, names: Callable[[], tuple[str, ...]]
    ) -> None:
        """Raise for what can differ between two calls of one signature (autograd). `names`: those of `arrays`."""

    def written(self, array: Any) -> None:  # noqa: B027 - nor anybody to tell
        """Called for each of the caller's arrays that an operation writes."""

    @abstractmethod
    def to_numpy(self, array: Any) -> np.ndarray:
        """A NumPy view of an array on the CPU; bfloat16 may come as uint16."""

    @abstractmethod
    def from_numpy(self, array: np.ndarray, dtype: str, like: Any) -> Any:
        """Hand a result computed on the CPU back in kind; a bfloat16 `array` is uint16."""

    @abstractmethod
    def seed(self, numbers: tuple[int, int], like: Any) -> Any:
        """An array of these two numbers of 64 bits, for dropout_seed, on the device of `like`: int64 (2,), or of the
        same bytes.
        """

    @abstractmethod
    def to_host(self, array: Any) -> np.ndarray:
        """A copy in NumPy, after everything on the current stream."""

    @abstractmethod
    def from_host(self, array: np.ndarray, like: Any) -> Any:
        """The array on the device of `like`, which may be any array of this library."""

    def extent(self, array: Any) -> Extent:
        return Extent.of(self.shape(array), self.byte_strides(array), self.itemsize(array))

    def ref(self, array: Any, argument: str) -> TensorRef:
        """The array as numbers. Its strides must be multiples of the item size (`is_strided_by_element`)."""
        itemsize = self.itemsize(array)
        strides = tuple(stride // itemsize for stride in self.byte_strides(array))
        device = self.device(array, argument)
        return TensorRef(self.pointer(array, argument), self.shape(array), strides, self.dtype(array), device, array)

    def is_strided_by_element(self, array: Any) -> bool:
        """False for a view such as one field of a structured array."""
        itemsize = self.itemsize(array)
        return all(n < 2 or s % itemsize == 0 for n, s in zip(self.shape(array), self.byte_strides(array), strict=True))

    def has_contiguous_rows(self, array: Any) -> bool:
        """Whether neighbours along the last dimension are neighbours in memory."""
        shape = self.shape(array)
        return 0 in shape or shape[-1] < 2 or self.byte_strides(array)[-1] == self.itemsize(array)


class GpuFramework(Framework):
    """One whose memory and streams we use ourselves: CuPy and PyTorch. (JAX's are XLA's.)

    On the path of every call are `signature`, `check_call` and the functions that `address`, `allocator` and `stream`
    return, which are C functions where there are any; the rest serves the first call of a signature.
    """

    # Whether outputs may be allocated inside a capture: torch's allocator has pools for that, CuPy's has not.
    allocates_in_capture = True

    @abstractmethod
    def signature(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], list[int]]:
        """(all of the arrays that a prepared call depends on, as a hashable; their pointers). None gives (None, 0).

        Cheap, and unchecked: may raise anything for arrays that are not of this library.
        """

    @abstractmethod
    def contiguous(self, array: Any) -> Any:
        """A C-contiguous copy, queued on the current stream."""

    @abstractmethod
    def as_int32(self, array: Any) -> Any:
        """A C-contiguous copy of integers, queued on the current stream; those beyond int32 become its ends."""

    @abstractmethod
    def is_capturing(self, stream: int, device_index: int) -> bool:
        """Whether `stream`, the current one of the device, is being captured into a CUDA graph."""

    @property
    @abstractmethod
    def address(self) -> Callable[[Any], int]:
        """`pointer`, for an array that was just allocated."""

    @abstractmethod
    def allocator(self, shape: tuple[int, ...], dtype: str, like: Any, swapped: bool = False) -> Callable[[], Any]:
        """A function that returns a new C-contiguous array on the device of `like`, which it does not keep.

        swapped: C-contiguous in the other layout; torch alone is asked for it.
        """

    def scratch(self, size: int, like: Any) -> tuple[Callable[[], Any], Callable[[Any], int]]:
        """What allocates `size` bytes on the device of `like`, as any object with memory; what takes its pointer."""
        return self.allocator((size,), "uint8", like), self.address

    @abstractmethod
    def stream(self, device_index: int) -> Callable[[int], int]:
        """A function of the device index that returns the handle of its current stream."""
