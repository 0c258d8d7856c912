"""Compile the kernels of many cases at once, before any of them runs."""

from __future__ import annotations

from collections.abc import Iterable

from fa2cupy import kernels
from fa2cupy.jit import compile_many, driver
from fa2cupy.kernels import CompileJob
from tests.gpu.cases import Case, problem_of

__all__ = ["compile_ahead", "jobs_of"]


def jobs_of(
    wanted: Iterable[tuple[Case, bool]], info: driver.DeviceInfo, sm80: Iterable[Case] = ()
) -> list[CompileJob]:
    """One job for each different kernel that the cases run on a device; a case's bool says whether backward too.
    sm80: cases whose backward runs with the kernels that every GPU has."""
    jobs: dict[tuple[object, ...], CompileJob] = {}

    def add(case: Case, launches: Iterable[kernels.KernelLaunch]) -> None:
        for launch in launches:
            key = (launch.source, launch.name, launch.arch, tuple(sorted(launch.defines.items())))
            if key not in jobs:
                jobs[key] = CompileJob(launch.source, launch.name, launch.arch, launch.defines, str(case), 0, 0)

    for case, backward in wanted:
        problem = problem_of(case, False)
        add(case, kernels.plan_forward(problem, info).launches)
        add(case, kernels.plan_forward(problem, info, family="sm80").launches)
        if backward:
            add(case, kernels.plan_backward(problem_of(case, True), info, case.deterministic).launches)
    for case in sm80:
        add(case, kernels.plan_backward(problem_of(case, True), info, case.deterministic, family="sm80").launches)
    return list(jobs.values())


def compile_ahead(wanted: Iterable[tuple[Case, bool]], sm80: Iterable[Case] = ()) -> int:
    """How many kernels there are; raises the first CompilationError."""
    jobs = jobs_of(wanted, driver.device_info(0), sm80)
    for result in compile_many(jobs):
        if result.error is not None:
            raise result.error
    return len(jobs)
