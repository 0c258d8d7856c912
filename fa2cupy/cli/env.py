"""env: what a bug report needs: versions, GPU, driver, NVRTC, cache, settings. Never fails."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "numpy", "ml_dtypes", "cupy-cuda12x", "cupy-cuda13x", "cupy", "cuda-pathfinder", "nvidia-cuda-nvrtc-cu12",
    "nvidia-cuda-nvrtc", "torch", "jax", "jaxlib", "matplotlib", "tqdm",
)  # fmt: skip
Lines = Iterator[tuple[str, str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``env`` has no options."""


def run(args: argparse.Namespace) -> int:
    """Print every section; what cannot be found out is printed with its reason."""
    for title, section in SECTIONS.items():
        print(title)
        for name, value in _rows(section):
            print(f"  {name:<24} {value}")
    return 0


def _rows(section: Callable[[], Lines]) -> Lines:
    try:
        yield from section()
    except Exception as error:  # a report with a hole is better than none, whatever is broken on that machine
        reason = " ".join(str(error).split())[:300]
        yield "not available", f"{type(error).__name__}: {reason}"


def _python() -> Lines:
    import fa2cupy

    yield "fa2cupy", f"{fa2cupy.__version__} in {Path(fa2cupy.__file__).parent}"
    yield "python", f"{platform.python_version()} ({platform.python_implementation()}) in {sys.prefix}"
    yield "platform", f"{platform.platform()}, {os.cpu_count()} CPUs"
    for name in PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def _driver() -> Lines:
    from fa2cupy.jit import driver

    yield "CUDA of the driver", ".".join(map(str, driver.driver_version()))
    try:
        version = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
        yield "kernel module", version.partition(":")[2].strip()
    except OSError:
        pass
    count = driver.device_count()
    if not count:
        yield "GPUs", "none"
    for index in range(count):
        yield f"GPU {index}", _gpu(index)


def _gpu(index: int) -> str:
    from fa2cupy.errors import UnsupportedDevice
    from fa2cupy.jit import driver

    try:
        info = driver.device_info(index)
    except UnsupportedDevice as error:
        return str(error)
    return (
        f"{info.name}, sm_{info.cc[0]}{info.cc[1]}, {info.sm_count} SMs, "
        f"{info.shared_mem_optin // 1024} KB shared memory per block, {info.l2_bytes >> 20} MB L2"
    )


def _nvrtc() -> Lines:
    from fa2cupy.errors import MissingDependency
    from fa2cupy.jit import compiler, targets
    from fa2cupy.jit.cupy import require_cupy

    build = compiler.nvrtc_build()
    yield "NVRTC", build
    yield "found in", compiler.nvrtc_path() or "(not known)"
    try:
        require_cupy()
        yield "reached through", "CuPy"
    except MissingDependency as error:
        yield "reached through", f"ctypes, for torch and JAX: {' '.join(str(error).split())[:200]}"
    if objection := targets.wgmma_objection(build):
        yield "Hopper kernels", f"none: {objection}"
    elif targets.target("sm_90a", build) != "sm_90a":
        yield "Hopper kernels", "PTX, assembled by the driver when they are loaded"


def _cache() -> Lines:
    from fa2cupy import env

    directory = env.cache_dir()
    yield "kernel cache", str(directory)
    if directory.is_dir():
        sizes = [path.stat().st_size for path in directory.rglob("*") if path.is_file()]
        yield "in it", f"{len(sizes)} files, {sum(sizes) / 2**20:.1f} MB, mode {directory.stat().st_mode & 0o777:o}"
    else:
        yield "in it", "nothing yet"


def _settings() -> Lines:
    from fa2cupy import env

    for variable in env.VARIABLES:
        value = os.environ.get(variable.name)
        yield variable.name, f"{variable.default}  (default)" if value is None else repr(value)
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_PATH", "CUPY_CACHE_DIR", "LD_LIBRARY_PATH"):
        if name in os.environ:
            yield name, repr(os.environ[name])


def gpu_record() -> Lines:
    import fa2cupy

    folder = Path(fa2cupy.__file__).resolve().parent.parent / "tests" / "gpu"
    if not (folder / "record.json").is_file():
        yield "tests/gpu/record.json", "none here (only a checkout has it)"
        return
    spec = importlib.util.spec_from_file_location("fa2cupy_gpu_record", folder / "record.py")
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield "verdict", module.verdict(module.read(), module.digest())[1]
    for name, value in json.loads((folder / "record.json").read_text()).items():
        if isinstance(value, (str, int, float)):
            yield name, str(value)


SECTIONS: dict[str, Callable[[], Lines]] = {
    "Python": _python,
    "Driver and GPUs": _driver,
    "NVRTC": _nvrtc,
    "Cache": _cache,
    "Settings": _settings,
    "Last run of the GPU tests": gpu_record,
}
