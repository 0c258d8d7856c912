"""What XLA hands to an FFI handler, read by ctypes; errors and metadata that go back.

Layout of the structs: xla/ffi/api/c_api.h, whose versions 0.1 on only append.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from fa2cupy.errors import Fa2Error, InvalidArgument, InvalidType, LaunchError

__all__ = [
    "Buffer",
    "Frame",
    "args_of",
    "attribute_of",
    "device_ordinal",
    "handler",
    "pointers_of",
    "rets_of",
    "stream_of",
]

_Word = ctypes.c_uint64

# All memory, by address: as bytes for the fixed forms of `struct`, and as words, the word at address a at a >> 3. Read
# so, a frame costs a third of what it does as ctypes objects, of which every pointer on the way is one.
_bytes: Any = (ctypes.c_char * sys.maxsize).from_address(0)
_words: Any = (_Word * (sys.maxsize >> 3)).from_address(0)


class Frame(NamedTuple):
    """Of an XLA_FFI_CallFrame what is needed: addresses (args, rets and attrs: of arrays of pointers) and numbers."""

    extension: int
    api: int
    context: int
    num_args: int
    args: int
    num_rets: int
    rets: int
    attrs: int


# Its words 1 to 3, 7, 9 (args: those of words 5 to 9), 12, 14 (rets: 10 to 14), 20 (attrs: 15 to 20).
_FRAME = struct.Struct("@8xQQQ24xQ8xQ16xQ8xQ40xQ").unpack_from


class _Tables(dict[int, Callable[[Any, int], tuple[int, ...]]]):
    """Number of pointers -> what reads as many from an address."""

    def __missing__(self, count: int) -> Callable[[Any, int], tuple[int, ...]]:
        read = self[count] = struct.Struct(f"@{count}Q").unpack_from
        return read


_tables = _Tables()


def args_of(frame: Frame) -> tuple[int, ...]:
    """The addresses of the XLA_FFI_Buffers of the inputs."""
    return _tables[frame.num_args](_bytes, frame.args)


def rets_of(frame: Frame) -> tuple[int, ...]:
    """Those of the outputs."""
    return _tables[frame.num_rets](_bytes, frame.rets)


def pointers_of(buffers: Iterable[int]) -> list[int]:
    """Where the memory of buffers is: the word at 24 of each."""
    words = _words
    return [words[address + 24 >> 3] for address in buffers]


class Buffer(ctypes.Structure):
    """XLA_FFI_Buffer; `Buffer.from_address` reads one."""

    _fields_ = (
        ("size", _Word),
        ("extension", _Word),
        ("dtype_number", ctypes.c_int32),
        ("data", _Word),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
    )

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
    """The one attribute of a call, a string: XLA_FFI_ByteSpan."""
    span = _words[frame.attrs >> 3] >> 3
    data = _words[span]
    text: bytes = _bytes[data : data + _words[span + 1]]
    return text


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

    new, read, memory = tuple.__new__, _FRAME, _bytes

    def handle(address: int) -> int | None:
        frame = new(Frame, read(memory, address))
        if frame.extension:
            _answer_metadata(frame.extension)
            return None
        try:
            run(frame)
        except BaseException as error:
            return _error(frame.api, error)
        return None

    return _Callback(handle)
