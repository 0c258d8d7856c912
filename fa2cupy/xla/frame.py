"""What XLA hands to an FFI handler, read by ctypes; errors and metadata that go back.

Layout of the structs: xla/ffi/api/c_api.h, whose versions 0.1 on only append.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from fa2cupy.errors import Fa2Error, InvalidArgument, InvalidType, LaunchError

__all__ = [
    "MEMORY",
    "WORDS",
    "Buffer",
    "Frame",
    "Words",
    "args_of",
    "attribute_of",
    "device_ordinal",
    "handler",
    "places_of",
    "rets_of",
    "stream_of",
]

_Word = ctypes.c_uint64

# All memory, by address: as bytes, and as words, the word at address a at a >> 3. Read so, a frame costs a small part
# of what it does as ctypes objects, of which every pointer on the way is one.
MEMORY: Any = (ctypes.c_char * sys.maxsize).from_address(0)
WORDS: Any = memoryview((_Word * (sys.maxsize >> 3)).from_address(0)).cast("B").cast("Q")

Words = tuple[int, ...]


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
    return _tables[frame.num_args](MEMORY, frame.args)


def rets_of(frame: Frame) -> tuple[int, ...]:
    """Those of the outputs."""
    return _tables[frame.num_rets](MEMORY, frame.rets)


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
    span = WORDS[frame.attrs >> 3] >> 3
    data = WORDS[span]
    text: bytes = MEMORY[data : data + WORDS[span + 1]]
    return text


_Read = Callable[[Any], Words]


def places_of(frame: Frame, order: Sequence[int]) -> tuple[_Read, _Read]:
    """How to read the next frame whose tables are where this one's are: two functions of `WORDS`.

    The first reads the tables: where the attribute and the buffers are. While that stays as it is, the second reads the
    pointers of the buffers numbered in `order` (inputs, then outputs), and after them the attribute's address and size.
    """
    tables = (
        frame.attrs >> 3,
        *range(frame.args >> 3, (frame.args >> 3) + frame.num_args),
        *range(frame.rets >> 3, (frame.rets >> 3) + frame.num_rets),
    )
    buffers = args_of(frame) + rets_of(frame)
    span = WORDS[frame.attrs >> 3] >> 3
    return itemgetter(*tables), itemgetter(*(buffers[i] + 24 >> 3 for i in order), span, span + 1)


# ----------------------------------------------------------------------------------------------------------------------
# XLA's functions

# Byte offsets of function pointers in XLA_FFI_Api.
_ERROR_CREATE, _STREAM_GET, _DEVICE_ORDINAL_GET = 48, 80, 184
# They return at once: the GIL stays. Their one argument goes as it is, a reference.
_ApiFunction = ctypes.PYFUNCTYPE(ctypes.c_void_p)
_INVALID_ARGUMENT, _INTERNAL = 3, 13


class _ErrorArguments(ctypes.Structure):
    _fields_ = (("size", _Word), ("extension", _Word), ("message", ctypes.c_char_p), ("code", ctypes.c_int))


class _ContextArguments(ctypes.Structure):
    """Of Stream_Get and DeviceOrdinal_Get; `result` is what they fill in (an int32 of DeviceOrdinal_Get)."""

    _fields_ = (("size", _Word), ("extension", _Word), ("context", _Word), ("result", _Word))


class _OfThread(threading.local):
    """Arguments to fill in again and again, as words and as what is passed."""

    def __init__(self) -> None:
        arguments = _ContextArguments(ctypes.sizeof(_ContextArguments), 0, 0, 0)
        self.pair = memoryview(arguments).cast("B").cast("Q"), ctypes.byref(arguments)


_of_thread = _OfThread()


class _Functions(dict[int, Callable[[Any], int | None]]):
    """Address -> the function there."""

    def __missing__(self, address: int) -> Callable[[Any], int | None]:
        function = self[address] = _ApiFunction(address)
        return function


_functions = _Functions()


def _from_context(offset: int, frame: Words) -> int:
    words, reference = _of_thread.pair
    words[2], words[3] = frame[2], 0
    if _functions[WORDS[frame[1] + offset >> 3]](reference):
        raise LaunchError("XLA does not say on which stream or device it calls")
    return words[3]


def stream_of(frame: Words) -> int:
    """The CUDA stream on which to launch."""
    return _from_context(_STREAM_GET, frame)


def device_ordinal(frame: Words) -> int:
    return _from_context(_DEVICE_ORDINAL_GET, frame) & 0xFFFFFFFF


def _error(api: int, error: BaseException) -> int | None:
    """An XLA_FFI_Error, which XLA frees."""
    code = _INVALID_ARGUMENT if isinstance(error, (InvalidArgument, InvalidType)) else _INTERNAL
    text = str(error) if isinstance(error, Fa2Error) else f"{type(error).__name__}: {error}"
    message = f"fa2cupy: {text}".encode(errors="backslashreplace").replace(b"\0", b"")
    arguments = _ErrorArguments(ctypes.sizeof(_ErrorArguments), 0, message, code)
    return _functions[WORDS[api + _ERROR_CREATE >> 3]](ctypes.byref(arguments))


# ----------------------------------------------------------------------------------------------------------------------
# Handlers

_METADATA = 1  # type of the extension that asks what a handler promises
_COMMAND_BUFFER_COMPATIBLE = 1


def _answer_metadata(extension: int) -> bool:
    """Whether XLA only asks, at registration: API version 0.1, and that the handler may be recorded into a command
    buffer.
    """
    if ctypes.c_int32.from_address(extension + 8).value != _METADATA:
        return False
    metadata = _Word.from_address(extension + 24).value
    ctypes.c_int32.from_address(metadata + 24).value = 0
    ctypes.c_int32.from_address(metadata + 28).value = 1
    ctypes.c_uint32.from_address(metadata + 32).value = _COMMAND_BUFFER_COMPATIBLE
    return True


_Callback = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)


def handler(run: Callable[[Words], None]) -> Any:
    """A C function for XLA that does `run`, which gets the fields of `Frame` as they are. Keep a reference to it."""

    read, memory = _FRAME, MEMORY

    def handle(address: int) -> int | None:
        frame = read(memory, address)
        if frame[0] and _answer_metadata(frame[0]):
            return None
        try:
            run(frame)
        except BaseException as error:
            return _error(frame[1], error)
        return None

    return _Callback(handle)
