"""fa2cupy.jit.compiler and fa2cupy.jit.batch with the NVRTC that is installed; no GPU is needed."""

from __future__ import annotations

import builtins
import os
import pickle
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fa2cupy.errors import CompilationError, MissingDependency
from fa2cupy.jit import compile_many, compiler, nvrtc
from fa2cupy.jit.cupy import cupy_or_none, require_cupy
from fa2cupy.jit.nvrtc import NvrtcError
from fa2cupy.jit.source import Source

REVERSE = Source(
    "sm80/reverse.cu",
    b"""
#include "common/config.cuh"
extern "C" __global__ void reverse(float* x) {
  __shared__ float s[kBlock];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = s[kBlock - 1 - threadIdx.x];
}
extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2; }
""",
    (("common/config.cuh", b"static_assert(FA2_BLOCK > 1, FA2_NAME);\nconstexpr int kBlock = FA2_BLOCK;\n"),),
)
DEFINES = {"FA2_BLOCK": 256, "FA2_NAME": '"reverse"'}


def test_cubin_and_resources() -> None:
    cubin = compiler.compile(REVERSE, "sm_80", DEFINES)
    assert cubin.image.startswith(compiler.ELF_MAGIC)
    assert not cubin.is_ptx
    assert cubin.warnings == ()
    assert set(cubin.kernels) == {"reverse", "twice"}
    assert cubin.kernels["reverse"].static_shared == 1024
    assert cubin.kernels["twice"].static_shared == 0
    for resources in cubin.kernels.values():
        assert 4 <= resources.registers <= 32
        assert (resources.spill_bytes, resources.stack) == (0, 0)
    assert re.fullmatch(r"1\d\.\d+\.\d+ CL-\d+", cubin.build)


def test_cubin_ends_where_its_elf_header_says() -> None:
    """The last byte, which CuPy drops, is back: the section or program headers of this ELF end the file."""
    image = compiler.compile(REVERSE, "sm_80", DEFINES).image
    assert image.endswith(b"\0")

    def number(offset: int, size: int) -> int:
        return int.from_bytes(image[offset : offset + size], "little")

    ends = [number(32, 8) + number(54, 2) * number(56, 2), number(40, 8) + number(58, 2) * number(60, 2)]
    sections = number(40, 8)
    for index in range(number(60, 2)):
        header = sections + index * number(58, 2)
        if number(header + 4, 4) != 8:  # SHT_NOBITS takes no room
            ends.append(number(header + 24, 8) + number(header + 32, 8))
    assert max(ends) == len(image)


@pytest.mark.usefixtures("no_memory_of_nvrtc")
def test_nvrtc_by_ctypes_is_nvrtc_by_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, in cubins, PTX, errors, and logs but for the time that ptxas took."""
    pytest.importorskip("cupy")

    def everything() -> list[Any]:
        found: list[Any] = [compiler.nvrtc_build(), Path(compiler.nvrtc_path() or "").resolve()]
        for arch in ("sm_80", "sm_90a", "sm_199"):
            cubin = compiler.compile(REVERSE, arch, DEFINES)
            found.append((cubin.image, re.sub(r"[\d.]+ ms", "", cubin.log), cubin.kernels, cubin.is_ptx))
        with pytest.raises(CompilationError) as caught:
            compiler.compile(REVERSE, "sm_80", {**DEFINES, "FA2_BLOCK": 1})
        return [*found, nvrtc.load().architectures(), nvrtc.load().version(), str(caught.value)]

    monkeypatch.setattr(compiler, "_build", "")
    by_cupy = everything()
    assert type(nvrtc.load()).__name__ == "_CupyNvrtc"
    nvrtc.load.cache_clear()
    monkeypatch.setattr(nvrtc, "cupy_or_none", lambda: None)
    monkeypatch.setattr(compiler, "_build", "")
    by_ctypes = everything()
    assert type(nvrtc.load()).__name__ == "_CtypesNvrtc"
    assert by_ctypes == by_cupy


def test_nvrtc_is_found_beside_torch_alone(tmp_path: Path) -> None:
    """Without CuPy: in the wheels that torch and JAX bring, in torch's own folder, or where CUDA_PATH says."""
    library = compiler.nvrtc_path()
    assert library is not None
    release = re.search(r"libnvrtc\.so\.(\d+)", Path(library).name)
    assert release is not None
    builtins_ = list(Path(library).parent.glob("libnvrtc-builtins.so.*"))
    places = {
        "wheel": "site/nvidia/cuda_nvrtc/lib/libnvrtc.so." + release[1],
        "wheel of CUDA 13": "site/nvidia/cu13/lib/libnvrtc.so." + release[1],
        "torch": f"site/torch/lib/libnvrtc-0a1b2c3d.so.{release[1]}",
        "CUDA_PATH": "cuda/lib64/libnvrtc.so." + release[1],
    }
    code = """
        import sys
        for name in [*sys.modules]:
            if name.partition(".")[0] in ("nvidia", "torch"):
                del sys.modules[name]
        sys.modules["cupy"] = None  # an import of it fails
        sys.path[:] = [path for path in sys.path if not path.endswith("site-packages")]
        from fa2cupy.jit import Source, compiler
        cubin = compiler.compile(Source("k.cu", b'extern "C" __global__ void k(int* p) { *p = 1; }'), "sm_90a", {})
        print(compiler.nvrtc_path(), cubin.is_ptx, *cubin.kernels, cubin.build)
    """
    for place in places.values():
        file = tmp_path / place
        file.parent.mkdir(parents=True)
        file.symlink_to(library)
        for extra in builtins_:
            (file.parent / extra.name).symlink_to(extra)
        (file.parent / "libnvrtc.alt.so.12").write_text("not this one")
        (file.parent.parent.parent / "__init__.py").touch() if "torch" in place else None
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *numpy_only(tmp_path)])}
        environment.pop("LD_LIBRARY_PATH", None)
        environment["CUDA_PATH"] = str(tmp_path / "cuda")
        found = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True
        )
        assert found.returncode == 0, found.stderr
        assert found.stdout.split() == [str(file), "False", "k", *compiler.nvrtc_build().split()]
        file.unlink()


def numpy_only(folder: Path) -> list[str]:
    """Places where the package and NumPy, but nothing else, can be imported from."""
    import numpy

    alone = folder / "numpy_only"
    alone.mkdir(exist_ok=True)
    where = Path(numpy.__file__).parent
    for name in ("numpy", "numpy.libs"):
        if not (alone / name).exists() and (where.parent / name).exists():
            (alone / name).symlink_to(where.parent / name)
    return [str(alone), str(Path(__file__).parent.parent)]


def test_order_in_which_nvrtc_is_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The newest that the driver takes; one that is too new for it comes last, one that is too old never."""
    files = [tmp_path / f"libnvrtc.so.{version}" for version in ("12", "13", "11.2")]
    files.append(tmp_path / "libnvrtc-builtins.so.12.9")
    monkeypatch.setattr(nvrtc, "_is_loaded", lambda name: False)
    monkeypatch.setattr(nvrtc, "_files", lambda: iter(files))
    own = [str(file) for file in files]
    for version, order in (
        ((12, 8), [own[0], "libnvrtc.so.12", own[1], "libnvrtc.so.13"]),
        ((13, 1), [own[1], "libnvrtc.so.13", own[0], "libnvrtc.so.12"]),
    ):
        monkeypatch.setattr(nvrtc.driver, "driver_version", lambda version=version: version)
        assert list(nvrtc._candidates()) == order
    monkeypatch.setattr(nvrtc, "_is_loaded", lambda name: name.endswith("12"))
    assert next(nvrtc._candidates()) == "libnvrtc.so.12"  # what torch has loaded


def test_spills_and_warnings_are_seen() -> None:
    spilling = Source(
        "spill.cu",
        b"""
__device__ __noinline__ float helper(float x) { return x * x; }
extern "C" __global__ void __launch_bounds__(1024, 2) spill(float* p) {
  int unused;
  float a[48];
  #pragma unroll
  for (int i = 0; i < 48; i++) a[i] = p[i * threadIdx.x];
  #pragma unroll
  for (int i = 0; i < 48; i++) p[i] = helper(a[(i * 7) % 48]) * a[i];
}
extern "C" __global__ void plain(float* p) { p[0] = 1; }
""",
    )
    cubin = compiler.compile(spilling, "sm_80", {})
    assert cubin.kernels["spill"].spill_bytes > 0
    assert cubin.kernels["spill"].stack > 0
    assert cubin.kernels["plain"].spill_bytes == 0
    assert any("unused" in warning for warning in cubin.warnings)


def test_ptxas_log_is_understood_line_by_line() -> None:
    log = """
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a' for 'sm_90a'
ptxas info    : Function properties for a
ptxas         .     144 bytes stack frame, 84 bytes spill stores, 96 bytes spill loads
ptxas info    : Function properties for helper
ptxas         .     512 bytes stack frame, 256 bytes spill stores, 256 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 2048 bytes smem, 360 bytes cmem[0]
ptxas info    : Compiling entry function 'b' for 'sm_90a'
ptxas info    : Function properties for b
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, 360 bytes cmem[0]
"""
    cubin = compiler.Cubin(b"", log, compiler._resources(log), "", 0.0)
    assert cubin.kernels == {
        "a": compiler.KernelResources(registers=168, spill_bytes=96, static_shared=2048, stack=144),
        "b": compiler.KernelResources(registers=8, spill_bytes=0, static_shared=0, stack=0),
    }
    assert len(cubin.warnings) == 1
    assert "C7510" in cubin.warnings[0]


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120"])
def test_every_architecture(arch: str) -> None:
    log = compiler.compile(REVERSE, arch, DEFINES).log
    assert f"for '{arch}'" in log


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FA2CUPY_DEBUG", raising=False)
    usual = compiler.options("sm_90a", {"FA2_B": 2, "FA2_A": "x"})
    assert usual == (
        "-arch=sm_90a",
        "-std=c++17",
        "-ftz=true",
        "-default-device",
        "--ptxas-options=-v",
        "-DFA2_A=x",
        "-DFA2_B=2",
    )
    monkeypatch.setenv("FA2CUPY_DEBUG", "1")
    assert set(compiler.options("sm_90a", {"FA2_B": 2, "FA2_A": "x"})) - set(usual) == {"-lineinfo"}


def test_failure_carries_log_and_context() -> None:
    with pytest.raises(CompilationError) as caught:
        compiler.compile(REVERSE, "sm_80", {**DEFINES, "FA2_BLOCK": 1}, context="ForwardPlan(...)")
    error = caught.value
    assert "common/config.cuh(1): error: static assertion failed" in error.log
    assert error.context == "ForwardPlan(...)"
    assert error.message.startswith("sm80/reverse.cu does not compile for sm_80 with NVRTC")
    assert "FA2_BLOCK=1" in error.message
    for part in (error.message, error.log, error.context):
        assert part in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_missing_header_is_named() -> None:
    with pytest.raises(CompilationError, match=r'cannot open source file "common/gone\.cuh"'):
        compiler.compile(Source("k.cu", b'#include "common/gone.cuh"\n'), "sm_80", {})


def test_device_newer_than_nvrtc_gets_ptx() -> None:
    cubin = compiler.compile(REVERSE, "sm_199", DEFINES)
    assert cubin.is_ptx
    assert cubin.image.endswith(b"}\n\0")
    assert cubin.kernels == {}
    newest = max(nvrtc.load().architectures())
    assert f".target sm_{newest}\n".encode() in cubin.image
    assert b".visible .entry reverse(" in cubin.image


@pytest.mark.parametrize("arch", ["sm_199a", "sm_20"])
def test_architecture_that_cannot_be_had(arch: str) -> None:
    with pytest.raises(CompilationError, match=f"cannot compile for {arch}: it knows .*80"):
        compiler.compile(REVERSE, arch, DEFINES)


@pytest.mark.parametrize("arch", ["80", "compute_80", "sm80", "sm_90b", ""])
def test_misspelt_architecture(arch: str) -> None:
    with pytest.raises(CompilationError, match=r"is not an architecture: it is written like sm_80 or sm_90a"):
        compiler.compile(REVERSE, arch, DEFINES)


@pytest.fixture
def no_memory_of_nvrtc() -> Iterator[None]:
    nvrtc.load.cache_clear()
    yield
    nvrtc.load.cache_clear()


def test_no_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> None:
        original: Callable[..., Any] = builtins.__import__

        def replaced(name: str, *args: Any, **kwargs: Any) -> Any:
            if name == "cupy":
                raise error
            return original(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", replaced)

    with monkeypatch.context() as patched:
        monkeypatch = patched
        for error, match in (
            (
                ModuleNotFoundError("No module named 'cupy'", name="cupy"),
                r"CuPy is not installed: .*'fa2cupy\[cuda1[23]\]'$",
            ),
            (ImportError("libsomething.so: not found"), r"CuPy cannot be imported: pip install .*\n.*libsomething"),
            (
                ModuleNotFoundError("No module named 'numpy'", name="numpy"),
                r"cannot be imported \(No module named 'numpy'",
            ),
            (
                PermissionError(13, "Permission denied", "/.cupy"),
                "set CUPY_CACHE_DIR to a directory that can be written",
            ),
        ):
            fail(error)
            assert cupy_or_none() is None
            with pytest.raises(MissingDependency, match=match):
                require_cupy()


@pytest.mark.usefixtures("no_memory_of_nvrtc")
@pytest.mark.parametrize("with_cupy", [False, True])
def test_no_nvrtc(monkeypatch: pytest.MonkeyPatch, with_cupy: bool, tmp_path: Path) -> None:
    import cupy

    class DynamicLibNotFoundError(RuntimeError):
        pass

    def get_version() -> None:
        raise DynamicLibNotFoundError('Failure finding "libnvrtc.so"')

    broken = tmp_path / "libnvrtc.so.12"
    broken.write_text("not a library")
    monkeypatch.setattr(cupy.cuda, "nvrtc", SimpleNamespace(getVersion=get_version))
    monkeypatch.setattr(nvrtc, "cupy_or_none", lambda: cupy if with_cupy else None)
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(("libnvrtc.so.that-is-nowhere", str(broken))))
    with pytest.raises(MissingDependency, match=r"NVRTC was not found: pip install 'fa2cupy\[cuda1[23]\]'\n") as caught:
        compiler.compile(REVERSE, "sm_80", DEFINES)
    assert ('Failure finding "libnvrtc.so"' in str(caught.value)) == with_cupy
    assert str(broken) in str(caught.value) and "nowhere" not in str(caught.value)


def test_nvrtc_without_its_builtins() -> None:
    log = "nvrtc: error: failed to open libnvrtc-builtins.so.13.0.\n  Make sure that it is installed correctly.\0"
    error = compiler._failure(NvrtcError("7", log), REVERSE, "sm_80", {}, "")
    assert isinstance(error, MissingDependency)
    assert "NVRTC is installed incompletely: pip install 'fa2cupy[cuda1" in str(error)


@dataclass(frozen=True)
class Job:
    source: str | Source
    name: str
    arch: str
    defines: dict[str, int | str]
    label: str


def test_compile_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA2CUPY_CACHE_DIR", str(tmp_path / "cache"))
    jobs = [
        Job(REVERSE, "reverse", "sm_80", DEFINES, "a"),
        Job(REVERSE, "reverse", "sm_86", {**DEFINES, "FA2_BLOCK": 1}, "does not compile"),
        Job(REVERSE, "gone", "sm_86", DEFINES, "has no such kernel"),
        Job(REVERSE, "twice", "sm_90", DEFINES, "b"),
    ]
    seen: list[str] = []
    results = compile_many(jobs, max_workers=2, on_done=lambda result: seen.append(result.job.label))
    assert [result.job for result in results] == jobs
    assert sorted(seen) == sorted(job.label for job in jobs)
    first, broken, nameless, last = results
    assert first.resources is not None
    assert first.resources.static_shared == 1024
    assert (first.error, first.cached, first.warnings) == (None, False, ())
    assert first.seconds > 0
    assert last.resources is not None
    assert broken.resources is None
    assert "static assertion failed" in str(broken.error)
    assert "while compiling for:\ndoes not compile" in str(broken.error)
    assert "has no kernel gone: it has reverse, twice" in str(nameless.error)
    again = compile_many(jobs)
    assert [result.cached for result in again] == [True, False, False, True]
    assert again[0].resources == first.resources
    assert compile_many([]) == []


def test_compile_many_stops_when_nvrtc_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FA2CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "_build", "")

    def missing() -> None:
        raise MissingDependency("NVRTC was not found")

    monkeypatch.setattr(nvrtc, "load", missing)
    with pytest.raises(MissingDependency):
        compile_many([Job(REVERSE, "reverse", "sm_80", DEFINES, str(number)) for number in range(8)])
