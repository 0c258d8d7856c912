"""Every example, and every snippet of the pages for users, runs as a user would run it; examples stay short. On NumPy
or CPU arrays where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FRAMEWORKS = {
    "torch_tensors": "torch",
    "jax_arrays": "jax",
    "ring_jax": "jax",
    "gpt_jax": "jax",
    "gpt_torch": "torch",
    "long_context": "torch",
    "decode": "torch",
}
PROOFS = {"decode", "gpt_jax", "gpt_torch", "long_context"}  # whole models, which may be longer
ARGUMENTS = {"ring_jax": ["--seqlen", "256"], **{name: ["--tiny"] for name in PROOFS}}
SNIPPETS = {
    f"{page}-{number}": code
    for page in ("README.md", "docs/torch.md", "docs/usage.md")
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S))
}
# What a snippet leaves behind, if it leaves these names, must be so.
CHECKED = """
if hasattr(globals().get("q"), "requires_grad") and q.requires_grad and "graph" not in globals():
    assert all(float(x.grad.abs().sum()) > 0 for x in (q, k, v))
if "dq" in globals():
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape) and float(abs(dq).sum()) > 0
if "x" in globals():
    assert x.grad.abs().sum() > 0
if "same" in globals():
    assert (out == same).all()
"""


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} >= {"quickstart_cupy", "numpy_cpu", *FRAMEWORKS}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= (220 if path.stem in PROOFS else 60)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    framework = FRAMEWORKS.get(path.stem)
    if framework and importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed; .ci/run installs it and runs this example")
    assert output_of([path, *ARGUMENTS.get(path.stem, [])], tmp_path).strip()


def output_of(arguments: Sequence[str | Path], folder: Path) -> str:
    """What Python prints, in a folder from which fa2cupy is not to be seen."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, *arguments]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) == 15
    for page, imports in (
        ("README.md", {"torch", "jax", "cupy"}),
        ("docs/torch.md", {"torch"}),
        ("docs/usage.md", {"fa2cupy"}),
    ):
        found = {name for key, code in SNIPPETS.items() if key.startswith(page) for name in modules(code)}
        assert imports <= found


def modules(code: str) -> set[str]:
    return set(re.findall(r"^(?:import|from) (\w+)", code, re.M))


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet_runs(name: str, tmp_path: Path) -> None:
    code = SNIPPETS[name]
    for framework in modules(code) & {"torch", "jax"}:
        if importlib.util.find_spec(framework) is None:
            pytest.skip(f"{framework} is not installed; .ci/run installs it and runs this snippet")
    if not has_gpu():
        code = code.replace("import cupy\n", "import numpy as cupy\n")
    output_of(["-c", code + CHECKED], tmp_path)


def has_gpu() -> bool:
    try:
        import cupy

        return bool(cupy.cuda.runtime.getDeviceCount())
    except Exception:  # no CuPy, no driver or no GPU
        return False
