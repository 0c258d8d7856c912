"""Compile the kernels of many cases at once, beside the tests that will need them.

    compiler = CompileAhead(wanted, sm80, modules)      a process of its own; what it makes is in the cache on the disk
    compiler.outcome()                                  None, and at last {"kernels": 1203, "seconds": 71.4}

A test whose kernel is not there yet waits for it, or compiles it if nobody does: the cache has a lock for each. Kernels
are compiled in the order of the tests, in a process of lower priority, so that the tests' own work goes first.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fa2cupy import kernels
from fa2cupy.jit import compile_many, driver
from fa2cupy.kernels import CompileJob
from fa2cupy.kernels.decode import DecodePlan
from fa2cupy.kernels.plan import Plan
from tests.gpu.cases import Case, problem_of
from tests.gpu.room import shared

__all__ = ["CompileAhead", "jobs_of"]

ROOT = Path(__file__).resolve().parents[2]


def jobs_of(
    wanted: Iterable[tuple[Case, bool]],
    info: driver.DeviceInfo,
    sm80: Iterable[Case] = (),
    plans: Iterable[Plan | DecodePlan] = (),
) -> Iterator[CompileJob]:
    """One job for each different kernel that the cases run on a device; a case's bool says whether backward too.
    sm80: cases whose backward runs with the kernels that every GPU has. plans: further ones."""
    found: set[tuple[object, ...]] = set()

    def new(case: object, launches: Iterable[kernels.KernelLaunch]) -> Iterator[CompileJob]:
        for launch in launches:
            key = (launch.source, launch.name, launch.arch, tuple(sorted(launch.defines.items())))
            if key not in found:
                found.add(key)
                yield CompileJob(launch.source, launch.name, launch.arch, launch.defines, str(case), 0, 0)

    for case, backward in dict.fromkeys(wanted):
        problem = problem_of(case, False)
        yield from new(case, kernels.plan_forward(problem, info).launches)
        yield from new(case, kernels.plan_forward(problem, info, family="sm80").launches)
        if backward:
            plan = kernels.plan_backward(problem_of(case, True), info, case.deterministic)
            yield from new(case, plan.launches)
    for case in sm80:
        plan = kernels.plan_backward(problem_of(case, True), info, case.deterministic, family="sm80")
        yield from new(case, plan.launches)
    for each in plans:
        yield from new(each.problem, each.launches)


class CompileAhead:
    """Starts at once. modules: names of those whose `needed_plans` are wanted too."""

    def __init__(self, wanted: Sequence[tuple[Case, bool]], sm80: Sequence[Case], modules: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.compile_ahead"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
        )
        self._outcome: dict[str, Any] | None = None
        with contextlib.suppress(BrokenPipeError):  # `outcome` tells
            pickle.dump((wanted, sm80, modules, driver.device_info(0)), self._process.stdin)
            self._process.stdin.close()

    def outcome(self, *, stop: bool = False) -> dict[str, Any] | None:
        """What it has compiled, or None while it does. stop: what it has not, no test needs any more."""
        if self._process.poll() is None:
            if not stop:
                return None
            self._process.terminate()
        if self._outcome is None:
            said = self._process.stdout.read()
            code = self._process.wait()
            failure = {"status": "stopped" if code < 0 else "failed: its traceback is above"}
            self._outcome = json.loads(said) if said else failure
        return self._outcome


def main() -> None:
    start = time.monotonic()
    wanted, sm80, modules, info = pickle.load(sys.stdin.buffer)
    os.nice(5)
    plans = itertools.chain.from_iterable(importlib.import_module(name).needed_plans(info) for name in modules)
    with shared(), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = [pool.submit(compile_many, [job]) for job in jobs_of(wanted, info, sm80, plans)]
        failed = [result.job.label for job in jobs for result in job.result() if result.error is not None]
        seconds = round(time.monotonic() - start, 1)
        # The tests that need what does not compile say why.
        print(
            json.dumps({"kernels": len(jobs), "seconds": seconds} | ({"failed": failed} if failed else {})), flush=True
        )


if __name__ == "__main__":
    main()
