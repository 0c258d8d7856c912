"""Faults that users met, each with the right outcome; tests/frameworks has those of torch and JAX arrays."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fa2cupy
from fa2cupy import __main__, locks
from fa2cupy.cli import backends, demo
from fa2cupy.errors import InvalidArgument, LaunchError, MissingDependency
from fa2cupy.frameworks import CUPY
from fa2cupy.jit import Source, compiler, driver
from fa2cupy.jit.cache import open_cache
from fa2cupy.prepared import PREPARED
from tests import dlpack_producer, ranks
from tests.dlpack_producer import Producer
from tests.fake_driver import FakeDriver, fake_driver
from tests.fake_gpu import FakeGpu, cupy_array, to_cupy

kernel_module = sys.modules["fa2cupy.jit.kernel"]
SHAPE = (2, 5, 4, 16)
ROOT = Path(__file__).parent.parent


# ----------------------------------------------------------------------------------------------------------------------
# Arrays


@pytest.mark.parametrize("prepared", [False, True])
def test_fault_cupy_array_without_memory(gpu: FakeGpu, prepared: bool) -> None:
    import cupy

    x = {name: cupy_array(SHAPE, np.float16) for name in ("q", "k", "v", "out")}
    null = cupy.ndarray(SHAPE, np.float16, cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(0, 1280, None, 0), 0))
    gpu.compute = False
    for name in x:
        PREPARED.clear()
        if prepared:
            fa2cupy.attention(**x)
        launches = len(gpu.launches)
        with pytest.raises(InvalidArgument, match=f"^{name} has no memory: its pointer is null"):
            fa2cupy.attention(**{**x, name: null})
        assert len(gpu.launches) == launches
    empty = cupy_array((2, 0, 4, 16), np.float16)
    for _ in range(2):
        fa2cupy.attention(empty, x["k"], x["k"])


class ReadOnlyProducer(Producer):
    """Refuses, as NumPy and JAX do, to export read-only memory to who cannot be told that it is."""

    asked: Any = ()

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None) -> Any:
        self.asked = max_version
        if max_version is None:
            raise BufferError("cannot export a readonly array")
        return super().__dlpack__(stream)


def read_only(array: np.ndarray, device: tuple[int, int]) -> ReadOnlyProducer:
    return ReadOnlyProducer(array, device=device, versioned=True, readonly=True)


def test_fault_read_only_producers_on_the_cpu() -> None:
    values = np.random.default_rng(0).standard_normal(SHAPE)
    producer = read_only(values, (1, 0))
    np.testing.assert_array_equal(fa2cupy.attention(producer, values, values), fa2cupy.attention(*[values] * 3))
    assert producer.asked == (1, 0)
    with pytest.raises(InvalidArgument, match="out is read-only: an output must be writable"):
        fa2cupy.attention(values, values, values, out=read_only(values.copy(), (1, 0)))
    values.flags.writeable = False
    assert fa2cupy.attention(values, values, values).shape == SHAPE


def test_fault_read_only_producers_on_a_gpu(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda index: type("Stream", (), {"ptr": 0}))
    gpu.compute = False
    device = (2, 0)
    memory = np.zeros(SHAPE, np.float16)
    q = to_cupy(memory)
    out = fa2cupy.attention(read_only(memory, device), q, q)
    assert type(out) is cupy.ndarray
    for _ in range(2):
        with pytest.raises(InvalidArgument, match="out is read-only"):
            fa2cupy.attention(q, q, q, out=read_only(memory, device))
        fa2cupy.attention(q, q, q, out=to_cupy(memory))  # the second time there is a prepared call
    assert not CUPY.readonly(q) and CUPY.readonly(gpu_array := _import(read_only(memory, device))[1:])
    assert gpu_array.shape == (1, *SHAPE[1:])


def _import(producer: Producer) -> Any:
    from fa2cupy.frameworks.dlpack import from_producer

    return from_producer(producer, "q")


def test_fault_producer_from_before_versions() -> None:
    values = np.random.default_rng(0).standard_normal(SHAPE)
    producer = Producer(values)  # its __dlpack__ has no max_version
    np.testing.assert_array_equal(fa2cupy.attention(producer, values, values), fa2cupy.attention(*[values] * 3))

    class Broken(Producer):
        def __dlpack__(self, **_: Any) -> Any:
            raise TypeError("it is broken")

    with pytest.raises(InvalidArgument, match=r"k: its __dlpack__ failed with TypeError: it is broken"):
        fa2cupy.attention(values, Broken(values), values)


def test_fault_producer_without_memory() -> None:
    class Null(Producer):
        def __dlpack__(self, stream: Any = None) -> Any:
            capsule = super().__dlpack__(stream)
            managed = dlpack_producer._alive[self.tickets[-1]][1]
            managed.dl_tensor.data = None
            return capsule

    values = np.zeros(SHAPE)
    with pytest.raises(InvalidArgument, match="v has no memory: the pointer in its DLPack capsule is null"):
        fa2cupy.attention(values, values, Null(values))
    assert fa2cupy.attention(values, values[:, :0], Null(values[:, :0])).shape == SHAPE


@pytest.mark.parametrize(
    ("keywords", "start"),
    [
        ({"softmax_scale": 10**5000}, "softmax_scale=<an int of 16610 bits> is not supported: it must be finite"),
        ({"softmax_scale": -(10**400)}, "softmax_scale=<an int of 1329 bits> is not supported: it must be finite"),
        ({"causal": 10**5000}, "causal=<an int of 16610 bits> is a int: True or False is needed"),
        ({"layout": 10**5000}, "layout=<an int of 16610 bits> is a int"),
        ({"dtype": 10**5000}, "dtype=<an int of 16610 bits> is a int"),
    ],
)
def test_fault_number_too_long_to_print(keywords: dict[str, Any], start: str) -> None:
    q = np.zeros(SHAPE)
    with pytest.raises(fa2cupy.Fa2Error) as caught:
        fa2cupy.attention(q, q, q, **keywords)
    assert str(caught.value).startswith(start)


# ----------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize("argv", [["compile", "--jobs", "-1"], ["compile", "--jobs", "0"], ["demo", "--steps", "-3"]])
def test_fault_counts_below_one(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        __main__.main(argv)
    assert caught.value.code == 2
    assert f"argument {argv[1]}: {argv[2]!r} is not a whole number of at least 1" in capsys.readouterr().err


def command(*argv: str, **environment: str) -> tuple[list[str], dict[str, str]]:
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    return [sys.executable, "-m", "fa2cupy", *argv], {**kept, "PYTHONPATH": str(ROOT), **environment}


@pytest.mark.parametrize(("where", "unbuffered"), [("closed pipe", ""), ("closed pipe", "1"), ("full disk", "")])
def test_fault_output_that_cannot_be_written(where: str, unbuffered: str) -> None:
    argv, environment = command("env", PYTHONUNBUFFERED=unbuffered)
    if where == "closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
    elif not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    try:
        done = subprocess.run(argv, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)
    reason = "Broken pipe" if where == "closed pipe" else "No space left on device"
    assert (done.returncode, done.stderr) == (1, f"fa2cupy: the output cannot be written: {reason}\n")


def test_fault_no_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        __main__.main(["--version"])
    assert not caught.value.code
    assert capsys.readouterr().out == f"fa2cupy {fa2cupy.__version__}\n"


@pytest.mark.parametrize("chosen", ["", "OMP_NUM_THREADS"])
def test_fault_demo_fights_for_cores(tmp_path: Path, chosen: str) -> None:
    """It runs with one BLAS thread, unless somebody chose a number."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os\n"
        "atexit.register(lambda: print([os.environ.get(n) for n in ('OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS')]))\n"
    )
    given = {chosen: "7"} if chosen else {}
    argv, environment = command("demo", "--help", PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]), **given)
    said = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout
    assert "training steps" in said
    assert said.splitlines()[-1] == ("[None, '7']" if chosen else "['1', '1']")


def test_fault_untrained_model_is_not_said_to_have_learnt() -> None:
    for steps, words in ((60, "60 steps"), (7, "7 of 60 steps"), (1, "1 of 60 steps")):
        left, right = demo.titles([8.0] * steps, 60, 2)
        assert f"after {words}" in left and f"over {words}" in right
        assert ("time was up" in right) == (steps < 60)
        assert "learn" not in left + right
    assert demo.done([8.0], 1) == "1 step"


@pytest.mark.parametrize("missing", ["driver", "CuPy", "NVRTC", "driver, CuPy, NVRTC", ""])
def test_fault_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, missing: str, tmp_path: Path) -> None:
    words = {"driver": "no CUDA driver", "CuPy": "CuPy is not installed", "NVRTC": "NVRTC was not found"}
    monkeypatch.setenv("FA2CUPY_CACHE_DIR", str(tmp_path))
    if "CuPy" in missing:
        monkeypatch.setitem(sys.modules, "cupy", None)
    if "NVRTC" in missing:

        def not_found() -> None:
            raise MissingDependency("NVRTC was not found: pip install it")

        monkeypatch.setattr(compiler.nvrtc, "load", not_found)
        monkeypatch.setattr(compiler, "_build", "")
    with fake_driver(monkeypatch, *(["libcuda-that-is-not-there.so.1"] if "driver" in missing else [])):
        said = backends.missing()
    for name, sentence in words.items():
        assert (sentence in said) == (name in missing)
    assert bool(said) == bool(missing)


# ----------------------------------------------------------------------------------------------------------------------
# Processes and threads

SOURCE = Source("k.cu", b'extern "C" __global__ void k(int* p) { *p = A; }')


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_fault_eight_ranks_on_one_empty_cache(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each kernel is compiled once (torchrun: tests/frameworks)."""
    cache, done = tmp_path / "cache", tmp_path / "done"
    done.mkdir()
    subprocess.run(
        [sys.executable, ranks.__file__, str(done), method],
        env={**os.environ, "FA2CUPY_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=120,
    )
    compiled, seconds = ranks.read(done)
    with capsys.disabled():
        print(
            f"\n{ranks.RANKS} ranks ({method}), {ranks.KERNELS} kernels: {seconds[0]:.2f} to {seconds[-1]:.2f} s each"
        )
    assert compiled == ranks.KERNELS
    assert not [path for path in cache.iterdir() if path.suffix in (".lock", ".tmp")]


def in_child(work: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Whether `work` is true in a forked child, which is killed if it hangs."""
    child = os.fork()
    if not child:
        good = False
        try:
            signal.alarm(int(seconds))
            good = work()
        finally:
            os._exit(0 if good else 1)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_fault_fork_while_locks_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread compiles, loads, and stores while the process is forked: the child finds every lock free."""
    monkeypatch.setenv("FA2CUPY_CACHE_DIR", str(tmp_path))
    held, done = threading.Event(), threading.Event()
    every = [lock for lock in locks._locks if isinstance(lock, locks.Lock)]
    assert len(every) >= 4  # of the memories, the cache, the compiler

    def hold() -> None:
        with open_cache().lock("key"):
            for lock in every:
                lock.__enter__()
            held.set()
            done.wait(60)
            for lock in every:
                lock.__exit__(None, None, None)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)

    def work() -> bool:
        kernel_module.kernel(SOURCE, "k", "sm_80", {"A": 77})
        return True

    try:
        assert in_child(work)
    finally:
        done.set()
        thread.join(60)


def test_fault_child_of_a_killed_process_keeps_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File locks are shared with children; that of a rank which was killed is free though its data loader lives."""
    monkeypatch.setenv("FA2CUPY_CACHE_DIR", str(tmp_path))
    code = """
        import os, signal, time
        from fa2cupy.jit.cache import open_cache
        with open_cache().lock("key"):
            child = os.fork()
            if not child:
                os.close(1)  # or whoever reads it would wait
                time.sleep(60)
                os._exit(0)
            print(child, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    argv = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(argv, env=environment, stdout=subprocess.PIPE, text=True).stdout
    assert (tmp_path / "key.lock").exists()
    try:
        start = time.monotonic()
        with open_cache().lock("key", timeout=10):
            assert time.monotonic() - start < 5
    finally:
        os.kill(int(said), signal.SIGKILL)


def test_fault_fork_after_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA does not survive a fork, and says so in one sentence; a parent that only compiled has not used it."""
    with fake_driver(monkeypatch) as fake:

        def fails() -> bool:
            try:
                driver.device_info(0)
            except LaunchError as error:
                return "forked from one that has used it" in str(error) and "'spawn'" in str(error)
            return False

        assert driver.driver_version() == (12, 4) and driver.pip_extra() == "fa2cupy[cuda12]"
        assert fake["init_count"] == 0
        assert in_child(lambda: driver.device_info(0).name == "Fake GPU")
        driver.device_info(0)
        assert in_child(fails)
        assert driver.device_info(1).name == "Second Fake GPU"  # the parent goes on


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    with fake_driver(monkeypatch) as found:
        yield found


@pytest.mark.parametrize("other", [None, 0])
def test_fault_first_call_in_a_thread_of_autograd(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, other: int | None
) -> None:
    """Which has no context yet, or another device's: the module is loaded where its arrays are, and nothing is left."""
    monkeypatch.setenv("FA2CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(kernel_module.modules, "cupy_or_none", lambda: None)
    kernel = kernel_module.kernel(SOURCE, "k", "sm_80", {"A": 5 if other is None else 6})
    seen: list[Any] = []

    def current() -> int | None:
        context = ctypes.c_void_p()
        fake.library.cuCtxGetCurrent(ctypes.byref(context))
        return context.value

    def work() -> None:
        if other is not None:
            with driver.device_guard(other):
                seen.append((kernel.function(1, 100_000), current()))
        else:
            seen.append((kernel.function(1, 100_000), current()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    ((function, left),) = seen
    assert left == (None if other is None else 0x1000 + other)
    (load,) = fake.loads
    assert (load.context, load.function, function) == (0x1001, b"k", 0xA000)
    assert fake.last_attribute == (8, 100_000)


def test_launch_without_cupy(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From a source to the driver, in a process that cannot import CuPy."""
    code = """
        import ctypes, sys
        sys.modules["cupy"] = None  # an import of it fails
        from fa2cupy import jit
        from fa2cupy.jit import driver
        from fa2cupy.jit.cupy import cupy_or_none
        assert cupy_or_none() is None
        driver._library_names = lambda: (sys.argv[1],)
        fake = ctypes.CDLL(sys.argv[1])
        fake.fake_reset()
        ctypes.c_int.in_dll(fake, "fake_params_bytes").value = 8
        source = jit.Source("k.cu", b'extern "C" __global__ void k(int* p) { *p = 1; }')
        for arch in ("sm_80", "sm_90a"):
            function = jit.kernel(source, "k", arch, {}).function(1, 4096)
            params = (ctypes.c_ubyte * 8)(*range(8))
            with jit.device_guard(1):
                jit.launch(function, jit.LaunchConfig((3, 1, 1), (32, 1, 1)), ctypes.addressof(params), 7)
        print(*(ctypes.c_int.in_dll(fake, f"fake_{name}_count").value for name in ("load", "launch")), hex(function))
        loads = (ctypes.c_ubyte * 88).in_dll(fake, "fake_loads")
        print(bytes(loads[8:12]), int.from_bytes(bytes(loads[:8]), "little"))
    """
    said = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), fake.path],
        env={**os.environ, "FA2CUPY_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines() == ["2 2 0xa001", rf"b'\x7fELF' {0x1001}"]
