"""What is shipped: the wheel and the source distribution hold every kernel, and an installed wheel finds them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fa2cupy import env

ROOT = Path(__file__).parent.parent
KERNELS = {path.relative_to(ROOT / "cuda_src").as_posix() for path in ROOT.glob("cuda_src/**/*.cu*")}
MODULES = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("fa2cupy/**/*.py")}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git would check out. With no build/ in it: a stale one puts deleted kernels into the wheel."""
    target = tmp_path_factory.mktemp("package") / "fa2cupy"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "results", "nvrtc13")
    shutil.copytree(ROOT, target, ignore=ignored)
    return target


def _build(checkout: Path, kind: str) -> Path:
    """Build the wheel or the sdist with the setuptools that is installed: no network, no isolation."""
    shutil.rmtree(checkout / "build", ignore_errors=True)
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}('dist'))"
    result = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    warnings = [line for line in result.stderr.splitlines() if "is absent from the `packages` configuration" in line]
    assert not warnings, warnings
    return checkout / "dist" / result.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    return _build(checkout, "wheel")


def test_there_are_kernels() -> None:
    assert {"sm80/flash_fwd.cu", "sm80/flash_bwd.cu", "common/config.cuh"} <= KERNELS


def test_wheel_holds_every_module_and_kernel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"fa2cupy/cuda_src/{kernel}" for kernel in KERNELS} <= names
    assert names >= MODULES
    assert {"fa2cupy/py.typed", "fa2cupy/attention.pyi", "fa2cupy/kvcache.pyi"} <= names
    assert wheel.name.endswith("-py3-none-any.whl")
    # Nothing else: no tests, no benchmarks, no stray top-level package.
    assert {name.split("/")[0] for name in names} == {"fa2cupy", wheel.name.rpartition("-py3")[0] + ".dist-info"}


def test_wheel_has_the_licence_and_the_extras(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = wheel.name.rpartition("-py3")[0] + ".dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    for line in ("Provides-Extra: cuda12", "Provides-Extra: cuda13", "License-Expression: BSD-3-Clause"):
        assert line in metadata


def test_sdist_holds_what_a_wheel_is_built_from(checkout: Path) -> None:
    path = _build(checkout, "sdist")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"cuda_src/{kernel}" for kernel in KERNELS} <= names
    assert names >= MODULES | {"setup.cfg", "pyproject.toml", "LICENSE", "README.md", "Makefile", "tests/conftest.py"}


def test_installed_wheel_finds_its_kernels(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(command, check=True)
    code = (
        "import fa2cupy, sys\n"
        "from fa2cupy.jit import source\n"
        f"assert fa2cupy.__file__.startswith({str(site)!r}), fa2cupy.__file__\n"
        f"for path in {sorted(kernel for kernel in KERNELS if kernel.endswith('.cu'))!r}:\n"
        "    assert source.load(path).code\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PYTHONPATH"] = str(site)
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_kernels_readme_names_every_kernel_file() -> None:
    named = set(re.findall(r"^\| `([a-z0-9_/]+\.cuh?)`", (ROOT / "cuda_src" / "README.md").read_text(), re.MULTILINE))
    assert named == KERNELS


def test_the_readme_has_every_setting() -> None:
    named = set(re.findall(r"^\| `(FA2CUPY_\w+)`", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert named == {variable.name for variable in env.VARIABLES}
