"""Arrays in, results out: what fa2cupy knows about CuPy, PyTorch, JAX, NumPy and `__dlpack__` producers.

A framework is found by the module name of the array's type and is never imported here: an array of it cannot exist
before its user has imported it. `Framework` is the interface, `GpuFramework` the larger one of those whose memory and
streams we use ourselves; JAX's, whose outputs are XLA's, is in `jax_arrays.py`.
"""

from __future__ import annotations

import functools
import operator
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from fa2cupy.errors import InvalidArgument, InvalidType, UnsupportedDevice
from fa2cupy.overlap import Extent

__all__ = [
    "CUPY",
    "ITEMSIZE",
    "NUMPY",
    "TORCH",
    "WORKSPACE_ALIGNMENT",
    "Device",
    "Framework",
    "GpuFramework",
    "TensorRef",
    "contiguous_strides",
    "describe",
    "framework_of",
]

# A workspace is one block, this aligned (bytes). CuPy's and torch's allocators align to 512.
WORKSPACE_ALIGNMENT = 256

ITEMSIZE = {"float16": 2, "bfloat16": 2, "uint16": 2, "float32": 4, "float64": 8}


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


def describe(array: object) -> str:
    """The type of an argument as an error message names it: 'torch.Tensor', 'list'."""
    kind = type(array)
    module = kind.__module__
    return (
        kind.__qualname__ if module in ("builtins", "__main__") else f"{module.partition('.')[0]}.{kind.__qualname__}"
    )


class Framework(ABC):
    """What one array library does differently. `name` is how an error message calls it."""

    name: str

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
    def is_capturing(self, stream: int, device_index: int) -> bool:
        """Whether `stream`, the current one of the device, is being captured into a CUDA graph."""

    @property
    @abstractmethod
    def address(self) -> Callable[[Any], int]:
        """`pointer`, for an array that was just allocated."""

    @abstractmethod
    def allocator(self, shape: tuple[int, ...], dtype: str, like: Any) -> Callable[[], Any]:
        """A function that returns a new C-contiguous array on the device of `like`, which it does not keep."""

    def scratch(self, size: int, like: Any) -> tuple[Callable[[], Any], Callable[[Any], int]]:
        """What allocates `size` bytes on the device of `like`, as any object with memory; what takes its pointer."""
        return self.allocator((size,), "uint8", like), self.address

    @abstractmethod
    def stream(self, device_index: int) -> Callable[[int], int]:
        """A function of the device index that returns the handle of its current stream."""


class _Numpy(Framework):
    name = "NumPy"

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

    def from_numpy(self, array: np.ndarray, dtype: str, like: np.ndarray) -> np.ndarray:
        return array.view(like.dtype) if dtype == "bfloat16" else array


class _Cupy(_Numpy, GpuFramework):
    """CuPy arrays: dtypes and strides are NumPy's, memory and streams are CUDA's."""

    name = "CuPy"
    allocates_in_capture = False

    def check(self, array: Any, argument: str) -> None:
        if not hasattr(array, "data") or not hasattr(array, "strides"):  # cupyx.scipy.sparse and the like
            raise InvalidType(f"{argument} is a {describe(array)}: a cupy.ndarray is needed")

    def device(self, array: Any, argument: str) -> Device:
        return Device("cuda", array.data.device_id)

    def pointer(self, array: Any, argument: str) -> int:
        return int(array.data.ptr)

    def readonly(self, array: Any) -> bool:
        return False

    def contiguous(self, array: Any) -> Any:
        return array.copy(order="C")

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
                key.append((type(array), array.shape, array.strides, array.dtype, memory.device_id, pointer & 15))
                pointers.append(pointer)
        return tuple(key), pointers

    @property
    def address(self) -> Callable[[Any], int]:
        return operator.attrgetter("data.ptr")

    def is_capturing(self, stream: int, device_index: int) -> bool:
        # The legacy default stream cannot be captured, and asking about it while another stream is would be an error.
        return stream not in (0, 1) and bool(sys.modules["cupy"].cuda.runtime.streamIsCapturing(stream))

    def allocator(self, shape: tuple[int, ...], dtype: str, like: Any) -> Callable[[], Any]:
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


class _Torch(GpuFramework):
    name = "PyTorch"

    def check(self, array: Any, argument: str) -> None:
        torch = sys.modules["torch"]
        kind = type(array)
        if any(base.__name__ == "FakeTensor" for base in kind.__mro__):
            raise InvalidType(
                f"{argument} is a FakeTensor: fa2cupy cannot be traced by torch.compile; "
                "call it outside the compiled function, or through torch.compiler.disable"
            )
        if kind.__torch_dispatch__ not in (
            torch.Tensor.__torch_dispatch__,
            torch._C._disabled_torch_dispatch_impl,
        ):
            raise InvalidType(
                f"{argument} is a {describe(array)}, a wrapper without memory of its own: pass a torch.Tensor"
            )
        if array.is_nested:
            raise InvalidType(f"{argument} is a nested tensor: pass a torch.Tensor with one length")
        if array.layout is not torch.strided:
            raise InvalidType(f"{argument} has layout {array.layout}: only torch.strided is supported")
        if array.is_neg():  # float16 parts of a conjugated complex tensor: the sign is not in memory yet
            raise InvalidType(f"{argument} is a lazily negated view: pass {argument}.resolve_neg()")
        self.pointer(array, argument)

    def device(self, array: Any, argument: str) -> Device:
        kind = array.device.type
        if kind == "cpu":
            return Device("cpu", 0)
        if kind == "cuda":
            return Device("cuda", array.get_device())
        raise UnsupportedDevice(f"{argument} is on device {array.device}: 'cuda' and 'cpu' are supported")

    def dtype(self, array: Any) -> str:
        return str(array.dtype).removeprefix("torch.")

    def byte_strides(self, array: Any) -> tuple[int, ...]:
        itemsize = array.element_size()
        return tuple(stride * itemsize for stride in array.stride())

    def itemsize(self, array: Any) -> int:
        return int(array.element_size())

    def pointer(self, array: Any, argument: str) -> int:
        try:
            return int(array.data_ptr())
        except RuntimeError as error:  # torch.func wrappers, functional tensors
            raise InvalidType(
                f"{argument} is a {describe(array)} without memory of its own (inside torch.func or torch.compile?): "
                f"pass a plain torch.Tensor"
            ) from error

    def contiguous(self, array: Any) -> Any:
        torch = sys.modules["torch"]
        return array.detach().clone(memory_format=torch.contiguous_format)

    def signature(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], list[int]]:
        key: list[Any] = []
        pointers = []
        for array in arrays:
            if array is None:
                key.append(None)
                pointers.append(0)
            else:
                pointer = array.data_ptr()
                # Strides that follow from the shape are not asked for: a bool is cheaper to make, hash and compare.
                strides = array.is_contiguous() or array.stride()
                key.append((type(array), array.shape, strides, array.dtype, array.get_device(), pointer & 15))
                pointers.append(pointer)
        return tuple(key), pointers

    @functools.cached_property
    def _autograd(self) -> tuple[Callable[[], bool], Any]:
        torch = sys.modules["torch"]
        return torch.is_grad_enabled, torch.autograd.forward_ad

    def check_call(self, arrays: Sequence[Any], function: str, names: Callable[[], tuple[str, ...]]) -> None:
        is_grad_enabled, forward_ad = self._autograd
        if is_grad_enabled():
            for i, array in enumerate(arrays):
                if array is not None and array.requires_grad:
                    raise InvalidArgument(
                        f"{names()[i]} requires grad, but autograd does not see fa2cupy.{function}: use "
                        "torch.no_grad() or .detach(), and fa2cupy.attention_backward for gradients"
                    )
        if forward_ad._current_level >= 0:
            for i, array in enumerate(arrays):
                if array is not None and forward_ad.unpack_dual(array).tangent is not None:
                    raise InvalidArgument(
                        f"{names()[i]} has a tangent, but forward-mode autograd does not see fa2cupy.{function}: "
                        "pass its primal"
                    )

    def written(self, array: Any) -> None:
        # As torch's own out= does: autograd then notices that a tensor it saved has changed.
        if not array.is_inference():
            sys.modules["torch"].autograd.graph.increment_version(array)

    @property
    def address(self) -> Callable[[Any], int]:
        return cast("Callable[[Any], int]", sys.modules["torch"].Tensor.data_ptr)

    def is_capturing(self, stream: int, device_index: int) -> bool:
        torch = sys.modules["torch"]
        with torch.cuda.device(device_index):
            return bool(torch.cuda.is_current_stream_capturing())

    def allocator(self, shape: tuple[int, ...], dtype: str, like: Any) -> Callable[[], Any]:
        torch = sys.modules["torch"]
        # empty_like is twice as fast as empty or new_empty. What it copies is a tensor that gave its memory back.
        model = torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
        model.untyped_storage().resize_(0)
        return functools.partial(torch.empty_like, model)

    def stream(self, device_index: int) -> Callable[[int], int]:
        torch = sys.modules["torch"]
        raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
        return raw_stream or (lambda index: torch.cuda.current_stream(index).cuda_stream)

    def to_numpy(self, array: Any) -> np.ndarray:
        torch = sys.modules["torch"]
        array = array.detach()
        if array.dtype is torch.bfloat16:
            return cast("np.ndarray", array.view(torch.int16).numpy().view(np.uint16))
        return cast("np.ndarray", array.numpy())

    def from_numpy(self, array: np.ndarray, dtype: str, like: Any) -> Any:
        torch = sys.modules["torch"]
        if dtype == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(like.dtype)
        return torch.from_numpy(array)


NUMPY = _Numpy()
CUPY = _Cupy()
TORCH = _Torch()


def framework_of(array: object) -> Framework | None:
    """The framework whose array this is; None for `__dlpack__` producers of other libraries and everything else."""
    if isinstance(array, np.ndarray):
        return NUMPY
    for base in type(array).__mro__:
        root = base.__module__.partition(".")[0]
        if root == "torch" and base.__name__ == "Tensor":
            return TORCH
        if root == "cupy" and base.__name__ == "ndarray":
            return CUPY
        if root in ("jax", "jaxlib") and base.__name__ in ("Array", "ArrayImpl", "Tracer"):
            from fa2cupy.jax_arrays import JAX

            return JAX
    return None
