"""The libraries that compile long have their kernels of the cells compiled beforehand, in processes of their own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import feature_peers
from benchmarks.feature_cells import CELLS, Cell
from benchmarks.feature_peers import COMPILED

__all__ = ["warm"]


def warm(names: Iterable[str], cells: Sequence[Cell], processes: int, seconds: float) -> Callable[[], None]:
    """Have processes compile the libraries' kernels of the cells into their caches on disk; the result waits for them.

    One that fails is repeated, and reported, where it is measured.
    """
    jobs = [f"{name}:{cell.name}" for name in names if name in COMPILED for cell in cells if cell.group != "equal"]
    shares = [share for share in (jobs[n::processes] for n in range(processes)) if share]
    running = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *share],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for share in shares
    ]
    for process in running:
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()

    def wait() -> None:
        for process in running:
            process.wait()

    return wait


def _compile(job: str) -> None:
    name, _, cell_name = job.partition(":")
    cell = CELLS[cell_name]
    tensors = feature_peers.make_tensors(cell)
    for mode in ("fwd", "bwd"):
        feature_peers.make(name, cell, tensors, mode)()


if __name__ == "__main__":  # a process of `warm`
    feature_peers.probe(COMPILED)
    for _job in sys.argv[1:]:
        with contextlib.suppress(Exception):
            _compile(_job)
