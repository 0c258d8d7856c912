"""fa2cupy.jit.driver against a fake driver: what arrives there, which errors come back, what a launch costs."""

from __future__ import annotations

import ctypes
import dataclasses
import statistics
import sys
import threading
import timeit
from collections.abc import Iterator

import pytest

from fa2cupy.errors import LaunchError, MissingDependency, UnsupportedDevice
from fa2cupy.jit import driver
from fa2cupy.jit.kernel import LaunchConfig
from tests.fake_driver import FakeDriver, fake_driver, forget_driver

CONFIG = LaunchConfig(grid=(70_000, 2, 3), block=(128, 1, 2), shared_mem_bytes=166_912)


class Params(ctypes.Structure):
    _fields_ = (("pointer", ctypes.c_uint64), ("length", ctypes.c_int), ("scale", ctypes.c_float))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    with fake_driver(monkeypatch) as found:
        yield found


def test_device_info(fake: FakeDriver) -> None:
    info = driver.device_info(0)
    assert info == driver.DeviceInfo(
        index=0, name="Fake GPU", cc=(9, 0), sm_count=132, shared_mem_optin=232448, l2_bytes=50 << 20
    )
    assert driver.device_info(1).name == "Second Fake GPU"
    assert driver.device_info(0) is info
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.index = 1  # type: ignore[misc]


def test_versions_choose_the_extra(fake: FakeDriver) -> None:
    assert driver.driver_version() == (12, 4)
    assert driver.pip_extra() == "fa2cupy[cuda12]"
    fake["version"] = 13000
    forget_driver()
    assert driver.driver_version() == (13, 0)
    assert driver.pip_extra() == "fa2cupy[cuda13]"


def test_old_gpu_is_named(fake: FakeDriver) -> None:
    fake.set_compute_capability(1, (7, 5))
    with pytest.raises(
        UnsupportedDevice, match=r"device 1 \(Second Fake GPU\) has compute capability 7\.5: 8\.0 or newer"
    ):
        driver.device_info(1)


@pytest.mark.parametrize("index", [-1, 2])
def test_device_that_does_not_exist(fake: FakeDriver, index: int) -> None:
    for call in (driver.device_info, driver.device_guard):
        with pytest.raises(UnsupportedDevice, match=f"device {index} does not exist: this machine has 2 CUDA devices"):
            call(index)


def test_driver_without_a_device(fake: FakeDriver) -> None:
    fake["init_status"] = 100
    assert driver.device_count() == 0
    with pytest.raises(UnsupportedDevice, match="this machine has 0 CUDA devices"):
        driver.device_info(0)


def test_driver_that_does_not_start(fake: FakeDriver) -> None:
    fake["init_status"] = 803
    with pytest.raises(
        MissingDependency, match=r"cannot be initialised: unknown error .803: unknown error.; reinstall"
    ):
        driver.device_info(0)


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_driver(monkeypatch, "libcuda-that-is-not-there.so.1"):
        for call in (driver.driver_version, driver.device_count, lambda: driver.device_info(0)):
            with pytest.raises(MissingDependency, match=r"no CUDA driver: .* was not found; install the NVIDIA driver"):
                call()
        assert driver.pip_extra() == "fa2cupy[cuda12]"


@pytest.mark.parametrize("once", [True, False])
def test_launch_passes_everything(fake: FakeDriver, once: bool) -> None:
    fake["params_bytes"] = ctypes.sizeof(Params)
    params = Params(0x7FFF_1234_5678_9ABC, -3, 0.125)
    function, stream = 0x7F00_DEAD_BEE0, 0x7F11_0000_0010
    if once:
        driver.launch(function, CONFIG, ctypes.addressof(params), stream)
    else:
        driver.Launcher(function, CONFIG)(ctypes.addressof(params), stream)
    (launch,) = fake.launches
    assert (launch.function, launch.stream, launch.extra, launch.num_attrs) == (function, stream, 0, 0)
    assert (tuple(launch.grid), tuple(launch.block)) == (CONFIG.grid, CONFIG.block)
    assert launch.shared_mem_bytes == CONFIG.shared_mem_bytes
    assert bytes(launch.params[: ctypes.sizeof(Params)]) == bytes(params)


@pytest.mark.parametrize(("version", "overlaps"), [(12020, False), (12030, True), (13000, True)])
def test_launch_beside_the_one_before(fake: FakeDriver, version: int, overlaps: bool) -> None:
    """Programmatic stream serialization (6 in cuda.h), where graphs may hold it."""
    fake["version"] = version
    forget_driver()
    fake["params_bytes"] = ctypes.sizeof(Params)
    params = Params()
    launcher = driver.Launcher(1, dataclasses.replace(CONFIG, overlaps_previous=True))
    for stream in (0, 5):
        launcher(ctypes.addressof(params), stream)
    seen = [(launch.num_attrs, launch.attr_id, launch.attr_value) for launch in fake.launches]
    assert seen == 2 * [(1, 6, 1) if overlaps else (0, 0, 0)]
    assert ctypes.sizeof(driver._CUlaunchAttribute) == 72


def test_launcher_reads_the_struct_at_each_launch(fake: FakeDriver) -> None:
    fake["params_bytes"] = ctypes.sizeof(Params)
    params = Params()
    launcher = driver.Launcher(1, CONFIG)
    for length in range(3):
        params.length = length
        launcher(ctypes.addressof(params), length)
    assert [Params.from_buffer_copy(bytes(launch.params)).length for launch in fake.launches] == [0, 1, 2]
    assert [launch.stream for launch in fake.launches] == [0, 1, 2]


def test_launcher_memory_is_bounded(fake: FakeDriver) -> None:
    fake["record"] = 0
    launcher = driver.Launcher(1, CONFIG)
    params = (Params * 2000)()
    for index in range(len(params)):
        launcher(ctypes.addressof(params) + index * ctypes.sizeof(Params), 0x1000 + index)
    assert len(launcher._configs) <= 256
    assert len(launcher._params) <= 256


def test_one_launcher_in_many_threads(fake: FakeDriver) -> None:
    """Each thread has its own struct and stream; no launch mixes them up."""
    fake["params_bytes"] = ctypes.sizeof(Params)
    launcher = driver.Launcher(1, CONFIG)
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        params = Params(pointer=number)
        barrier.wait()
        for index in range(200):
            params.length = index
            launcher(ctypes.addressof(params), 0x1000 + number)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    seen: dict[int, list[int]] = {}
    for launch in fake.launches:
        params = Params.from_buffer_copy(bytes(launch.params))
        assert launch.stream == 0x1000 + params.pointer
        seen.setdefault(params.pointer, []).append(params.length)
    assert seen == {number: list(range(200)) for number in range(8)}


def test_failed_launch_raises(fake: FakeDriver) -> None:
    fake["launch_status"] = 700
    params = Params()
    launcher = driver.Launcher(1, CONFIG)
    with pytest.raises(LaunchError) as caught:
        launcher(ctypes.addressof(params), 0)
    message = str(caught.value)
    assert "CUDA_ERROR_ILLEGAL_ADDRESS (700: an illegal memory access was encountered)" in message
    assert "grid=(70000, 2, 3)" in message
    assert "queued earlier" in message
    fake["launch_status"] = 0
    launcher(ctypes.addressof(params), 0)


def test_guard_pushes_only_when_needed(fake: FakeDriver) -> None:
    def current() -> int | None:
        context = ctypes.c_void_p()
        fake.library.cuCtxGetCurrent(ctypes.byref(context))
        return context.value

    assert current() is None
    with driver.device_guard(1):
        assert current() == 0x1001
        with driver.device_guard(1):
            assert (current(), fake["push_count"]) == (0x1001, 1)
        assert current() == 0x1001
        with driver.device_guard(0):
            assert (current(), fake["push_count"]) == (0x1000, 2)
        assert current() == 0x1001
    assert current() is None
    with pytest.raises(ZeroDivisionError), driver.device_guard(0):
        raise ZeroDivisionError
    assert current() is None
    with driver.device_guard(0), driver.device_guard(1):
        pass
    assert fake["retain_count"] == 2  # once per device, however often


def test_context_check(fake: FakeDriver) -> None:
    first, second = driver.context_check(0), driver.context_check(1)
    seen = []

    def look() -> tuple[bool, bool]:
        return first(), second()

    assert look() == (False, False)
    with driver.device_guard(1):
        assert look() == (False, True)
        with driver.device_guard(0):
            assert look() == (True, False)
            thread = threading.Thread(target=lambda: seen.append(look()))
            thread.start()
            thread.join()
        assert look() == (False, True)
    assert seen == [(False, False)]


def test_guard_is_per_thread(fake: FakeDriver) -> None:
    contexts = []

    def work() -> None:
        with driver.device_guard(0):
            params = Params()
            driver.launch(1, CONFIG, ctypes.addressof(params), 0)
        contexts.append(fake.launches[-1].context)

    with driver.device_guard(1):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        params = Params()
        driver.launch(1, CONFIG, ctypes.addressof(params), 0)
    assert contexts == [0x1000]
    assert fake.launches[-1].context == 0x1001


def test_dynamic_shared_memory(fake: FakeDriver) -> None:
    with driver.device_guard(0):
        driver.set_max_dynamic_shared_memory(0x5000, 166_912)
        assert fake.last_attribute == (8, 166_912)
        fake["set_attribute_status"] = 1
        with pytest.raises(LaunchError, match=r"cuFuncSetAttribute: CUDA_ERROR_INVALID_VALUE \(1: invalid argument\)"):
            driver.set_max_dynamic_shared_memory(0x5000, 10**6)


def test_launch_and_guard_are_cheap(fake: FakeDriver) -> None:
    """What Python adds to a launch. The limits are wide (a loaded machine); 0.5 us and 0.4 us are usual."""
    fake["record"] = 0
    params = Params()
    address = ctypes.addressof(params)
    launcher = driver.Launcher(1, CONFIG)

    def guarded() -> None:
        with driver.device_guard(0):
            pass

    with driver.device_guard(0):
        for call, limit in ((lambda: launcher(address, 0x7F11_0000_0010), 5e-6), (guarded, 5e-6)):
            times = [timeit.timeit(call, number=2000) / 2000 for _ in range(9)]
            assert min(times) < limit, f"{statistics.median(times) * 1e6:.2f} us"
