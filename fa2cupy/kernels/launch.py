"""What a plan is made of: kernels to compile and to launch, as values, and how a launch becomes a call."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fa2cupy import jit
from fa2cupy.jit import tensor_map
from fa2cupy.jit.driver import Launcher
from fa2cupy.jit.kernel import LaunchConfig
from fa2cupy.jit.tensor_map import TensorMapSpec

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
    bound = tuple(
        (_BoundWithMaps if launch.tensor_maps else _Bound)(launch, device_index, context) for launch in launches
    )
    if len(bound) == 1:
        return bound[0]

    def launch_all(pointers: tuple[int, ...], stream: int) -> None:
        for launch in bound:
            launch(pointers, stream)

    return launch_all


class _Bound:
    """A KernelLaunch on a device. Each thread packs a copy of the params; the driver copies them at the launch."""

    def __init__(self, launch: KernelLaunch, device_index: int, context: str) -> None:
        kernel = jit.kernel(launch.source, launch.name, launch.arch, launch.defines, context=context)
        function = kernel.function(device_index, launch.config.shared_mem_bytes)
        self._launcher = Launcher(function, launch.config)
        self._params = launch.params
        self._pointers = tuple((offset // 8, position, add_bytes) for offset, position, add_bytes in launch.pointers)
        self._local = threading.local()
        # The call's first pointers, as far as they stand at the front as they come: one copy instead of a loop.
        count = 0
        while count < len(self._pointers) and self._pointers[count] == (count, count, 0):
            count += 1
        self._front, self._others = slice(0, count), self._pointers[count:]

    def __call__(self, pointers: tuple[int, ...], stream: int) -> None:
        try:
            words, address = self._local.packed
        except AttributeError:
            words, address = self._pack()
        words[self._front] = pointers[self._front]
        for word, position, add_bytes in self._others:
            words[word] = pointers[position] + add_bytes
        self._launcher(address, stream)

    def _pack(self) -> tuple[ctypes.Array[ctypes.c_uint64], int]:
        words = (ctypes.c_uint64 * (len(self._params) // 8)).from_buffer_copy(self._params)
        self._local.packed = words, ctypes.addressof(words)
        return self._local.packed  # type: ignore[no-any-return]


class _BoundWithMaps(_Bound):
    """A KernelLaunch whose struct has tensor maps. Those of arrays that the thread's last call had too are still there.

    Most calls have new outputs at most, and the allocator gives them the same workspace again; a map that is needed
    again is found in the cache of `tensor_map.encode`.
    """

    def __init__(self, launch: KernelLaunch, device_index: int, context: str) -> None:
        super().__init__(launch, device_index, context)
        self._maps = tuple(
            (index, slice(offset, offset + tensor_map.SIZE), position, add_bytes, spec)
            for index, (offset, position, add_bytes, spec) in enumerate(launch.tensor_maps)
        )

    def __call__(self, pointers: tuple[int, ...], stream: int) -> None:
        try:
            words, content, address, last = self._local.with_maps
        except AttributeError:
            words, content, address, last = self._pack_with_maps()
        for index, place, position, add_bytes, spec in self._maps:
            pointer = pointers[position]
            if pointer != last[index]:
                content[place] = tensor_map.encode(spec, pointer + add_bytes)
                last[index] = pointer
        for word, position, add_bytes in self._pointers:
            words[word] = pointers[position] + add_bytes
        self._launcher(address, stream)

    def _pack_with_maps(self) -> tuple[ctypes.Array[ctypes.c_uint64], memoryview, int, list[int]]:
        buffer = bytearray(self._params)
        words = (ctypes.c_uint64 * (len(buffer) // 8)).from_buffer(buffer)
        self._local.with_maps = words, memoryview(buffer), ctypes.addressof(words), [-1] * len(self._maps)
        return self._local.with_maps  # type: ignore[no-any-return]
