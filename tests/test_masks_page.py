"""docs/masks.md: its code runs, in order, and draws its pictures."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "masks.md"
# A snippet, and the picture behind it, if there is one.
SNIPPET = re.compile(r"```python\n(.*?)```\n(?:\n```\n(.*?)```\n)?", re.DOTALL)


def test_pictures_are_what_the_code_draws() -> None:
    names: dict[str, Any] = {}
    pictures = 0
    for code, picture in SNIPPET.findall(PAGE.read_text(encoding="utf-8")):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        if picture:
            pictures += 1
            assert picture.rstrip("\n") == (printed.getvalue().rstrip("\n") or names["mask"].plot()), code
    assert pictures >= 15
    assert names["out"].shape == names["q"].shape == names["dq"].shape
