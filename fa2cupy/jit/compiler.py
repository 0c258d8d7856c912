"""A `Source` for one architecture becomes a `Cubin`. Needs NVRTC, but neither a GPU nor a driver.

NVRTC's log is read on success too: registers, spills and ptxas' warnings are only there.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from fa2cupy import env
from fa2cupy.errors import CompilationError, MissingDependency
from fa2cupy.jit import driver, nvrtc, targets
from fa2cupy.jit.nvrtc import NvrtcError
from fa2cupy.jit.source import Source
from fa2cupy.locks import Lock

__all__ = [
    "Cubin",
    "Defines",
    "KernelResources",
    "compile",
    "nvrtc_build",
    "nvrtc_is_loaded",
    "nvrtc_path",
    "options",
]

ELF_MAGIC = b"\x7fELF"
_OPTIONS = ("-std=c++17", "-ftz=true", "-default-device", "--ptxas-options=-v")
_ARCH = re.compile(r"sm_(\d+)([af]?)")

Defines = Mapping[str, int | str]


@dataclass(frozen=True, slots=True)
class KernelResources:
    """What ptxas says of one kernel: registers per thread, and bytes.

    `spill_bytes` is the larger of stores and loads, so that 0 means no spill at all.
    """

    registers: int
    spill_bytes: int
    static_shared: int
    stack: int


@dataclass(frozen=True, slots=True)
class Cubin:
    """A compiled source: a cubin, or PTX text (with its final NUL), which the driver assembles.

    `kernels` maps names to resources, and is empty for PTX; `build` is NVRTC's ("12.9.86 CL-36037853").
    """

    image: bytes = field(repr=False)
    log: str = field(repr=False)
    kernels: Mapping[str, KernelResources]
    build: str
    seconds: float

    @property
    def is_ptx(self) -> bool:
        return not self.image.startswith(ELF_MAGIC)

    @property
    def serialised(self) -> bool:
        """Whether ptxas made every wgmma wait for the one before it (C7510, C7515, ...), which is slow."""
        return any("wgmma" in warning and "serialized" in warning for warning in self.warnings)

    @property
    def warnings(self) -> tuple[str, ...]:
        """The log's warnings: the compiler's, and ptxas' `C75xx` (wgmma serialised and the like)."""
        return tuple(line.strip() for line in self.log.splitlines() if _WARNING.search(line))


def options(arch: str, defines: Defines) -> tuple[str, ...]:
    """Every NVRTC option, for `arch` (sm_80, compute_90a, ...) and macros given by their full names."""
    debug = ("-lineinfo",) if env.debug() else ()
    return (f"-arch={arch}", *_OPTIONS, *debug, *(f"-D{name}={defines[name]}" for name in sorted(defines)))


def compile(source: Source, arch: str, defines: Defines, *, context: str = "") -> Cubin:
    """Compile; CompilationError, with the log and `context`, if NVRTC refuses; MissingDependency without NVRTC."""
    loaded = nvrtc.load()
    target = _target(arch)
    started = time.perf_counter()
    try:
        image, log = loaded.compile(
            source.code, source.path, source.headers, options(target, defines), ptx=target.startswith("compute")
        )
    except NvrtcError as error:
        raise _failure(error, source, target, defines, context) from None
    log = log.rstrip("\0 \n")
    return Cubin(image, log, _resources(log), nvrtc_build(), time.perf_counter() - started)


def _target(arch: str) -> str:
    """`arch`, or a virtual architecture: its own where the driver is to assemble it, the newest below it where NVRTC
    is older than the device."""
    match = _ARCH.fullmatch(arch)
    if not match:
        raise CompilationError(f"{arch!r} is not an architecture: it is written like sm_80 or sm_90a")
    number, suffix = int(match[1]), match[2]
    known = nvrtc.load().architectures()
    if number in known:
        return targets.target(arch, nvrtc_build())
    older = [candidate for candidate in known if candidate < number]
    if suffix or not older:
        raise CompilationError(
            f"NVRTC {nvrtc_build()} cannot compile for {arch}: it knows {', '.join(map(str, known))}"
        )
    return f"compute_{max(older)}"


def _failure(
    error: NvrtcError, source: Source, target: str, defines: Defines, context: str
) -> CompilationError | MissingDependency:
    log = error.log.strip("\0 \n")
    if "libnvrtc-builtins" in log or "nvrtc-builtins64" in log:
        return MissingDependency(f"NVRTC is installed incompletely: pip install '{driver.pip_extra()}'\n{log}")
    macros = " ".join(f"{name}={defines[name]}" for name in sorted(defines))
    message = f"{source.path} does not compile for {target} with NVRTC {nvrtc_build()} ({error}); {macros}"
    return CompilationError(message.rstrip("; "), log=log, context=context)


# ptxas -v. Lines of functions that are not kernels lack "Compiling entry function" and end up under no name.
_WARNING = re.compile(r"\bwarning\b|\(C7\d{3}\)|Potential Performance Loss", re.IGNORECASE)
_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def _resources(log: str) -> dict[str, KernelResources]:
    kernels: dict[str, KernelResources] = {}
    entry = function = ""
    frame = (0, 0)
    for line in log.splitlines():
        if found := _ENTRY.search(line):
            entry, frame = found[1], (0, 0)
        elif found := _PROPERTIES.search(line):
            function = found[1]
        elif (found := _FRAME.search(line)) and function == entry:
            frame = int(found[1]), max(int(found[2]), int(found[3]))
        elif (found := _USED.search(line)) and entry:
            shared = _SHARED.search(line)
            kernels[entry] = KernelResources(int(found[1]), frame[1], int(shared[1]) if shared else 0, frame[0])
            entry = ""
    return kernels


_build_lock = Lock()
_build = ""


def nvrtc_build() -> str:
    """Release and build of the NVRTC in use, such as "12.9.86 CL-36037853"; loads NVRTC.

    Its own version query has no third number, and 12.9.41 and 12.9.86 make different code; PTX names its maker.
    """
    global _build
    loaded = nvrtc.load()
    with _build_lock:
        if not _build:
            try:
                ptx, _ = loaded.compile(b"", "empty.cu", (), ("-arch=compute_80",), ptx=True)
            except NvrtcError as error:
                raise MissingDependency(
                    f"NVRTC does not work ({error}): pip install '{driver.pip_extra()}'\n{error.log}"
                ) from error
            header = ptx.decode(errors="replace")
            version, build = re.search(r"\bV(\d+\.\d+\.\d+)", header), re.search(r"Compiler Build ID: (\S+)", header)
            fallback = ".".join(map(str, loaded.version()))
            _build = f"{version[1] if version else fallback} {build[1] if build else ''}".rstrip()
        return _build


def nvrtc_is_loaded() -> bool:
    """Whether this process has paid for NVRTC already."""
    return bool(_build)


def nvrtc_path() -> str | None:
    """File of the NVRTC in use, or None where that is not known: merely nothing to remember. Loads NVRTC."""
    return nvrtc.load().path()
