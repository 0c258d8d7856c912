"""Every FA2CUPY_* environment variable, in one table, read when it is asked for (never at import)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fa2cupy.errors import InvalidArgument

__all__ = [
    "CHECK",
    "STRICT",
    "VARIABLES",
    "Variable",
    "cache_dir",
    "check",
    "current",
    "debug",
    "kernel",
    "may_check",
    "strict",
]


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable: its name, what it does, and what holds when it is unset or empty."""

    name: str
    meaning: str
    default: str


CACHE_DIR = Variable(
    "FA2CUPY_CACHE_DIR",
    "directory of compiled kernels; one that others can write is not trusted",
    "$XDG_CACHE_HOME/fa2cupy, else ~/.cache/fa2cupy",
)
CHECK = Variable(
    "FA2CUPY_CHECK",
    "1 waits for the arrays that say where sequences lie, and makes wrong ones an error; 0 clamps them",
    "0",
)
DEBUG = Variable(
    "FA2CUPY_DEBUG", "1 logs each new plan (to stderr without a handler) and compiles with -lineinfo; 0 does not", "0"
)
FLASH_ATTN = Variable(
    "FA2CUPY_FLASH_ATTN",
    "1 or force: Python starts with fa2cupy in flash_attn's place; set by `python -m fa2cupy run`, which says how",
    "flash_attn is what is installed",
)
KERNEL = Variable(
    "FA2CUPY_KERNEL",
    "sm80 or sm90 forces that family of kernels; sm90, which is the forward's, is an error where it is impossible",
    "by the GPU and the arrays",
)

STRICT = Variable(
    "FA2CUPY_STRICT",
    "1 makes a call an error that would fall back to another library's kernels (torch's SDPA taken over); 0 counts it",
    "0",
)

VARIABLES: tuple[Variable, ...] = (CACHE_DIR, CHECK, DEBUG, FLASH_ATTN, KERNEL, STRICT)

FAMILIES = ("sm80", "sm90")

_FALSE = ("0", "false", "no", "off")
_TRUE = ("1", "true", "yes", "on")


def _read(variable: Variable) -> str:
    return os.environ.get(variable.name, "").strip()


def cache_dir() -> Path:
    """Directory of the compiled kernels (not created here). RuntimeError when no home directory can be found."""
    explicit = _read(CACHE_DIR)
    if explicit:
        return Path(explicit).expanduser().absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification: a relative path in these variables is invalid and to be ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "fa2cupy"


def check() -> bool:
    """Whether lengths are looked at, which waits for the device. InvalidArgument as `debug`."""
    return _flag(CHECK)


# What os.environ looks into: to ask it for what is not there takes a microsecond.
_encoded: object = getattr(os.environ, "_data", None)
_CHECK_ENCODED = os.fsencode(CHECK.name) if os.name != "nt" else CHECK.name


def may_check() -> bool:
    """False if `check` is known to be false; 20 times as fast."""
    return not isinstance(_encoded, dict) or _CHECK_ENCODED in _encoded


def debug() -> bool:
    """Whether plans are printed and kernels carry line information. InvalidArgument for anything but 0 or 1."""
    return _flag(DEBUG)


def strict() -> bool:
    """Whether a call that would fall back to another library's kernels is an error. InvalidArgument as `debug`."""
    return _flag(STRICT)


def _flag(variable: Variable) -> bool:
    value = _read(variable).lower()
    if value in _TRUE:
        return True
    if not value or value in _FALSE:
        return False
    raise InvalidArgument(f"{variable.name}={value!r} is not understood: use 1 or 0")


def kernel() -> str | None:
    """The kernel family that is forced, or None to choose by GPU and arrays. InvalidArgument for an unknown one."""
    value = _read(KERNEL).lower()
    if not value:
        return None
    if value in FAMILIES:
        return value
    raise InvalidArgument(f"{KERNEL.name}={value!r} is not a kernel family: use {' or '.join(FAMILIES)}, or unset it")


def current() -> dict[str, str]:
    """Name -> value of the variables that are set, for bug reports."""
    return {variable.name: os.environ[variable.name] for variable in VARIABLES if variable.name in os.environ}
