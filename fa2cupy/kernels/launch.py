"""What a plan is made of: kernels to compile and to launch, as values, and how a launch becomes a call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fa2cupy import jit
from fa2cupy.jit import driver, tensor_map
from fa2cupy.jit.driver import Launcher
from fa2cupy.jit.kernel import LaunchConfig
from fa2cupy.jit.source import Source
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
    """One kernel of a plan. source: a file of cuda_src, or what was read of it with a header of the user's.

    params: the packed struct, less its pointers and tensor maps. A pointer that is in neither stays null.
    """

    source: str | Source
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
    return _Bound(launches, device_index, context) if launches else _nothing


def _nothing(pointers: tuple[int, ...], stream: int) -> None:
    """The launches of a plan without any: of arrays without elements."""


# What the driver is given for the launches of a call, by (launchable, pointers, stream). Allocators hand out the same
# addresses again and again, so that most calls find theirs here; when it is full it starts over. A few KB per entry.
_MAX_READY = 1024
_HEAD = 64  # bytes in front of a struct, of which 8 are its address; the others keep it aligned
_ready: dict[tuple[_Bound, tuple[int, ...], int], tuple[tuple[Any, ...], ...]] = {}


class _Bound:
    """The launches of a plan on a device. Any number of threads may call: structs that were packed are only read.

    Most calls come in a thread where the device's context is current, and whether it is costs more to ask than to see
    from a launch that is refused: `context_check` is asked then.
    """

    def __init__(self, launches: Sequence[KernelLaunch], device_index: int, context: str) -> None:
        self._device_index = device_index
        self._launch = driver.launch_kernel_ex()
        self._launchers: list[tuple[Launcher, int]] = []  # and where in the block the address of its struct is
        self._pointers: list[tuple[int, int, int]] = []  # word of the block, position, bytes to add
        self._maps: list[tuple[slice, int, int, TensorMapSpec]] = []
        template = bytearray()
        for launch in launches:
            kernel = jit.kernel(launch.source, launch.name, launch.arch, launch.defines, context=context)
            function = kernel.function(device_index, launch.config.shared_mem_bytes)
            self._launchers.append((Launcher(function, launch.config), len(template)))
            start = len(template) + _HEAD
            for offset, position, add_bytes in launch.pointers:
                self._pointers.append(((start + offset) // 8, position, add_bytes))
            for offset, position, add_bytes, spec in launch.tensor_maps:
                place = slice(start + offset, start + offset + tensor_map.SIZE)
                self._maps.append((place, position, add_bytes, spec))
            template += bytes(_HEAD) + launch.params + bytes(-len(launch.params) % _HEAD)
        self._template, self._block = bytes(template), ctypes.c_char * len(template)

    def __call__(self, pointers: tuple[int, ...], stream: int) -> None:
        calls = _ready.get((self, pointers, stream))
        if calls is None:
            with driver.device_guard(self._device_index):  # maps are encoded in a context
                calls = self._pack(pointers, stream)
        launch = self._launch
        for arguments in calls:
            status = launch(*arguments)
            if status:
                self._again(calls, arguments, status)

    def _pack(self, pointers: tuple[int, ...], stream: int) -> tuple[tuple[Any, ...], ...]:
        content = bytearray(self._template)
        for place, position, add_bytes, spec in self._maps:
            content[place] = tensor_map.encode(spec, pointers[position] + add_bytes)
        words = memoryview(content).cast("Q")
        for word, position, add_bytes in self._pointers:
            words[word] = pointers[position] + add_bytes
        block = self._block.from_buffer(content)
        address = ctypes.addressof(block)
        calls = []
        for launcher, head in self._launchers:
            words[head // 8] = address + head + _HEAD
            calls.append(launcher.arguments(block, head, stream))
        if len(_ready) >= _MAX_READY:
            _ready.clear()
        _ready[self, pointers, stream] = ready = tuple(calls)
        return ready

    def _again(self, calls: tuple[tuple[Any, ...], ...], arguments: tuple[Any, ...], status: int) -> None:
        """After a launch that was refused: once more if the device's context was not current, else LaunchError."""
        if not driver.context_check(self._device_index)():
            with driver.device_guard(self._device_index):
                status = self._launch(*arguments)
        if status:
            launcher, _ = self._launchers[next(i for i, each in enumerate(calls) if each is arguments)]
            launcher.fail(status)
