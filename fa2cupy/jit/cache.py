"""Compiled kernels on disk, so that a process that has compiled nothing starts in milliseconds and without NVRTC.

    <directory>/<key>.json          what was compiled, resources, and the sha256 of ...
    <directory>/<sha256>.cubin      ... the binary (.ptx where there is no cubin)
    <directory>/<key>.lock          while a process compiles; others wait for it
    <directory>/nvrtc.json          build string of each NVRTC library file that was ever loaded

Loading a binary is running code, so a directory that others could have written is not used, and what is made here is
never writable for others; who may read it is the umask's to say. Files are written under another name, synced and
renamed; a binary is named by its own digest, so two writers cannot mix theirs up. The key covers everything that makes
the binary. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import secrets
import stat
import sys
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
from fa2cupy.locks import Lock, close_in_child, keep_open

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows: processes that start together each compile
    fcntl = None

__all__ = ["DiskCache", "Entry", "cache_key", "open_cache"]

_SCHEMA = 1
_LOCK_TIMEOUT = 120.0  # seconds: far above one compilation; whoever waits longer compiles for itself
_LOCK_POLL = 0.02
_STALE = 3600.0  # seconds after which a file that is there for moments only is a killed process's


@dataclass(frozen=True, slots=True)
class Entry:
    """A binary and the file that holds it; `path` is None when it is only in memory. `compiled`: made just now."""

    cubin: Cubin
    path: Path | None
    compiled: bool


def cache_key(source: Source, target: str, defines: Defines, build: str) -> str:
    """sha256 over all that makes a binary: schema, package version, source bytes, options with defines, NVRTC build."""
    version = getattr(sys.modules.get("fa2cupy"), "__version__", "")
    parts = (_SCHEMA, version, source.digest, compiler.options(target, defines), build)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class DiskCache:
    """The cache in one directory; in `None`, a cache that never holds anything. Only I/O: it does not compile."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory

    def load(self, key: str) -> Entry | None:
        """The entry, if it is there and whole. A damaged one is deleted; one that cannot be read is left alone."""
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
        except OSError as error:
            _warn_once(
                self.directory,
                f"fa2cupy cannot read its kernel cache {self.directory} ({error}), so each process compiles anew; let "
                f"its owner make it readable (chmod -R a+rX), or let {env.CACHE_DIR.name} name another directory.",
            )
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
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
        _sweep(self.directory)
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
            if descriptor is not None and keep_open(descriptor):
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

    def remembered_builds(self) -> list[str]:
        """Of every NVRTC that filled this cache, here or where it came from, the latest first."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            known = json.loads(self._nvrtc_file().read_bytes())
            return list(dict.fromkeys(str(entry["build"]) for entry in reversed(known.values())))
        return []

    def remember_nvrtc(self, path: str | None, build: str) -> None:
        """Note the build of the library file that was loaded; without a path it is not recalled, but still known."""
        if self.directory is None or self.recall_nvrtc() == build:
            return
        known: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            loaded = json.loads(self._nvrtc_file().read_bytes())
            known = loaded if isinstance(loaded, dict) else {}
        with contextlib.suppress(OSError):  # store() says it when the directory cannot be written
            entry: dict[str, Any] = {"path": path, "build": build}
            if path is not None:
                status = Path(path).stat()
                entry |= {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
            if known.pop(_environment(), None) != entry:
                latest = {**dict(list(known.items())[-31:]), _environment(): entry}
                _write(self._nvrtc_file(), json.dumps(latest, indent=1).encode())

    def _nvrtc_file(self) -> Path:
        if self.directory is None:
            raise FileNotFoundError
        return self.directory / "nvrtc.json"


def open_cache() -> DiskCache:
    """The cache in the directory that the environment names, made if need be; a warning, once, if it is not used."""
    try:
        directory = env.cache_dir()
    except (RuntimeError, OSError) as error:  # no home directory; a relative path from a working directory that is gone
        _warn_once(
            None,
            f"fa2cupy has no kernel cache ({error}), so each process compiles anew; {env.CACHE_DIR.name} can name a "
            "directory.",
        )
        return DiskCache(None)
    advice = ""
    try:
        _make(directory)
        objection = _objection(directory)
        if objection:
            advice = "make the directory yours, and writable for you alone (chmod go-w), or "
    except OSError as error:
        objection = str(error)
    if objection:
        _warn_once(
            directory,
            f"fa2cupy does not use its kernel cache {directory}: {objection}. Each process compiles anew; "
            f"{advice}let {env.CACHE_DIR.name} name another.",
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
            path.mkdir(mode=0o755)


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
    # Not tempfile's, which only their owner may read.
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o644)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@functools.cache
def _sweep(directory: Path) -> None:
    """Remove what killed processes left behind; once per process."""
    end = time.time() - _STALE
    with contextlib.suppress(OSError):
        for path in [*directory.glob(".*.tmp"), *directory.glob("*.lock")]:
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < end:
                    path.unlink()


def _acquire(path: Path, timeout: float) -> int | None:
    """Descriptor of the locked file, or None where locking is impossible or took too long."""
    if fcntl is None:
        return None
    deadline = time.monotonic() + timeout
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            return None
        close_in_child(descriptor)
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
            deadline = 0.0
        keep_open(descriptor)
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
_warned_lock = Lock()


def _warn_once(directory: Path | None, message: str) -> None:
    with _warned_lock:
        if directory in _warned:
            return
        _warned.add(directory)
    log.warn(message)
