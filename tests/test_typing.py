"""What mypy says of the public functions: nothing of tests/typing/passes.py, each line of tests/typing/fails.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = Path("tests") / "typing"


def mypy(*paths: Path) -> str:
    """Its output, with the settings and the cache of `make lint`."""
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--no-pretty", *map(str, paths)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode in (0, 1), result.stderr
    return result.stdout


def test_type_checkers_accept_what_is_right_and_refuse_what_is_wrong() -> None:
    lines = (ROOT / FOLDER / "fails.py").read_text(encoding="utf-8").splitlines()
    expected = {number for number, line in enumerate(lines, 1) if "  # " in line}
    assert len(expected) == 10
    output = mypy(FOLDER / "passes.py", FOLDER / "fails.py")
    found = re.findall(r"^([^:]+):(\d+):(?:\d+:)? error: ", output, re.M)
    assert {int(line) for _, line in found} == expected, output
    assert {Path(path).name for path, _ in found} == {"fails.py"}, output


def test_what_runs_is_checked_too() -> None:
    """attention.pyi hides attention.py from mypy, unless it is asked for by name."""
    assert mypy(Path("fa2cupy") / "attention.py") == ""
