"""Every row of the tile tables compiles, without a spill that its row does not declare, and without a warning.

With NVRTC 12.9 and 13.0, whichever CuPy is installed (`python -m tests.nvrtc` fetches what is missing), and without a
GPU. `make test` compiles a sample (compile_worker.in_sample), `make compile-all` everything; the kernel cache keeps it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import nvrtc
from tests.compile_worker import ARCHS

# Largest dynamic plus static shared memory of a block, bytes (CUDA C++ Programming Guide, compute capabilities).
SHARED_MEMORY = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
}

each_nvrtc_and_arch = pytest.mark.parametrize(
    ("release", "arch"), [(release, arch) for arch in ARCHS for release in nvrtc.DISTRIBUTIONS]
)


def compile_rows(release: str, arch: str, which: str) -> list[dict[str, Any]]:
    library = nvrtc.library(release)
    assert library is not None, f"NVRTC {release} is not here: {sys.executable} -m tests.nvrtc"
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    # NVRTC looks for its builtins there; it also keeps this process's note of "the NVRTC that is found" to itself.
    paths = [str(library.parent), os.environ.get("LD_LIBRARY_PATH", "")]
    worker = subprocess.run(
        [sys.executable, "-m", "tests.compile_worker", str(library), release, arch, which, str(threads)],
        env={**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(path for path in paths if path)},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert worker.returncode == 0, worker.stderr
    return [json.loads(line) for line in worker.stdout.splitlines()]


def objections(row: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled row, in words."""
    found = []
    if row["error"]:
        found.append(row["error"])
    if row["spill_bytes"] > row["allowed_spill_bytes"]:
        found.append(f"spills {row['spill_bytes']} bytes, its row declares {row['allowed_spill_bytes']}")
    if row["registers"] > 255:
        found.append(f"uses {row['registers']} registers")
    limit = SHARED_MEMORY[row["arch"]]
    if row["shared_mem_bytes"] > limit:
        found.append(f"needs {row['shared_mem_bytes']} bytes of shared memory: at most {limit} on {row['arch']}")
    found += row["warnings"]
    return [f"{row['arch']} {row['name']} {row['label']}: {objection}" for objection in found]


def check(rows: list[dict[str, Any]]) -> None:
    assert rows
    found = [objection for row in rows for objection in objections(row)]
    assert not found, "\n" + "\n".join(found)


@each_nvrtc_and_arch
def test_sample_of_rows(release: str, arch: str) -> None:
    check(compile_rows(release, arch, "sample"))


@pytest.mark.slow
@each_nvrtc_and_arch
def test_all_rows(release: str, arch: str) -> None:
    check(compile_rows(release, arch, "all"))
