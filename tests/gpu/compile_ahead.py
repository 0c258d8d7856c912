"""Compile the kernels of many cases at once, before any of them runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from fa2cupy import kernels
from fa2cupy.jit import compile_many, driver
from fa2cupy.kernels import CompileJob
from fa2cupy.kernels.decode import DecodePlan
from fa2cupy.kernels.plan import Plan
from tests.gpu.cases import Case, problem_of

__all__ = ["compile_ahead", "jobs_of"]


def jobs_of(
    wanted: Iterable[tuple[Case, bool]],
    info: driver.DeviceInfo,
    sm80: Iterable[Case] = (),
    plans: Iterable[Plan | DecodePlan] = (),
) -> list[CompileJob]:
    """One job for each different kernel that the cases run on a device; a case's bool says whether backward too.
    sm80: cases whose backward runs with the kernels that every GPU has. plans: further ones."""
    jobs: dict[tuple[object, ...], CompileJob] = {}

    def add(case: object, launches: Iterable[kernels.KernelLaunch]) -> None:
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
    for plan in plans:
        add(plan.problem, plan.launches)
    return list(jobs.values())


def compile_ahead(
    wanted: Iterable[tuple[Case, bool]],
    sm80: Iterable[Case] = (),
    plans: Iterable[Callable[[driver.DeviceInfo], Iterable[Plan | DecodePlan]]] = (),
) -> int:
    """How many kernels there are; raises the first CompilationError."""
    info = driver.device_info(0)
    jobs = jobs_of(wanted, info, sm80, itertools.chain.from_iterable(each(info) for each in plans))
    for result in compile_many(jobs):
        if result.error is not None:
            raise result.error
    return len(jobs)
