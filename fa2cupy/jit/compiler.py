"""NVRTC: a `Source` for one architecture becomes a `Cubin`. Needs CuPy and NVRTC, but neither a GPU nor a driver.

`cupy.cuda.nvrtc` is driven directly, because CuPy's own compiler appends an `-arch` of its own, hides the log, and
cannot name sm_90a. The log is read on success too: registers, spills and ptxas' warnings are only there.
"""

from __future__ import annotations

import functools
import importlib
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fa2cupy import env
from fa2cupy.errors import CompilationError, MissingDependency
from fa2cupy.jit import driver
from fa2cupy.jit.source import Source

__all__ = [
    "Cubin",
    "KernelResources",
    "compile",
    "nvrtc_build",
    "nvrtc_path",
    "options",
    "require_cupy",
    "wgmma_objection",
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
    """A compiled source: a cubin, or PTX text (with its final NUL) for a device that is newer than NVRTC.

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
    def warnings(self) -> tuple[str, ...]:
        """The log's warnings: the compiler's, and ptxas' `C75xx` (wgmma serialised and the like)."""
        return tuple(line.strip() for line in self.log.splitlines() if _WARNING.search(line))


def options(arch: str, defines: Defines) -> tuple[str, ...]:
    """Every NVRTC option, for `arch` (sm_80, sm_90a, ...) and macros given by their full names."""
    debug = ("-lineinfo",) if env.debug() else ()
    return (f"-arch={arch}", *_OPTIONS, *debug, *(f"-D{name}={defines[name]}" for name in sorted(defines)))


def compile(source: Source, arch: str, defines: Defines, *, context: str = "") -> Cubin:
    """Compile; CompilationError, with the log and `context`, if NVRTC refuses; MissingDependency without NVRTC."""
    nvrtc = _nvrtc()
    target = _target(arch)
    started = time.perf_counter()
    names = tuple(name.encode() for name, _ in source.headers)
    contents = tuple(content for _, content in source.headers)
    program = nvrtc.createProgram(source.code.decode(), source.path, contents, names)
    try:
        try:
            nvrtc.compileProgram(program, options(target, defines))
        except nvrtc.NVRTCError as error:
            raise _failure(error, nvrtc.getProgramLog(program), source, target, defines, context) from None
        log = nvrtc.getProgramLog(program).rstrip("\0 \n")
        # Both getters strip the last byte, which is NUL in a cubin as well as in PTX.
        image = (nvrtc.getPTX if target.startswith("compute") else nvrtc.getCUBIN)(program) + b"\0"
    finally:
        nvrtc.destroyProgram(program)
    return Cubin(image, log, _resources(log), nvrtc_build(), time.perf_counter() - started)


def _target(arch: str) -> str:
    """`arch`, or the newest virtual architecture below it when this NVRTC is older than the device."""
    match = _ARCH.fullmatch(arch)
    if not match:
        raise CompilationError(f"{arch!r} is not an architecture: it is written like sm_80 or sm_90a")
    number, suffix = int(match[1]), match[2]
    known = _nvrtc().getSupportedArchs()
    if number in known:
        return arch
    older = [candidate for candidate in known if candidate < number]
    if suffix or not older:
        raise CompilationError(
            f"NVRTC {nvrtc_build()} cannot compile for {arch}: it knows {', '.join(map(str, known))}"
        )
    return f"compute_{max(older)}"


def _failure(
    error: Exception, log: str, source: Source, target: str, defines: Defines, context: str
) -> CompilationError | MissingDependency:
    log = log.strip("\0 \n")
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


def require_cupy() -> Any:
    """The cupy module; MissingDependency that says what to install, or what keeps it from being imported."""
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            raise MissingDependency(f"CuPy cannot be imported ({error}): pip install '{driver.pip_extra()}'") from error
        raise MissingDependency(f"CuPy is needed for arrays on a GPU: pip install '{driver.pip_extra()}'") from None
    except ImportError as error:
        raise MissingDependency(f"CuPy cannot be imported: pip install '{driver.pip_extra()}'\n{error}") from error
    except OSError as error:  # CuPy makes its cache directory when it is imported
        raise MissingDependency(
            f"CuPy cannot be imported ({error}): set CUPY_CACHE_DIR to a directory that can be written"
        ) from error
    return cupy


@functools.cache
def _nvrtc() -> Any:
    """`cupy.cuda.nvrtc`, with NVRTC itself loaded."""
    require_cupy()
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()  # the first call finds and loads the library, and has many ways to fail
    except Exception as error:
        raise MissingDependency(f"NVRTC was not found: pip install '{driver.pip_extra()}'\n{error}") from error
    return nvrtc


_build_lock = threading.Lock()
_build = ""


def nvrtc_build() -> str:
    """Release and build of the NVRTC in use, such as "12.9.86 CL-36037853"; loads NVRTC.

    Its own version query has no third number, and 12.9.41 and 12.9.86 make different code; PTX names its maker.
    """
    global _build
    nvrtc = _nvrtc()
    with _build_lock:
        if not _build:
            program = nvrtc.createProgram("", "empty.cu", (), ())
            try:
                nvrtc.compileProgram(program, ("-arch=compute_80",))
                header = nvrtc.getPTX(program).decode(errors="replace")
            except nvrtc.NVRTCError as error:
                raise MissingDependency(
                    f"NVRTC does not work ({error}): pip install '{driver.pip_extra()}'\n{nvrtc.getProgramLog(program)}"
                ) from error
            finally:
                nvrtc.destroyProgram(program)
            version, build = re.search(r"\bV(\d+\.\d+\.\d+)", header), re.search(r"Compiler Build ID: (\S+)", header)
            fallback = ".".join(map(str, nvrtc.getVersion()))
            _build = f"{version[1] if version else fallback} {build[1] if build else ''}".rstrip()
        return _build


def nvrtc_is_loaded() -> bool:
    """Whether this process has paid for NVRTC already."""
    return bool(_build)


def wgmma_objection(build: str) -> str:
    """Why an NVRTC (its `nvrtc_build`) is not to compile wgmma kernels, or the empty string.

    sm_90a came with 12.0. 12.5 and 12.6 put waits into loops of wgmma, which makes them slow; 12.8.0 to 12.9.0 have
    been reported to miscompile causal attention. 12.9.86 (CUDA 12.9.1) and everything after it are good.
    """
    version = tuple(int(number) for number in build.split()[0].split("."))
    if version < (12, 0):
        return f"NVRTC {build} does not know sm_90a"
    if (12, 5) <= version < (12, 7):
        return f"NVRTC {build} makes slow code of wgmma loops"
    if (12, 8) <= version < (12, 9, 86):
        return f"NVRTC {build} may make wrong code of wgmma loops"
    return ""


def nvrtc_path() -> str | None:
    """File of the NVRTC in use, or None where CuPy did not find it through cuda-pathfinder (conda). Loads NVRTC."""
    _nvrtc()
    try:
        path = importlib.import_module("cuda.pathfinder").load_nvidia_dynamic_lib("nvrtc").abs_path
    except Exception:  # no pathfinder, or it sees no NVRTC where CuPy's own search does: merely nothing to remember
        return None
    return str(path) if path else None
