"""The NVRTC releases that CI compiles the kernels with, whichever CuPy is installed.

    python -m tests.nvrtc

installs those that this environment lacks, each in a directory of its own below `sys.prefix`, where nothing finds it by
accident. Needs pip and, once, a network or a mirror; no GPU. Standard library only.

`use` lets a process compile with one of them, or with any other: see with_nvrtc.py.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

DISTRIBUTIONS = {"12.9": "nvidia-cuda-nvrtc-cu12", "13.0": "nvidia-cuda-nvrtc"}


def library(version: str) -> Path | None:
    """libnvrtc of this release ("12.9"): the environment's own, or the one that was installed here; None if neither."""
    pattern = f"libnvrtc.so.{version.split('.')[0]}"
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTIONS[version])
    except importlib.metadata.PackageNotFoundError:
        own = []
    else:
        own = distribution.files or [] if distribution.version.startswith(f"{version}.") else []
    candidates = [Path(str(file.locate())) for file in own if file.name == pattern]
    candidates += sorted(_directory(version).glob(f"nvidia/*/lib/{pattern}"))
    return next((path for path in candidates if path.is_file()), None)


def use(folder: Path, version: str) -> str:
    """Compile with the libnvrtc of this folder in this process; its build. Exits if that is not of release `version`.

    To be called before anything else loads an NVRTC: CuPy takes the newest that is loaded, and torch may load its own.
    """
    for path in (*folder.glob("libnvrtc-builtins.so.*"), *folder.glob("libnvrtc.so.*")):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    from fa2cupy.jit import compiler

    build = compiler.nvrtc_build()
    if not f"{build.split()[0]}.".startswith(f"{version}."):
        sys.exit(f"CuPy uses NVRTC {build}, not the {version} that {folder} was to have")
    return build


def install(version: str) -> None:
    """Install one release for the tests alone."""
    target = _directory(version)
    shutil.rmtree(target, ignore_errors=True)  # whatever an interrupted attempt left
    requirement = f"{DISTRIBUTIONS[version]}=={version}.*"
    print(f"tests: installing {requirement} (once)", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), requirement]
    if subprocess.run(command).returncode or library(version) is None:
        shutil.rmtree(target, ignore_errors=True)
        sys.exit(f"tests: pip could not install {requirement}; a network or a package mirror is needed once")
    for spare in target.glob("nvidia/*/lib/*.alt.*"):  # a second build of the same, 110 MB
        spare.unlink()


def main() -> None:
    for version in DISTRIBUTIONS:
        if library(version) is None:
            install(version)


def _directory(version: str) -> Path:
    return Path(sys.prefix) / "nvrtc" / version


if __name__ == "__main__":
    main()
