"""What XLA hands to an FFI handler, read by ctypes; errors and metadata that go back.

Layout of the structs: xla/ffi/api/c_api.h, whose versions 0.1 on only append.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from fa2cupy.errors import Fa2Error, InvalidArgument, InvalidType, LaunchError

__all__ = ["Buffer", "Frame", "attribute_of", "device_ordinal", "handler", "stream_of"]

_Word = ctypes.c_uint64
_Words = ctypes.POINTER(ctypes.POINTER(_Word))


class Frame(ctypes.Structure):
    """XLA_FFI_CallFrame. What its pointers point to is read as words, which costs the least."""

    _fields_ = (
        ("size", _Word),
        ("extension", _Word),
        ("api", _Word),
        ("context", _Word),
        ("stage", _Word),
        *((name, _Word) for name in ("args_size", "args_extension", "num_args", "arg_types")),
        ("args", _Words),
        *((name, _Word) for name in ("rets_size", "rets_extension", "num_rets", "ret_types")),
        ("rets", _Words),
        *((name, _Word) for name in ("attrs_size", "attrs_extension", "num_attrs", "attr_types", "attr_names")),
        ("attrs", _Words),
    )


DATA = 3  # the word of an XLA_FFI_Buffer that is its address


class Buffer(ctypes.Structure):
    """XLA_FFI_Buffer."""

    _fields_ = (
        ("size", _Word),
        ("extension", _Word),
        ("dtype_number", ctypes.c_int32),
        ("data", _Word),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
    )

    @classmethod
    def at(cls, words: Any) -> Buffer:
        return cls.from_address(ctypes.addressof(words.contents))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.dims[: self.rank])

    @property
    def dtype(self) -> str:
        try:
            return _DTYPES[self.dtype_number]
        except KeyError:
            raise InvalidType(f"XLA passes a buffer of data type {self.dtype_number}, which is not supported") from None

    def view(self) -> np.ndarray:
        """NumPy over its memory; bfloat16 as uint16."""
        dtype = np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)
        shape = self.shape
        if 0 in shape:
            return np.empty(shape, dtype)
        memory: Any = (ctypes.c_char * (int(np.prod(shape)) * dtype.itemsize)).from_address(self.data)
        view: np.ndarray = np.ndarray(shape, dtype, memory)
        return view


# XLA_FFI_DataType -> dtype.
_DTYPES = {
    1: "bool",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "uint8",
    7: "uint16",
    8: "uint32",
    9: "uint64",
    10: "float16",
    11: "float32",
    12: "float64",
    16: "bfloat16",
}


def attribute_of(frame: Frame) -> bytes:
    """The one attribute of a call, a string."""
    data, size = frame.attrs[0][:2]
    return ctypes.string_at(data, size)


# ----------------------------------------------------------------------------------------------------------------------
# XLA's functions

# Byte offsets of function pointers in XLA_FFI_Api.
_ERROR_CREATE, _STREAM_GET, _DEVICE_ORDINAL_GET = 48, 80, 184
_ApiFunction = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)  # they return at once: the GIL stays
_INVALID_ARGUMENT, _INTERNAL = 3, 13


class _ErrorArguments(ctypes.Structure):
    _fields_ = (("size", _Word), ("extension", _Word), ("message", ctypes.c_char_p), ("code", ctypes.c_int))


class _ContextArguments(ctypes.Structure):
    """Of Stream_Get and DeviceOrdinal_Get; `result` is what they fill in (an int32 of DeviceOrdinal_Get)."""

    _fields_ = (("size", _Word), ("extension", _Word), ("context", _Word), ("result", _Word))


class _OfThread(threading.local):
    """Arguments to fill in again and again, and where they are."""

    def __init__(self) -> None:
        arguments = _ContextArguments(ctypes.sizeof(_ContextArguments), 0, 0, 0)
        self.pair = arguments, ctypes.addressof(arguments)


_of_thread = _OfThread()
_functions: dict[tuple[int, int], Callable[[int], int | None]] = {}


def _api_function(api: int, offset: int) -> Callable[[int], int | None]:
    function = _functions.get((api, offset))
    if function is None:
        function = _functions[api, offset] = _ApiFunction(_Word.from_address(api + offset).value)
    return function


def _from_context(frame: Frame, offset: int) -> int:
    arguments, address = _of_thread.pair
    arguments.context, arguments.result = frame.context, 0
    if _api_function(frame.api, offset)(address):
        raise LaunchError("XLA does not say on which stream or device it calls")
    result: int = arguments.result
    return result


def stream_of(frame: Frame) -> int:
    """The CUDA stream on which to launch."""
    return _from_context(frame, _STREAM_GET)


def device_ordinal(frame: Frame) -> int:
    return _from_context(frame, _DEVICE_ORDINAL_GET) & 0xFFFFFFFF


def _error(api: int, error: BaseException) -> int | None:
    """An XLA_FFI_Error, which XLA frees."""
    code = _INVALID_ARGUMENT if isinstance(error, (InvalidArgument, InvalidType)) else _INTERNAL
    text = str(error) if isinstance(error, Fa2Error) else f"{type(error).__name__}: {error}"
    message = f"fa2cupy: {text}".encode(errors="backslashreplace").replace(b"\0", b"")
    arguments = _ErrorArguments(ctypes.sizeof(_ErrorArguments), 0, message, code)
    return _api_function(api, _ERROR_CREATE)(ctypes.addressof(arguments))


# ----------------------------------------------------------------------------------------------------------------------
# Handlers

_METADATA = 1  # type of the extension that asks what a handler promises
_COMMAND_BUFFER_COMPATIBLE = 1


def _answer_metadata(extension: int) -> None:
    """XLA asks, at registration: API version 0.1, and that the handler may be recorded into a command buffer."""
    if ctypes.c_int32.from_address(extension + 8).value != _METADATA:
        return
    metadata = _Word.from_address(extension + 24).value
    ctypes.c_int32.from_address(metadata + 24).value = 0
    ctypes.c_int32.from_address(metadata + 28).value = 1
    ctypes.c_uint32.from_address(metadata + 32).value = _COMMAND_BUFFER_COMPATIBLE


_Callback = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)


def handler(run: Callable[[Frame], None]) -> Any:
    """A C function for XLA that does `run`. Keep a reference to it."""

    def handle(address: int) -> int | None:
        frame = Frame.from_address(address)
        if frame.extension:
            _answer_metadata(frame.extension)
            return None
        try:
            run(frame)
        except BaseException as error:
            return _error(frame.api, error)
        return None

    return _Callback(handle)
