"""Run a program with one exact NVRTC, whichever CuPy and torch would find: how `wgmma_objection` is decided.

    python -m tests.with_nvrtc RELEASE FOLDER -m MODULE ARGUMENTS...
    python -m tests.with_nvrtc RELEASE FOLDER SCRIPT.py ARGUMENTS...

FOLDER has libnvrtc.so.* and libnvrtc-builtins.so.* of RELEASE, as in NVIDIA's wheel; CuPy may be of another CUDA.

    python -m tests.with_nvrtc 12.9.86 /tmp/12.9.86 -m pytest tests/gpu/test_flash_fwd.py tests/gpu/test_accuracy.py
    python -m tests.with_nvrtc 12.9.86 /tmp/12.9.86 benchmarks/bench.py --modes fwd

Kernels come from a cache of this build alone, and the wgmma kernels run whatever is said against it. RELEASE+cubin
(12.8.93+cubin): NVRTC assembles them even where the driver would do it better. The last lines say what the cache then
holds. Processes that the program starts do not inherit the NVRTC.
"""

from __future__ import annotations

import atexit
import collections
import json
import os
import runpy
import sys
from pathlib import Path

from fa2cupy import env, jit
from fa2cupy.jit import targets
from tests import nvrtc


def main() -> None:
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    version, folder, *program = sys.argv[1:]
    version, _, kind = version.partition("+")
    if kind not in ("", "cubin"):
        sys.exit(f"+{kind} is unknown: RELEASE or RELEASE+cubin is needed")
    if kind:
        targets._driver_assembles = lambda: False
    build = nvrtc.use(Path(folder), version)
    cache = env.cache_dir() / build.replace(" ", "-")
    os.environ[env.CACHE_DIR.name] = str(cache)
    jit.wgmma_objection = lambda build: ""
    jit.serialises_wgmma = lambda build: False
    print(f"NVRTC {build}, kernels in {cache}", flush=True)
    atexit.register(report, cache)
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        runpy.run_path(sys.argv[0], run_name="__main__")


def report(cache: Path) -> None:
    """How many kernels there are of each architecture, build and kind."""
    records = [json.loads(path.read_bytes()) for path in cache.glob("*.json") if path.name != "nvrtc.json"]
    kinds = collections.Counter((r["arch"], r["build"], Path(r["file"]).suffix[1:]) for r in records)
    for (arch, build, kind), count in sorted(kinds.items()):
        print(f"{count} kernels for {arch} made by NVRTC {build} ({kind})")


if __name__ == "__main__":
    main()
