"""The CUDA driver (libcuda) by ctypes: what the device is, which context is current, and the launch itself.

Everything is looked up on first use; importing this module loads nothing. Handles are plain integers.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from ctypes import byref, c_char_p, c_int, c_uint, c_void_p
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from fa2cupy.declared import GPU_TOO_OLD
from fa2cupy.errors import LaunchError, MissingDependency, UnsupportedDevice
from fa2cupy.locks import Lock

__all__ = [
    "DeviceInfo",
    "LaunchConfig",
    "Launcher",
    "call",
    "context_check",
    "device_count",
    "device_guard",
    "device_info",
    "driver_version",
    "launch",
    "launch_kernel_ex",
    "load_function",
    "pip_extra",
    "set_max_dynamic_shared_memory",
]

MIN_COMPUTE_CAPABILITY = (8, 0)

# CUdevice_attribute and CUfunction_attribute, cuda.h
_MULTIPROCESSOR_COUNT = 16
_L2_CACHE_SIZE = 38
_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76
_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97
_FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

_SUCCESS = 0
_NO_DEVICE = 100


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What a plan needs to know of a GPU. `cc` is (major, minor); the two sizes are bytes."""

    index: int
    name: str
    cc: tuple[int, int]
    sm_count: int
    shared_mem_optin: int
    l2_bytes: int


def _library_names() -> tuple[str, ...]:
    return ("nvcuda.dll",) if os.name == "nt" else ("libcuda.so.1",)


def _open() -> tuple[ctypes.CDLL, ctypes.PyDLL]:
    for name in _library_names():
        try:
            return ctypes.CDLL(name), ctypes.PyDLL(name)
        except OSError:
            continue
    raise MissingDependency(
        f"no CUDA driver: {_library_names()[0]} was not found; install the NVIDIA driver "
        "(arrays of NumPy, and of torch and JAX on the CPU, need none)"
    )


class _Driver:
    """The entry points of libcuda, initialised (cuInit)."""

    def __init__(self) -> None:
        if _used_before_fork:
            raise LaunchError(
                "CUDA cannot be used in a process that was forked from one that has used it: start it with the "
                "'spawn' or 'forkserver' method"
            )
        library, gil_held = _open()
        self.launch_kernel_ex: Callable[..., int] = library.cuLaunchKernelEx
        # Never blocks, so the GIL need not be given up and taken back (about 30 ns each way).
        self.get_current_context: Callable[..., int] = gil_held.cuCtxGetCurrent
        self.push_context: Callable[..., int] = library.cuCtxPushCurrent_v2
        self.pop_context: Callable[..., int] = library.cuCtxPopCurrent_v2
        self._library = library
        # What CuPy, torch and JAX use; kept for the life of the process.
        self.primary_contexts: dict[int, int] = {}
        self._lock = Lock()
        status = library.cuInit(0)
        self.usable = status == _SUCCESS
        if not self.usable and status != _NO_DEVICE:
            raise MissingDependency(
                f"the CUDA driver cannot be initialised: {self.describe(status)}; reinstall the NVIDIA driver, "
                "or restart the machine if it was just upgraded"
            )

    def describe(self, status: int) -> str:
        """`CUDA_ERROR_INVALID_VALUE (1: invalid argument)` for a CUresult."""
        texts = []
        for function in ("cuGetErrorName", "cuGetErrorString"):
            text = c_char_p()
            getattr(self._library, function)(c_int(status), byref(text))
            texts.append(text.value.decode(errors="replace") if text.value else "unknown error")
        return f"{texts[0]} ({status}: {texts[1]})"

    def call(self, name: str, *args: Any) -> None:
        """Call an entry point that is not hot; LaunchError unless it returns CUDA_SUCCESS."""
        status = getattr(self._library, name)(*args)
        if status != _SUCCESS:
            raise LaunchError(f"{name}: {self.describe(status)}")

    def device(self, index: int) -> c_int:
        """CUdevice of an ordinal; UnsupportedDevice if there is none."""
        count = self.device_count()
        if not 0 <= index < count:
            raise UnsupportedDevice(
                f"device {index} does not exist: this machine has {count} CUDA device{'' if count == 1 else 's'}"
            )
        device = c_int()
        self.call("cuDeviceGet", byref(device), c_int(index))
        return device

    def device_count(self) -> int:
        if not self.usable:
            return 0
        count = c_int()
        self.call("cuDeviceGetCount", byref(count))
        return count.value

    def retain_primary_context(self, index: int) -> int:
        """Handle of a device's primary context, which is made if it does not exist yet."""
        device = self.device(index)
        with self._lock:
            context = self.primary_contexts.get(index)
            if context is None:
                handle = c_void_p()
                self.call("cuDevicePrimaryCtxRetain", byref(handle), device)
                context = self.primary_contexts[index] = handle.value or 0
        return context


@functools.cache
def _driver() -> _Driver:
    return _Driver()


_used_before_fork = False


def _after_fork_in_child() -> None:
    """CUDA that was initialised in the parent is of no use here; else the child starts like any other process."""
    global _used_before_fork
    _used_before_fork = _used_before_fork or _driver.cache_info().currsize > 0
    _driver.cache_clear()
    device_info.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def call(name: str, *args: Any) -> None:
    """Call an entry point of libcuda; LaunchError unless it succeeds. MissingDependency without a driver."""
    _driver().call(name, *args)


def driver_version() -> tuple[int, int]:
    """Newest CUDA version that the driver supports, such as (12, 4). MissingDependency without a driver.

    Does not initialise CUDA, after which a forked child could not use it.
    """
    library, _ = _open()
    version = c_int()
    if library.cuDriverGetVersion(byref(version)) != _SUCCESS:
        raise MissingDependency("the CUDA driver does not tell its version; reinstall the NVIDIA driver")
    return version.value // 1000, version.value % 1000 // 10


def device_count() -> int:
    """Number of CUDA devices that this process may use. MissingDependency without a driver."""
    return _driver().device_count()


def pip_extra() -> str:
    """The extra of fa2cupy that suits this machine's driver: CUDA 13 came with R580."""
    try:
        return "fa2cupy[cuda13]" if driver_version() >= (13, 0) else "fa2cupy[cuda12]"
    except MissingDependency:
        return "fa2cupy[cuda12]"


@functools.cache
def device_info(index: int) -> DeviceInfo:
    """Describe a device. UnsupportedDevice if it does not exist or is older than sm_80."""
    driver = _driver()
    device = driver.device(index)

    def attribute(number: int) -> int:
        value = c_int()
        driver.call("cuDeviceGetAttribute", byref(value), c_int(number), device)
        return value.value

    name = ctypes.create_string_buffer(256)
    driver.call("cuDeviceGetName", name, c_int(len(name)), device)
    info = DeviceInfo(
        index=index,
        name=name.value.decode(errors="replace"),
        cc=(attribute(_COMPUTE_CAPABILITY_MAJOR), attribute(_COMPUTE_CAPABILITY_MINOR)),
        sm_count=attribute(_MULTIPROCESSOR_COUNT),
        shared_mem_optin=attribute(_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
        l2_bytes=attribute(_L2_CACHE_SIZE),
    )
    if info.cc < MIN_COMPUTE_CAPABILITY:
        raise GPU_TOO_OLD.error(index=index, name=info.name, major=info.cc[0], minor=info.cc[1])
    return info


class _Current(threading.local):
    """Where cuCtxGetCurrent writes, and a reference to it; one per thread."""

    def __init__(self) -> None:
        context = c_void_p()
        self.pair = context, byref(context)


_current = _Current()


class _AlreadyCurrent:
    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


class _PushedContext:
    __slots__ = ("_context", "_driver")

    def __init__(self, driver: _Driver, context: int) -> None:
        self._driver, self._context = driver, context

    def __enter__(self) -> None:
        status = self._driver.push_context(c_void_p(self._context))
        if status != _SUCCESS:
            raise LaunchError(f"cuCtxPushCurrent: {self._driver.describe(status)}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        popped = c_void_p()
        status = self._driver.pop_context(byref(popped))
        if status != _SUCCESS and error is None:
            raise LaunchError(f"cuCtxPopCurrent: {self._driver.describe(status)}")


_ALREADY_CURRENT = _AlreadyCurrent()


def context_check(index: int) -> Callable[[], bool]:
    """A function that tells whether device `index`'s primary context is current in the calling thread: cheaply."""
    driver = _driver()
    context = driver.primary_contexts.get(index) or driver.retain_primary_context(index)
    get_current_context = driver.get_current_context

    def is_current() -> bool:
        current, reference = _current.pair
        get_current_context(reference)
        return current.value == context

    return is_current


def device_guard(index: int) -> AbstractContextManager[None]:
    """`with device_guard(i):` runs its body with device i's primary context current, then restores this thread's.

    Enter it at once, in the thread that called: whether there is anything to do is decided here.
    """
    driver = _driver()
    current, reference = _current.pair
    driver.get_current_context(reference)
    context = driver.primary_contexts.get(index) or driver.retain_primary_context(index)
    if current.value == context:
        return _ALREADY_CURRENT
    return _PushedContext(driver, context)


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Grid in blocks, block in threads, dynamic shared memory in bytes.

    `cluster` is what the source's `__cluster_dims__` says; the launch itself does not need it. `overlaps_previous`: the
    kernel waits itself (griddepcontrol.wait) for the one before it in the stream, and may start beside it.
    """

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int] = (1, 1, 1)
    shared_mem_bytes: int = 0
    overlaps_previous: bool = False


class _CUlaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h (72 bytes), of a value that is an int."""

    _fields_ = (("id", c_uint), ("value", c_int * 17))  # the value at byte 8


class _CUlaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h (56 bytes)."""

    _fields_ = (
        ("gridDimX", c_uint),
        ("gridDimY", c_uint),
        ("gridDimZ", c_uint),
        ("blockDimX", c_uint),
        ("blockDimY", c_uint),
        ("blockDimZ", c_uint),
        ("sharedMemBytes", c_uint),
        ("hStream", c_void_p),
        ("attrs", ctypes.POINTER(_CUlaunchAttribute)),
        ("numAttrs", c_uint),
    )


_PROGRAMMATIC_STREAM_SERIALIZATION = 6
# What such a launch needs inside a graph capture; elsewhere 11.8.
_OVERLAP_DRIVER = (12, 3)

# Both caches of a Launcher hold a few dozen bytes per entry; a caller with ever new streams or addresses starts over.
_MAX_CACHED = 256


def launch_kernel_ex() -> Callable[..., int]:
    """cuLaunchKernelEx, for the arguments of `Launcher.arguments`; returns a CUresult."""
    return _driver().launch_kernel_ex


class Launcher:
    """A kernel with its launch configuration: `launcher(params_address, stream)`.

    The kernel's one parameter is a struct by value at `params_address`, copied by the driver before the call returns.
    The device's primary context must be current (`device_guard`). Any number of threads may call: what ctypes needs
    is built once per stream and per address and then only read.

    cuLaunchKernelEx and not cuLaunchKernel: the same launch with 4 arguments to convert in place of 11, 0.35 us less.
    """

    __slots__ = ("_configs", "_function", "_launch", "_params", "config", "function")

    def __init__(self, function: int, config: LaunchConfig) -> None:
        self.function, self.config = function, config
        self._function = c_void_p(function)
        self._launch = _driver().launch_kernel_ex
        self._configs: dict[int, Any] = {}
        self._params: dict[int, Any] = {}

    def __call__(self, params_address: int, stream: int) -> None:
        try:
            config, params = self._configs[stream], self._params[params_address]
        except KeyError:
            config, params = self._pack_config(stream), self._pack_params(params_address)
        status = self._launch(config, self._function, params, None)
        if status:
            self.fail(status)

    def arguments(self, block: ctypes.Array[Any], offset: int, stream: int) -> tuple[Any, ...]:
        """What `launch_kernel_ex()` takes for a launch whose parameters do not change; they are kept with it.

        block: the parameters, and at `offset` bytes the address of their struct: the driver's array of pointers.
        """
        config = self._configs.get(stream)
        return config or self._pack_config(stream), self._function, byref(block, offset), None

    def _pack_config(self, stream: int) -> Any:
        config = self.config
        attribute = None
        if config.overlaps_previous and driver_version() >= _OVERLAP_DRIVER:
            attribute = ctypes.pointer(_CUlaunchAttribute(_PROGRAMMATIC_STREAM_SERIALIZATION, (0, 1)))
        packed = byref(
            _CUlaunchConfig(
                *config.grid, *config.block, config.shared_mem_bytes, stream, attribute, int(attribute is not None)
            )
        )
        if len(self._configs) >= _MAX_CACHED:
            self._configs = {}
        self._configs[stream] = packed
        return packed

    def _pack_params(self, params_address: int) -> Any:
        packed = byref((c_void_p * 1)(params_address))  # kernelParams: an array of pointers, ours has one
        if len(self._params) >= _MAX_CACHED:
            self._params = {}
        self._params[params_address] = packed
        return packed

    def fail(self, status: int) -> None:
        """LaunchError for what a launch returned."""
        raise LaunchError(
            f"cuLaunchKernelEx: {_driver().describe(status)}, launching {self.config}; "
            "the error may come from work queued earlier on this device"
        )


def launch(function: int, config: LaunchConfig, params_address: int, stream: int) -> None:
    """Launch once; where the same launch comes back, keep a `Launcher`."""
    Launcher(function, config)(params_address, stream)


def load_function(image: bytes, name: str) -> int:
    """CUfunction of a cubin or of PTX with its final NUL, in the current context. The module is never unloaded."""
    driver = _driver()
    module, function = c_void_p(), c_void_p()
    driver.call("cuModuleLoadData", byref(module), image)
    driver.call("cuModuleGetFunction", byref(function), module, name.encode())
    return function.value or 0


def set_max_dynamic_shared_memory(function: int, size: int) -> None:
    """Let a function use `size` bytes of dynamic shared memory on the current device; needed above 48 KiB."""
    _driver().call("cuFuncSetAttribute", c_void_p(function), c_int(_FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES), c_int(size))
