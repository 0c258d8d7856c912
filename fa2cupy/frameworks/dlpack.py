"""DLPack: read a capsule with ctypes (pointer, shape, strides, dtype, device); arrays over other libraries' memory.

NumPy cannot import bfloat16 through DLPack and CuPy needs ml_dtypes for it; attention only needs the numbers. The
capsule is read and kept, not consumed: its own destructor gives the memory back to the producer when it is freed.
Layout: https://dmlc.github.io/dlpack/latest/c_api.html (both the versioned and the unversioned struct).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from fa2cupy.errors import InvalidArgument, InvalidType, MissingDependency, UnsupportedDevice
from fa2cupy.frameworks.overlap import Extent

__all__ = ["CPU", "CUDA", "CUDA_HOST", "CUDA_MANAGED", "DLPackView", "ReadOnly", "from_producer", "read"]

# DLDeviceType
CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13

_DTYPE_NAMES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
_READ_ONLY = 1  # bit of DLManagedTensorVersioned.flags
_VERSION = (1, 0)  # asked for: without it a producer cannot say that its memory is read-only, and must refuse
_MAJOR_VERSION = 1  # of the versioned struct that this module knows


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("type_bits", ctypes.c_uint8),
        ("type_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _DLManagedTensor(ctypes.Structure):
    _fields_ = [("dl_tensor", _DLTensor), ("manager_ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class _DLManagedTensorVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("dl_tensor", _DLTensor),
    ]


# Prototypes of our own: what ctypes.pythonapi's functions take is shared by all of the process.
_capsule_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


@dataclass(frozen=True, slots=True)
class DLPackView:
    """What a capsule says. `strides` in elements; `device` is (DLDeviceType, index); `owner` keeps the memory alive."""

    ptr: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    itemsize: int
    device: tuple[int, int]
    readonly: bool
    owner: object


@dataclass(frozen=True, slots=True)
class ReadOnly:
    """Owner of memory that must not be written, where its array cannot say so (CuPy's)."""

    owner: object


def read(capsule: object) -> DLPackView:
    """The contents of a DLPack capsule that nobody has consumed yet. InvalidType for anything else."""
    if _capsule_is_valid(capsule, b"dltensor_versioned"):
        address = _capsule_pointer(capsule, b"dltensor_versioned")
        versioned = _DLManagedTensorVersioned.from_address(address)
        if versioned.major > _MAJOR_VERSION:
            raise InvalidType(
                f"DLPack {versioned.major}.{versioned.minor} is not supported: at most {_MAJOR_VERSION}.x"
            )
        tensor, readonly = versioned.dl_tensor, bool(versioned.flags & _READ_ONLY)
    elif _capsule_is_valid(capsule, b"dltensor"):
        address = _capsule_pointer(capsule, b"dltensor")
        tensor, readonly = _DLManagedTensor.from_address(address).dl_tensor, False
    else:
        raise InvalidType("not an unconsumed DLPack capsule: __dlpack__() must return a new one at each call")
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    if tensor.strides:
        strides = tuple(tensor.strides[i] for i in range(tensor.ndim))
    else:  # NULL means C-contiguous
        strides, step = (), 1
        for size in reversed(shape):
            strides, step = (step, *strides), step * size
    bits = tensor.type_bits * tensor.type_lanes
    kind = _DTYPE_NAMES.get(tensor.type_code, f"type{tensor.type_code}_")
    dtype = "bool" if kind == "bool" else f"{kind}{tensor.type_bits}"
    if tensor.type_lanes != 1:
        dtype += f"x{tensor.type_lanes}"
    return DLPackView(
        ptr=(tensor.data or 0) + tensor.byte_offset,
        shape=shape,
        strides=strides,
        dtype=dtype,
        itemsize=max(1, bits // 8),
        device=(tensor.device_type, tensor.device_id),
        readonly=readonly,
        owner=capsule,
    )


def _device_of(array: object, name: str) -> tuple[int, int]:
    """(DLDeviceType, index) of a `__dlpack__` producer, called `name` in errors."""
    try:
        kind, index = array.__dlpack_device__()  # type: ignore[attr-defined]
        return int(kind), int(index)
    except Exception as error:  # the producer's own code: anything can come out of it
        raise InvalidArgument(f"{name}: its __dlpack_device__ failed with {type(error).__name__}: {error}") from error


def from_producer(array: Any, argument: str) -> Any:
    """A CuPy (GPU) or NumPy (CPU) array over the memory of a `__dlpack__` producer.

    On a GPU the producer is asked to make its work visible to CuPy's current stream of that device.
    """
    kind, index = _device_of(array, argument)
    if kind in (CPU, CUDA_HOST):
        return _numpy_over(_capsule(array, argument, {}), argument)
    if kind in (CUDA, CUDA_MANAGED):
        from fa2cupy.jit import driver
        from fa2cupy.jit.cupy import require_cupy

        driver.device_info(index)  # no driver, no such device: said clearly before CuPy is asked
        try:
            cupy = require_cupy()
        except MissingDependency as error:
            raise MissingDependency(
                f"{argument} is on a GPU and has nothing but __dlpack__, for which CuPy is needed: {error}"
            ) from error
        stream = cupy.cuda.get_current_stream(index).ptr or 1  # 1: the legacy default stream, in DLPack's numbers
        return _cupy_over(cupy, _capsule(array, argument, {"stream": stream}), argument)
    raise UnsupportedDevice(f"{argument} is on DLPack device type {kind}: CUDA (2, 13) and CPU (1, 3) are supported")


def _capsule(array: Any, argument: str, keywords: dict[str, Any]) -> DLPackView:
    try:
        try:
            capsule = array.__dlpack__(**keywords, max_version=_VERSION)
        except TypeError:  # a producer from before DLPack 1.0
            capsule = array.__dlpack__(**keywords)
        return read(capsule)
    except InvalidType as error:
        raise InvalidType(f"{argument}: {error}") from error
    except Exception as error:  # the producer's own code: anything can come out of it
        raise InvalidArgument(f"{argument}: its __dlpack__ failed with {type(error).__name__}: {error}") from error


def _dtype_of(view: DLPackView, argument: str) -> np.dtype:
    if view.dtype == "bfloat16":
        try:
            import ml_dtypes
        except ImportError as error:
            raise MissingDependency(
                f"{argument} is bfloat16 from DLPack, which needs: pip install ml_dtypes"
            ) from error
        return cast("np.dtype", np.dtype(ml_dtypes.bfloat16))
    try:
        return np.dtype(view.dtype)
    except TypeError as error:
        raise InvalidType(f"{argument} has dtype {view.dtype}, which is not supported") from error


def _placement(view: DLPackView, argument: str) -> tuple[np.dtype, tuple[int, ...], Extent]:
    dtype = _dtype_of(view, argument)
    strides = tuple(stride * view.itemsize for stride in view.strides)
    extent = Extent.of(view.shape, strides, view.itemsize)
    if not view.ptr and not extent.empty:
        raise InvalidArgument(f"{argument} has no memory: the pointer in its DLPack capsule is null")
    return dtype, strides, extent


def _numpy_over(view: DLPackView, argument: str) -> np.ndarray:
    dtype, strides, extent = _placement(view, argument)
    if extent.empty:
        return np.empty(view.shape, dtype)
    memory: Any = (ctypes.c_char * (extent.high - extent.low)).from_address(view.ptr + extent.low)
    memory.owner = view.owner  # the array keeps the ctypes object, the ctypes object keeps the capsule
    array: np.ndarray = np.ndarray(view.shape, dtype, memory, -extent.low, strides)
    array.flags.writeable = not view.readonly
    return array


def _cupy_over(cupy: Any, view: DLPackView, argument: str) -> Any:
    dtype, strides, extent = _placement(view, argument)
    owner = ReadOnly(view.owner) if view.readonly else view.owner
    memory = cupy.cuda.UnownedMemory(view.ptr + extent.low, extent.high - extent.low, owner, view.device[1])
    return cupy.ndarray(view.shape, dtype, cupy.cuda.MemoryPointer(memory, -extent.low), strides)
