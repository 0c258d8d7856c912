"""What a plan is made of: kernels to compile and to launch, as values, and how a launch becomes a call."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fa2cupy import jit
from fa2cupy.jit import tensor_map
from fa2cupy.jit.driver import Launcher
from fa2cupy.jit.kernel import LaunchConfig
from fa2cupy.jit.tensor_map import TensorMapSpec
from fa2cupy.locks import Lock

__all__ = ["CompileJob", "KernelLaunch", "Launchable", "Pointer", "TensorMapArgument", "bind"]

Launchable = Callable[[tuple[int, ...], int], None]


@dataclass(frozen=True, slots=True)
class CompileJob:
    """One binary to compile: a row of a tile table for one architecture and one choice of defines."""

    source: str
    name: str
    arch: str
    defines: Mapping[str, int | str]
    label: str
    shared_mem_bytes: int
    allowed_spill_bytes: int


class Pointer(NamedTuple):
    """A pointer in a params struct: its byte offset there, and to what (position among the call's pointers, bytes to
    add)."""

    offset: int
    position: int
    add_bytes: int


class TensorMapArgument(NamedTuple):
    """A tensor map in a params struct: its byte offset there, and of what array (as `Pointer`)."""

    offset: int
    position: int
    add_bytes: int
    spec: TensorMapSpec


@dataclass(frozen=True, slots=True)
class KernelLaunch:
    """One kernel of a plan.

    params: the packed struct, less its pointers and tensor maps. A pointer that is in neither stays null.
    """

    source: str
    name: str
    arch: str
    defines: Mapping[str, int | str]
    config: LaunchConfig
    params: bytes = field(repr=False)
    pointers: tuple[Pointer, ...]
    tensor_maps: tuple[TensorMapArgument, ...] = ()

    def pack(
        self, pointers: tuple[int, ...], encode: Callable[[TensorMapSpec, int], bytes] = tensor_map.encode
    ) -> bytearray:
        """The struct with its maps and pointers; what binding does, for those who launch by other means.

        `encode` makes the maps: the driver, unless it is replaced.
        """
        packed = bytearray(self.params)
        for offset, position, add_bytes, spec in self.tensor_maps:
            packed[offset : offset + tensor_map.SIZE] = encode(spec, pointers[position] + add_bytes)
        words = memoryview(packed).cast("Q")
        for offset, position, add_bytes in self.pointers:
            words[offset // 8] = pointers[position] + add_bytes
        return packed


def bind(launches: Sequence[KernelLaunch], device_index: int, context: str) -> Launchable:
    """Compile and load every kernel on a device; then launching takes only pointers and a stream.

    pointers: of the call's arrays in the plan's order, the workspace last. context: the printed plan, for errors:
    CompilationError, LaunchError.
    """
    jit.kernels([(each.source, each.name, each.arch, each.defines) for each in launches], context=context)
    bound = tuple(_Bound(launch, device_index, context) for launch in launches)
    if len(bound) == 1:
        return bound[0]

    def launch_all(pointers: tuple[int, ...], stream: int) -> None:
        for launch in bound:
            launch(pointers, stream)

    return launch_all


# Structs that are kept, of all launches together: about 1.5 KB each. The oldest goes first.
MAX_STRUCTS = 2048

_Structs = dict[tuple[int, ...], tuple[Any, Any]]

_kept: deque[tuple[_Structs, tuple[int, ...]]] = deque()
_lock = Lock()


class _Bound:
    """A KernelLaunch on a device.

    For each set of pointers a struct is filled once, and then only read, by any thread; the driver copies it at the
    launch. Calls come back with the same pointers soon: what has freed an output gets it again.
    """

    def __init__(self, launch: KernelLaunch, device_index: int, context: str) -> None:
        kernel = jit.kernel(launch.source, launch.name, launch.arch, launch.defines, context=context)
        function = kernel.function(device_index, launch.config.shared_mem_bytes)
        self._launch, self._launcher = launch, Launcher(function, launch.config)
        self._structs: _Structs = {}  # pointers -> the struct as the launcher takes it, and its memory

    def __call__(self, pointers: tuple[int, ...], stream: int) -> None:
        struct = self._structs.get(pointers)
        if struct is None:
            struct = self._fill(pointers)
        self._launcher.launch(struct[0], stream)

    def _fill(self, pointers: tuple[int, ...]) -> tuple[Any, Any]:
        packed = self._launch.pack(pointers, tensor_map.encode)
        memory = (ctypes.c_char * len(packed)).from_buffer(packed)
        struct = self._launcher.packed(ctypes.addressof(memory)), memory
        with _lock:
            if pointers not in self._structs:
                _kept.append((self._structs, pointers))
            self._structs[pointers] = struct
            while len(_kept) > MAX_STRUCTS:
                structs, oldest = _kept.popleft()
                structs.pop(oldest, None)
        return struct
