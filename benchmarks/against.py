"""Two commits as peers in one process: how the other one gets in, and what "level" means.

    python benchmarks/bench.py --against REV            the whole grid, forward and backward, three times
    python benchmarks/bench.py --against REV --features 'w*,vl*'    cells of features, or these and --cases ...
    python benchmarks/bench.py --against FA2_X=1,FA2_Y=2             this tree, its kernels with other constants
    python benchmarks/host_cost.py --against REV        microseconds of the host, likewise
    python benchmarks/bench.py --against DIRECTORY      where there is no git: `git archive REV | tar -x -C DIRECTORY`

The other tree's package is copied under another name, in its own sources too: neither an import inside a function nor
a registry of torch's can reach from one into the other. Both use the same kernel cache, where both find their kernels.

Level: the geometric mean of each direction is within 0.5%, and no cell is lost; lost is one that is slower by more than
1.5% in every repeat. Against itself (`--against HEAD`, nothing changed) a run says what the machine's noise is.
"""

from __future__ import annotations

import atexit
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from benchmarks import results

__all__ = ["LOST", "MEAN", "OTHER", "REPEATS", "Verdict", "judge", "load", "write"]

OTHER = "fa2cupy_other"
REPEATS = 3
MEAN = 0.005  # a direction's mean may be slower by as much
LOST = 0.015  # a cell may be, in every repeat

_CONSTANTS = re.compile(r"(FA2_\w+=-?\d+)(,FA2_\w+=-?\d+)*")

Times = Mapping[str, tuple[float, float]]  # cell -> time of ours and of the other


@dataclass(frozen=True)
class Verdict:
    """directions: name -> geometric mean of the other's time over ours (above 1: ours is faster). lost: cells."""

    directions: Mapping[str, float]
    cells: Mapping[str, tuple[float, ...]]
    lost: tuple[str, ...]

    @property
    def slower(self) -> tuple[str, ...]:
        return tuple(name for name, ratio in self.directions.items() if ratio < 1 - MEAN)

    @property
    def ok(self) -> bool:
        return not self.slower and not self.lost

    def __str__(self) -> str:
        lines = [f"{name}: {self._ratios(ratios)}" for name, ratios in self.cells.items()]
        for name, ratio in self.directions.items():
            word = "slower" if name in self.slower else "faster" if ratio > 1 + MEAN else "level"
            lines.append(f"{name}, mean of {self._count(name)} cells: {ratio:.4f} of the other's speed, {word}")
        lines += [f"lost: {name}: {self._ratios(self.cells[name])}" for name in self.lost]
        lines.append("level" if self.ok else "NOT LEVEL")
        return "\n".join(lines)

    @staticmethod
    def _ratios(ratios: Sequence[float]) -> str:
        return " ".join(f"{ratio:.4f}" for ratio in ratios)

    def _count(self, direction: str) -> int:
        return sum(direction_of(name) == direction for name in self.cells)


def direction_of(cell: str) -> str:
    """'fwd' of the cell 'fwd:d64:...', 'fwd of features' of 'fwd of features:w1k_8k'."""
    return cell.partition(":")[0]


def judge(repeats: Sequence[Times]) -> Verdict:
    """ValueError unless every repeat has the same cells."""
    if not repeats or any(set(times) != set(repeats[0]) for times in repeats):
        raise ValueError("every repeat has to have the same cells, and there has to be one")
    cells = {name: tuple(times[name][1] / times[name][0] for times in repeats) for name in repeats[0]}
    lost = tuple(name for name, ratios in cells.items() if all(1 / ratio > 1 + LOST for ratio in ratios))
    directions: dict[str, list[float]] = {}
    for name, ratios in cells.items():
        directions.setdefault(direction_of(name), []).extend(ratios)
    means = {direction: results.geometric_mean(ratios) for direction, ratios in directions.items()}
    return Verdict(means, cells, lost)


def load(what: str) -> tuple[ModuleType, str]:
    """The package of a commit or a directory, or this one with other constants, imported beside ours as `OTHER`, and
    what it is called. SystemExit for what is none of these.
    """
    if OTHER in sys.modules:
        raise RuntimeError("one other tree in a process")
    from fa2cupy import env

    folder = Path(tempfile.mkdtemp(prefix="fa2cupy-against-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # not before: modules may be imported late
    name = _copy(what, folder)
    # Wherever the cache is for ours, it is for the other: its own name would lead it elsewhere.
    os.environ.setdefault(env.CACHE_DIR.name, str(env.cache_dir()))
    sys.path.append(str(folder))
    try:
        return importlib.import_module(OTHER), name
    finally:
        sys.path.remove(str(folder))


def _copy(what: str, folder: Path) -> str:
    """The package as `folder`/OTHER, with its own name replaced in all of it, and cuda_src beside it."""
    constants = dict(part.split("=", 1) for part in what.split(",")) if _CONSTANTS.fullmatch(what) else {}
    if constants:
        tree, name = results.ROOT, f"this tree with {what}"
    elif Path(what).is_dir():
        tree, name = Path(what), str(what)
    else:
        tree, name = folder / "tree", _export(what, folder / "tree")
    if not (tree / "fa2cupy" / "__init__.py").is_file():
        sys.exit(f"--against {what}: there is no package fa2cupy in it")
    shutil.copytree(tree / "fa2cupy", folder / OTHER, ignore=shutil.ignore_patterns("__pycache__", "cuda_src"))
    shutil.copytree(tree / "cuda_src", folder / "cuda_src")
    for path in (folder / OTHER).rglob("*.py"):
        path.write_text(re.sub(r"\bfa2cupy\b", OTHER, path.read_text()))
    if constants:
        config = folder / "cuda_src" / "common" / "config.cuh"  # what reads them, in every kernel
        text = config.read_text()
        unread = [constant for constant in constants if not re.search(rf"\b{constant}\b", text)]
        if unread:
            sys.exit(f"--against {what}: no kernel has a constant {unread[0]}")
        config.write_text("".join(f"#define {key} {value}\n" for key, value in constants.items()) + text)
    return name


def _export(revision: str, target: Path) -> str:
    git = ["git", "-C", str(results.ROOT)]
    try:
        found = subprocess.run([*git, "log", "-1", "--format=%h %s", revision, "--"], capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"--against {revision}: not a directory, and git cannot be asked ({error})")
    if found.returncode or not found.stdout:
        sys.exit(f"--against {revision}: neither a directory nor a commit ({found.stderr.strip()})")
    archive = subprocess.run([*git, "archive", revision, "fa2cupy", "cuda_src"], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(target, filter="data")
        else:
            tar.extractall(target)
    return found.stdout.strip()


def write(path: Path, repeats: Sequence[Times], verdict: Verdict, **about: str) -> None:
    """Everything that was measured, as JSON."""
    record = {**about, "level": verdict.ok, "directions": dict(verdict.directions), "lost": list(verdict.lost)}
    record["repeats"] = [dict(times) for times in repeats]
    path.write_text(json.dumps(record, indent=1) + "\n")
