"""Runs at the start of every Python that has this folder on PYTHONPATH: those below `python -m fa2cupy run`.

It puts fa2cupy in flash_attn's place where FA2CUPY_FLASH_ATTN says so, and hands on to the sitecustomize that it hides.
"""

import importlib.util
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def _install() -> None:
    wanted = os.environ.get("FA2CUPY_FLASH_ATTN", "").strip().lower()
    if wanted not in ("1", "force"):
        return
    # Not `import fa2cupy.install`: that would import NumPy before the script can set its environment.
    spec = importlib.util.spec_from_file_location("fa2cupy.install", _HERE.parent / "install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if importlib.util.find_spec("fa2cupy") is None:
        sys.path.append(str(_HERE.parent.parent))
    module.install_as_flash_attn(force=wanted == "force")


def _hand_on() -> None:
    others = [entry for entry in sys.path if Path(entry).resolve() != _HERE]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


try:
    _install()
finally:
    _hand_on()
