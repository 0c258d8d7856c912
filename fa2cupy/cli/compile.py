"""compile: every kernel for the GPUs you name, into the cache. Needs NVRTC, but no GPU."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from fa2cupy import kernels
from fa2cupy.cli.arguments import at_least_one
from fa2cupy.cli.progress import counter
from fa2cupy.errors import Fa2Error
from fa2cupy.jit import CompileResult, cache, compile_many, compiler, driver
from fa2cupy.kernels import CompileJob

HEADER = ("arch", "kernel", "registers", "shared", "spills", "seconds", "warnings")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``compile``."""
    parser.add_argument("--arch", action="append", metavar="sm_XY", help="repeatable; default: this machine's GPUs")
    parser.add_argument("--quick", action="store_true", help="only head_dim 64 and 128 in bfloat16")
    parser.add_argument("--wide", action="store_true", help="float32 and float64 instead of the 16-bit types")
    parser.add_argument("--jobs", type=at_least_one, metavar="N", help="compilations at a time (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """Compile and print the table; 1 when a kernel did not compile, 2 when there is nothing to compile for."""
    archs = list(dict.fromkeys(args.arch or own_archs()))
    if not archs:
        print("This machine has no usable GPU. Name one: --arch sm_80 (A100), sm_86, sm_89, sm_90a (H100), sm_120 ...")
        return 2
    found = [job for arch in archs for job in kernels.compile_jobs(arch, all_rows=not args.quick, wide=args.wide)]
    jobs = list({(job.arch, job.label): job for job in found}.values())  # sm_90a has those of sm_90 too
    print(f"NVRTC {compiler.nvrtc_build()}, {len(jobs)} kernels for {', '.join(archs)}")
    start = time.perf_counter()
    with counter(len(jobs), "compiling") as step:
        results = compile_many(jobs, max_workers=args.jobs, on_done=lambda _: step())
    print(table(jobs, results))
    failures = [result.error for result in results if result.error]
    for error in dict.fromkeys(map(str, failures)):
        print(f"\n{error}")
    cached = sum(result.cached for result in results)
    print(
        f"{len(results) - cached - len(failures)} compiled, {cached} were in the cache, {len(failures)} failed, "
        f"{time.perf_counter() - start:.1f} s; cache: {cache.open_cache().directory or 'none'}"
    )
    return 1 if failures else 0


def own_archs() -> list[str]:
    """Architectures of this machine's GPUs, without those that the kernels do not support."""
    found = []
    try:
        count = driver.device_count()
    except Fa2Error:
        return []
    for index in range(count):
        try:
            major, minor = driver.device_info(index).cc
        except Fa2Error:
            continue
        found.append(f"sm_{major}{minor}" + "a" * ((major, minor) == (9, 0)))
    return found


def table(jobs: Sequence[CompileJob], results: Sequence[CompileResult]) -> str:
    """Registers per thread, bytes of shared memory, bytes spilled, seconds of NVRTC and warnings of each kernel."""
    rows = [HEADER, *(_row(job, result) for job, result in zip(jobs, results, strict=True))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER) - 1)]
    lines = []
    for row in rows:
        # Words to the left, numbers to the right.
        words = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(row[2:-1], widths[2:], strict=True)]
        lines.append("  ".join([*words, *numbers, row[-1]]).rstrip())
    return "\n".join(lines)


def _row(job: CompileJob, result: CompileResult) -> tuple[str, ...]:
    resources = result.resources
    if result.error:
        return job.arch, job.label, "failed", "", "", "", ""
    if resources is None:
        return job.arch, job.label, "PTX", str(job.shared_mem_bytes), "", f"{result.seconds:.1f}", ""
    shared = str(job.shared_mem_bytes + resources.static_shared)
    numbers = (str(resources.registers), shared, str(resources.spill_bytes), f"{result.seconds:.1f}")
    return job.arch, job.label, *numbers, "; ".join(result.warnings)
