"""Launching a compiled kernel on the CPU: schedules, plants, and the errors that the world reports."""

from __future__ import annotations

import ctypes
import enum
import os
from typing import NamedTuple

from fa2cupy.jit.kernel import LaunchConfig


class HostRunError(Exception):
    """A broken rule, found by the world while the kernel ran: its message says which, and where."""


class Schedule(enum.IntEnum):
    """Which of the warps that can run goes first, and in which order blocks start: up, down or at random."""

    LOWEST_FIRST = 0
    HIGHEST_FIRST = 1
    RANDOM = 2


class _Launch(ctypes.Structure):
    """The twin of `fa2_host::Launch` in world.h."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32),
        ("shared_mem_bytes", ctypes.c_uint32),
        ("schedule", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("late", ctypes.c_void_p),
        ("late_bytes", ctypes.c_char_p),
        ("late_count", ctypes.c_uint64),
        ("plant", ctypes.c_char_p),
        ("params", ctypes.c_void_p),
        ("params_bytes", ctypes.c_uint64),
        ("message", ctypes.c_char_p),
        ("message_bytes", ctypes.c_uint64),
    )


class Site(NamedTuple):
    """A barrier, wait or fence in the source: what FA2_PLANT="flash_fwd.cu:120" leaves out."""

    file: str
    line: int
    name: str

    @property
    def plant(self) -> str:
        return f"{self.file}:{self.line}"


def launch(
    library: ctypes.CDLL,
    config: LaunchConfig,
    params: bytes | bytearray,
    schedule: Schedule = Schedule.LOWEST_FIRST,
    *,
    seed: int = 1,
    plant: str | None = None,
    cluster: int = 1,
    late: tuple[int, bytes] | None = None,
) -> list[Site]:
    """Run the grid to its end; `params` are the bytes of the kernel's struct, `cluster` the blocks of a cluster.

    late: an address, and what the launch before wrote there, which comes when somebody waits for it (griddepcontrol).
    Returns the synchronisation sites that were reached.
    """
    plant = plant if plant is not None else os.environ.get("FA2_PLANT")
    words = ctypes.create_string_buffer(len(params) + 64)
    address = -(-ctypes.addressof(words) // 64) * 64  # the alignment of a TensorMap
    ctypes.memmove(address, bytes(params), len(params))
    message = ctypes.create_string_buffer(2048)
    request = _Launch(
        grid=config.grid,
        block=config.block,
        cluster=cluster,
        shared_mem_bytes=config.shared_mem_bytes,
        schedule=schedule,
        seed=seed,
        late=late[0] if late else None,
        late_bytes=late[1] if late else None,
        late_count=len(late[1]) if late else 0,
        plant=plant.encode() if plant else None,
        params=address,
        params_bytes=len(params),
        message=ctypes.cast(message, ctypes.c_char_p),
        message_bytes=len(message),
    )
    if library.host_launch(ctypes.byref(request)):
        raise HostRunError(f"{message.value.decode()} [{schedule.name}]")
    return [_site(line) for line in library.host_sites().decode().splitlines()]


def _site(text: str) -> Site:
    place, name = text.split(" ")
    file, line = place.rsplit(":", 1)
    return Site(file, int(line), name)
