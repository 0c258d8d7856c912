"""From a call on a cache on a GPU to a launch: a new signature is checked and planned once, then repeated cheaply."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from fa2cupy import env, log
from fa2cupy.cached import rows
from fa2cupy.cached.call import ARRAYS, LENGTHS, OF_CACHE, Call
from fa2cupy.cached.counters import counters, make_room
from fa2cupy.cached.problem import CacheProblem
from fa2cupy.errors import CompilationError, InvalidArgument, LaunchError
from fa2cupy.frameworks.base import Device, GpuFramework
from fa2cupy.frameworks.overlap import Extent
from fa2cupy.prepared import check_overlap, shared_scratch, workspace_block

__all__ = ["PreparedAttend", "prepare"]

_FUNCTION = "attention_with_kvcache"
_PLACES = {name: position for position, name in enumerate(ARRAYS)}
_LENGTH = _PLACES["cache_seqlens"]
_MAX_CHECKED = 1024


class Held(Protocol):
    """The arrays of a cache, in the order of OF_CACHE, those that are there, and the pointers of a call, in the order
    of ARRAYS, of which the cache's are filled in."""

    @property
    def arrays(self) -> list[Any]: ...
    @property
    def given(self) -> list[Any]: ...
    @property
    def pointers(self) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class PreparedAttend:
    """Everything about one signature that does not depend on pointers. A place is one among ARRAYS.

    names: of the call's arrays, some of which may be None; places: theirs. results: where among them out and lse_out
    are, or None. fresh: (result, place, allocator, address of what it allocates) of those that are not given; shared:
    (place, address) of lse where nobody reads it. copied: (place, what makes a copy as the kernels need it).
    written: places of the caller's arrays that are written; extents: of ARRAYS, None where there is none.
    checked: pointers that were found not to overlap.
    """

    framework: GpuFramework
    device: Device
    launchable: Callable[[tuple[int, ...], int], None]
    counters: int
    workspace_bytes: int
    allocate_workspace: Callable[[], Any]
    workspace_address: Callable[[Any], int]
    names: tuple[str, ...]
    places: tuple[int, ...]
    results: tuple[int | None, int | None]
    fresh: tuple[tuple[int, int, Callable[[], Any], Callable[[Any], int]], ...]
    shared: tuple[tuple[int, int], ...]
    copied: tuple[tuple[int, Callable[[Any], Any]], ...]
    written: tuple[int, ...]
    extents: tuple[Extent | None, ...]
    no_capture: bool
    stream: Callable[[int], int]
    is_current: Callable[[], bool]
    guard: Callable[[int], AbstractContextManager[None]]
    sizes: rows.Sizes
    checked: set[tuple[int, ...]] = field(default_factory=set)

    def run(
        self, cache: Held, arrays: list[Any], pointers: list[int], number: int | None, workspace: Any
    ) -> tuple[Any, Any]:
        """out, lse. `arrays`: those of `names`; `pointers`: theirs; number: cache_seqlens where it is one."""
        whole = cache.pointers.copy()
        for place, pointer in zip(self.places, pointers, strict=True):
            whole[place] = pointer
        if number is not None:
            whole[_LENGTH] = number
        self.framework.check_call(cache.given + arrays, _FUNCTION, lambda: self._names_of(cache))
        if self.written or workspace is not None:
            self._check_given(tuple(whole), workspace)
        if env.may_check() and env.check():
            self._check_lengths(cache, arrays, number)
        if self.is_current():
            results = self._launch(cache, arrays, whole, workspace)
        else:
            with self.guard(self.device.index):
                results = self._launch(cache, arrays, whole, workspace)
        for place in self.written:
            self.framework.written(self._array(cache, arrays, place))
        return results[0], results[1]

    def _launch(self, cache: Held, arrays: list[Any], pointers: list[int], workspace: Any) -> list[Any]:
        """Allocate and launch. The device's context is current."""
        index = self.device.index
        stream = self.stream(index)
        if self.no_capture and self.framework.is_capturing(stream, index):
            self._refuse_capture(workspace)
        results = [None if place is None else arrays[place] for place in self.results]
        for result, place, allocate, address in self.fresh:
            results[result] = array = allocate()
            pointers[place] = address(array)
        for place, pointer in self.shared:
            pointers[place] = pointer
        copies = []  # memory that is in use until the launch
        for place, copy in self.copied:
            copies.append(copy(self._array(cache, arrays, place)))
            pointers[place] = self.framework.pointer(copies[-1], ARRAYS[place])
        if workspace is None and self.workspace_bytes:
            workspace = self.allocate_workspace()
            pointers.append(self.workspace_address(workspace))
        else:
            pointers.append(0 if workspace is None else self.framework.pointer(workspace, "workspace"))
        pointers.append(counters(index, stream, self.counters))
        self.launchable(tuple(pointers), stream)
        return results

    def _array(self, cache: Held, arrays: list[Any], place: int) -> Any:
        """The one of ARRAYS at a place."""
        return cache.arrays[place] if place < len(OF_CACHE) else arrays[self.places.index(place)]

    def _names_of(self, cache: Held) -> tuple[str, ...]:
        return (*(name for name, x in zip(OF_CACHE, cache.arrays, strict=True) if x is not None), *self.names)

    def _refuse_capture(self, workspace: Any) -> None:
        copied = [ARRAYS[place] for place, _ in self.copied]
        if copied:
            raise InvalidArgument(
                f"{copied[0]} must be copied, which {self.framework.name} cannot do inside a CUDA graph capture: pass "
                "it contiguous, and lengths as int32"
            )
        missing = [ARRAYS[place] for _, place, *_ in self.fresh]
        if self.workspace_bytes and workspace is None:
            missing.append("workspace")
        if missing:
            raise InvalidArgument(
                f"fa2cupy.{_FUNCTION} inside a CUDA graph capture: {self.framework.name}'s memory pool cannot be used "
                f"there, so {', '.join(name + '=' for name in missing)} must be given (workspace: "
                f"{self.workspace_bytes} bytes)"
            )

    def _check_given(self, pointers: tuple[int, ...], workspace: Any) -> None:
        if workspace is None and pointers in self.checked:
            return
        blocks = [
            (name, pointer, extent)
            for name, pointer, extent in zip(ARRAYS, pointers, self.extents, strict=True)
            if extent is not None
        ]
        check_overlap(blocks, {ARRAYS[place] for place in self.written})
        if workspace is not None:
            block = workspace_block(self.framework, workspace, self.device, self.workspace_bytes)
            check_overlap([*blocks, block], {"workspace"})
        elif len(self.checked) < _MAX_CHECKED:
            self.checked.add(pointers)

    def _check_lengths(self, cache: Held, arrays: list[Any], number: int | None) -> None:
        """What FA2CUPY_CHECK=1 asks for."""
        index = self.device.index
        if self.framework.is_capturing(self.stream(index), index):
            raise InvalidArgument(
                f"{env.CHECK.name}=1 waits for lengths, which a CUDA graph capture cannot do: unset it"
            )
        held = {**dict(zip(OF_CACHE, cache.arrays, strict=True)), **dict(zip(self.names, arrays, strict=True))}
        with self.guard(index):
            found = {name: self.framework.to_host(held[name]) for name in LENGTHS if held.get(name) is not None}
        rows.check(found, number, self.sizes)


def prepare(call: Call, names: tuple[str, ...]) -> PreparedAttend:
    """For calls that are like this one, which was checked. names: of their arrays, of OF_CALL, out and lse_out among
    them if they are given."""
    from fa2cupy.jit import driver

    cache, arrays, framework = call.cache, call.arrays, call.cache.framework
    assert isinstance(framework, GpuFramework)
    device = cache.device
    driver.device_info(device.index)  # no driver, or a GPU that is too old, before anything is allocated
    for name in ("k_cache", "v_cache"):
        if not framework.has_contiguous_rows(arrays[name]) or not framework.is_strided_by_element(arrays[name]):
            raise InvalidArgument(
                f"{name} has strides {framework.byte_strides(arrays[name])} (bytes): its last dimension must be "
                "contiguous on a GPU"
            )
    stream = framework.stream(device.index)
    capturing = framework.is_capturing(stream(device.index), device.index)
    copied = tuple(_copies(framework, arrays))
    problem = CacheProblem.of(call, [ARRAYS[position] for position, _ in copied])
    launchable, needed, count = _bound(problem, device.index, capturing)
    fresh, shared = [], []
    with driver.device_guard(device.index):
        if not capturing:
            make_room(device.index)
        for result, (name, dtype) in enumerate((("out", framework.dtype(arrays["q"])), ("lse_out", "float32"))):
            if name in arrays:
                continue
            shape = call.shape(name)
            if name == "lse_out" and not call.options.get("return_lse"):
                size = 4 * math.prod(shape)
                pointer = shared_scratch(framework, device.index, size, arrays["q"])
                if pointer is not None:
                    shared.append((_PLACES[name], pointer))
                    continue
                fresh.append((result, _PLACES[name], *framework.scratch(size, arrays["q"])))
                continue
            fresh.append((result, _PLACES[name], framework.allocator(shape, dtype, arrays["q"]), framework.address))
        allocate, address = framework.scratch(max(1, needed), arrays["q"])
    return PreparedAttend(
        framework=framework,
        device=device,
        launchable=launchable,
        counters=count,
        workspace_bytes=needed,
        allocate_workspace=allocate,
        workspace_address=address,
        names=names,
        places=tuple(_PLACES[name] for name in names),
        results=(_index(names, "out", arrays), _index(names, "lse_out", arrays)),
        fresh=tuple(fresh),
        shared=tuple(shared),
        copied=copied,
        written=tuple(_PLACES[name] for name in call.written),
        extents=tuple(framework.extent(arrays[name]) if name in arrays else None for name in ARRAYS),
        no_capture=not framework.allocates_in_capture,
        stream=stream,
        is_current=driver.context_check(device.index),
        guard=driver.device_guard,
        sizes=_sizes(call),
    )


def _index(names: tuple[str, ...], name: str, arrays: Mapping[str, Any]) -> int | None:
    return names.index(name) if name in arrays else None


def _sizes(call: Call) -> rows.Sizes:
    cache = call.cache
    positions = cache.framework.shape(call.arrays["rotary_cos"])[0] if "rotary_cos" in call.arrays else 0
    return rows.Sizes(
        call.batch, call.seqlen_q, call.seqlen_new or 0, cache.rows, cache.page, cache.width, call.is_packed, positions
    )


def _copies(framework: GpuFramework, arrays: Mapping[str, Any]) -> list[tuple[int, Callable[[Any], Any]]]:
    """What has to be copied at each call: rows that are not contiguous, integers that are not int32 without gaps."""
    copies: list[tuple[int, Callable[[Any], Any]]] = []
    for name, array in arrays.items():
        if name in LENGTHS:
            if framework.dtype(array) != "int32" or not _is_contiguous(framework, array):
                copies.append((_PLACES[name], framework.as_int32))
        elif name in ("k_scale", "v_scale", "rotary_cos", "rotary_sin", "sinks"):
            if not _is_contiguous(framework, array):
                copies.append((_PLACES[name], framework.contiguous))
        elif name in ("q", "k_new", "v_new") and not (
            framework.has_contiguous_rows(array) and framework.is_strided_by_element(array)
        ):
            copies.append((_PLACES[name], framework.contiguous))
    return copies


def _is_contiguous(framework: GpuFramework, array: Any) -> bool:
    shape, strides, step = framework.shape(array), framework.byte_strides(array), framework.itemsize(array)
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length > 1 and stride != step:
            return False
        step *= max(1, length)
    return True


def _bound(problem: CacheProblem, index: int, capturing: bool) -> tuple[Any, int, int]:
    try:
        return bound_plan(problem, index)
    except (LaunchError, CompilationError) as error:
        if capturing:
            raise LaunchError(
                f"fa2cupy.{_FUNCTION} could not load its kernel inside a CUDA graph capture: call it once with the "
                "same shapes before the capture"
            ) from error
        raise


@functools.lru_cache(maxsize=1024)
def bound_plan(problem: CacheProblem, device_index: int) -> tuple[Callable[[tuple[int, ...], int], None], int, int]:
    """(what launches the problem, bytes of workspace, counters)."""
    from fa2cupy.jit import driver
    from fa2cupy.kernels.decode import plan_decode

    plan = plan_decode(problem, driver.device_info(device_index))
    if env.debug():
        log.debug(plan)
    return plan.bind(device_index), plan.workspace_bytes, plan.counters
