"""From a source to something that can be launched: memory cache, disk cache, NVRTC, module on a device.

Where CUDA binaries come from and how they are loaded; it does not know what they compute.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fa2cupy import env, log
from fa2cupy.errors import CompilationError, LaunchError, MissingDependency
from fa2cupy.jit import cache, compiler, driver, modules, targets
from fa2cupy.jit import source as source_module
from fa2cupy.jit.cache import Entry
from fa2cupy.jit.compiler import Cubin, Defines, KernelResources
from fa2cupy.jit.driver import LaunchConfig
from fa2cupy.jit.source import Source
from fa2cupy.locks import Lock

__all__ = ["Kernel", "LaunchConfig", "build", "expected_nvrtc_build", "kernel", "kernels"]


def build(source: Source, arch: str, defines: Defines, *, context: str = "") -> Entry:
    """The binary of a source, from the disk cache or else compiled (and stored).

    NVRTC is loaded only when something has to be compiled, or when its build is not known yet. Where there is none,
    what any NVRTC made for this source will do: a cache may have been filled elsewhere.
    """
    disk = cache.open_cache()

    def key(nvrtc_build: str) -> str:
        return cache.cache_key(source, targets.target(arch, nvrtc_build), defines, nvrtc_build)

    if not compiler.nvrtc_is_loaded() and (remembered := disk.recall_nvrtc()):
        entry = disk.load(key(remembered))
        if entry is not None:
            return entry
    try:
        nvrtc_build = compiler.nvrtc_build()
    except MissingDependency:
        for remembered in _usable_builds(disk):
            entry = disk.load(key(remembered))
            if entry is not None:
                return entry
        raise
    if not _driver_objection(nvrtc_build, is_ptx=False):  # else another process may well find a better one
        disk.remember_nvrtc(compiler.nvrtc_path(), nvrtc_build)
    entry = disk.load(key(nvrtc_build))
    if entry is not None:
        return entry
    with disk.lock(key(nvrtc_build)):
        entry = disk.load(key(nvrtc_build))  # by the process that held the lock
        if entry is not None:
            return entry
        cubin = compiler.compile(source, arch, defines, context=context)
        path = disk.store(key(nvrtc_build), cubin, {"source": source.path, "arch": arch, "defines": dict(defines)})
        return Entry(cubin, path, compiled=True)


def expected_nvrtc_build() -> str:
    """Build of the NVRTC in use, or, before this process has loaded one, of the one that the cache remembers.

    Loads NVRTC where neither is known: then whatever is asked for next has to be compiled anyway. Where there is none
    to load, the latest that the cache has heard of.
    """
    disk = cache.open_cache()
    if not compiler.nvrtc_is_loaded() and (remembered := disk.recall_nvrtc()):
        return remembered
    try:
        return compiler.nvrtc_build()
    except MissingDependency:
        for remembered in _usable_builds(disk):
            return remembered
        raise


def _usable_builds(disk: cache.DiskCache) -> list[str]:
    """Of all NVRTC that ever filled the cache, latest first, without those that are too new for the driver."""
    return [build for build in disk.remembered_builds() if not _driver_objection(build, is_ptx=False)]


def _discard(source: Source, arch: str, defines: Defines, cubin: Cubin) -> None:
    key = cache.cache_key(source, targets.target(arch, cubin.build), defines, cubin.build)
    cache.open_cache().discard(key)


class Kernel:
    """One entry point of a binary, loaded on any number of devices."""

    def __init__(self, name: str, source: Source, arch: str, defines: Defines, context: str, entry: Entry) -> None:
        self.name, self.arch = name, arch
        self._source, self._defines, self._context = source, dict(defines), context
        self._entry = entry
        self._functions: dict[int, int] = {}
        self._shared_memory: dict[int, int] = {}
        self._modules: list[object] = []  # unloaded when they die
        self._lock = Lock()

    def __repr__(self) -> str:
        return f"Kernel({self.name!r}, {self._source.path!r}, {self.arch!r}, {self.resources})"

    @property
    def cubin(self) -> Cubin:
        return self._entry.cubin

    @property
    def resources(self) -> KernelResources | None:
        """Registers, spills, stack and static shared memory; None where the driver compiles PTX."""
        return self.cubin.kernels.get(self.name)

    def function(self, device_index: int, shared_mem_bytes: int = 0) -> int:
        """CUfunction on a device, allowed to use that much dynamic shared memory. LaunchError if it cannot be loaded.

        Not for the hot path, and not inside a graph capture: the first call on a device loads the module.
        """
        with self._lock:
            function = self._functions.get(device_index)
            if function is None:
                function = self._functions[device_index] = self._load(device_index)
            if shared_mem_bytes > self._shared_memory.get(device_index, 0):
                with driver.device_guard(device_index):
                    driver.set_max_dynamic_shared_memory(function, shared_mem_bytes)
                self._shared_memory[device_index] = shared_mem_bytes
            return function

    def _load(self, device_index: int) -> int:
        driver.device_info(device_index)
        if objection := _driver_objection(self.cubin.build, self.cubin.is_ptx):
            raise MissingDependency(objection)
        if self.cubin.serialised:
            log.warn_once(
                f"NVRTC {self.cubin.build} serialises wgmma in {self.name}, which took 0.4 of the forward's speed when "
                "it was measured (docs/debugging.md); a driver of CUDA 13.0, or NVRTC 12.9.86, or newer ones end that"
            )
        try:
            try:
                return self._load_module(device_index)
            except modules.ImageError:
                if self._entry.compiled:
                    raise
            # What was on disk is whole by its digest, and yet this driver refuses it: make it anew, once.
            _discard(self._source, self.arch, self._defines, self.cubin)
            self._entry = build(self._source, self.arch, self._defines, context=self._context)
            return self._load_module(device_index)
        except LaunchError as error:
            raise LaunchError(
                f"{self.name} of {self._source.path} for {self.arch} cannot be loaded on device {device_index}: {error}"
            ) from error

    def _load_module(self, device_index: int) -> int:
        path = None if self.cubin.is_ptx else self._entry.path
        function, owner = modules.load(self.cubin.image, path, self.name, device_index)
        self._modules.append(owner)
        return function


def _driver_objection(nvrtc_build: str, is_ptx: bool) -> str:
    """Why this machine's driver will not take what an NVRTC made, or the empty string (also without a driver).

    Cubins work across a major version, PTX only up to the driver's own version.
    """
    try:
        supported = driver.driver_version()
    except MissingDependency:
        return ""
    made = tuple(int(part) for part in nvrtc_build.split()[0].split(".")[:2])
    if made[0] <= supported[0] and not (is_ptx and made > supported):
        return ""
    reason = " (this GPU is newer than NVRTC, so the driver itself has to compile for it)" if is_ptx else ""
    return (
        f"NVRTC {made[0]}.{made[1]} is too new for this machine's driver, which supports CUDA "
        f"{supported[0]}.{supported[1]}{reason}: upgrade the driver, or uninstall the CuPy and the nvidia-cuda-nvrtc "
        f"that are there and pip install '{driver.pip_extra()}'"
    )


class _Memo:
    """A dictionary whose missing values are made once, under one lock per key."""

    def __init__(self) -> None:
        self._values: dict[Hashable, Any] = {}
        self._locks: dict[Hashable, Lock] = {}
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        with contextlib.suppress(KeyError):
            return self._values[key]
        with self._lock:
            lock = self._locks.setdefault(key, Lock())
        with lock:
            if key not in self._values:
                self._values[key] = make()
            return self._values[key]

    def clear(self) -> None:
        with self._lock:
            self._values, self._locks = {}, {}


_entries = _Memo()
_kernels = _Memo()


def kernel(source: str | Source, name: str, arch: str, defines: Defines, *, context: str = "") -> Kernel:
    """The kernel `name` of a source of cuda_src ("sm80/flash_fwd.cu"), compiled for `arch` with these macros.

    From memory, else from disk, else from NVRTC; any number of threads may ask. `context`, the printed plan, goes into
    a CompilationError. Other errors: MissingDependency.
    """
    key = (source, arch, tuple(sorted(defines.items())), env.debug())

    def make() -> Kernel:
        def make_entry() -> tuple[Source, Entry]:
            loaded = source if isinstance(source, Source) else source_module.load(source)
            return loaded, build(loaded, arch, defines, context=context)

        loaded, entry = _entries.get(key, make_entry)
        if entry.cubin.kernels and name not in entry.cubin.kernels:
            found = ", ".join(sorted(entry.cubin.kernels))
            raise CompilationError(f"{loaded.path} has no kernel {name}: it has {found}", context=context)
        return Kernel(name, loaded, arch, defines, context, entry)

    found: Kernel = _kernels.get((name, key), make)
    return found


def kernels(requests: Sequence[tuple[str | Source, str, str, Defines]], *, context: str = "") -> tuple[Kernel, ...]:
    """`kernel` for several (source, name, arch, defines) at once: what has to be compiled is compiled side by side."""
    with ThreadPoolExecutor(max(1, len(requests)), thread_name_prefix="fa2cupy-nvrtc") as pool:
        return tuple(pool.map(lambda request: kernel(*request, context=context), requests))
