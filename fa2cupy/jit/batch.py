"""Compile many sources at once: NVRTC gives up the GIL, so threads are enough."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Protocol

from fa2cupy.errors import CompilationError
from fa2cupy.jit import source as source_module
from fa2cupy.jit.compiler import KernelResources
from fa2cupy.jit.kernel import build
from fa2cupy.jit.source import Source

__all__ = ["CompileResult", "Job", "compile_many"]


class Job(Protocol):
    """What there is to compile: `fa2cupy.kernels.CompileJob` is one. `source` is a path in cuda_src, or a Source."""

    @property
    def source(self) -> str | Source: ...
    @property
    def name(self) -> str: ...
    @property
    def arch(self) -> str: ...
    @property
    def defines(self) -> Mapping[str, int | str]: ...
    @property
    def label(self) -> str: ...


@dataclass(frozen=True, slots=True)
class CompileResult:
    """What became of a job.

    `resources` is None when `error` is not, or when the result is PTX. `cached`: nothing had to be compiled.
    `seconds` is the time that NVRTC took, now or when the cached binary was made.
    """

    job: Job
    resources: KernelResources | None
    warnings: tuple[str, ...]
    seconds: float
    cached: bool
    error: CompilationError | None = None


def compile_many(
    jobs: Iterable[Job],
    *,
    max_workers: int | None = None,
    on_done: Callable[[CompileResult], None] | None = None,
) -> list[CompileResult]:
    """Compile into the disk cache, `max_workers` (default: one per core) at a time; results in the jobs' order.

    `on_done` is called with each result as it comes, in the calling thread. A source that does not compile is a result
    with an `error`, a missing NVRTC is raised. Needs no GPU.
    """
    jobs = list(jobs)
    results: list[CompileResult | None] = [None] * len(jobs)
    # Not os.cpu_count(): a container may own two cores of a hundred.
    affinity = getattr(os, "sched_getaffinity", None)
    workers = max_workers or (len(affinity(0)) if affinity else os.cpu_count()) or 1
    with ThreadPoolExecutor(min(workers, max(1, len(jobs))), thread_name_prefix="fa2cupy-nvrtc") as pool:
        places = {pool.submit(_compile, job): place for place, job in enumerate(jobs)}
        try:
            for future in as_completed(places):
                result = results[places[future]] = future.result()
                if on_done is not None:
                    on_done(result)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [result for result in results if result is not None]


def _compile(job: Job) -> CompileResult:
    started = time.perf_counter()
    try:
        source = job.source if isinstance(job.source, Source) else source_module.load(job.source)
        entry = build(source, job.arch, job.defines, context=job.label)
        cubin = entry.cubin
        if cubin.kernels and job.name not in cubin.kernels:
            raise CompilationError(
                f"{source.path} has no kernel {job.name}: it has {', '.join(sorted(cubin.kernels))}", context=job.label
            )
    except CompilationError as error:
        return CompileResult(job, None, (), time.perf_counter() - started, cached=False, error=error)
    return CompileResult(job, cubin.kernels.get(job.name), cubin.warnings, cubin.seconds, cached=not entry.compiled)
