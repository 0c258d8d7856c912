"""Locks that survive a fork: in the child they are free, whichever of the parent's threads held them."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from types import TracebackType

__all__ = ["Lock", "close_in_child", "keep_open"]


class Lock:
    """A `threading.Lock` for `with`. What it guards must be whole at every moment: a child may find it half done."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        with _registry:
            _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(RuntimeError):  # forked inside the block: this child's lock is free already
            self._lock.release()

    def _renew(self) -> None:
        self._lock = threading.Lock()


_registry = threading.Lock()
_locks: weakref.WeakSet[Lock] = weakref.WeakSet()
_descriptors: set[int] = set()


def close_in_child(descriptor: int) -> None:
    """A forked child shares the parent's file locks and would keep them when the parent gives them up, or dies."""
    with _registry:
        _descriptors.add(descriptor)


def keep_open(descriptor: int) -> bool:
    """Take `close_in_child` back, before the descriptor is closed; False in a child, where it is closed already."""
    with _registry:
        known = descriptor in _descriptors
        _descriptors.discard(descriptor)
    return known


def _after_in_child() -> None:
    global _registry
    _registry = threading.Lock()
    for lock in tuple(_locks):
        lock._renew()
    while _descriptors:
        with contextlib.suppress(OSError):
            os.close(_descriptors.pop())


if hasattr(os, "register_at_fork"):
    # Nobody is amid a change of the registry while the process is copied.
    os.register_at_fork(
        before=lambda: _registry.acquire() and None,
        after_in_parent=lambda: _registry.release(),
        after_in_child=_after_in_child,
    )
