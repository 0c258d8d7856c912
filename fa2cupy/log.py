"""What fa2cupy says beside errors: records of the logger "fa2cupy", and warnings that point at the caller's line."""

from __future__ import annotations

import functools
import sys
import warnings
from types import FrameType

from fa2cupy.errors import Fa2Warning

__all__ = ["debug", "warn", "warn_once"]


def debug(message: object) -> None:
    """A record of level DEBUG, for what FA2CUPY_DEBUG asks for; to stderr where no handler would see it.

    The root logger's level, WARNING unless it is set, does not count; that of "fa2cupy" does, once somebody has set it.
    """
    import logging

    logger = logging.getLogger("fa2cupy")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.DEBUG)
    if logger.hasHandlers():
        logger.debug("%s", message)
    elif logger.isEnabledFor(logging.DEBUG):
        print(message, file=sys.stderr)


def warn(message: str) -> None:
    """A `Fa2Warning` at the line, outside this package, from which it was called."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_back is not None and _is_ours(frame):
        frame = frame.f_back
    assert frame is not None
    names = frame.f_globals
    registry = names.setdefault("__warningregistry__", {})
    place = frame.f_code.co_filename, frame.f_lineno
    warnings.warn_explicit(message, Fa2Warning, *place, module=names.get("__name__"), registry=registry)


@functools.cache
def warn_once(message: str) -> None:
    """`warn`, the first time that this process has the message."""
    warn(message)


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == "fa2cupy"
