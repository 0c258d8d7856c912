"""Every example runs as a user would run it, and stays short. On NumPy or CPU arrays where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
FRAMEWORKS = {"torch_tensors": "torch", "jax_arrays": "jax", "ring_jax": "jax", "gpt_jax": "jax", "gpt_torch": "torch"}
ARGUMENTS = {"ring_jax": ["--seqlen", "256"], "gpt_jax": ["--tiny"], "gpt_torch": ["--tiny"]}
PROOFS = {"gpt_jax", "gpt_torch"}  # whole trainings, which may be longer


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} >= {"quickstart_cupy", "numpy_cpu", *FRAMEWORKS}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= (200 if path.stem in PROOFS else 60)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    framework = FRAMEWORKS.get(path.stem)
    if framework and importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed; .ci/run installs it and runs this example")
    root = str(path.parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, path, *ARGUMENTS.get(path.stem, [])]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
