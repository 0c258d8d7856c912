"""Which kernels ran behind the doors that other libraries' calls come through: counted, and said once."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from fa2cupy import env
from fa2cupy.errors import NotTaken

__all__ = ["Report", "Row", "fell_back", "report", "took"]

_lock = threading.Lock()
_counts: dict[tuple[str, str, str], int] = {}


@dataclass(frozen=True, slots=True)
class Row:
    """Calls of one kind. door: what was called; kernel: what ran; why: why it was not ours, else empty."""

    door: str
    kernel: str
    why: str
    calls: int


class Report(tuple[Row, ...]):
    """Rows in the order in which they first came; print it for a table."""

    __slots__ = ()

    def __str__(self) -> str:
        if not self:
            return "no calls through fa2cupy's doors"
        heads = ("door", "kernel", "calls", "why not fa2cupy")
        cells = [heads, *((row.door, row.kernel, str(row.calls), row.why) for row in self)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
        return "\n".join(line.rstrip() for line in lines)


def report(*, reset: bool = False) -> Report:
    """What ran behind the doors of this process so far (torch's SDPA, ...): our kernels, or others and why.

    One row for each door, kernel and reason, with the number of calls; a call that torch.compile traced through
    `fa2cupy.torch.scaled_dot_product_attention` counts once, when it is traced. reset: start again at 0.
    """
    with _lock:
        rows = Report(Row(*key, calls) for key, calls in _counts.items())
        if reset:
            _counts.clear()
    return rows


def took(door: str) -> None:
    """Count a call that our kernels compute."""
    _count((door, "fa2cupy", ""))


def fell_back(door: str, kernel: str, why: str) -> None:
    """Count a call that `kernel` computes, and log it the first time. NotTaken where FA2CUPY_STRICT forbids it."""
    if env.strict():
        raise NotTaken(f"{door} would run {kernel}, because {why}, and {env.STRICT.name} forbids it")
    if _count((door, kernel, why)) == 1:
        import logging

        logging.getLogger("fa2cupy").warning("%s runs %s: %s", door, kernel, why)


def _count(key: tuple[str, str, str]) -> int:
    with _lock:
        _counts[key] = count = _counts.get(key, 0) + 1
    return count
