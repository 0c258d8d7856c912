"""The snippets of docs/jax.md run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import jax.numpy as jnp

import fa2cupy
from tests.frameworks.jax_problems import assert_close

PAGE = Path(__file__).parents[2] / "docs" / "jax.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


def test_snippets() -> None:
    assert len(SNIPPETS) == 6
    names: dict[str, object] = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, str(PAGE), "exec"), names)
    q, k, v = (names[name] for name in "qkv")
    assert all(bool(jnp.isfinite(names[f"d{name}"]).all()) for name in "qkv")
    assert_close(names["each"], fa2cupy.attention(q, k, v)[None])
