"""Tests that need a GPU, torch and CuPy (JAX for its own). `make gpu-test` runs them and writes the record.

Without a GPU nothing here is collected. Kernels are compiled before the first test, all at once: those of the `cases`
that a test is parametrised with, those of its module's list NEEDS, and its `needed_plans`. What is not foreseen is
compiled when called.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import record
from tests.gpu.ledger import LEDGER

# JAX would take most of the GPU's memory when it starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


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
    config.stash[_STATE] = {"start": time.monotonic(), "deselected": 0, "outcomes": {}, "slowest": {}}


def pytest_report_header() -> str:
    if MISSING:
        return f"tests/gpu: not collected, {MISSING}"
    from fa2cupy import jit

    seen = _device()
    objection = jit.wgmma_objection(seen["nvrtc"])
    return f"tests/gpu: on {seen['device']}, NVRTC {seen['nvrtc']}" + f" (sm_80 kernels: {objection})" * bool(objection)


_STATE = pytest.StashKey[dict[str, Any]]()


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items:
        items[0].config.stash[_STATE]["deselected"] += len(items)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session", autouse=True)
def compiled_ahead(request: pytest.FixtureRequest) -> None:
    """Compile, in threads, what the selected tests' cases need."""
    from tests.gpu.compile_ahead import compile_ahead

    modules = {item.module for item in request.session.items if isinstance(item, pytest.Function)}
    wanted = [(case, True) for module in modules for case in getattr(module, "NEEDS", ())]
    for item in request.session.items:
        parameters = getattr(item, "callspec", None)
        if parameters is not None and "cases" in parameters.params:
            wanted += [
                (case, "bwd" in item.path.name or "backward" in item.name) for case in parameters.params["cases"]
            ]
    start = time.monotonic()
    sm80 = [case for module in modules for case in getattr(module, "NEEDS_SM80", ())]
    count = compile_ahead(wanted, sm80, [module.needed_plans for module in modules if hasattr(module, "needed_plans")])
    LEDGER.note("compiled", {"kernels": count, "seconds": round(time.monotonic() - start, 1)})


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


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _REPORTS.append((report.nodeid, report.outcome, report.duration))


_REPORTS: list[tuple[str, str, float]] = []


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path = session.config.getoption("--record")
    if not path or session.config.option.collectonly:
        return
    state = session.config.stash[_STATE]
    status = "passed" if exitstatus == 0 else "failed"
    if status == "passed" and (state["deselected"] or not _covers_everything(session)):
        status = "partial"
    outcomes: dict[str, int] = {}
    for _, outcome, _ in _REPORTS:
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    slowest = sorted(_REPORTS, key=lambda r: -r[2])[:8]
    record.write(
        {
            "status": status,
            "digest": record.digest(),
            "date": record.now(),
            **_device(),
            "seconds": round(time.monotonic() - state["start"], 1),
            "tests": outcomes,
            "failed": [name for name, outcome, _ in _REPORTS if outcome == "failed"][:20],
            "compared": LEDGER.compared,
            "worst": LEDGER.worst,
            **LEDGER.notes,
            "slowest": {name.partition("::")[2]: round(seconds, 1) for name, _, seconds in slowest},
        },
        Path(path),
    )


def _covers_everything(session: pytest.Session) -> bool:
    """Whether every test module of this directory took part."""
    collected = {item.path.name for item in session.items}
    return all(path.name in collected for path in Path(__file__).parent.glob("test_*.py"))


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
