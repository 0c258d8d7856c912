"""The snippets of docs/torch.md run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "torch.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) == 2


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet(snippet: str) -> None:
    names: dict[str, object] = {}
    exec(compile(snippet, str(PAGE), "exec"), names)
    if "q" in names and getattr(names["q"], "requires_grad", False):
        assert all(names[name].grad is not None for name in "qkv")  # type: ignore[attr-defined]
    else:
        assert (names["out"] == names["same"]).all()  # type: ignore[attr-defined]
