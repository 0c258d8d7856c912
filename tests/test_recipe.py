"""The recipe for a keyword, followed in a copy: `lift`, which is added to every score, touches the recipe's files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

_OBJECTION = '''        """What speaks against computing it with a row of a tile table, or the empty string."""
        return ""
'''
_ROW = """    Keyword("lift", "float | None", None, _ALL, "added to every score", "0.2", (None, 0.0), check_scale),
"""
_SPEC = '''

@dataclass(frozen=True, slots=True)
class Lift(Spec):
    """A number that is added to every score."""

    value: float

    def defines(self) -> dict[str, int | str]:
        return {"FA2_LIFT": 1}

    def objection(self, row: Row) -> str:
        return "lift is not in the wgmma kernels" if row.family == "sm90" else ""
'''
_INTO_THE_PROBLEM = '    "lift": lambda problem, value: replace(problem, lift=Lift(value)),\n'

# File: what stands there, and what stands there instead, everywhere.
EDITS: dict[str, list[tuple[str, str]]] = {
    "fa2cupy/keywords.py": [('    Keyword(\n        "softcap",', _ROW + '    Keyword(\n        "softcap",')],
    "fa2cupy/attention.pyi": [
        (
            "softmax_scale: float | None = None,\n",
            "softmax_scale: float | None = None,\n    lift: float | None = None,\n",
        ),
    ],
    "fa2cupy/attention.py": [
        (
            '        layout: "bshd", or',
            '        lift: a number that is added to every score.\n        layout: "bshd", or',
        ),
        ("softmax_scale, softcap, alibi", "softmax_scale, lift, softcap, alibi"),
    ],
    "fa2cupy/cpu.py": [
        ("    softmax_scale: float,\n", "    softmax_scale: float,\n    lift: float = 0.0,\n"),
        ("    out[:, :first] = 0\n", "    L += lift\n    out[:, :first] = 0\n"),
        ("_split_lse(L, tiles", "_split_lse(L - lift, tiles"),
    ],
    "fa2cupy/spec.py": [
        ("__all__ = [", '__all__ = ["Lift", '),
        (_OBJECTION, _OBJECTION + _SPEC),
    ],
    "fa2cupy/problem.py": [
        ("from fa2cupy.spec import (\n", "from fa2cupy.spec import (\n    Lift,\n"),
        ("    aligned: bool\n", "    aligned: bool\n    lift: Lift | None = None\n"),
        ("AttentionProblem]] = {\n", "AttentionProblem]] = {\n" + _INTO_THE_PROBLEM),
    ],
}
GENERATED = {"docs/usage.md"}
FOLDERS = ("fa2cupy", "cuda_src", "tests", "tools", "docs")

# Run in the copy.
CODE = """
import inspect
import numpy as np
import fa2cupy
from fa2cupy.kernels import plan_backward, plan_forward
from fa2cupy.problem import SPECS
from tests.plan_cases import H200, backward_problem, problem

assert "lift: 'float | None' = None" in str(inspect.signature(fa2cupy.attention))
rng = np.random.default_rng(1)
q, k, v, dout = rng.standard_normal((4, 2, 5, 3, 8))
plain, lse = fa2cupy.attention(q, k, v, causal=True, return_lse=True)
out, lifted = fa2cupy.attention(q, k, v, causal=True, return_lse=True, lift=2)
np.testing.assert_allclose(out, plain, rtol=1e-12)
np.testing.assert_allclose(lifted, lse + 2, rtol=1e-12)
expected = fa2cupy.attention_backward(dout, q, k, v, plain, lse, causal=True)
for given, gradients in (({}, [x * np.exp(-2.0) for x in expected]), ({"lift": 2.0}, expected)):
    # P = exp(s - lse): the backward without the keyword takes e^2 times too little.
    found = fa2cupy.attention_backward(dout, q, k, v, out, lifted, causal=True, **given)
    np.testing.assert_allclose(found[2], gradients[2], rtol=1e-10)
for value in (None, 0.0):
    assert (fa2cupy.attention(q, k, v, causal=True, lift=value) == plain).all()
for function in (fa2cupy.attention, fa2cupy.backward_workspace_bytes):
    try:
        function(q, k, v, lift="high")
    except TypeError as error:
        assert "lift='high' is a str" in str(error)
    else:
        raise AssertionError

for plan_of, dense in (
    (lambda p: plan_forward(p, H200), problem()),
    (lambda p: plan_backward(p, H200, False), backward_problem(300, 300, 64, "bfloat16", False)),
):
    assert all("FA2_LIFT" not in launch.defines for launch in plan_of(dense).launches)
    assert any(launch.arch == "sm_90a" for launch in plan_of(dense).launches)
    plan = plan_of(SPECS["lift"](dense, 2.0))
    assert any(launch.defines.get("FA2_LIFT") == 1 for launch in plan.launches)
    assert not any(launch.arch == "sm_90a" for launch in plan.launches)
    assert "lift is not in the wgmma kernels" in str(plan) and "lift=Lift(value=2.0)" in str(plan)
print("followed")
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with the recipe followed."""
    target = tmp_path_factory.mktemp("recipe")
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", *(("host", "frameworks") if folder == "tests" else ()))
        shutil.copytree(ROOT / folder, target / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", target)
    for name, edits in EDITS.items():
        text = (target / name).read_text(encoding="utf-8")
        for old, new in edits:
            assert old in text, f"{name}: {old!r} is not there any more"
            text = text.replace(old, new)
        (target / name).write_text(text, encoding="utf-8")
    run(target, "tools/docs.py")
    return target


def run(folder: Path, *arguments: str) -> str:
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_keyword_works(copy: Path) -> None:
    assert run(copy, "-c", CODE) == "followed\n"


def test_the_table_and_what_comes_from_it_agree(copy: Path) -> None:
    """tests/test_keywords.py of the copy: signatures, types, docstrings."""
    run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_keywords.py", "-k", "what_ or docstrings")
    assert "| `lift` | `float \\| None` | forward, backward, bytes |" in (copy / "docs" / "usage.md").read_text()


def test_the_files_are_those_of_the_recipe(copy: Path) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    section = page.partition("\n## A keyword\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"^\d+\. \[`([^`]+)`\]", section, re.M))
    changed = {
        path.relative_to(copy).as_posix()
        for folder in FOLDERS
        for path in (copy / folder).rglob("*")
        if path.is_file()
        and path.suffix != ".pyc"
        and path.read_bytes() != (ROOT / path.relative_to(copy)).read_bytes()
    }
    assert changed == named == EDITS.keys() | GENERATED
