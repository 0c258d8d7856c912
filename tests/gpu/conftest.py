"""Tests that need a GPU, torch and CuPy (JAX for its own). `make gpu-test` runs them and writes the record.

Without a GPU nothing here is collected. Several processes share the GPU (pytest-xdist): most of a test's time is the
host's. Kernels are compiled beside the tests, all at once: those of the `cases` that a test is parametrised with, those
of its module's list NEEDS, and its `needed_plans`. What is not foreseen is compiled when called.

A test that is marked `alone` runs when nothing else does. While a run lasts, and if it is killed, RECORD.running.json
beside the record says what has passed so far, and how many seconds each module took.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.gpu import record
from tests.gpu.ledger import LEDGER

if TYPE_CHECKING:
    from tests.gpu.compile_ahead import CompileAhead

# JAX would take most of the GPU's memory when it starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Few kernels and much else to do: these go first, while the kernels of the others are compiled.
FIRST = ("test_jax.py", "test_transformers.py", "test_torch.py", "test_frameworks.py", "test_large.py")


def _missing() -> str:
    """Why these tests cannot run here, or nothing."""
    try:
        import cupy  # noqa: F401
        import torch
    except ImportError as error:
        return f"{error.name} is not installed"
    return "" if torch.cuda.is_available() else "torch sees no GPU"


MISSING = _missing()
if MISSING:
    collect_ignore_glob = ["test_*.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="PATH", help="write what was seen to this file (a whole, unfiltered run)")


def pytest_configure(config: pytest.Config) -> None:
    if MISSING and config.getoption("--record"):
        raise pytest.UsageError(f"the GPU tests cannot run here: {MISSING}")
    for line in (
        "alone: measures time, so that nothing else may run beside it",
        "xdist_group(name): tests that one process runs, one after the other",
    ):
        config.addinivalue_line("markers", line)
    config.pluginmanager.register(Recorder(config))


def pytest_report_header() -> str:
    if MISSING:
        return f"tests/gpu: not collected, {MISSING}"
    from fa2cupy import jit

    seen = _device()
    objection = jit.wgmma_objection(seen["nvrtc"])
    return f"tests/gpu: on {seen['device']}, NVRTC {seen['nvrtc']}" + f" (sm_80 kernels: {objection})" * bool(objection)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in _ours(items):
        item.add_marker(pytest.mark.gpu)
    first = {item for item in _ours(items) if item.path.name in FIRST}
    items.sort(key=lambda item: (_is_alone(item), item not in first))


def _ours(items: list[pytest.Item]) -> list[pytest.Item]:
    return [item for item in items if item.path.parent == Path(__file__).parent]


def _is_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


def compiler_of(items: list[pytest.Item]) -> CompileAhead | None:
    """Has started to compile what the cases of these tests need."""
    from tests.gpu.compile_ahead import CompileAhead

    wanted, sm80 = [], []
    modules = []
    for item in _ours(items):
        module = getattr(item, "module", None)
        if module not in modules:
            modules.append(module)
            wanted += [(case, True) for case in getattr(module, "NEEDS", ())]
            sm80 += getattr(module, "NEEDS_SM80", ())
        cases = item.callspec.params.get("cases", ()) if hasattr(item, "callspec") else ()
        wanted += [(case, "bwd" in item.path.name or "backward" in item.name) for case in cases]
    plans = [module.__name__ for module in modules if hasattr(module, "needed_plans")]
    return CompileAhead(wanted, sm80, plans) if modules else None


@pytest.fixture(autouse=True)
def _among_others(request: pytest.FixtureRequest) -> Iterator[None]:
    """In the room with the other processes' tests and the compiler, or alone in it."""
    from tests.gpu import room

    with room.alone() if _is_alone(request.node) else room.shared():
        yield


@pytest.fixture
def device() -> Any:
    """The first GPU, as torch names it."""
    import torch

    return torch.device("cuda", 0)


@pytest.fixture
def sm80_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FA2CUPY_KERNEL=sm80, for calls that the process has made before too."""
    from tests.gpu.runner import forget_calls

    monkeypatch.setenv("FA2CUPY_KERNEL", "sm80")
    forget_calls()
    yield
    forget_calls()


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    """Give torch's unused blocks back after a test that needed many, so that CuPy and JAX find room."""
    yield
    import torch

    if torch.cuda.memory_reserved() > 4 << 30:
        torch.cuda.empty_cache()


class Recorder:
    """Hears what becomes of the tests, and writes the record. With xdist there is one in each process that runs tests,
    which tells what it saw when it ends, and one where the user started, which hears of all tests and runs none."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.start, self.written = time.monotonic(), 0.0
        self.deselected = 0
        self.compiler: CompileAhead | None = None
        self.reports: list[tuple[str, str, float]] = []
        self.seconds: Counter[str] = Counter()  # of each module, in all processes
        path = config.getoption("--record")
        self.path = Path(path) if path and not config.option.collectonly else None
        # What xdist tells one of its processes.
        self.worker: str | None = getattr(config, "workerinput", {}).get("workerid")

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.deselected += len(items)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if not MISSING and not self.config.option.collectonly and self.worker in (None, "gw0"):
            self.compiler = compiler_of(session.items)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """What the compiler says goes with a test's report: the process that writes may be another."""
        report = yield
        if self.compiler is not None and (outcome := self.compiler.outcome()) is not None:
            report.user_properties.append(("compiled", outcome))
            self.compiler = None
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.reports.append((report.nodeid, report.outcome, report.duration))
        for name, value in report.user_properties:
            if name == "compiled":
                LEDGER.note(name, value)
        waited = "alone" in report.keywords and report.when != "call"
        self.seconds[Path(report.nodeid.partition("::")[0]).name] += 0 if waited else report.duration
        if self.path and self.worker is None and time.monotonic() > self.written + 1:
            record.write({"status": "running", **self.seen(), **LEDGER.notes}, self.running)
            self.written = time.monotonic()

    @property
    def running(self) -> Path:
        assert self.path is not None
        return self.path.with_suffix(".running.json")

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """xdist's: a process has ended."""
        told = getattr(node, "workeroutput", {}).get("fa2cupy")
        if told is not None:
            ledger, self.deselected = json.loads(told)
            LEDGER.merge(ledger)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if self.compiler is not None:
            LEDGER.note("compiled", self.compiler.outcome(stop=True))
        if self.worker is not None:
            self.config.workeroutput["fa2cupy"] = json.dumps([vars(LEDGER), self.deselected])  # type: ignore[attr-defined]
        elif self.path:
            status = "passed" if exitstatus == 0 else "failed"
            if status == "passed" and (self.deselected or not self.covers_everything()):
                status = "partial"
            results = {"compared": LEDGER.compared, "worst": LEDGER.worst, **LEDGER.notes}
            record.write({"status": status, **_device(), **self.seen(), **results}, self.path)
            self.running.unlink(missing_ok=True)

    def seen(self) -> dict[str, Any]:
        return {
            "digest": _digest(),
            "date": record.now(),
            "seconds": round(time.monotonic() - self.start, 1),
            "processes": self.config.getoption("numprocesses", None) or 1,
            "tests": dict(Counter(outcome for _, outcome, _ in self.reports)),
            "failed": [name for name, outcome, _ in self.reports if outcome == "failed"][:20],
            "modules": {name: round(seconds, 1) for name, seconds in self.seconds.most_common()},
            "slowest": {
                name.partition("::")[2]: round(seconds, 1)
                for name, _, seconds in sorted(self.reports, key=lambda report: -report[2])[:8]
            },
        }

    def covers_everything(self) -> bool:
        """Whether every test module of this directory took part."""
        return all(path.name in self.seconds for path in Path(__file__).parent.glob("test_*.py"))


_digest = functools.cache(record.digest)


def _device() -> dict[str, str]:
    import cupy
    import torch

    from fa2cupy.jit import compiler

    runtime = cupy.cuda.runtime
    driver = runtime.driverGetVersion()
    versions = {"python": platform.python_version(), "cupy": cupy.__version__, "torch": torch.__version__}
    try:
        import jax

        versions["jax"] = jax.__version__
    except ImportError:
        pass
    return {
        "device": torch.cuda.get_device_name(0),
        "driver": _driver_version() + f" (CUDA {driver // 1000}.{driver % 1000 // 10})",
        "nvrtc": compiler.nvrtc_build(),
        **versions,
    }


def _driver_version() -> str:
    """580.159.04, as the kernel module says."""
    path = Path("/proc/driver/nvidia/version")
    words = path.read_text().split() if path.exists() else []
    return next((word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit()), "unknown")
