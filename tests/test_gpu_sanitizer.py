"""tests/gpu/sanitizer.py with a made-up compute-sanitizer: any report fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu import sanitizer


@pytest.mark.parametrize(
    ("summary", "code", "outcome"),
    [
        ("ERROR SUMMARY: 0 errors", 0, "clean"),
        ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, "clean"),
        ("ERROR SUMMARY: 1 error", 9, "1 errors"),
        ("ERROR SUMMARY: 12 errors", 0, "12 errors"),
        ("RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", 0, "1 errors"),
        ("ERROR SUMMARY: 0 errors", 1, "did not finish"),  # a wrong result
        ("Target application terminated", 0, "did not finish"),
    ],
)
def test_any_report_fails(
    summary: str,
    code: int,
    outcome: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '========= {summary}'\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: str(tool))
    monkeypatch.setattr(sanitizer, "without_a_tool", lambda end: 0.0)
    monkeypatch.setattr(sanitizer, "SHARES", dict.fromkeys(sanitizer.TOOLS, 1))
    assert sanitizer.main([]) == (0 if outcome == "clean" else 1)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "all: " + ", ".join(f"{name} {outcome}" for name in sanitizer.TOOLS)
    lines = [line for line in printed if line.startswith(sanitizer.TOOLS)]
    assert [line.partition(" (")[0] for line in lines] == [f"{name}: {outcome}" for name in sanitizer.TOOLS]


def test_every_share_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of two reports errors, one of three hangs."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        "#!/bin/sh\necho '   2.5 s  dense(64)'\n"
        "case \"$*\" in *1/2) echo '== ERROR SUMMARY: 3 errors'; exit 9;; *2/3) sleep 60;; esac\n"
        "echo '== ERROR SUMMARY: 0 errors'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: str(tool))
    monkeypatch.setattr(sanitizer, "without_a_tool", lambda end: 0.0)
    monkeypatch.setattr(sanitizer, "SHARES", {"memcheck": 2, "racecheck": 3, "synccheck": 1})
    assert sanitizer.main(["--tools", "memcheck,racecheck,synccheck", "--timeout", "2"]) == 1
    printed = capsys.readouterr().out
    assert printed.endswith("all: memcheck 3 errors, racecheck did not finish, synccheck clean\n")
    assert "the slowest: 2.5 s  dense(64)" in printed and "stopped: out of time" in printed
