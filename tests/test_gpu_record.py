"""The record of the last GPU run is for the sources that are here, and its digest sees code and nothing else."""

from __future__ import annotations

import fcntl
import json
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.gpu import conftest, record, room
from tests.gpu.ledger import Ledger


def test_the_sources_have_run_on_a_gpu() -> None:
    allowed, sentence = record.verdict(record.read(), record.digest())
    assert allowed, sentence
    if "PENDING" in sentence:
        warnings.warn(sentence, stacklevel=1)


def test_every_pattern_finds_sources() -> None:
    for pattern in record.SOURCES:
        assert list(record.ROOT.glob(pattern)), f"{pattern} matches nothing: was a file renamed?"


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("a = b;  // why\n", "a=b;"),
        ("a /* x\n y */ + b", "a + b"),
        ("f(x,\n  y);\n\n", "f(x, y);"),
        ('s = "// no comment";', 's = "// no comment"; // but this'),
        ("#define A \\\n  1\nint x;", "#define A 1\nint x;"),
        ("c = '\"'; // \"\n", "c = '\"';"),
    ],
)
def test_layout_and_comments_of_cuda_do_not_count(left: str, right: str) -> None:
    assert list(record.cuda_tokens(left)) == list(record.cuda_tokens(right))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("int a;", "inta;"),
        ("a + +b", "a ++ b"),
        ("x > > y", "x >> y"),
        ("#define A\nB", "#define A B"),
        ('asm("a  b");', 'asm("a b");'),
        ("1.5f", "1 .5f"),
        ("a = 1;", "a = 2;"),
    ],
)
def test_code_of_cuda_counts(left: str, right: str) -> None:
    assert list(record.cuda_tokens(left)) != list(record.cuda_tokens(right))


def test_python_counts_as_a_syntax_tree() -> None:
    plain = "def f(x):\n    return x + 1\n"
    documented = '"""Module."""\n# why\ndef f(x):\n    """Doc."""\n    return (x +\n            1)  # sum\n'
    assert list(record.python_tokens(plain)) == list(record.python_tokens(documented))
    assert list(record.python_tokens(plain)) != list(record.python_tokens(plain.replace("+ 1", "+ 1.0")))
    assert list(record.python_tokens("x = 'a'")) != list(record.python_tokens("x = b'a'"))


def _copy(destination: Path) -> Path:
    for folder in ("cuda_src", "fa2cupy"):
        shutil.copytree(record.ROOT / folder, destination / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return destination


def test_digest_changes_with_a_source_and_with_its_name(tmp_path: Path) -> None:
    root = _copy(tmp_path)
    before = record.digest(root)
    assert before == record.digest()
    source = root / "fa2cupy" / "problem.py"
    text = source.read_text()
    source.write_text(text + "\n# a remark\n")
    assert record.digest(root) == before
    source.write_text(text + "\nX = 1\n")
    assert record.digest(root) != before
    source.write_text(text)
    (root / "fa2cupy" / "kernels").mkdir(exist_ok=True)
    (root / "fa2cupy" / "kernels" / "new.py").touch()
    assert record.digest(root) != before


def test_verdicts() -> None:
    assert record.verdict({"digest": "a", "status": "passed", "device": "X", "date": "D"}, "a")[0]
    allowed, sentence = record.verdict({"digest": "a", "status": "pending", "reason": "no GPU"}, "a")
    assert allowed and "no GPU" in sentence
    for bad in ({}, {"digest": "b", "status": "passed"}, {"digest": "a", "status": "failed"}, {"digest": "a"}):
        assert not record.verdict(bad, "a")[0]


def test_pending_keeps_the_last_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    record.write({"status": "passed", "device": "NVIDIA X", "digest": "old"}, path)
    assert record.main(["--record", str(path)]) == 1
    for reason in ("the first", "the second"):
        assert record.main(["--record", str(path), "--pending", reason]) == 0
        kept = record.read(path)
        assert (kept["status"], kept["reason"], kept["digest"]) == ("pending", reason, record.digest())
        assert kept["last"] == {"device": "NVIDIA X"}
    assert "PENDING" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        record.main(["--record", str(path), "--pending", " "])


def _report(module: str, outcome: str = "passed", **more: Any) -> Any:
    told = {"when": "call", "duration": 2.0, "keywords": {}, "user_properties": [], **more}
    return SimpleNamespace(nodeid=f"tests/gpu/{module}::test_it[64]", outcome=outcome, **told)


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> conftest.Recorder:
    """Of a run by several processes, in the one that runs no tests."""
    monkeypatch.setattr(conftest, "LEDGER", Ledger())
    monkeypatch.setattr(conftest, "_device", lambda: {"device": "NVIDIA X"})
    options = {"--record": str(tmp_path / "record.json"), "numprocesses": 4}
    config: Any = SimpleNamespace(option=SimpleNamespace(collectonly=False))
    config.getoption = lambda name, default=None: options.get(name, default)
    return conftest.Recorder(config)


def test_a_run_that_is_stopped_tells_how_far_it_came(recorder: conftest.Recorder) -> None:
    compiled = {"kernels": 1200, "seconds": 70.0}
    recorder.pytest_runtest_logreport(_report("test_sinks.py", user_properties=[("compiled", compiled)]))
    recorder.written = 0.0
    recorder.pytest_runtest_logreport(_report("test_sinks.py", "failed"))
    recorder.written = 0.0
    recorder.pytest_runtest_logreport(_report("test_runtime.py", keywords={"alone": 1}, when="setup", duration=99.0))
    seen = record.read(recorder.running)
    assert seen["status"] == "running" and not record.verdict(seen, record.digest())[0]
    assert seen["compiled"] == compiled and seen["tests"] == {"passed": 1, "failed": 1}
    assert seen["modules"] == {"test_sinks.py": 4.0, "test_runtime.py": 0.0}  # to wait takes nobody's time
    assert recorder.path is not None and not recorder.path.exists()


@pytest.mark.parametrize(
    ("modules", "deselected", "code", "status"),
    [("all", 0, 0, "passed"), ("all", 0, 1, "failed"), ("all", 3, 0, "partial"), ("one", 0, 0, "partial")],
)
def test_only_a_whole_run_passes(
    modules: str, deselected: int, code: int, status: str, recorder: conftest.Recorder
) -> None:
    names = sorted(path.name for path in Path(conftest.__file__).parent.glob("test_*.py"))
    for name in names if modules == "all" else names[:1]:
        recorder.pytest_runtest_logreport(_report(name))
    ledger = Ledger()
    ledger.compared, ledger.worst = 7, {"dq": {"float16": {"error_over_limit": 0.5}}}
    for worst in (0.25, 0.5):  # two processes
        ledger.worst["dq"]["float16"]["error_over_limit"] = worst
        ledger.note("errors", {str(worst): 1})
        told = json.dumps([vars(ledger), deselected])
        recorder.pytest_testnodedown(SimpleNamespace(workeroutput={"fa2cupy": told}))
    recorder.pytest_sessionfinish(code)
    assert recorder.path is not None
    written = record.read(recorder.path)
    assert (written["status"], written["digest"], written["compared"]) == (status, record.digest(), 14)
    assert written["worst"] == {"dq": {"float16": {"error_over_limit": 0.5}}}
    assert written["errors"] == {"0.25": 1, "0.5": 1} and not recorder.running.exists()


def test_who_is_alone_in_the_room() -> None:
    entered: list[str] = []

    def enter(name: str, kind: Callable[[], AbstractContextManager[None]]) -> threading.Thread:
        def go() -> None:
            with kind():
                entered.append(name)

        thread = threading.Thread(target=go)
        thread.start()
        return thread

    def waits() -> bool:
        with room._DOOR.open("rb") as door:
            try:
                fcntl.flock(door, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    with room.shared():
        enter("a second", room.shared).join(10)
        first = enter("alone", room.alone)
        end = time.monotonic() + 10
        while not waits() and time.monotonic() < end:
            time.sleep(0.01)
        second = enter("after", room.shared)  # behind the one that waits
        second.join(0.2)
        assert entered == ["a second"]
    first.join(10), second.join(10)
    assert entered == ["a second", "alone", "after"]
