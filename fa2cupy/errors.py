"""Every exception that fa2cupy raises on purpose, and its warning.

All derive from `Fa2Error` and from the built-in exception that a caller would catch anyway.
"""

# ruff: noqa: N818 - the names say what went wrong; the base class says that it is an error

from __future__ import annotations

__all__ = [
    "CompilationError",
    "Fa2Error",
    "Fa2Warning",
    "InvalidArgument",
    "InvalidType",
    "LaunchError",
    "MissingDependency",
    "NotTaken",
    "UnsupportedDevice",
]


class Fa2Error(Exception):
    """Base of all errors raised by fa2cupy."""


class Fa2Warning(RuntimeWarning):
    """Something works, but not as well as it could; the message says what to do."""


class InvalidArgument(Fa2Error, ValueError):
    """An argument has the right type but a value that attention cannot use."""


class InvalidType(Fa2Error, TypeError):
    """An argument has a type that attention cannot use."""


class UnsupportedDevice(Fa2Error, ValueError):
    """The GPU exists but cannot run these kernels, or the device asked for does not exist."""


class MissingDependency(Fa2Error, ImportError):
    """CuPy, NVRTC or the CUDA driver is missing or too old; the message says what to install."""


class CompilationError(Fa2Error, RuntimeError):
    """NVRTC rejected a kernel.

    `log` is NVRTC's log; `context` says what was being compiled for (the printed plan), or is empty.
    """

    def __init__(self, message: str, *, log: str = "", context: str = "") -> None:
        self.message, self.log, self.context = message, log, context
        parts = [message, context and f"while compiling for:\n{context}", log and f"NVRTC log:\n{log}"]
        super().__init__("\n\n".join(part for part in parts if part))

    def __reduce__(self) -> tuple[object, ...]:  # keyword-only arguments need help to cross a process pool
        return _rebuild_compilation_error, (self.message, self.log, self.context)


class NotTaken(Fa2Error, RuntimeError):
    """A call would have fallen back to another library's kernels, which FA2CUPY_STRICT=1 forbids."""


class LaunchError(Fa2Error, RuntimeError):
    """The CUDA driver refused to load or to launch a kernel, or reported an earlier failure."""


def _rebuild_compilation_error(message: str, log: str, context: str) -> CompilationError:
    return CompilationError(message, log=log, context=context)
