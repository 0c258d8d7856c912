"""fa2cupy.jit.targets: who makes the code of wgmma kernels, by NVRTC's release and the driver's version."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fa2cupy import log
from fa2cupy.jit import Source, cache, compiler, driver, targets
from tests.fake_driver import FakeDriver, fake_driver, forget_driver

kernel_module = sys.modules["fa2cupy.jit.kernel"]
SOURCE = Source("k.cu", b"code")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    with fake_driver(monkeypatch) as found:
        yield found


def set_driver(fake: FakeDriver, version: int) -> None:
    fake["version"] = version
    forget_driver()


@pytest.mark.parametrize(
    ("build", "new_driver", "old_driver", "objection"),
    [
        ("11.8.89 CL-1", "sm_90a", "sm_90a", "does not know sm_90a"),
        ("12.0.140 CL-1", "compute_90a", "sm_90a", ""),
        ("12.4.127 CL-1", "compute_90a", "sm_90a", ""),
        ("12.5.82 CL-1", "compute_90a", "sm_90a", "may make wrong code"),
        ("12.6.77 CL-1", "compute_90a", "sm_90a", ""),
        ("12.8.61", "compute_90a", "sm_90a", "may make wrong code"),
        ("12.8.93 CL-1", "compute_90a", "sm_90a", ""),
        ("12.9.41 CL-1", "compute_90a", "sm_90a", "may make wrong code"),
        ("12.9", "compute_90a", "sm_90a", "may make wrong code"),  # no third number: perhaps 41
        ("12.9.86 CL-36037853", "sm_90a", "sm_90a", ""),
        ("13.0.48 CL-1", "sm_90a", "sm_90a", ""),
        ("13.0", "sm_90a", "sm_90a", ""),
        ("13.2.51 CL-1", "sm_90a", "sm_90a", ""),
    ],
)
def test_releases(fake: FakeDriver, build: str, new_driver: str, old_driver: str, objection: str) -> None:
    """`objection`: with an old driver; a new one makes up for every release that knows sm_90a."""
    for version in (13000, 13010):
        set_driver(fake, version)
        assert targets.target("sm_90a", build) == new_driver
        assert bool(targets.wgmma_objection(build)) == build.startswith("11.")
        assert not targets.serialises_wgmma(build)
        assert targets.target("sm_90", build) == "sm_90" and targets.target("sm_80", build) == "sm_80"
    set_driver(fake, 12080)
    assert targets.target("sm_90a", build) == old_driver
    assert targets.serialises_wgmma(build) == (new_driver == "compute_90a")
    said = targets.wgmma_objection(build)
    assert (objection in said and f"NVRTC {build} " in said) if objection else said == ""
    assert "CUDA 12.8, 13.0 is needed" in said or "wrong code" not in said
    assert fake["init_count"] == 0  # a forked child could not use CUDA


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache is being filled for another machine."""
    with fake_driver(monkeypatch, "libcuda-that-is-not-there.so.1"):
        assert targets.target("sm_90a", "12.8.93 CL-1") == "compute_90a"
        assert targets.wgmma_objection("12.8.93 CL-1") == ""


class FakeNvrtc:
    """Release 12.8.93; its assembler serialises wgmma."""

    def __init__(self) -> None:
        self.targets: list[str] = []

    def architectures(self) -> list[int]:
        return [80, 90]

    def path(self) -> None:
        return None

    def compile(self, code: bytes, name: str, headers: Any, options: Any, *, ptx: bool) -> tuple[bytes, str]:
        self.targets.append(options[0].removeprefix("-arch="))
        if ptx:
            return b".version 8.7\n.target sm_90a\n\0", ""
        log = "ptxas info : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
        log += "\nptxas info : Compiling entry function 'k' for 'sm_90a'\nptxas info : Used 168 registers"
        return compiler.ELF_MAGIC + bytes(64), log if "90a" in options[0] else log.partition("\n")[2]


@pytest.mark.parametrize(("version", "expected"), [(13000, "compute_90a"), (12080, "sm_90a")])
def test_the_driver_assembles_what_it_can(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: int, expected: str,
    recwarn: pytest.WarningsRecorder,
) -> None:  # fmt: skip
    """From a source to a module on a device, compiled and from the cache; serialised code is told of once."""
    nvrtc = FakeNvrtc()
    monkeypatch.setenv("FA2CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler.nvrtc, "load", lambda: nvrtc)
    monkeypatch.setattr(compiler, "nvrtc_build", lambda: "12.8.93 CL-1")
    monkeypatch.setattr(kernel_module.modules, "cupy_or_none", lambda: None)
    log.warn_once.cache_clear()
    set_driver(fake, version)
    for _ in range(2):
        kernel_module._entries.clear()
        kernel_module._kernels.clear()
        kernel_module.kernel(SOURCE, "k", "sm_90a", {}).function(1)
    kernel_module.kernel(SOURCE, "k", "sm_90", {}).function(1)
    assert nvrtc.targets == [expected, "sm_90"]
    starts = [bytes(load.image[:4]) for load in fake.loads]
    assert starts == [b".ver" if expected == "compute_90a" else compiler.ELF_MAGIC] * 2 + [compiler.ELF_MAGIC]
    assert [(load.context, load.function) for load in fake.loads] == [(0x1001, b"k")] * 3
    suffixes = sorted(path.suffix for path in tmp_path.iterdir() if path.suffix != ".json")
    assert suffixes == [".cubin", ".ptx" if expected == "compute_90a" else ".cubin"][: len(suffixes)]
    said = [str(warning.message) for warning in recwarn if "serialises wgmma in k" in str(warning.message)]
    assert len(said) == (expected == "sm_90a")
    assert not said or ("a driver of CUDA 13.0" in said[0] and "12.9.86" in said[0])


def test_each_driver_finds_its_own_in_one_cache(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The driver was upgraded, or the cache is shared: PTX for the one, a cubin for the other, both kept."""
    nvrtc = FakeNvrtc()
    monkeypatch.setenv("FA2CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler.nvrtc, "load", lambda: nvrtc)
    monkeypatch.setattr(compiler, "nvrtc_build", lambda: "12.8.93 CL-1")
    kinds = []
    for version in (12080, 13000, 12080, 13000):
        set_driver(fake, version)
        entry: cache.Entry = kernel_module.build(SOURCE, "sm_90a", {})
        kinds.append((entry.compiled, entry.cubin.is_ptx))
    assert kinds == [(True, False), (True, True), (False, False), (False, True)]
    assert driver.driver_version() == (13, 0)
