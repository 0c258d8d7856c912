"""CuPy, which arrays of its own need; kernels for other frameworks' arrays do without it where it is missing."""

from __future__ import annotations

from typing import Any

from fa2cupy.errors import MissingDependency
from fa2cupy.jit import driver

__all__ = ["cupy_or_none", "require_cupy"]


def require_cupy() -> Any:
    """The cupy module; MissingDependency that says what to install, or what keeps it from being imported."""
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            raise MissingDependency(f"CuPy cannot be imported ({error}): pip install '{driver.pip_extra()}'") from error
        raise MissingDependency(f"CuPy is not installed: pip install '{driver.pip_extra()}'") from None
    except ImportError as error:
        raise MissingDependency(f"CuPy cannot be imported: pip install '{driver.pip_extra()}'\n{error}") from error
    except OSError as error:  # CuPy makes its cache directory when it is imported
        raise MissingDependency(
            f"CuPy cannot be imported ({error}): set CUPY_CACHE_DIR to a directory that can be written"
        ) from error
    return cupy


def cupy_or_none() -> Any:
    """The cupy module, or None where it cannot be imported, for whatever reason."""
    try:
        return require_cupy()
    except MissingDependency:
        return None
