"""What each of several processes does that start together on one empty cache.

python tests/ranks.py FOLDER            leaves a file there, named after what `compile_some` returned
python tests/ranks.py FOLDER METHOD     starts RANKS processes that do so by multiprocessing (spawn, fork)
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from pathlib import Path

RANKS, KERNELS = 8, 4


def compile_some() -> tuple[int, float]:
    """(how many of the kernels this process compiled, seconds until it had all of them)."""
    sys.modules["cupy"] = None  # type: ignore[assignment]  # importing it takes longer than all the rest
    from fa2cupy.jit import Source
    from fa2cupy.jit.kernel import build

    start = time.perf_counter()
    source = Source("k.cu", b'extern "C" __global__ void k(int* p) { *p = A; }')
    compiled = sum(build(source, "sm_80", {"A": number}).compiled for number in range(KERNELS))
    return compiled, time.perf_counter() - start


def leave(folder: str) -> None:
    compiled, seconds = compile_some()
    Path(folder, f"{compiled}-{seconds:.9f}").touch()


def read(folder: Path) -> tuple[int, list[float]]:
    """(kernels compiled by all ranks together, the seconds of each in order); all of them must have come to an end."""
    found = [path.name.split("-") for path in folder.iterdir()]
    assert len(found) == RANKS
    return sum(int(compiled) for compiled, _ in found), sorted(float(seconds) for _, seconds in found)


def main() -> None:
    folder, *method = sys.argv[1:]
    if not method:
        return leave(folder)
    if method == ["fork"]:
        compile_nothing()
    context = multiprocessing.get_context(method[0])
    processes = [context.Process(target=leave, args=(folder,)) for _ in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))


def compile_nothing() -> None:
    """A parent that has NVRTC loaded already."""
    sys.modules["cupy"] = None  # type: ignore[assignment]
    from fa2cupy.jit import compiler

    compiler.nvrtc_build()


if __name__ == "__main__":
    main()
