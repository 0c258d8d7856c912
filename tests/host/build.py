"""A kernel's source and its defines to a loaded library; every one is compiled once and kept in build/host.

A kernel is compiled exactly as it stands in cuda_src. Only the files around PTX (`common/ptx.cuh`, `sm80/ptx.cuh`,
`sm90/ptx.cuh`, `sm90/wgmma.cuh`) are replaced, by their twins in tests/host/cuda, which g++ finds first.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fa2cupy.jit import source as source_module

HERE = Path(__file__).resolve().parent
WORLD = HERE / "cuda"
BUILD = HERE.parent.parent / "build" / "host"
_CUDA_WORLD = str(WORLD / "cuda_world.h")
CXX = os.environ.get("CXX") or "g++"

_INCLUDED_BY_TWINS = ("types", "config", "listed", "params", "accumulator")  # of cuda_src/common

# Few, and the same for every version of g++: what a kernel must not do.
_WARNINGS = ("-Werror", "-Wreturn-type", "-Wuninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi")
# Uninitialised variables hold a pattern, as shared memory does: what a GPU's registers hold is anybody's guess.
_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-ftrivial-auto-var-init=pattern", *_WARNINGS)
# Products and sums are contracted as nvcc does, which -O1 alone does not. -O2 takes longer to compile than it saves.
_OPTIMISED = ("-O1", "-fexpensive-optimizations", "-ffp-contract=fast")
# Checks of memory are calls, and of the symbols only lines are kept: half the time of g++.
_SANITIZED = (
    *("-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "--param=asan-instrumentation-with-call-threshold=0",
)


class BuildError(Exception):
    """g++ does not take a kernel, or a mutation does not fit its file."""


@dataclass(frozen=True)
class Mutation:
    """A bug put into one file of cuda_src: `find`, which is there exactly once, becomes `replace`."""

    path: str
    find: str
    replace: str

    def apply(self, text: str) -> str:
        count = text.count(self.find)
        if count != 1:
            raise BuildError(f"{self.path} has {self.find!r} {count} times: the mutation needs it exactly once")
        return text.replace(self.find, self.replace)


def sanitizing() -> bool:
    """Whether this process runs the sanitized libraries (it was started with libasan, see test_sanitized.py)."""
    return os.environ.get("FA2_HOST_SANITIZE") == "1"


@functools.cache
def _cpu_flags() -> tuple[str, ...]:
    """The fused multiply-add and 8 floats at a time, where every CPU of this kind that we meet has them."""
    if platform.machine() != "x86_64":
        return ()
    features = Path("/proc/cpuinfo").read_text().split()
    return ("-march=x86-64-v3",) if {"avx2", "fma", "bmi2", "f16c"} <= set(features) else ()


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([CXX, "--version"], check=True, capture_output=True, text=True).stdout


@functools.cache
def _twins() -> tuple[tuple[str, bytes], ...]:
    files = sorted(path for path in WORLD.rglob("*") if path.is_file())
    common = [source_module.root() / "common" / f"{name}.cuh" for name in _INCLUDED_BY_TWINS]
    return tuple((path.name, path.read_bytes()) for path in [*files, *common])


def library(
    path: str,
    kernel: str,
    defines: Mapping[str, int | str],
    *,
    mutation: Mutation | None = None,
    directory: Path | None = None,
    headers: tuple[tuple[str, bytes], ...] = (),
) -> ctypes.CDLL:
    """The library of one kernel of `path`, a source of cuda_src (or of `directory`), with these macros.

    headers: by name, what it includes and is no file.
    """
    return _library(path, kernel, tuple(sorted(defines.items())), mutation, directory or source_module.root(), headers)


@functools.cache
def _library(
    path: str,
    kernel: str,
    defines: tuple[tuple[str, int | str], ...],
    mutation: Mutation | None,
    directory: Path,
    headers: tuple[tuple[str, bytes], ...],
) -> ctypes.CDLL:
    macros = {"FA2_HOST_SOURCE": f'"{path}"', "FA2_HOST_KERNEL": kernel, **dict(defines)}
    source = source_module.load(path, directory=directory, headers=dict(headers))
    key = (source.digest, sorted(macros.items()), mutation)
    options = [f"-D{name}={value}" for name, value in macros.items()]
    objects = [str(_object(name)) for name in ("world", "async", "mma")]
    options += ["-include", _world(), "-shared", str(WORLD / "entry.cpp"), *objects]
    target = _once(f"{kernel}-", ".so", key, lambda stem: _includes(stem, mutation, directory, headers) + options)
    loaded = ctypes.CDLL(str(target))
    loaded.host_sites.restype = ctypes.c_char_p
    return loaded


@functools.cache
def _world() -> str:
    """The file that comes before every kernel. Compiled once, by compilers that can: g++'s own parse takes 0.1 s."""
    if "Free Software Foundation" not in _compiler_version():
        return _CUDA_WORLD
    arguments = ["-w", "-x", "c++-header", f"-I{WORLD}", f"-I{source_module.root()}", _CUDA_WORLD]
    return str(_once("world-", ".h.gch", "header", lambda stem: arguments)).removesuffix(".gch")


@functools.cache
def _object(name: str) -> Path:
    """An object file that all libraries have in common: compiled once, so that it may take its time."""
    options = [f"-I{WORLD}", f"-I{source_module.root()}", "-include", _CUDA_WORLD, *(() if sanitizing() else ("-O3",))]
    return _once(f"{name}-", ".o", (name, options), lambda stem: [*options, "-c", str(WORLD / f"{name}.cpp")])


def _includes(
    stem: Path, mutation: Mutation | None, directory: Path, headers: tuple[tuple[str, bytes], ...]
) -> list[str]:
    folders = list(dict.fromkeys((WORLD, directory, source_module.root())))
    for name, content in headers:
        file = stem.with_suffix(".src") / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    if headers and mutation is None:
        folders.insert(0, stem.with_suffix(".src"))
    if mutation is not None:
        original = next(folder / mutation.path for folder in folders if (folder / mutation.path).exists())
        changed = stem.with_suffix(".src") / mutation.path
        changed.parent.mkdir(parents=True, exist_ok=True)
        # What the world reports names the file that was changed, not its copy.
        changed.write_text(f'#line 1 "{original}"\n' + mutation.apply(original.read_text()))
        folders.insert(0, stem.with_suffix(".src"))
    return [f"-I{folder}" for folder in folders]


def _once(prefix: str, suffix: str, key: object, arguments: Callable[[Path], list[str]]) -> Path:
    """The product of g++ that belongs to `key`, made if it is not there yet. `arguments` gets its path, less suffix."""
    flags = (*_FLAGS, *(_SANITIZED if sanitizing() else _OPTIMISED), *_cpu_flags())
    digest = hashlib.sha256(repr((key, flags, _twins(), _compiler_version())).encode()).hexdigest()[:20]
    stem = BUILD / f"{prefix}{digest}"
    target = stem.with_name(stem.name + suffix)
    if target.exists():
        return target
    BUILD.mkdir(parents=True, exist_ok=True)
    with stem.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest's worker processes share the folder
        if not target.exists():
            unfinished = stem.with_suffix(f".{os.getpid()}")
            command = [CXX, *flags, *arguments(stem), "-o", str(unfinished)]
            environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise BuildError(f"g++ failed:\n{' '.join(command)}\n{done.stderr[-6000:]}")
            unfinished.replace(target)
    return target
