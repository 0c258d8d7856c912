"""A library of its own as far as fa2cupy can tell: an object with `__dlpack__` and nothing else."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import numpy as np

from fa2cupy.frameworks import dlpack

_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_CAPSULE_DESTRUCTOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
# A prototype of our own: what ctypes.pythonapi's function takes is shared by the process, and JAX sets it otherwise.
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)

_CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "complex": 5, "bool": 6}
_alive: dict[int, Any] = {}  # what a capsule points at
_tickets = itertools.count()


class Producer:
    """`array` through DLPack only. `dtype` overrides the name of its dtype; `null_strides` stand for contiguous."""

    def __init__(
        self,
        array: np.ndarray,
        *,
        dtype: str = "",
        device: tuple[int, int] = (dlpack.CPU, 0),
        versioned: bool = False,
        readonly: bool = False,
        null_strides: bool = False,
        byte_offset: int = 0,
    ) -> None:
        self.array, self.device = array, device
        self.dtype = dtype or array.dtype.name
        self.versioned, self.readonly = versioned, readonly
        self.null_strides, self.byte_offset = null_strides, byte_offset
        self.streams: list[Any] = []
        self.tickets: list[int] = []

    @property
    def released(self) -> bool:
        """Whether nobody holds a capsule any more."""
        return not any(ticket in _alive for ticket in self.tickets)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, stream: Any = None) -> Any:
        self.streams.append(stream)
        array, ndim = self.array, self.array.ndim
        managed = dlpack._DLManagedTensorVersioned() if self.versioned else dlpack._DLManagedTensor()
        if self.versioned:
            managed.major, managed.minor, managed.flags = 1, 1, int(self.readonly)
        tensor = managed.dl_tensor
        shape = (ctypes.c_int64 * max(1, ndim))(*array.shape)
        strides = (ctypes.c_int64 * max(1, ndim))(*(s // array.itemsize for s in array.strides))
        tensor.data = array.ctypes.data - self.byte_offset
        tensor.byte_offset = self.byte_offset
        tensor.device_type, tensor.device_id = self.device
        tensor.ndim, tensor.shape = ndim, shape
        if not self.null_strides:
            tensor.strides = strides
        kind = self.dtype.rstrip("0123456789")
        tensor.type_code = _CODES.get(kind, 17)
        tensor.type_bits, tensor.type_lanes = array.itemsize * 8, 1
        ticket = next(_tickets)

        def release(_: Any) -> None:
            _alive.pop(ticket, None)

        destructor = _CAPSULE_DESTRUCTOR(release)
        name = b"dltensor_versioned" if self.versioned else b"dltensor"
        _alive[ticket] = (array, managed, shape, strides, name)
        # The callback object must outlive its own call: never freed, this is a test.
        _forever.append((destructor, name))
        self.tickets.append(ticket)
        return _new_capsule(ctypes.addressof(managed), name, ctypes.cast(destructor, ctypes.c_void_p))


_forever: list[Any] = []
