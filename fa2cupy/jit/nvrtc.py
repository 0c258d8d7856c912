"""NVRTC itself: through CuPy where that is installed, else by ctypes, from the wheels that torch and JAX bring.

Both are driven in the same few ways. `cupy.cuda.nvrtc` and not CuPy's compiler, which appends an `-arch` of its own,
hides the log, and cannot name sm_90a.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

from fa2cupy.errors import MissingDependency
from fa2cupy.jit import driver
from fa2cupy.jit.cupy import cupy_or_none

__all__ = ["Nvrtc", "NvrtcError", "load"]


class NvrtcError(Exception):
    """A program does not compile; `log` says why."""

    def __init__(self, message: str, log: str) -> None:
        self.log = log
        super().__init__(message)


class Nvrtc(ABC):
    """A loaded NVRTC. Any number of threads may compile; the GIL is given up meanwhile."""

    @abstractmethod
    def version(self) -> tuple[int, int]:
        """Without the third number, which only `compiler.nvrtc_build` finds out."""

    @abstractmethod
    def architectures(self) -> list[int]:
        """Compute capabilities that it can compile for: 80, 90, ..."""

    @abstractmethod
    def compile(
        self, code: bytes, name: str, headers: Sequence[tuple[str, bytes]], options: Sequence[str], *, ptx: bool
    ) -> tuple[bytes, str]:
        """(cubin, or PTX with its final NUL; the log, which is worth reading on success too). NvrtcError."""

    @abstractmethod
    def path(self) -> str | None:
        """The library's file, or None where nobody can tell."""


@functools.cache
def load() -> Nvrtc:
    """The NVRTC of this process. MissingDependency, with every reason, if there is none."""
    reasons = []
    if cupy_or_none() is not None:
        try:
            return _CupyNvrtc()
        except Exception as error:  # the first call finds and loads the library, and has many ways to fail
            reasons.append(str(error))
    for candidate in _candidates():
        try:
            return _CtypesNvrtc(candidate)
        except (OSError, AttributeError) as error:
            # That a name is nowhere to be found says no more than the sentence above it.
            reasons += [str(error)] if os.sep in candidate else []
    details = "\n".join(["", *reasons])
    raise MissingDependency(f"NVRTC was not found: pip install '{driver.pip_extra()}'{details}")


class _CupyNvrtc(Nvrtc):
    def __init__(self) -> None:
        from cupy.cuda import nvrtc

        self._nvrtc = nvrtc
        nvrtc.getVersion()

    def version(self) -> tuple[int, int]:
        major, minor = self._nvrtc.getVersion()
        return major, minor

    def architectures(self) -> list[int]:
        return list(self._nvrtc.getSupportedArchs())

    def compile(
        self, code: bytes, name: str, headers: Sequence[tuple[str, bytes]], options: Sequence[str], *, ptx: bool
    ) -> tuple[bytes, str]:
        nvrtc = self._nvrtc
        names = tuple(header.encode() for header, _ in headers)
        program = nvrtc.createProgram(code.decode(), name, tuple(content for _, content in headers), names)
        try:
            try:
                nvrtc.compileProgram(program, tuple(options))
            except nvrtc.NVRTCError as error:
                raise NvrtcError(str(error), nvrtc.getProgramLog(program)) from None
            # Both getters strip the last byte, which is NUL in a cubin as well as in PTX.
            image = (nvrtc.getPTX if ptx else nvrtc.getCUBIN)(program) + b"\0"
            return image, nvrtc.getProgramLog(program)
        finally:
            nvrtc.destroyProgram(program)

    def path(self) -> str | None:
        """None where CuPy did not find it through cuda-pathfinder (conda)."""
        try:
            found = importlib.import_module("cuda.pathfinder").load_nvidia_dynamic_lib("nvrtc").abs_path
        except Exception:  # no pathfinder, or it sees no NVRTC where CuPy's own search does
            return None
        return str(found) if found else None


class _CtypesNvrtc(Nvrtc):
    def __init__(self, name: str) -> None:
        self._library = library = ctypes.CDLL(name)
        self._name = name
        library.nvrtcGetErrorString.restype = c_char_p
        for function in ("nvrtcGetCUBIN", "nvrtcGetSupportedArchs"):  # of 11.1 and 11.2
            getattr(library, function)

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise NvrtcError(f"{self._library.nvrtcGetErrorString(status).decode()} ({status})", "")

    def version(self) -> tuple[int, int]:
        major, minor = c_int(), c_int()
        self._call("nvrtcVersion", byref(major), byref(minor))
        return major.value, minor.value

    def architectures(self) -> list[int]:
        count = c_int()
        self._call("nvrtcGetNumSupportedArchs", byref(count))
        found = (c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", found)
        return list(found)

    def compile(
        self, code: bytes, name: str, headers: Sequence[tuple[str, bytes]], options: Sequence[str], *, ptx: bool
    ) -> tuple[bytes, str]:
        program = c_void_p()
        contents = (c_char_p * len(headers))(*(content for _, content in headers))
        names = (c_char_p * len(headers))(*(header.encode() for header, _ in headers))
        self._call("nvrtcCreateProgram", byref(program), code, name.encode(), len(headers), contents, names)
        try:
            encoded = (c_char_p * len(options))(*(option.encode() for option in options))
            try:
                self._call("nvrtcCompileProgram", program, len(options), encoded)
            except NvrtcError as error:
                raise NvrtcError(str(error), self._text(program, "ProgramLog")) from None
            image = self._read(program, "PTX" if ptx else "CUBIN")
            return image, self._text(program, "ProgramLog")
        finally:
            self._library.nvrtcDestroyProgram(byref(program))

    def _read(self, program: c_void_p, what: str) -> bytes:
        size = c_size_t()
        self._call(f"nvrtcGet{what}Size", program, byref(size))
        buffer = ctypes.create_string_buffer(max(1, size.value))
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw[: size.value]

    def _text(self, program: c_void_p, what: str) -> str:
        return self._read(program, what).decode(errors="replace")

    def path(self) -> str | None:
        if Path(self._name).is_absolute():
            return self._name
        try:
            return _file_of(self._library.nvrtcVersion)
        except (AttributeError, OSError, TypeError):  # no dladdr here
            return None


class _DlInfo(ctypes.Structure):
    _fields_ = (("fname", c_char_p), ("fbase", c_void_p), ("sname", c_char_p), ("saddr", c_void_p))


def _file_of(function: Any) -> str | None:
    """The shared library that a C function lies in."""
    info = _DlInfo()
    if not ctypes.CDLL(None).dladdr(ctypes.cast(function, c_void_p), byref(info)) or not info.fname:
        return None
    return os.path.realpath(os.fsdecode(info.fname))


_MAJORS = (13, 12)  # newest first; an older one cannot make half of the kernels
_FILE = re.compile(r"libnvrtc(?:-[0-9a-f]+)?\.so\.(\d+)[\d.]*|nvrtc64_(\d\d)\d_0\.dll")


def _candidates() -> Iterator[str]:
    """What to load, best first: what this process has loaded already, else the newest release that the driver takes.

    Of equals, wheels come first, then torch's own folder, CUDA_PATH, and what the system's loader finds.
    """
    for major in _MAJORS:
        if _is_loaded(name := _soname(major)):
            yield name
    files = [(int(match[1] or match[2]), str(path)) for path in _files() if (match := _FILE.fullmatch(path.name))]
    named = [(major, _soname(major)) for major in _MAJORS]
    try:
        newest, _ = driver.driver_version()
    except MissingDependency:
        newest = max(_MAJORS)

    def preference(found: tuple[int, str]) -> tuple[bool, int]:
        return found[0] > newest, -found[0]

    for major, name in sorted([*files, *named], key=preference):
        if major >= min(_MAJORS):
            yield name


def _soname(major: int) -> str:
    return f"nvrtc64_{major}0_0.dll" if os.name == "nt" else f"libnvrtc.so.{major}"


def _is_loaded(name: str) -> bool:
    if not hasattr(os, "RTLD_NOLOAD"):
        return False
    try:
        ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return False
    return True


def _files() -> Iterator[Path]:
    # Wheels: nvidia/cuda_nvrtc/lib of CUDA 12, nvidia/cu13/lib of CUDA 13 (on Windows bin, bin/x86_64).
    for folder in _folders("nvidia"):
        for pattern in ("*/lib/libnvrtc.so.*", "*/bin/nvrtc64_*.dll", "*/bin/*/nvrtc64_*.dll"):
            yield from sorted(folder.glob(pattern))
    for folder in _folders("torch"):  # wheels that bring their own copies, under names with a digest
        yield from sorted(folder.glob("lib/libnvrtc*.so.*"))
    for variable in ("CUDA_PATH", "CUDA_HOME", "CONDA_PREFIX"):
        if root := os.environ.get(variable):
            for pattern in ("lib64/libnvrtc.so.*", "lib/libnvrtc.so.*", "bin/nvrtc64_*.dll"):
                yield from sorted(Path(root).glob(pattern))
    yield from sorted(Path("/usr/local/cuda/lib64").glob("libnvrtc.so.*"))


def _folders(package: str) -> list[Path]:
    """Where a package lies, without importing it."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return []
    return [Path(location) for location in (spec.submodule_search_locations or ())] if spec else []
