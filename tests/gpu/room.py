"""Whoever measures time is alone: locks between the processes that share the GPU tests, and their compiler.

They lie on two files of this folder, so that runs beside each other wait for each other too.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

__all__ = ["alone", "shared"]

_ROOM = Path(__file__)  # held by everybody, by one who is alone exclusively
_DOOR = Path(__file__).with_name("__init__.py")  # held by who waits to be alone: nobody else goes in meanwhile


@contextlib.contextmanager
def _held(path: Path, kind: int) -> Iterator[None]:
    with path.open("rb") as file:
        fcntl.flock(file, kind)
        yield  # closing gives it back


@contextlib.contextmanager
def shared() -> Iterator[None]:
    with contextlib.ExitStack() as held:
        with _held(_DOOR, fcntl.LOCK_SH):
            held.enter_context(_held(_ROOM, fcntl.LOCK_SH))
        yield


@contextlib.contextmanager
def alone() -> Iterator[None]:
    with _held(_DOOR, fcntl.LOCK_EX), _held(_ROOM, fcntl.LOCK_EX):
        yield
