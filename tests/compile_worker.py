"""Compile kernels with one exact NVRTC, in a process of its own; test_compile.py starts it.

    python -m tests.compile_worker <folder of libnvrtc> <release> <arch> sample|all <threads>

prints one line of JSON per kernel.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from fa2cupy.jit import compile_many
from fa2cupy.kernels import compile_jobs
from tests import nvrtc

# Architectures of which CI compiles every bfloat16 row; of the others, and of float16, a fixed quarter.
EVERY_ROW = ("sm_80", "sm_86", "sm_90", "sm_90a")
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")  # sm_90a has what sm_90 has


def in_sample(job: Any) -> bool:
    """Whether `make test` compiles this job. Depends on nothing but its label and architecture."""
    is_bfloat16 = bool(job.defines["FA2_BF16"])
    fixed = hashlib.sha256(f"{job.arch} {job.label}".encode()).digest()[0]
    return (is_bfloat16 and job.arch in EVERY_ROW) or fixed % 4 == 0


def main() -> None:
    folder, release, arch, which, threads = sys.argv[1:]
    nvrtc.use(Path(folder), release)
    jobs = [job for job in compile_jobs(arch, True) if which == "all" or in_sample(job)]
    for result in compile_many(jobs, max_workers=int(threads)):
        job, resources = result.job, result.resources
        record = {
            "label": job.label,
            "name": job.name,
            "arch": job.arch,
            "error": str(result.error) if result.error else "",
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
