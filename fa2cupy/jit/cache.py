"""Compiled kernels on disk, so that a process that has compiled nothing starts in milliseconds and without NVRTC.

    <directory>/<key>.json          what was compiled, resources, and the sha256 of ...
    <directory>/<sha256>.cubin      ... the binary (.ptx where there is no cubin)
    <directory>/<key>.lock          while a process compiles; others wait for it
    <directory>/nvrtc.json          build string of each NVRTC library file that was ever loaded

Loading a binary is running code, so a directory that others could have written is not used. Files are written under
another name, synced and renamed; a binary is named by its own digest, so two writers cannot mix theirs up. The key
covers everything that makes the binary. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from fa2cupy import env, log
from fa2cupy.jit import compiler
from fa2cupy.jit.compiler import Cubin, Defines, KernelResources
from fa2cupy.jit.source import Source

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows: processes that start together each compile
    fcntl = None

__all__ = ["DiskCache", "Entry", "cache_key", "open_cache"]

_SCHEMA = 1
_LOCK_TIMEOUT = 120.0  # seconds: far above one compilation; whoever waits longer compiles for itself
_LOCK_POLL = 0.02


@dataclass(frozen=True, slots=True)
class Entry:
    """A binary and the file that holds it; `path` is None when it is only in memory. `compiled`: made just now."""

    cubin: Cubin
    path: Path | None
    compiled: bool


def cache_key(source: Source, arch: str, defines: Defines, build: str) -> str:
    """sha256 over all that makes a binary: schema, package version, source bytes, options with defines, NVRTC build."""
    version = getattr(sys.modules.get("fa2cupy"), "__version__", "")
    parts = (_SCHEMA, version, source.digest, compiler.options(arch, defines), build)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class DiskCache:
    """The cache in one directory; in `None`, a cache that never holds anything. Only I/O: it does not compile."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory

    def load(self, key: str) -> Entry | None:
        """The entry, if it is there and whole. A damaged one is deleted."""
        if self.directory is None:
            return None
        record_path = self.directory / f"{key}.json"
        try:
            record = json.loads(record_path.read_bytes())
            path = self.directory / Path(record["file"]).name
            image = path.read_bytes()
            cubin = Cubin(
                image=image,
                log=str(record["log"]),
                kernels={name: KernelResources(**numbers) for name, numbers in record["kernels"].items()},
                build=str(record["build"]),
                seconds=float(record["seconds"]),
            )
            # A PTX file has no magic number; its digest and its suffix must do.
            whole = hashlib.sha256(image).hexdigest() == path.stem and cubin.is_ptx == (path.suffix == ".ptx")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            self.discard(key)
            return None
        return Entry(cubin, path, compiled=False)

    def store(self, key: str, cubin: Cubin, description: dict[str, Any]) -> Path | None:
        """Write an entry; None, after one warning, if that is impossible."""
        if self.directory is None:
            return None
        name = hashlib.sha256(cubin.image).hexdigest() + (".ptx" if cubin.is_ptx else ".cubin")
        record = {
            **description,
            "file": name,
            "log": cubin.log,
            "kernels": {kernel: asdict(numbers) for kernel, numbers in cubin.kernels.items()},
            "build": cubin.build,
            "seconds": round(cubin.seconds, 3),
        }
        try:
            _write(self.directory / name, cubin.image)
            _write(self.directory / f"{key}.json", json.dumps(record, indent=1).encode())
        except OSError as error:
            _warn_once(
                self.directory,
                f"fa2cupy cannot write to its kernel cache {self.directory} ({error}); what is not in it is compiled "
                f"anew by each process. {env.CACHE_DIR.name} names another directory.",
            )
            return None
        return self.directory / name

    def discard(self, key: str) -> None:
        """Delete an entry and its binary, as far as they exist."""
        if self.directory is None:
            return
        record_path = self.directory / f"{key}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            # The name alone: a damaged record must not lead out of the directory.
            (self.directory / Path(json.loads(record_path.read_bytes())["file"]).name).unlink()
        with contextlib.suppress(OSError):
            record_path.unlink()

    @contextlib.contextmanager
    def lock(self, key: str, timeout: float = _LOCK_TIMEOUT) -> Iterator[None]:
        """Keep other processes from compiling `key`, if that is possible; after `timeout` seconds, go on regardless.

        Advisory and never needed for correctness: a lost race only repeats work.
        """
        descriptor = None if self.directory is None else _acquire(self.directory / f"{key}.lock", timeout)
        try:
            yield
        finally:
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    (self.directory / f"{key}.lock").unlink()  # type: ignore[operator]  # before the lock is given up
                os.close(descriptor)

    def recall_nvrtc(self) -> str | None:
        """Build of the NVRTC that this environment loaded last, if that file is unchanged; does not load it.

        Should another NVRTC be found next time all the same, the build remembered here still names what made the
        entries that are then used, and a miss loads NVRTC and learns the truth.
        """
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(self._nvrtc_file().read_bytes())[_environment()]
            status = Path(known["path"]).stat()
            if [status.st_size, status.st_mtime_ns] == [known["size"], known["mtime_ns"]]:
                return str(known["build"])
        return None

    def remember_nvrtc(self, path: str | None, build: str) -> None:
        """Note the build of the library file that was loaded."""
        if self.directory is None or path is None or self.recall_nvrtc() == build:
            return
        known: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            loaded = json.loads(self._nvrtc_file().read_bytes())
            known = loaded if isinstance(loaded, dict) else {}
        with contextlib.suppress(OSError):  # store() says it when the directory cannot be written
            status = Path(path).stat()
            known.pop(_environment(), None)
            latest = dict(list(known.items())[-31:])
            latest[_environment()] = {
                "path": path,
                "size": status.st_size,
                "mtime_ns": status.st_mtime_ns,
                "build": build,
            }
            _write(self._nvrtc_file(), json.dumps(latest, indent=1).encode())

    def _nvrtc_file(self) -> Path:
        if self.directory is None:
            raise FileNotFoundError
        return self.directory / "nvrtc.json"


def open_cache() -> DiskCache:
    """The cache in the directory that the environment names, made if need be; a warning, once, if it is not used."""
    try:
        directory = env.cache_dir()
    except RuntimeError as error:  # no home directory
        _warn_once(None, f"fa2cupy has no kernel cache ({error}); {env.CACHE_DIR.name} can name a directory.")
        return DiskCache(None)
    try:
        _make(directory)
        objection = _objection(directory)
    except OSError as error:
        objection = str(error)
    if objection:
        _warn_once(
            directory,
            f"fa2cupy does not use its kernel cache {directory}: {objection}. Each process compiles anew; make the "
            f"directory yours alone (chmod 700), or let {env.CACHE_DIR.name} name another.",
        )
        return DiskCache(None)
    return DiskCache(directory)


def _make(directory: Path) -> None:
    missing = []
    while not directory.is_dir():
        missing.append(directory)
        if directory.parent == directory:
            break
        directory = directory.parent
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process; if it is a file, the next step says so
            path.mkdir(mode=0o700)


def _objection(directory: Path) -> str:
    """Why what lies in the directory may not be ours, or the empty string."""
    status = directory.stat()
    if not stat.S_ISDIR(status.st_mode):
        return "it is not a directory"
    if os.name == "nt":  # access control lists: a profile directory is private there
        return ""
    # A symbolic link's owner can point it elsewhere.
    if {status.st_uid, directory.lstat().st_uid} - {os.getuid(), 0}:
        return "it belongs to another user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others can write to it (mode {stat.S_IMODE(status.st_mode):o})"
    return ""


def _write(path: Path, content: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


def _acquire(path: Path, timeout: float) -> int | None:
    """Descriptor of the locked file, or None where locking is impossible or took too long."""
    if fcntl is None:
        return None
    deadline = time.monotonic() + timeout
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us deletes the file; a lock on a deleted file excludes nobody.
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
            waited = False
        except (BlockingIOError, PermissionError):
            waited = True
        except FileNotFoundError:
            waited = False
        except OSError:  # a file system without locks
            os.close(descriptor)
            return None
        os.close(descriptor)
        if time.monotonic() > deadline:
            return None
        if waited:
            time.sleep(_LOCK_POLL)


def _environment() -> str:
    """What decides which NVRTC is found, in one word."""
    names = ("LD_LIBRARY_PATH", "CONDA_PREFIX", "CUDA_PATH", "CUDA_HOME", "PYTHONPATH", "PATH" * (os.name == "nt"))
    values = [sys.prefix, *(os.environ.get(name, "") for name in names)]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


_warned: set[Path | None] = set()
_warned_lock = threading.Lock()


def _warn_once(directory: Path | None, message: str) -> None:
    with _warned_lock:
        if directory in _warned:
            return
        _warned.add(directory)
    log.warn(message)
