"""Compile kernels with one exact NVRTC, in a process of its own, which `compile_rows` starts.

    python -m tests.compile_worker <folder of libnvrtc> <release> <arch> sample|all <threads>

prints NVRTC's build and one line of JSON per kernel.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from fa2cupy.jit import compile_many, source
from fa2cupy.jit.kernel import build
from fa2cupy.kernels import compile_jobs
from tests import nvrtc
from tools import binaries

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")  # sm_90a has what sm_90 has
# Of these every bfloat16 row is in the sample of one release; of the others, and of float16, a fixed quarter is.
EVERY_ROW = ("sm_80", "sm_86", "sm_90", "sm_90a")


def in_sample(job: Any, release: str) -> bool:
    """Whether `make test` compiles this job with this release. Depends on nothing but its label and architecture."""
    fixed = hashlib.sha256(f"{job.arch} {job.label}".encode()).digest()[0]
    if fixed % len(nvrtc.DISTRIBUTIONS) != list(nvrtc.DISTRIBUTIONS).index(release):
        return False
    return bool(job.defines["FA2_BF16"] and job.arch in EVERY_ROW) or fixed // 2 % 4 == 0


def compile_rows(release: str, arch: str, which: str) -> tuple[str, list[dict[str, Any]]]:
    """NVRTC's build and a record of every row, as `main` prints them."""
    library = nvrtc.library(release)
    assert library is not None, f"NVRTC {release} is not here: {sys.executable} -m tests.nvrtc"
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    # Keeps the cache's note of "the NVRTC that this environment finds" to this folder.
    paths = [str(library.parent), os.environ.get("LD_LIBRARY_PATH", "")]
    worker = subprocess.run(
        [sys.executable, "-m", "tests.compile_worker", str(library.parent), release, arch, which, str(threads)],
        env={**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(path for path in paths if path)},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert worker.returncode == 0, worker.stderr
    head, *lines = worker.stdout.splitlines()
    return json.loads(head), [json.loads(line) for line in lines]


def _digest(job: Any) -> str:
    """Of the binary, which is in the kernel cache by now."""
    cubin = build(source.load(job.source), job.arch, job.defines).cubin
    return binaries.digest(binaries.describe(cubin, job.name, job.shared_mem_bytes))


def main() -> None:
    folder, release, arch, which, threads = sys.argv[1:]
    print(json.dumps(nvrtc.use(Path(folder), release)))
    jobs = [job for job in compile_jobs(arch, True) if which == "all" or in_sample(job, release)]
    for result in compile_many(jobs, max_workers=int(threads)):
        job, resources = result.job, result.resources
        record = {
            "source": job.source,
            "label": job.label,
            "name": job.name,
            "arch": job.arch,
            "error": str(result.error) if result.error else "",
            "digest": "" if result.error else _digest(job),
            "in_sample": in_sample(job, release),
            "registers": resources.registers if resources else 0,
            "spill_bytes": resources.spill_bytes if resources else 0,
            "allowed_spill_bytes": job.allowed_spill_bytes,
            "shared_mem_bytes": (resources.static_shared if resources else 0) + job.shared_mem_bytes,
            "warnings": result.warnings,
            "seconds": result.seconds,
            "cached": result.cached,
        }
        print(json.dumps(record))


if __name__ == "__main__":
    main()
