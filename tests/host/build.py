"""A kernel's source and its defines to a loaded library; every one is compiled once and kept in build/host.

A kernel is compiled exactly as it stands in cuda_src. Only `common/ptx.cuh` and `sm80/ptx.cuh` are replaced, by their
twins in tests/host/cuda, which g++ finds first.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fa2cupy.jit import source as source_module

HERE = Path(__file__).resolve().parent
WORLD = HERE / "cuda"
BUILD = HERE.parent.parent / "build" / "host"
CXX = os.environ.get("CXX") or "g++"

# Few, and the same for every version of g++: what a kernel must not do.
_WARNINGS = ("-Werror", "-Wreturn-type", "-Wuninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi")
# Uninitialised variables hold a pattern, as shared memory does: what a GPU's registers hold is anybody's guess.
_FLAGS = ("-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-ftrivial-auto-var-init=pattern", *_WARNINGS)
_OPTIMISED = ("-O2", "-ffp-contract=fast")  # contracted as nvcc does
_SANITIZED = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@dataclass(frozen=True)
class Mutation:
    """A bug put into one file of cuda_src: `find`, which is there exactly once, becomes `replace`."""

    path: str
    find: str
    replace: str

    def apply(self, text: str) -> str:
        count = text.count(self.find)
        assert count == 1, f"{self.path} has {self.find!r} {count} times: the mutation needs it exactly once"
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
    return tuple((path.name, path.read_bytes()) for path in [*files, source_module.root() / "common" / "types.cuh"])


def library(
    path: str,
    kernel: str,
    defines: Mapping[str, int | str],
    *,
    mutation: Mutation | None = None,
    directory: Path | None = None,
) -> ctypes.CDLL:
    """The library of one kernel of `path`, a source of cuda_src (or of `directory`), with these macros."""
    source = source_module.load(path, directory=directory)
    directory = source_module.root() if directory is None else directory
    flags = (*_FLAGS, *(_SANITIZED if sanitizing() else _OPTIMISED), *_cpu_flags())
    macros = {"FA2_HOST_SOURCE": f'"{path}"', "FA2_HOST_KERNEL": kernel, **defines}
    digest = hashlib.sha256(repr((source.digest, flags, sorted(macros.items()), mutation, _twins())).encode())
    digest.update(_compiler_version().encode())
    stem = f"{kernel}-{digest.hexdigest()[:20]}"
    target = BUILD / f"{stem}.so"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with (BUILD / f"{stem}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # pytest's worker processes share the folder
            if not target.exists():
                _compile(target, flags, macros, mutation, directory)
    loaded = ctypes.CDLL(str(target))
    loaded.host_sites.restype = ctypes.c_char_p
    return loaded


def _compile(
    target: Path,
    flags: tuple[str, ...],
    macros: Mapping[str, int | str],
    mutation: Mutation | None,
    directory: Path,
) -> None:
    includes = list(dict.fromkeys((WORLD, directory, source_module.root())))
    if mutation is not None:
        changed = target.with_suffix(".src") / mutation.path
        changed.parent.mkdir(parents=True, exist_ok=True)
        original = next(folder / mutation.path for folder in includes if (folder / mutation.path).exists())
        # The messages and the plants speak of the file that was changed, not of its copy.
        text = f'#line 1 "{original}"\n' + mutation.apply(original.read_text())
        changed.write_text(text)
        includes.insert(0, target.with_suffix(".src"))
    unfinished = target.with_suffix(f".{os.getpid()}")
    command = [CXX, *flags, *(f"-D{name}={value}" for name, value in macros.items())]
    command += [*(f"-I{folder}" for folder in includes), "-include", str(WORLD / "cuda_world.h")]
    command += ["-o", str(unfinished), str(WORLD / "entry.cpp"), str(WORLD / "world.cpp")]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # the compiler's bugs, no
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"g++ failed:\n{' '.join(command)}\n{done.stderr[-6000:]}"
    unfinished.replace(target)
