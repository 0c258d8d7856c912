"""Counters on a GPU that are 0 between launches: by them thread blocks of one launch find out who is the last.

A kernel leaves them at 0, so they are set to 0 once, where they are allocated. Launches that may run at the same time
have counters of their own: eager calls by stream (and by thread, where each has a default stream of its own), captured
ones by capture and stream, since two graphs may be replayed at once. They are never given back: a graph keeps them.
"""

from __future__ import annotations

import ctypes
import threading
from ctypes import byref, c_int, c_size_t, c_ubyte, c_uint64, c_void_p
from dataclasses import dataclass, field

from fa2cupy.errors import LaunchError
from fa2cupy.jit import driver
from fa2cupy.locks import Lock

__all__ = ["counters", "make_room"]

_SLAB_BYTES = 1 << 20
_ALIGNMENT = 256
_LEGACY_STREAMS = (0, 1)  # cannot be captured, and asking about them while another is would be an error
_PER_THREAD_STREAM = 2
_CAPTURING = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE

_Key = tuple[int, int, int, int]  # device, stream, thread or 0, capture or 0


@dataclass
class _Slab:
    """Memory of zeros on a device; what lies before `used` is somebody's."""

    pointer: int
    used: int = 0


@dataclass
class _State:
    slabs: dict[int, _Slab] = field(default_factory=dict)
    places: dict[_Key, tuple[int, int]] = field(default_factory=dict)  # pointer, bytes
    lock: Lock = field(default_factory=Lock)


_state = _State()


def counters(device_index: int, stream: int, count: int) -> int:
    """The address of so many counters for a launch on a stream. The device's context is current."""
    capture = 0 if stream in _LEGACY_STREAMS else _capture_of(stream)
    thread = threading.get_ident() if stream == _PER_THREAD_STREAM else 0
    key = device_index, stream, thread, capture
    size = 4 * count
    place = _state.places.get(key)
    if place is not None and place[1] >= size:
        return place[0]
    with _state.lock:
        size = -(-size // _ALIGNMENT) * _ALIGNMENT
        slab = _state.slabs.get(device_index)
        if slab is None or slab.used + size > _SLAB_BYTES:
            if capture:
                raise LaunchError(
                    "there are no counters left for a call inside a CUDA graph capture: call it once outside of one"
                )
            slab = _new_slab(device_index, max(size, _SLAB_BYTES))
        pointer = slab.pointer + slab.used
        slab.used += size
        _state.places[key] = pointer, size
    return pointer


def make_room(device_index: int) -> None:
    """See to it that captures find counters. Outside of a capture, with the device's context current."""
    with _state.lock:
        slab = _state.slabs.get(device_index)
        if slab is None or slab.used > _SLAB_BYTES // 2:
            _new_slab(device_index, _SLAB_BYTES)


def _new_slab(device_index: int, size: int) -> _Slab:
    pointer = c_uint64()
    driver.call("cuMemAlloc_v2", byref(pointer), c_size_t(size))
    driver.call("cuMemsetD8_v2", pointer, c_ubyte(0), c_size_t(size))
    driver.call("cuCtxSynchronize")  # any stream may be the first to use them
    _state.slabs[device_index] = slab = _Slab(pointer.value)
    return slab


def _capture_of(stream: int) -> int:
    """The number of the capture that a stream is in, or 0."""
    status, number = c_int(), c_uint64()
    nothing = ctypes.POINTER(c_void_p)()
    driver.call("cuStreamGetCaptureInfo_v2", c_void_p(stream), byref(status), byref(number), None, nothing, None)
    return number.value if status.value == _CAPTURING else 0
