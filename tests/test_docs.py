"""docs/algorithm.md names functions, variables and comment lines of the code: all of them are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
SOURCES = [*ROOT.glob("cuda_src/**/*.cu*"), *ROOT.glob("fa2cupy/**/*.py"), ROOT / "tests" / "reference.py"]
PUBLIC = {"*", "causal=True", "deterministic=True", "red.add"}  # the paper's sign, arguments, an instruction


@pytest.fixture(scope="module")
def code():
    return "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGE) if not link.startswith("http")]
    assert len(links) >= 8
    assert [link for link in links if not (ROOT / "docs" / link).is_file()] == []


def test_everything_named_is_in_the_code(code):
    names = set(re.findall(r"`([^`\n]+)`", PAGE)) - PUBLIC
    assert len(names) > 60
    files = {path.name for path in SOURCES}

    def found(name):
        if name in code or name in files or (ROOT / name).is_file():
            return True
        owner, _, member = name.partition("::")
        return bool(member) and f"struct {owner}" in code and re.search(rf"\b{member}\b", code) is not None

    assert sorted(name for name in names if not found(name)) == []
