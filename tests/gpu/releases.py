"""What other releases of NVRTC make of the Hopper kernels, timed in turns with this environment's, on an H100 or H200.

    python tests/gpu/releases.py 12.8.93=FOLDER 12.6.77=FOLDER ...

FOLDER has libnvrtc.so.12 and libnvrtc-builtins.so.* of that release (nvidia/cuda_nvrtc/lib in its wheel). Each release
compiles in a process of its own, into a cache of its own: to PTX, which the driver then assembles, and to cubins. This
process loads what is in the caches and needs no NVRTC itself. Prints seconds, then a table of TFLOP/s, and whether the
results have the same bits. The tests with one release, as PTX and as cubins:

    python -m tests.with_nvrtc 12.8.93 FOLDER -m pytest tests/gpu/test_flash_fwd.py tests/gpu/test_accuracy.py
    python -m tests.with_nvrtc 12.8.93+cubin FOLDER -m pytest tests/gpu/test_flash_fwd.py tests/gpu/test_accuracy.py
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import fa2cupy  # noqa: E402
from benchmarks.timing import TorchClock, take_turns  # noqa: E402
from fa2cupy import env  # noqa: E402
from fa2cupy.errors import MissingDependency  # noqa: E402
from fa2cupy.frameworks import TORCH  # noqa: E402
from fa2cupy.jit import compile_many, compiler, driver, kernel, nvrtc, targets  # noqa: E402
from fa2cupy.kernels import planner  # noqa: E402
from fa2cupy.prepared import PREPARED  # noqa: E402
from tests.gpu.cases import Case  # noqa: E402
from tests.gpu.compile_ahead import jobs_of  # noqa: E402

BATCH, SEQLEN, WIDTH = 4, 4096, 2048
SHAPES = {"128 causal": (128, True), "64 full": (64, False), "256 full": (256, False)}
NAMES = ("dout", "q", "k", "v", "out", "lse", "dq", "dk", "dv")
BURSTS = 6


@dataclass(frozen=True)
class Way:
    """A release of NVRTC ("" is this environment's), and who assembles; `family`: FA2CUPY_KERNEL."""

    release: str = ""
    folder: str = ""
    cubin: bool = False
    family: str = ""

    def __str__(self) -> str:
        how = self.family or ("cubin" if self.cubin else "PTX" if self.release else "own")
        return f"{self.release} {how}".strip()

    @property
    def name(self) -> str:
        return f"{self.release or 'own'}{'+cubin' * self.cubin}"

    def cache(self, caches: Path) -> Path:
        found = caches / self.name
        # with_nvrtc adds a folder named after the build.
        inside = [path for path in found.glob("*") if path.is_dir()] if self.release else []
        return inside[0] if inside else found

    def command(self) -> list[str]:
        kind = "cubin" if self.cubin else "ptx" if self.release else "own"
        own = [__file__, "--compile", kind]
        if not self.release:
            return [sys.executable, *own]
        return [sys.executable, "-m", "tests.with_nvrtc", self.name, self.folder, *own]


def cases() -> list[Case]:
    return [
        Case(SEQLEN, SEQLEN, head_dim, "bfloat16", causal, batch=BATCH, heads=(WIDTH // head_dim,) * 2)
        for head_dim, causal in SHAPES.values()
    ]


def compile_them(kind: str) -> None:
    """In a process with the release in question: compile, and let the driver assemble what is PTX."""
    start = time.perf_counter()
    jobs = list(jobs_of([(case, True) for case in cases()], driver.device_info(0)))
    results = compile_many(jobs)
    for result in results:
        if result.error is not None:
            raise result.error
    seconds = time.perf_counter() - start
    slow = sum(any("serialized" in line for line in result.warnings) for result in results)
    print(f"NVRTC {compiler.nvrtc_build()} ({kind}): {len(jobs)} kernels in {seconds:.1f} s, {slow} serialised")
    times = []
    for job in jobs:
        if job.arch == "sm_90a":
            loaded = kernel(job.source, job.name, job.arch, job.defines)
            assert loaded.cubin.is_ptx == (kind == "ptx"), f"{job.label} is not {kind}"
            start = time.perf_counter()
            loaded.function(0)
            times.append(time.perf_counter() - start)
    print(
        f"    {len(times)} modules of sm_90a loaded in {sum(times):.1f} s, the slowest in {max(times):.1f} s",
        flush=True,
    )
    # Whatever else the calls need.
    for family in ("", "sm80") if kind == "own" else ("",):
        os.environ[env.KERNEL.name] = family
        planner.bound_plan.cache_clear()
        for head_dim, causal in SHAPES.values():
            PREPARED.clear()
            prepare(tensors(head_dim), causal)
    torch.cuda.synchronize()


_kept: list[Any] = []  # modules of the ways before: calls that are prepared launch from them


@contextlib.contextmanager
def kernels_of(way: Way, caches: Path) -> Iterator[None]:
    """Calls that are prepared within use the kernels of this way."""
    jit_kernel = sys.modules["fa2cupy.jit.kernel"]
    os.environ[env.CACHE_DIR.name] = str(way.cache(caches))
    os.environ[env.KERNEL.name] = way.family
    assembles = targets._driver_assembles
    if way.cubin:
        targets._driver_assembles = lambda: False
    PREPARED.clear()
    planner.bound_plan.cache_clear()
    _kept.append((jit_kernel._entries._values, jit_kernel._kernels._values))
    jit_kernel._entries.clear()
    jit_kernel._kernels.clear()
    try:
        yield
    finally:
        targets._driver_assembles = assembles


def no_nvrtc() -> None:
    raise MissingDependency("everything was compiled before")


def measure(ways: list[Way], caches: Path) -> None:
    nvrtc.load = no_nvrtc  # type: ignore[assignment]
    fa2cupy.jit.wgmma_objection = lambda build: ""
    fa2cupy.jit.serialises_wgmma = lambda build: False
    clock = TorchClock()
    rows: dict[str, dict[str, float]] = {str(way): {} for way in ways}
    for label, (head_dim, causal) in SHAPES.items():
        x = tensors(head_dim)
        flops = 4 * BATCH * WIDTH * SEQLEN**2 * (0.5 if causal else 1)
        calls: dict[str, dict[str, Callable[[], object]]] = {"fwd": {}, "bwd": {}}
        first: dict[str, torch.Tensor] = {}
        for way in ways:
            start = time.perf_counter()
            with kernels_of(way, caches):
                results, forward, backward = prepare(x, causal)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            first = first or results
            same = {name: torch.equal(results[name], first[name]) for name in results}
            worst = {name: rms(results[name], first[name]) for name in results}
            differs = ", ".join(f"{name} by {worst[name]:.1e} (rms)" for name in results if not same[name])
            verdict = f"differs: {differs}" if differs else "same bits"
            print(f"{label:<11} {way!s:<14} ready in {seconds:5.2f} s; {verdict}", flush=True)
            calls["fwd"][str(way)] = run(forward, [x["q"], x["k"], x["v"], None, None])
            calls["bwd"][str(way)] = run(
                backward, [*(x[name] for name in NAMES[:4]), first["out"], first["lse"], *[None] * 3]
            )
        for mode, contestants in calls.items():
            for name, timing in take_turns(contestants, clock, bursts=BURSTS).items():
                rows[name][f"{mode} {label}"] = flops * (1 if mode == "fwd" else 2.5) / timing.ms / 1e9
    columns = list(next(iter(rows.values())))
    print("\n| NVRTC | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns))
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{row[column]:.0f}" for column in columns) + " |")


def tensors(head_dim: int) -> dict[str, torch.Tensor]:
    device = torch.device("cuda", 0)
    generator = torch.Generator(device=device).manual_seed(head_dim)
    shape = (BATCH, SEQLEN, WIDTH // head_dim, head_dim)
    return {name: torch.randn(shape, device=device, generator=generator).to(torch.bfloat16) for name in NAMES[:4]}


def prepare(x: dict[str, torch.Tensor], causal: bool) -> tuple[dict[str, torch.Tensor], Any, Any]:
    """(results, prepared forward, prepared backward). dq is summed in any order: its bits differ from call to call."""
    found = []
    out, lse = fa2cupy.attention(x["q"], x["k"], x["v"], causal=causal, return_lse=True)
    found += PREPARED._calls.values()
    PREPARED.clear()
    gradients = fa2cupy.attention_backward(x["dout"], x["q"], x["k"], x["v"], out, lse, causal=causal)
    found += PREPARED._calls.values()
    forward, backward = found
    return dict(zip(NAMES[4:], (out, lse, *gradients), strict=True)), forward, backward


def run(prepared: Any, arrays: list[Any]) -> Callable[[], object]:
    _, pointers = TORCH.signature(arrays)
    return lambda: prepared.run(list(arrays), list(pointers), None)


def rms(x: torch.Tensor, y: torch.Tensor) -> float:
    difference, reference = (x.float() - y.float()).square().mean(), y.float().square().mean()
    return float((difference / reference).sqrt())


def main() -> None:
    if sys.argv[1:2] == ["--compile"]:
        compile_them(sys.argv[2])
    elif sys.argv[1:]:
        with tempfile.TemporaryDirectory(prefix="fa2cupy-releases-") as folder:
            compare([argument.split("=", 1) for argument in sys.argv[1:]], Path(folder))
    else:
        sys.exit(__doc__)


def compare(releases: list[list[str]], caches: Path) -> None:
    # The driver's own cache is empty too, so that what it takes to assemble is seen.
    os.environ["CUDA_CACHE_PATH"] = str(caches / "driver")
    (caches / "driver").mkdir()
    ways = [Way(), Way(family="sm80")]
    for release, folder in releases:
        ways += [Way(release, folder), Way(release, folder, cubin=True)]
    start = time.perf_counter()
    processes = []
    for way in ways:
        if not way.family:
            cache = {env.CACHE_DIR.name: str(caches / way.name), "PYTHONPATH": str(ROOT)}
            processes.append(subprocess.Popen(way.command(), cwd=ROOT, env={**os.environ, **cache}))
    if sum(process.wait() != 0 for process in processes):
        sys.exit("a release could not compile its kernels")
    print(f"all compiled, and assembled where they are PTX, in {time.perf_counter() - start:.0f} s\n", flush=True)
    print(f"{torch.cuda.get_device_name(0)}, driver of CUDA {'.'.join(map(str, driver.driver_version()))}", flush=True)
    measure(ways, caches)


if __name__ == "__main__":
    main()
