"""What JAX calls by other names in other versions."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.experimental

__all__ = ["set_mesh", "x64"]


def x64(enabled: bool = True) -> AbstractContextManager[Any]:
    scope = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    return scope(enabled)  # type: ignore[no-any-return]


def set_mesh(mesh: Any) -> AbstractContextManager[Any]:
    scope = jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh
    return scope(mesh)  # type: ignore[no-any-return]
