"""Frames as XLA hands them to an FFI handler, with a table of functions of our own."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from fa2cupy.xla import frame as xla

NUMBERS = {name: number for number, name in xla._DTYPES.items()}
_Word = ctypes.c_uint64
_Words = ctypes.POINTER(ctypes.POINTER(_Word))


class CallFrame(ctypes.Structure):
    """XLA_FFI_CallFrame of xla/ffi/api/c_api.h."""

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


class FakeApi:
    """XLA_FFI_Api: what it says of stream and device, and what errors it was told of."""

    def __init__(self, stream: int = 0x77, device: int = 1, fails: bool = False) -> None:
        self.stream, self.device, self.fails = stream, device, fails
        self.errors: list[tuple[int, str]] = []
        self._table = (_Word * 32)()
        callback = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
        self._callbacks = {
            xla._ERROR_CREATE: callback(self._error_create),
            xla._STREAM_GET: callback(lambda address: self._answer(address, self.stream)),
            xla._DEVICE_ORDINAL_GET: callback(lambda address: self._answer(address, 0xDEAD << 32 | self.device)),
        }
        for offset, function in self._callbacks.items():
            self._table[offset // 8] = ctypes.cast(function, ctypes.c_void_p).value
        self.address = ctypes.addressof(self._table)
        xla._functions.clear()  # those of a table that is gone, and may have been here

    def _answer(self, address: int, value: int) -> int | None:
        arguments = xla._ContextArguments.from_address(address)
        assert (arguments.size, arguments.extension, arguments.context) == (32, 0, 0xC0)
        if self.fails:
            return 0x1
        arguments.result = value
        return None

    def _error_create(self, address: int) -> int:
        arguments = xla._ErrorArguments.from_address(address)
        self.errors.append((arguments.code, arguments.message.decode()))
        return 0xE


class FakeFrame:
    """A call of `attribute` with buffers (dtype, shape, address). `address` is what a handler gets."""

    def __init__(
        self,
        api: FakeApi,
        attribute: str,
        args: Sequence[tuple[str, tuple[int, ...], int]],
        rets: Sequence[tuple[str, tuple[int, ...], int]],
    ) -> None:
        self._kept: list[Any] = [api]
        self.frame = CallFrame(size=176, api=api.address, context=0xC0, num_args=len(args), num_rets=len(rets))
        self.frame.args, self.frame.rets = self._pointers(args), self._pointers(rets)
        text = ctypes.create_string_buffer(attribute.encode())
        span = (_Word * 2)(ctypes.addressof(text), len(attribute.encode()))
        self._kept += [text, span]
        self.frame.num_attrs, self.frame.attrs = 1, self._table([ctypes.addressof(span)])
        self.address = ctypes.addressof(self.frame)

    def _pointers(self, buffers: Sequence[tuple[str, tuple[int, ...], int]]) -> Any:
        addresses = []
        for dtype, shape, data in buffers:
            dims = (ctypes.c_int64 * len(shape))(*shape)
            buffer = xla.Buffer(size=48, dtype_number=NUMBERS[dtype], data=data, rank=len(shape), dims=dims)
            self._kept += [dims, buffer]
            addresses.append(ctypes.addressof(buffer))
        return self._table(addresses)

    def _table(self, addresses: Sequence[int]) -> Any:
        table = (_Word * len(addresses))(*addresses)
        self._kept.append(table)
        return ctypes.cast(table, ctypes.POINTER(ctypes.POINTER(_Word)))
