"""What the first call of a signature leaves for the next ones: a `PreparedCall`, and the table of them.

A call's signature is all that its plan depends on: each array's type, shape, strides, dtype, device and pointer modulo
16, and the options. What can differ under one signature (autograd, graph capture, overlap with given outputs) is
checked at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.frameworks import framework_of
from fa2cupy.frameworks.base import WORKSPACE_ALIGNMENT, Device, Framework, GpuFramework, describe
from fa2cupy.frameworks.overlap import Extent, has_duplicates, shares_memory
from fa2cupy.locks import Lock
from fa2cupy.operations import Operation
from fa2cupy.options import RawOptions

__all__ = [
    "PLAIN",
    "PREPARED",
    "Launchable",
    "PreparedCall",
    "check_overlap",
    "framework_by_type",
    "plain_type",
    "remember",
    "remember_plain",
    "shared_scratch",
    "signature_key",
    "workspace_block",
]

Launchable = Callable[[tuple[int, ...], int], None]

# Signatures kept. A decoding loop adds one per length, so the oldest are dropped rather than all of them.
MAX_PREPARED = 4096


@dataclass(frozen=True, slots=True)
class PreparedCall:
    """Everything about one signature that does not depend on pointers.

    fresh: (position among all arrays, allocator, address of what it allocates) of each output not given. shared:
    (position, address) of outputs that nobody reads, in memory that all calls share.
    results: where the outputs are among all arrays. extents: of all arrays, in pointer order; for new outputs None.
    workspace_bytes: 0 if the kernels need none; takes_workspace: whether there is a pointer to one all the same.
    check: of what arrays hold, at every call; None where there is nothing to check.
    no_capture: it allocates what cannot be allocated inside a CUDA graph capture.
    is_current: whether `guard` has nothing to do.
    """

    operation: Operation
    framework: GpuFramework
    device: Device
    launchable: Launchable
    device_index: int
    first_output: int
    results: slice
    fresh: tuple[tuple[int, Callable[[], Any], Callable[[Any], int]], ...]
    shared: tuple[tuple[int, int], ...]
    given: frozenset[str]
    extents: tuple[Extent | None, ...]
    workspace_bytes: int
    takes_workspace: bool
    allocate_workspace: Callable[[], Any]
    address: Callable[[Any], int]
    no_capture: bool
    stream: Callable[[int], int]
    is_current: Callable[[], bool]
    guard: Callable[[int], AbstractContextManager[None]]
    check: Callable[[list[Any]], None] | None = None

    def run(self, arrays: list[Any], pointers: list[int], workspace: Any) -> list[Any]:
        """`arrays`: inputs and outputs, None for an output to allocate; `pointers`: theirs. Both are filled in."""
        operation = self.operation
        if not operation.asked:
            self.framework.check_call(arrays, operation.name, operation.names)
        if self.given or workspace is not None:
            self._check_given(pointers, workspace)
        if self.check is not None:
            self.check(arrays)
        if self.is_current():
            self._launch(arrays, pointers, workspace)
        else:
            with self.guard(self.device_index):
                self._launch(arrays, pointers, workspace)
        if self.given:
            for name, array in zip(operation.outputs, arrays[self.results], strict=True):
                if name in self.given:
                    self.framework.written(array)
        return arrays[self.results]

    def _launch(self, arrays: list[Any], pointers: list[int], workspace: Any) -> None:
        """Allocate and launch. The device's context is current."""
        stream = self.stream(self.device_index)
        if self.no_capture and self.framework.is_capturing(stream, self.device_index):
            self._refuse_capture(workspace)
        for position, allocate, address in self.fresh:
            arrays[position] = array = allocate()
            pointers[position] = address(array)
        for position, pointer in self.shared:
            pointers[position] = pointer
        if self.takes_workspace:
            if workspace is None and self.workspace_bytes:
                workspace = self.allocate_workspace()
            pointers.append(self.address(workspace) if self.workspace_bytes else 0)
        self.launchable(tuple(pointers), stream)

    def _refuse_capture(self, workspace: Any) -> None:
        missing = [self.operation.outputs[position - self.first_output] for position, *_ in self.fresh]
        if self.workspace_bytes and workspace is None:
            missing.append("workspace")
        if missing:
            size = f" (workspace: {self.workspace_bytes} bytes)" if "workspace" in missing else ""
            raise InvalidArgument(
                f"fa2cupy.{self.operation.name} inside a CUDA graph capture: {self.framework.name}'s memory pool "
                f"cannot be used there, so {', '.join(name + '=' for name in missing)} must be given{size}"
            )

    def _check_given(self, pointers: list[int], workspace: Any) -> None:
        names = self.operation.names()
        blocks = [
            (name, pointer, extent)
            for name, pointer, extent in zip(names, pointers, self.extents, strict=True)
            if extent is not None
        ]
        check_overlap(blocks, self.given)
        if workspace is not None:
            block = workspace_block(self.framework, workspace, self.device, self.workspace_bytes)
            check_overlap([*blocks, block], {"workspace"})


class Runnable(Protocol):
    """A `PreparedCall`, or what another way into a framework prepares."""

    def run(self, arrays: list[Any], pointers: list[int], workspace: Any) -> list[Any]: ...


class Signed(Protocol):
    """A framework that can tell the signature of a call, and pointers where it knows them."""

    def signature(self, arrays: list[Any]) -> tuple[tuple[Any, ...], list[int]]: ...


class _PreparedCalls:
    """Signature -> what runs it, bounded. Reads take no lock."""

    def __init__(self, capacity: int) -> None:
        self._calls: dict[Any, Runnable] = {}
        self._capacity, self._lock = capacity, Lock()
        self.get = self._calls.get

    def put(self, key: Any, prepared: Runnable) -> None:
        with self._lock:
            while len(self._calls) >= self._capacity:
                del self._calls[next(iter(self._calls))]
            self._calls[key] = prepared

    def clear(self) -> None:
        with self._lock:
            self._calls.clear()

    def __len__(self) -> int:
        return len(self._calls)


PREPARED = _PreparedCalls(MAX_PREPARED)
framework_by_type: dict[type, Signed] = {}  # types that a prepared call exists for


def signature_key(operation: Operation, signature: tuple[Any, ...], options: RawOptions) -> tuple[Any, ...]:
    """The key of `PREPARED`. With types, since 1 == True: causal=1 is an error after causal=True too.

    Of causal, softmax_scale and deterministic, that is: nothing but a string equals a layout or a dtype, and the values
    of features were checked.
    """
    return operation, options, type(options[0]), type(options[1]), type(options[4]), signature


# Forwards of q, k and v, dense ones and no other arrays, all of `plain_type`, which is JAX's: functions of the three
# that return what `attention` does, by q's dtype and then by return_lse, causal, softmax_scale, layout, dtype, and the
# types of causal and softmax_scale, since 1 == True; where all but causal are their defaults by causal alone, which is
# a bool there. `jax.jit` knows the rest of a signature: what it has not seen yet is checked while it is traced.
plain_type: type | None = None
PLAIN: dict[Any, dict[Any, Callable[[Any, Any, Any], Any]]] = {}


def remember_plain(q: Any, return_lse: bool, options: RawOptions, function: Callable[[Any, Any, Any], Any]) -> None:
    """Let the next forwards with these options, which ask for no feature, be computed by a function at once."""
    global plain_type
    functions = PLAIN.setdefault(q.dtype, {})
    if len(functions) >= MAX_PREPARED:
        functions.clear()
    plain_type, causal = type(q), options[0]
    which = return_lse, *options[:4], type(causal), type(options[1])
    functions[which] = function
    if type(causal) is bool and not return_lse and options[1:4] == (None, "bshd", None):
        functions[causal] = function


def remember(key: tuple[Any, ...], array_type: type, framework: Signed, prepared: Runnable) -> None:
    """Let the next calls with this key, whose first array has this type, take the short way."""
    PREPARED.put(key, prepared)
    framework_by_type[array_type] = framework


_SHARED_BYTES = 1 << 20
_shared_blocks: dict[tuple[str, int], tuple[Any, int]] = {}
_shared_lock = Lock()


def shared_scratch(framework: GpuFramework, device_index: int, size: int, like: Any) -> int | None:
    """The address of memory that calls write and nobody reads: for small ones, whose time is the host's; else None.

    An allocation saved. It is never given back, since a captured graph goes on writing to it.
    """
    if size > _SHARED_BYTES:
        return None
    key = framework.name, device_index
    with _shared_lock:
        if key not in _shared_blocks:
            if framework.is_capturing(framework.stream(device_index)(device_index), device_index):
                return None  # the capture's own memory
            allocate, address = framework.scratch(_SHARED_BYTES, like)
            block = allocate()
            _shared_blocks[key] = block, address(block)
        return _shared_blocks[key][1]


def check_overlap(blocks: list[tuple[str, int, Extent]], written: Set[str]) -> None:
    """Raise if a written block shares memory with any other one. Blocks: (name, pointer, extent)."""
    spans = [(pointer + extent.low, pointer + extent.high) for _, pointer, extent in blocks]
    for i, (start, stop) in enumerate(spans):
        if blocks[i][0] in written:
            for j, (other_start, other_stop) in enumerate(spans):
                # A pair of written blocks is looked at once. Most pairs end here: their addresses do not even meet.
                if other_start < stop and start < other_stop and j != i and not (j < i and blocks[j][0] in written):
                    (name, pointer, extent), (other, other_pointer, other_extent) = blocks[i], blocks[j]
                    if shares_memory(pointer, extent, other_pointer, other_extent):
                        raise InvalidArgument(
                            f"{name} shares memory with {other}: an output must have elements of its own"
                        )


def workspace_block(framework: Framework, workspace: Any, device: Device, needed: int) -> tuple[str, int, Extent]:
    if framework_of(workspace) is not framework:
        raise InvalidType(
            f"workspace is a {describe(workspace)}: an array of {framework.name} is needed, as the inputs are"
        )
    framework.check(workspace, "workspace")
    if framework.device(workspace, "workspace") != device:
        raise InvalidArgument(
            f"workspace is on {framework.device(workspace, 'workspace')} but the inputs are on {device}: "
            "one device is needed"
        )
    extent = framework.extent(workspace)
    pointer = framework.pointer(workspace, "workspace")
    size = 1
    for length in framework.shape(workspace):
        size *= length
    size *= framework.itemsize(workspace)
    if (size and extent.high - extent.low != size) or has_duplicates(extent):
        raise InvalidArgument("workspace is not contiguous: one block of memory is needed")
    if size < needed:
        raise InvalidArgument(f"workspace has {size} bytes: at least {needed} are needed")
    if needed and pointer % WORKSPACE_ALIGNMENT:
        raise InvalidArgument(
            f"workspace starts at address {pointer:#x}: a multiple of {WORKSPACE_ALIGNMENT} is needed"
        )
    return "workspace", pointer, extent
