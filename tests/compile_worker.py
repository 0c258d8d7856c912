"""Compile kernels with one exact NVRTC, in a process of its own, which `compile_rows` starts.

    python -m tests.compile_worker <folder of libnvrtc> <release> <arch> few|sample|all <threads>

prints NVRTC's build and one line of JSON per kernel.
"""

from __future__ import annotations

import functools
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
from tests import covering, nvrtc
from tools import binaries

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")  # sm_90a has what sm_90 has
# Of these every bfloat16 row is in the sample of one release; of the others, and of float16, a fixed quarter is.
EVERY_ROW = ("sm_80", "sm_86", "sm_90", "sm_90a")
_CHOICES = ("BF16", "CAUSAL", "DETERMINISTIC", "PARTIAL_DKV", "DLSE", "CLEAR_DQ")


def in_sample(job: Any, release: str) -> bool:
    """Whether tests/binaries has this job's digest. Depends on nothing but its label and architecture."""
    fixed = hashlib.sha256(f"{job.arch} {job.label}".encode()).digest()[0]
    if fixed % len(nvrtc.DISTRIBUTIONS) != list(nvrtc.DISTRIBUTIONS).index(release):
        return False
    return bool(job.defines["FA2_BF16"] and job.arch in EVERY_ROW) or fixed // 2 % 4 == 0


def jobs_of(release: str, arch: str, which: str) -> list[Any]:
    """The jobs of "all" rows, of the "sample" in tests/binaries, or of the "few" of it that `make test` compiles."""
    if which == "few":
        return _few()[release, arch]
    return [job for job in compile_jobs(arch, True) if which == "all" or in_sample(job, release)]


@functools.cache
def _few() -> dict[tuple[str, str], list[Any]]:
    """Of the samples of all architectures, a covering array: each kernel on each architecture meets every tile, head
    dim, dtype, mask and way to add that it has a row for, and those meet each other."""
    pairs = [(release, arch) for release in nvrtc.DISTRIBUTIONS for arch in ARCHS]
    samples = [(pair, job) for pair in pairs for job in jobs_of(*pair, "sample")]
    places = covering.chosen([{"release": pair[0], **_factors(job)} for pair, job in samples])
    few: dict[tuple[str, str], list[Any]] = {pair: [] for pair in pairs}
    for pair, job in (samples[place] for place in places):
        few[pair].append(job)
    return few


def _factors(job: Any) -> dict[str, Any]:
    defines = job.defines
    return {
        "kernel": (job.source, job.arch),
        "tile": tuple(defines[f"FA2_{name}"] for name in ("BLOCK_M", "BLOCK_N", "NUM_WARPS")),
        "width": (defines["FA2_HEAD_DIM"], defines.get("FA2_HEAD_DIM_V")),
        **{name: defines.get(f"FA2_{name}") for name in _CHOICES},
    }


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
    for result in compile_many(jobs_of(release, arch, which), max_workers=int(threads)):
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
