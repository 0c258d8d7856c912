"""Importing fa2cupy is cheap and pulls in no array library; the CPU path needs none either."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LIBRARIES = ("cupy", "torch", "jax", "jaxlib", "ml_dtypes", "cuda")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("module", ["fa2cupy", "fa2cupy.calls", "fa2cupy.first_call", "fa2cupy.host", "fa2cupy.jit"])
def test_import_takes_no_array_library(module: str) -> None:
    assert run(f"import sys, {module}; print([m for m in {LIBRARIES} if m in sys.modules])") == "[]"


def test_numpy_arrays_take_no_array_library_and_no_driver() -> None:
    code = """
import sys
import ctypes
real = ctypes.CDLL
def refuse(name, *args, **kwargs):
    assert not (name and "cuda" in str(name)), name
    return real(name, *args, **kwargs)
ctypes.CDLL = refuse
for name in {libraries}:
    sys.modules[name] = None  # an import of it fails
import numpy as np, fa2cupy
q = np.ones((1, 3, 2, 8), np.float16)
out, lse = fa2cupy.attention(q, q, q, causal=True, return_lse=True)
fa2cupy.attention_backward(out, q, q, q, out, lse, causal=True)
bits = fa2cupy.attention(*[np.full((1, 3, 2, 8), 0x3F80, np.uint16)] * 3, dtype="bfloat16")
print(out.dtype, bits.dtype, set(bits.ravel().tolist()) == {{0x3F80}})
"""
    assert run(code.format(libraries=LIBRARIES)) == "float16 uint16 True"


def test_doors_are_offered_when_they_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fa2cupy.torch` after `import fa2cupy` alone: imported when it is asked for, unknown where it does not exist."""
    import fa2cupy

    missing = [door for door in fa2cupy._DOORS if not (Path(fa2cupy.__file__).parent / door).exists()]
    monkeypatch.setattr(fa2cupy, "_DOORS", (*fa2cupy._DOORS, "door_one", "door_two", "door_three"))
    monkeypatch.setattr(fa2cupy, "__path__", [*fa2cupy.__path__, str(tmp_path)])
    (tmp_path / "door_one.py").write_text("opened = True\n")
    (tmp_path / "door_three.py").write_text("import no_such_framework\n")
    assert {"door_one", "door_three", "attention", "__version__"} <= set(dir(fa2cupy))
    assert not {"door_two", *missing} & set(dir(fa2cupy))
    assert "fa2cupy.door_one" not in sys.modules
    assert fa2cupy.door_one.opened  # type: ignore[attr-defined]
    for name in ("door_two", "no_door", *missing):
        with pytest.raises(AttributeError, match=f"module 'fa2cupy' has no attribute '{name}'"):
            getattr(fa2cupy, name)
    with pytest.raises(ModuleNotFoundError, match="no_such_framework"):
        fa2cupy.door_three  # type: ignore[attr-defined]  # noqa: B018
    del sys.modules["fa2cupy.door_one"], fa2cupy.door_one  # type: ignore[attr-defined]


def test_public_names() -> None:
    import fa2cupy
    from fa2cupy.keywords import FUNCTIONS

    for name in fa2cupy.__all__:
        assert getattr(fa2cupy, name) is not None
    for name in FUNCTIONS:
        function = getattr(fa2cupy, name)
        first, second = (function.__doc__ or "").splitlines()[:2]
        assert 'Layout "bshd"' in first
        assert "bottom-right" in second
