"""fa2cupy.jit.kernel: the memory cache, and loading on devices with a fake CuPy and a fake driver."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fa2cupy.errors import CompilationError, LaunchError, MissingDependency, UnsupportedDevice
from fa2cupy.jit import LaunchConfig, cache, compiler, modules
from fa2cupy.jit.compiler import Cubin, KernelResources
from fa2cupy.jit.source import Source
from tests.fake_driver import FakeDriver, fake_driver

kernel_module = sys.modules["fa2cupy.jit.kernel"]
BUILD = "12.4.127 CL-1"


class CUDADriverError(RuntimeError):
    pass


class CUDARuntimeError(RuntimeError):
    pass


class FakeCupy:
    """Modules "load" unless their image contains `bad`; functions are numbered."""

    def __init__(self, driver: FakeDriver) -> None:
        self.bad = b"\0never\0"
        self.loaded: list[tuple[int, str]] = []
        self.device = 0
        self.busy = False
        outer = self

        class Device:
            def __init__(self, index: int) -> None:
                self.index = index
                if outer.busy:
                    raise CUDARuntimeError("cudaErrorDevicesUnavailable")

            def __enter__(self) -> None:
                self.previous, outer.device = outer.device, self.index

            def __exit__(self, *_: object) -> None:
                outer.device = self.previous

        def load(image: bytes, how: str) -> SimpleNamespace:
            if outer.bad in image:
                raise CUDADriverError("CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid")
            outer.loaded.append((outer.device, how))
            return SimpleNamespace(ptr=0x9000 + len(outer.loaded))

        class RawModule:
            def __init__(self, *, path: str) -> None:
                self.path = path

            def get_function(self, name: str) -> Any:
                path = self.path

                class RawKernel:
                    @property
                    def kernel(self) -> SimpleNamespace:
                        return load(Path(path).read_bytes(), f"path {name}")

                return RawKernel()

        class Module:
            def load(self, image: bytes) -> None:
                self.image = image

            def get_function(self, name: str) -> SimpleNamespace:
                return load(self.image, f"memory {name}")

        self.RawModule = RawModule
        self.cuda = SimpleNamespace(
            Device=Device,
            driver=SimpleNamespace(CUDADriverError=CUDADriverError),
            runtime=SimpleNamespace(CUDARuntimeError=CUDARuntimeError),
            function=SimpleNamespace(Module=Module),
        )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    with fake_driver(monkeypatch) as found:
        yield found


@pytest.fixture
def cupy(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    module = FakeCupy(fake)
    monkeypatch.setattr(modules, "cupy_or_none", lambda: module)
    return module


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """The archs that were compiled, by a compiler that takes no time and needs no NVRTC."""
    calls: list[str] = []

    def compile_(source: Source, arch: str, defines: Any, *, context: str = "") -> Cubin:
        calls.append(arch)
        image = b".version 8.4\n\0" if arch == "sm_199" else b"\x7fELF" + source.code + str(len(calls)).encode()
        kernels = {} if arch == "sm_199" else {"k": KernelResources(8, 0, 0, 0), "l": KernelResources(9, 0, 0, 0)}
        return Cubin(image, "", kernels, BUILD, 0.0)

    monkeypatch.setenv("FA2CUPY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "compile", compile_)
    monkeypatch.setattr(compiler, "nvrtc_build", lambda: BUILD)
    monkeypatch.setattr(compiler, "nvrtc_path", lambda: None)
    monkeypatch.setattr(cache, "_warned", set())
    forget()
    yield calls
    forget()


def forget() -> None:
    kernel_module._entries.clear()
    kernel_module._kernels.clear()


SOURCE = Source("k.cu", b"code")


def test_memory_cache(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = kernel_module.kernel(SOURCE, "k", "sm_80", {"A": 1, "B": 2})
    assert first.resources == KernelResources(8, 0, 0, 0)
    assert kernel_module.kernel(SOURCE, "k", "sm_80", {"B": 2, "A": 1}) is first
    second = kernel_module.kernel(SOURCE, "l", "sm_80", {"A": 1, "B": 2})
    assert second.cubin is first.cubin  # two kernels of one source are compiled together
    assert compiled == ["sm_80"]
    assert kernel_module.kernel(SOURCE, "k", "sm_86", {"A": 1, "B": 2}) is not first
    assert kernel_module.kernel(SOURCE, "k", "sm_80", {"A": 1}) is not first
    monkeypatch.setenv("FA2CUPY_DEBUG", "1")
    assert kernel_module.kernel(SOURCE, "k", "sm_80", {"A": 1, "B": 2}) is not first
    assert len(compiled) == 4
    assert "Kernel('k', 'k.cu', 'sm_80', KernelResources(registers=8" in repr(first)


def test_unknown_kernel_is_an_error_that_lists_the_others(compiled: list[str]) -> None:
    with pytest.raises(CompilationError, match=r"k\.cu has no kernel m: it has k, l"):
        kernel_module.kernel(SOURCE, "m", "sm_80", {})


def test_threads_compile_each_kernel_once(compiled: list[str]) -> None:
    barrier = threading.Barrier(8)
    found: list[Any] = []

    def work(number: int) -> None:
        barrier.wait()
        found.append(kernel_module.kernel(SOURCE, "k", "sm_80" if number % 2 else "sm_86", {}))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(compiled) == ["sm_80", "sm_86"]
    assert len({id(one) for one in found}) == 2


def test_several_kernels_at_once(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    working = compiler.compile
    together = threading.Barrier(3, timeout=30)

    def waiting(source: Source, arch: str, *args: Any, **kwargs: Any) -> Cubin:
        together.wait()  # breaks unless all three are under way
        return working(source, arch, *args, **kwargs)

    monkeypatch.setattr(compiler, "compile", waiting)
    requests = [(SOURCE, "k", arch, {"A": 1}) for arch in ("sm_80", "sm_86", "sm_90")]
    found = kernel_module.kernels(requests)
    assert [kernel.arch for kernel in found] == ["sm_80", "sm_86", "sm_90"]
    assert kernel_module.kernels(requests) == found
    assert kernel_module.kernels([]) == ()
    with pytest.raises(CompilationError, match="while compiling for:\nthe plan"):
        kernel_module.kernels([(SOURCE, "gone", "sm_80", {"A": 1})], context="the plan")


def test_failure_is_not_remembered(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    working = compiler.compile

    def broken(*_: Any, context: str = "", **__: Any) -> Cubin:
        raise CompilationError("does not compile", log="k.cu(1): error", context=context)

    monkeypatch.setattr(compiler, "compile", broken)
    with pytest.raises(CompilationError, match="while compiling for:\nthe plan"):
        kernel_module.kernel(SOURCE, "k", "sm_80", {}, context="the plan")
    monkeypatch.setattr(compiler, "compile", working)
    assert kernel_module.kernel(SOURCE, "k", "sm_80", {}).name == "k"


def test_function_is_loaded_once_per_device(compiled: list[str], cupy: FakeCupy, fake: FakeDriver) -> None:
    kernel = kernel_module.kernel(SOURCE, "k", "sm_90", {})
    first = kernel.function(0)
    assert kernel.function(0) == first
    second = kernel.function(1)
    assert second != first
    assert cupy.loaded == [(0, "path k"), (1, "path k")]
    assert cupy.device == 0


def test_shared_memory_limit_is_set_per_device_and_only_raised(
    compiled: list[str], cupy: FakeCupy, fake: FakeDriver
) -> None:
    kernel = kernel_module.kernel(SOURCE, "k", "sm_90", {})
    kernel.function(0)
    assert fake.last_attribute == (0, 0)
    for device, size, expected in ((0, 1000, 1000), (0, 500, 1000), (1, 700, 700), (0, 166_912, 166_912)):
        kernel.function(device, size)
        assert fake.last_attribute == (8, expected)
    fake["set_attribute_status"] = 1
    with pytest.raises(LaunchError, match="cuFuncSetAttribute: CUDA_ERROR_INVALID_VALUE"):
        kernel.function(0, 10**6)


def test_binary_that_is_only_in_memory(
    compiled: list[str], cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FA2CUPY_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="does not use its kernel cache"):
        kernel = kernel_module.kernel(SOURCE, "k", "sm_90", {})
    kernel.function(1)
    assert cupy.loaded == [(1, "memory k")]


def test_binary_that_the_driver_refuses_is_compiled_again_once(compiled: list[str], cupy: FakeCupy) -> None:
    kernel_module.kernel(SOURCE, "k", "sm_90", {})
    forget()
    cupy.bad = b"code1"
    kernel_module.kernel(SOURCE, "k", "sm_90", {}).function(0)
    assert compiled == ["sm_90"] * 2
    forget()
    kernel_module.kernel(SOURCE, "k", "sm_90", {}).function(0)  # the new one is in the cache
    assert compiled == ["sm_90"] * 2


def test_binary_that_the_driver_keeps_refusing(compiled: list[str], cupy: FakeCupy) -> None:
    cupy.bad = b"code"
    kernel = kernel_module.kernel(SOURCE, "k", "sm_90", {})
    for _ in range(2):
        with pytest.raises(
            LaunchError, match=r"k of k\.cu for sm_90 cannot be loaded on device 0: CUDA_ERROR_INVALID_IMAGE"
        ):
            kernel.function(0)
    assert compiled == ["sm_90"]
    forget()
    with pytest.raises(LaunchError, match="cannot be loaded"):
        kernel_module.kernel(SOURCE, "k", "sm_90", {}).function(0)
    assert compiled == ["sm_90"] * 2


@pytest.mark.parametrize(
    ("version", "arch", "problem"),
    [
        (12000, "sm_90", ""),
        (13000, "sm_90", ""),
        (11080, "sm_90", r"NVRTC 12\.4 is too new for this machine's driver, which supports CUDA 11\.8: upgrade"),
        (12040, "sm_199", ""),
        (12030, "sm_199", r"supports CUDA 12\.3 \(this GPU is newer than NVRTC, .*\): upgrade"),
    ],
)
def test_driver_older_than_nvrtc(
    compiled: list[str], cupy: FakeCupy, fake: FakeDriver, version: int, arch: str, problem: str
) -> None:
    """Cubins are fine within a major version; PTX needs a driver at least as new as the NVRTC."""
    fake["version"] = version
    kernel_module.driver._driver.cache_clear()
    kernel = kernel_module.kernel(SOURCE, "k", arch, {})
    if problem:
        with pytest.raises(MissingDependency, match=problem + ".*pip install 'fa2cupy"):
            kernel.function(0)
        assert cupy.loaded == []
    else:
        kernel.function(0)


def test_no_driver(compiled: list[str], cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_driver(monkeypatch, "libcuda-that-is-not-there.so.1"):
        with pytest.raises(MissingDependency, match="no CUDA driver"):
            kernel_module.kernel(SOURCE, "k", "sm_90", {}).function(0)


def test_device_that_cannot_be_used(compiled: list[str], cupy: FakeCupy, fake: FakeDriver) -> None:
    kernel = kernel_module.kernel(SOURCE, "k", "sm_90", {})
    with pytest.raises(UnsupportedDevice, match="device 7 does not exist"):
        kernel.function(7)
    fake.set_compute_capability(1, (7, 0))
    with pytest.raises(UnsupportedDevice, match=r"compute capability 7\.0"):
        kernel.function(1)
    cupy.busy = True
    with pytest.raises(LaunchError, match="cannot be loaded on device 0: cudaErrorDevicesUnavailable"):
        kernel.function(0)


@pytest.mark.parametrize(("version", "remembered"), [(11080, False), (12000, True), (13000, True), (0, True)])
def test_nvrtc_that_is_too_new_is_not_remembered(
    compiled: list[str], fake: FakeDriver, monkeypatch: pytest.MonkeyPatch, version: int, remembered: bool
) -> None:
    """Another process may find an NVRTC that suits the driver."""
    monkeypatch.setattr(compiler, "nvrtc_path", lambda: __file__)
    if version:
        fake["version"] = version
    else:
        monkeypatch.setattr(kernel_module.driver, "_library_names", lambda: ("libcuda-that-is-not-there.so.1",))
    kernel_module.driver._driver.cache_clear()
    kernel_module.kernel(SOURCE, "k", "sm_90", {})
    assert cache.open_cache().recall_nvrtc() == (BUILD if remembered else None)


def test_launch_config_is_a_value() -> None:
    config = LaunchConfig((1, 2, 3), (128, 1, 1), (1, 1, 1), 1024)
    assert config == LaunchConfig((1, 2, 3), (128, 1, 1), shared_mem_bytes=1024)
    assert hash(config) == hash(LaunchConfig((1, 2, 3), (128, 1, 1), shared_mem_bytes=1024))


def test_from_source_to_launch(compiled: list[str], cupy: FakeCupy, fake: FakeDriver) -> None:
    from fa2cupy import jit

    function = jit.kernel(SOURCE, "k", "sm_90", {}).function(1, 4096)
    config = LaunchConfig((1, 1, 1), (32, 1, 1), shared_mem_bytes=4096)
    launcher = jit.Launcher(function, config)
    params = (ctypes.c_ubyte * 16)(*range(16))
    fake["params_bytes"] = 16
    with jit.device_guard(1):
        launcher(ctypes.addressof(params), 7)
    (launch,) = fake.launches
    assert (launch.function, launch.context, launch.stream) == (function, 0x1001, 7)
    assert bytes(launch.params[:16]) == bytes(range(16))
